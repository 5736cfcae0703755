"""Glob patterns over the paths of parameters."""

import pytest

from functional_optimodules.wire.paths import matching

PATHS = (
    "b",
    "w",
    "head/b",
    "head/w",
    "block/0/norm1/scale",
    "block/0/conv/w",
    "block/10/norm1/scale",
    "norm/scale",
    "x.y/w",
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("w", {"w"}),
        ("*", {"b", "w"}),
        ("?", {"b", "w"}),
        ("head/*", {"head/b", "head/w"}),
        ("*/w", {"head/w", "x.y/w"}),
        ("**/w", {"w", "head/w", "block/0/conv/w", "x.y/w"}),
        ("head/**", {"head/b", "head/w"}),
        ("block/**", {"block/0/norm1/scale", "block/0/conv/w", "block/10/norm1/scale"}),
        ("block/*/norm?/scale", {"block/0/norm1/scale", "block/10/norm1/scale"}),
        ("block/?/**", {"block/0/norm1/scale", "block/0/conv/w"}),
        ("block/**/w", {"block/0/conv/w"}),
        ("block/**/0/**/w", {"block/0/conv/w"}),
        ("**/norm*/*", {"block/0/norm1/scale", "block/10/norm1/scale", "norm/scale"}),
        ("**/norm*/**", {"block/0/norm1/scale", "block/10/norm1/scale", "norm/scale"}),
        ("**", set(PATHS)),
        ("**/**", set(PATHS)),
        ("[bw]", {"b", "w"}),
        ("[a-c]", {"b"}),
        ("[!b]", {"w"}),
        ("head/[!b]", {"head/w"}),
        ("block/[0-9]/conv/w", {"block/0/conv/w"}),
        ("x.y/w", {"x.y/w"}),
        ("x?y/w", {"x.y/w"}),
        ("**/scale", {"block/0/norm1/scale", "block/10/norm1/scale", "norm/scale"}),
        ("head/w*", {"head/w"}),
        ("w**", {"w"}),
    ],
)
def test_what_a_pattern_matches(pattern: str, expected: set[str]) -> None:
    assert matching([pattern], PATHS, "here") == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "head",
        "head/",
        "/w",
        "xxy/w",
        "HEAD/w",
        "block/*",
        "*/norm1/scale",
        "head//w",
        "(w)",
        "w|b",
        "w+",
        "^w",
        "[^z-a",
        "head[!b]w",
        ".",
    ],
)
def test_what_matches_nothing_is_refused_by_its_name(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"here: the pattern .* matches no path: ") as caught:
        matching([pattern], PATHS, "here")
    assert repr(pattern) in str(caught.value)


def test_a_near_path_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'head/w'"):
        matching(["heda/w"], PATHS, "here")


def test_each_of_several_patterns_must_match() -> None:
    assert matching(["w", "head/*", "**/w"], PATHS, "here") == {"w", "head/b", "head/w", "block/0/conv/w", "x.y/w"}
    assert matching([], PATHS, "here") == frozenset()
    with pytest.raises(ValueError, match="pattern 'nothing'"):
        matching(["w", "nothing"], PATHS, "here")


@pytest.mark.parametrize(("pattern", "paths"), [(r"[\d]", ("1", "2")), (r"[\w]", ("a",)), ("[^a]", ("b",))])
def test_brackets_hold_characters_and_no_regular_expressions(pattern: str, paths: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="matches no path"):
        matching([pattern], paths, "here")


@pytest.mark.parametrize("pattern", ["[z-a]", "[b-a]/w", "[[:alpha:]]"])
def test_a_pattern_that_cannot_be_read_is_refused_by_its_name(pattern: str) -> None:
    with pytest.raises(ValueError, match="here: the pattern") as caught:
        matching([pattern], PATHS, "here")
    assert repr(pattern) in str(caught.value)


def test_characters_that_mean_something_may_stand_in_brackets() -> None:
    paths = ("a[0]/w", "a*/w", "a?/w", "b/w")
    assert matching(["a[[]0]/w"], paths, "here") == {"a[0]/w"}
    assert matching(["a[*]/w"], paths, "here") == {"a*/w"}
    assert matching(["a[?]/w"], paths, "here") == {"a?/w"}


def test_a_long_pattern_over_long_paths_is_soon_matched_or_refused() -> None:
    path = "/".join(["layer"] * 20)
    assert matching(["**/layer/**/layer"], [path], "here") == {path}
    with pytest.raises(ValueError, match="matches no path"):
        matching(["**/**/**/other"], [path], "here")
