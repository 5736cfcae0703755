"""How deep values from outside may nest, and how they are quoted."""

from typing import Any

import pytest

from functional_optimodules.config.outside import MOST_LEVELS, quote, require_shallow


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_a_value_may_nest_so_deep_and_no_deeper() -> None:
    require_shallow(nested(MOST_LEVELS), "it")
    require_shallow({"a": ({"b": [1]}, "text")}, "it")
    with pytest.raises(ValueError, match="it nests more than 100 levels deep"):
        require_shallow(nested(MOST_LEVELS + 1), "it")


def test_a_value_that_contains_itself_twice_is_refused_in_no_time() -> None:
    loop: list[Any] = []
    loop += [loop, loop]
    with pytest.raises(ValueError, match="it nests more than"):
        require_shallow(loop, "it")


@pytest.mark.parametrize("value", ["text", 3, 0.5, None, True, [1, "a"], {"a": {"b": (1, 2)}}, 10**50, float("nan")])
def test_small_values_are_quoted_as_python_writes_them(value: Any) -> None:
    assert quote(value) == repr(value)


LARGE = {
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "lists": [["x" * 10**4] * 100] * 100,
    "mapping": {str(i): i for i in range(10**4)},
    "integer": 10**5000,
    "negative": -(10**5000),
    "deep": nested(5000),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_values_are_quoted_in_part(kind: str) -> None:
    assert 0 < len(quote(LARGE[kind])) <= 1000


def test_a_value_whose_own_words_fail_is_quoted_all_the_same() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    assert "Mute" in quote(Mute())
    assert "Mute" in quote([Mute()])
