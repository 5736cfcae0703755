"""Hyper-parameters: what a field of a plug-in accepts, and how it is written as JSON.

The annotation of a field says its type, `hyperparameter` its range. From these
two alone come the checks, the configuration's JSON form and its reading, once
for every plug-in.
"""

import collections.abc
import dataclasses
import difflib
import json
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

import jax
import numpy as np

_MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers, written as in mathematics: `"[0, 1)"`, `"(0, inf)"`."""

    text: str

    def __post_init__(self) -> None:
        text = self.text.strip()
        try:
            low, high = (float(bound) for bound in text[1:-1].split(","))
        except ValueError:
            low = high = math.nan
        if text[:1] not in tuple("[(") or text[-1:] not in tuple("])") or not low <= high:
            raise ValueError(f"expected an interval such as '[0, 1)', not {self.text!r}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lower and the upper bound."""
        low, high = self.text.strip()[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self.bounds
        text = self.text.strip()
        above = low <= value if text[0] == "[" else low < value
        below = value <= high if text[-1] == "]" else value < high
        return above and below


def hyperparameter(*, default: Any = _MISSING, within: str | None = None) -> Any:
    """Declare a field of a plug-in, with its range.

    Args:
      default: the default value; without one, the field is required.
      within: the range of a number as an interval, such as `"[0, 1)"`.

    Returns:
      A dataclass field. A value out of the range is a `ValueError` when the
      plug-in is built; values that are being traced are not checked.
    """
    metadata = {} if within is None else {"within": Interval(within)}
    if default is _MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class FrozenConfig(Mapping[str, Any]):
    """A read-only, hashable mapping of JSON values; equal if its JSON text is."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._text = json.dumps(dict(values), sort_keys=True, allow_nan=False)
        self._values: dict[str, Any] = json.loads(self._text)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenConfig):  # the text tells 1 from true
            return self._text == other._text
        return self._values == other

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return repr(self._values)


def nearest(name: object, known: typing.Iterable[str]) -> str:
    """Say which of the known names are near the given one, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return f"there is {', '.join(repr(known) for known in names) or 'none'}"


def require_keys(found: Mapping[str, Any], expected: typing.Collection[str], what: str, kind: str = "key") -> None:
    """Raise a `KeyError` that names a missing or an unknown key of a mapping."""
    for key in expected:
        if key not in found:
            raise KeyError(f"{what} lacks the {kind} {key!r}")
    for key in found:
        if key not in expected:
            raise KeyError(f"{what} has an unknown {kind} {key!r}: {nearest(key, expected)}")


def describe(annotation: Any) -> str:
    """Write an annotation as a reader would: `int | None`, `tuple[Regularizer, ...]`."""
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(describe(member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        first, *others = typing.get_args(annotation)
        return f"list of {describe(first)}" if others == [...] else f"list of {len(others) + 1} values"
    if typing.get_origin(annotation) is collections.abc.Callable:
        return "function of the step"
    if hasattr(annotation, "from_specs"):
        return f"{annotation.__name__} (an instance, a name or a (name, config) pair)"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


class Mismatch(Exception):
    """A value is not of the annotated type."""


def coerce(value: Any, annotation: Any) -> Any:
    """Return the value as its annotation wants it.

    Integers become floats where floats are asked for, lists tuples, mappings
    read-only mappings, and names or `(name, config)` pairs plug-ins. Numbers
    given as zero-dimensional arrays become Python numbers; traced ones stay.

    Raises:
      Mismatch: if the value is not of the annotated type.
    """
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if annotation in (None, type(None)):
        if value is None:
            return None
    elif origin in (Union, types.UnionType):
        return _coerce_union(value, typing.get_args(annotation))
    elif origin is Literal:
        if value in typing.get_args(annotation) and not isinstance(value, np.ndarray):
            return value
    elif annotation in (bool, int, float):
        return _coerce_number(value, annotation)
    elif annotation is str:
        if isinstance(value, str):
            return value
    elif origin is tuple:
        members = typing.get_args(annotation)
        if isinstance(value, list | tuple) and members[1:] == (Ellipsis,):
            return tuple(coerce(item, members[0]) for item in value)
        if isinstance(value, list | tuple) and len(value) == len(members):
            return tuple(map(coerce, value, members))
    elif annotation is Mapping or origin is collections.abc.Mapping:
        if isinstance(value, Mapping):
            try:
                return FrozenConfig(value)
            except (TypeError, ValueError) as error:
                raise Mismatch(f"not made of JSON values ({error})") from None
    elif origin is collections.abc.Callable:
        if callable(value) and not isinstance(value, type):
            return value
    elif hasattr(annotation, "from_specs"):
        return _coerce_plugin(value, annotation)
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise Mismatch


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    reasons: list[Any] = []
    for member in members:
        try:
            return coerce(value, member)
        except Mismatch as mismatch:
            reasons += mismatch.args
    raise Mismatch(*reasons[:1])


def _coerce_number(value: Any, kind: type) -> Any:
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if kind is float and isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    accepted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        try:
            return kind(value)
        except OverflowError as error:
            raise Mismatch(str(error)) from None
    raise Mismatch


def _coerce_plugin(value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value.bare()
    if isinstance(value, str):
        return kind.from_specs(value)
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):
        return kind.from_specs(*value)
    raise Mismatch


def to_json(value: Any) -> Any:
    """Write the value of a field as JSON: the inverse of `coerce`.

    Raises:
      TypeError: if the value is a function or is being traced.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, FrozenConfig):
        return json.loads(json.dumps(dict(value)))
    if hasattr(value, "get_config"):
        return [value.name, value.get_config()]
    raise TypeError(f"{value!r} cannot be written in a configuration")
