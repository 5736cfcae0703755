"""Functions of a library by name, and the JSON values that their signatures take."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest

from functional_optimodules.config.calls import argument, find, require_names, require_small


def function(
    number: float | jax.Array | np.ndarray,
    count: int,
    flag: bool,
    text: str,
    mode: Literal["fast", "slow"],
    pair: tuple[float, float],
    steps: Sequence[int],
    axis: int | tuple[int, ...] | None,
    call: Callable[[Any], Any],
    bare=0.5,
    other: Callable[[Any], Any] | None = None,
): ...


def read(name, value):
    return argument(inspect.signature(function).parameters[name], value, "lib.function")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("number", 0.5, 0.5),
        ("number", 2, 2),
        ("count", 2, 2),
        ("flag", True, True),
        ("text", "x", "x"),
        ("mode", "slow", "slow"),
        ("pair", [0.5, 1], (0.5, 1)),
        ("steps", [1, 2, 3], (1, 2, 3)),
        ("axis", [0, 1], (0, 1)),
        ("axis", None, None),
        ("bare", 2.0, 2.0),
        ("other", None, None),
    ],
)
def test_a_value_is_read_as_the_annotation_or_the_default_says(name, value, expected):
    found = read(name, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("number", True, "a number"),
        ("number", "0.5", "a number"),
        ("number", None, "a number"),
        ("number", [0.5], "a number"),
        ("count", 2.0, "an integer"),
        ("flag", 1, "a boolean"),
        ("text", 1, "a string"),
        ("mode", "quick", "one of 'fast', 'slow'"),
        ("pair", [0.5], "a list of 2 values"),
        ("steps", ["1"], "a list of int"),
        ("axis", "0", "an integer or a list of int or null"),
        ("call", 1, "a function or an object, which JSON does not have,"),
        ("bare", "x", "a number"),
        ("other", "x", "null"),
    ],
)
def test_another_value_is_refused_by_function_argument_and_what_was_expected(name, value, expected):
    message = re.escape(f"lib.function takes {expected} for {name!r}, not {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(name, value)


@pytest.mark.parametrize("name", ["decoder.scanner.make_scanner", "detect_encoding.startswith", "JSONDecodeError.x"])
def test_what_a_library_only_imports_is_out_of_reach(name):
    with pytest.raises(ValueError, match="Me: json"):
        find(json, f"{name}.os", "Me", "thing")
    assert find(json, "dumps", "Me", "thing") is json.dumps
    assert find(json, "decoder.JSONDecoder", "Me", "thing") is json.JSONDecoder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dump_s", "Me: json has no public 'dump_s': did you mean .*'dumps'"),
        ("_default_decoder", "Me: json has no public '_default_decoder'"),
        ("", "Me: json has no public '': nothing there is named nearly so"),
        ("codecs", "Me: json.codecs makes no thing: it is <module 'codecs'"),
        ("decoder", "Me: json.decoder makes no thing: it is <module"),
    ],
)
def test_what_is_no_public_function_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        find(json, name, "Me", "thing")


def test_names_that_are_no_arguments_and_integers_above_the_bound_are_refused_wherever_they_are():
    with pytest.raises(ValueError, match=r"lib\.function takes no argument 'coun': did you mean 'count'"):
        require_names(["coun"], ["count", "flag"], "lib.function")
    require_small({"a": [[1, 2**32]]}, "steps", "lib.function")
    for value in (2**33, [1, [-(2**33)]], {"a": [{"b": 2**33}]}):
        with pytest.raises(ValueError, match=r"lib\.function takes at most 4294967296 for 'steps', not -?8589934592"):
            require_small(value, "steps", "lib.function")
