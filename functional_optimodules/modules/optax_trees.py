"""What is chosen for each parameter, by glob patterns over paths or by key: masks, labels and axes for optax.

Each is read from JSON as a function that gives, for a tree of parameters in any
container, the same tree of what is chosen: what optax takes for a mask.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from functional_optimodules.config.calls import refusal, require_names
from functional_optimodules.config.outside import quote
from functional_optimodules.types import Json, PyTree
from functional_optimodules.wire.paths import keystr, leaf_paths, matching

Choice = Callable[[PyTree], PyTree]


def is_pair(value: Json, *kinds: type) -> bool:
    """Whether a JSON value is a list of two values of these types."""
    return isinstance(value, list) and len(value) == 2 and all(map(isinstance, value, kinds))


def mask(value: Json, key: str, what: str) -> Choice:
    """Return a mask that was written as patterns or by key.

    Raises:
      ValueError: if it is neither.
    """
    if value and isinstance(value, Mapping):
        return _by_key(value, f"{what} at {key!r}", lambda entry: isinstance(entry, bool), "a boolean")
    return _by_pattern([(pattern, True) for pattern in _patterns(value, key, what)], f"{what} at {key!r}", False)


def labels(value: Json, key: str, what: str, transforms: Json) -> Choice:
    """Return labels that were written as pairs of a pattern and a label, or by key.

    Raises:
      ValueError: if it is neither, or a label is none of `transforms`.
    """
    known = list(transforms) if isinstance(transforms, Mapping) else None  # which is refused in its turn
    is_label: Callable[[Json], bool] = lambda entry: known is None or entry in known  # noqa: E731
    expected = f"one of the labels {quote(known)}"
    if value and isinstance(value, Mapping):
        return _by_key(value, f"{what} at {key!r}", is_label, expected)
    if not value or not isinstance(value, list) or not all(is_pair(each, str, str) for each in value):
        raise refusal(
            value, key, what, "a list of pairs of a pattern and a label, or nested mappings of labels by key,"
        )
    for pattern, label in value:
        _patterns(pattern, key, what)
        if not is_label(label):
            raise refusal(label, key, what, expected)
    return _by_pattern(value, f"{what} at {key!r}")


def axes_of(value: Json, key: str, what: str, axes: Any) -> Choice:
    """Return the axes that make a matrix of a parameter, where a pattern matches it, and `None` for others.

    Args:
      value: patterns, of parameters with the usual axes, or pairs of a pattern and the fields.
      key: the argument.
      what: how errors name who takes it.
      axes: optax's class of them.

    Raises:
      ValueError: if it is neither, or names another field.
    """
    pairs = value if isinstance(value, list) and value and all(is_pair(each, str, Mapping) for each in value) else None
    chosen = []
    for pattern, fields in pairs or [(pattern, {}) for pattern in _patterns(value, key, what)]:
        _patterns(pattern, key, what)
        require_names(fields, axes._fields, f"{what} at {key!r}")
        for each in fields.values():
            if not all(type(axis) is int for axis in (each if isinstance(each, list) else [each])):
                raise refusal(fields, key, what, "integers and lists of integers")
        chosen.append((pattern, axes(**{name: _tupled(each) for name, each in fields.items()})))
    return _by_pattern(chosen, f"{what} at {key!r}", None)


def _tupled(value: Json) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _patterns(value: Json, key: str, what: str) -> list[str]:
    """Return glob patterns, checked but for whether they match."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not patterns or not all(isinstance(each, str) for each in patterns):
        raise refusal(value, key, what, "a pattern over paths, a list of them, or nested mappings by key,")
    for pattern in patterns:
        try:
            matching([pattern], [], f"{what} at {key!r}")
        except ValueError as error:
            if "matches no path" not in str(error):
                raise
    return patterns


def _by_pattern(pairs: Sequence[tuple[str, Any]], what: str, *otherwise: Any) -> Choice:
    """Return a choice for each parameter: that of the first pattern that matches its path."""

    def call(tree: PyTree) -> PyTree:
        paths, chosen = leaf_paths(tree), dict[str, Any]()
        for pattern, value in pairs:
            for path in matching([pattern], paths, what):
                chosen.setdefault(path, value)
        for path in paths:
            if path not in chosen and not otherwise:
                raise ValueError(f"{what}: no pattern matches the parameter {path!r}: end with '**' for all others")
        return jax.tree.unflatten(jax.tree.structure(tree), [chosen.get(path, *otherwise) for path in paths])

    return call


def _by_key(tree: Json, what: str, fits: Callable[[Json], bool], expected: str) -> Choice:
    """Return a choice for each parameter that was written as nested dicts by key.

    Raises:
      ValueError: if a value does not fit; the choice itself raises it for parameters that
        it does not cover, and for what it names and is not there.
    """
    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, Mapping))
    entries = {keystr(path): node for path, node in nodes}
    for path, node in entries.items():
        if not fits(node):
            raise ValueError(f"{what} should be {expected} at {quote(path)}, not {quote(node)}")

    def call(tree: PyTree) -> PyTree:
        chosen = []
        for path in leaf_paths(tree):
            entry = next((entry for entry in entries if f"{path}/".startswith(f"{entry}/")), None)
            if entry is None:
                raise ValueError(f"{what} says nothing of the parameter {path!r}: it names {quote(sorted(entries))}")
            chosen.append(entry)
        if unused := sorted(entries.keys() - set(chosen)):
            raise ValueError(f"{what} names {quote(unused[0])}, and there are the parameters {quote(leaf_paths(tree))}")
        return jax.tree.unflatten(jax.tree.structure(tree), [entries[entry] for entry in chosen])

    return call
