"""The one reader of configurations: what a field accepts, how it is read from JSON and written.

The annotation of a field says its type, `hyperparameter` its range. From these
two alone come the checks, the JSON form and its reading, for plug-ins, for the
tables of an experiment and for any other frozen dataclass.
"""

import abc
import dataclasses
import difflib
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Union

import jax
import numpy as np

from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.types import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers, written as in mathematics: `"[0, 1)"`, `"(0, inf)"`."""

    text: str

    def __post_init__(self) -> None:
        try:
            low, high = self.bounds
        except ValueError:
            low = high = math.nan
        if self.text[:1] not in tuple("[(") or self.text[-1:] not in tuple("])") or not low <= high:
            raise ValueError(f"expected an interval such as '[0, 1)', not {self.text!r}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lower and the upper bound."""
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self.bounds
        return low < value < high or (value == low and self.text[0] == "[") or (value == high and self.text[-1] == "]")


def hyperparameter(
    *, default: Any = dataclasses.MISSING, within: str | None = None, omit: bool = False, static: bool = False
) -> Any:
    """Declare a field with a range.

    Args:
      default: the default value; without one, the field is required.
      within: the range of a number as an interval, such as `"[0, 1)"`.
      omit: whether a configuration leaves the field out while it has its default.
      static: whether programs are compiled for its value, as for one that says how large an array is.

    Returns:
      A dataclass field. A value out of the range is a `ValueError` when the
      dataclass is built; values that are being traced are not checked.
    """
    metadata = {"omit": omit, "static": static, **({"within": Interval(within)} if within else {})}
    return dataclasses.field(default=default, metadata=metadata)


class FrozenConfig(Mapping[str, Json]):
    """A read-only, hashable mapping of JSON values; equal if its JSON text is."""

    def __init__(self, values: Mapping[str, Json]) -> None:
        require_shallow(values, "a configuration")
        self._text = json.dumps(dict(values), sort_keys=True, allow_nan=False)
        self._values: dict[str, Json] = json.loads(self._text)

    def __getitem__(self, key: str) -> Json:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        # the text tells 1 from true
        return self._text == other._text if isinstance(other, FrozenConfig) else self._values == other

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return repr(self._values)


class Configured(abc.ABC):
    """A frozen dataclass whose fields are a configuration: read from it, checked, and written to it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    _owner: ClassVar[str]
    _around: ClassVar[str | None] = None
    """The field that it stands for: paths of hyper-parameters go on in that as if it were not there."""

    def __post_init__(self) -> None:
        check_fields(self, self._owner)
        self.validate()

    def validate(self) -> None:  # noqa: B027
        """Check what concerns several fields at once; nothing by default.

        Raises:
          ValueError: if the fields do not go together.
        """

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in self._told())})"

    def _told(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            omitted = field.metadata.get("omit") and not isinstance(value, jax.core.Tracer) and value == field.default
            if not omitted:
                yield field.name, value

    def get_config(self) -> dict[str, Json]:
        """Return the fields as JSON values.

        Raises:
          TypeError: if a field holds a function or a traced value.
        """
        config = {}
        for name, value in self._told():
            try:
                config[name] = to_json(value)
            except TypeError as error:
                raise TypeError(f"{self._owner}: {name}={error}") from None
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        """Build from what `get_config` returned.

        Raises:
          KeyError: if a field without default is missing, or a key is no field.
          TypeError: if a value, or the configuration itself, has a wrong type.
          ValueError: if a value is out of its range, or nests too deep.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls._owner}: a configuration is a mapping, not {quote(config)}")
        require_shallow(config, f"{cls._owner}: the configuration")
        known = field_types(cls)
        for key in config:
            if key not in known:
                raise KeyError(f"{cls._owner} has no field {quote(key)}: {nearest(key, known)}")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [repr(name) for name in needed if name not in config]:
            raise KeyError(f"{cls._owner} needs a value for {', '.join(missing)}")
        return cls(**config)


@functools.cache
def field_types(cls: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, in their order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(instance: "DataclassInstance", owner: str, mismatch: type[Exception] = TypeError) -> None:
    """Store the fields of a frozen dataclass as their annotations want them, and check their ranges.

    Args:
      instance: what has just been built; this is for its `__post_init__`.
      owner: how errors call it.
      mismatch: what is raised for a value that is not of the annotated type, such
        as one that is not among the options of a `Literal`.

    Raises:
      ValueError: if a number, which is not being traced, is out of its range.
    """
    hints = field_types(type(instance))
    for field in dataclasses.fields(instance):
        value, within = getattr(instance, field.name), field.metadata.get("within")
        try:
            value = coerce(value, hints[field.name])
        except Mismatch as error:
            wanted = ": ".join([describe(hints[field.name]), *error.args])
            raise mismatch(f"{owner}: {field.name}={quote(value)} should be of type {wanted}") from None
        if within is not None and isinstance(value, int | float) and value not in within:
            raise ValueError(f"{owner}: {field.name}={quote(value)} should be in {within.text}")
        object.__setattr__(instance, field.name, value)


def nearest(name: object, known: Iterable[str]) -> str:
    """Say which of the known names are near the given one, else all of them."""
    names = sorted(known)
    if close := difflib.get_close_matches(quote(name).strip("'"), names, n=3, cutoff=0.5):
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return f"there is {', '.join(map(repr, names)) or 'none'}"


def require_keys(found: Mapping[str, Json], expected: Collection[str], what: str, kind: str = "key") -> None:
    """Raise a `KeyError` that names a missing or an unknown key of a mapping."""
    for key in expected:
        if key not in found:
            raise KeyError(f"{what} lacks the {kind} {key!r}")
    for key in found:
        if key not in expected:
            raise KeyError(f"{what} has an unknown {kind} {quote(key)}: {nearest(key, expected)}")


def differences(was: Json, now: Json, key: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Yield the dotted key, what was and what is, wherever two configurations differ; `None` stands for nothing."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted(was.keys() | now.keys()):
            yield from differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif was != now:
        yield key, was, now


def describe(annotation: Any) -> str:
    """Write an annotation as a reader would: `int | None`, `tuple[Regularizer, ...]`."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(map(describe, members))
    if origin is tuple:
        return f"list of {describe(members[0])}" if members[1:] == (...,) else f"list of {len(members)} values"
    if origin is Callable:
        return "function" if members[:1] in ((), (...,)) else "function of the step"
    kind = origin or annotation
    if hasattr(kind, "from_specs"):
        return f"{kind.__name__} (an instance, a name or a (name, config) pair)"
    if isinstance(kind, type) and issubclass(kind, Configured):
        return f"{kind.__name__} (an instance or its configuration)"
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
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    kind = origin or annotation
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, members)
    if kind in (bool, int, float):
        return _coerce_number(value, kind)
    if hasattr(kind, "from_specs"):
        return _coerce_plugin(value, kind)
    if isinstance(kind, type) and issubclass(kind, Configured) and isinstance(value, Mapping):
        return kind.from_config(value)
    if origin is tuple and isinstance(value, list | tuple):
        members = members[:1] * len(value) if members[1:] == (...,) else members
        if len(value) == len(members):
            return tuple(map(coerce, value, members))
    elif kind is Mapping and isinstance(value, Mapping):
        try:
            return FrozenConfig(value)
        except (TypeError, ValueError) as error:
            raise Mismatch(f"not made of JSON values ({error})") from None
    elif origin is Literal and isinstance(value, Hashable) and value in members:
        return value
    elif kind is Callable:
        if callable(value) and not isinstance(value, type):
            return value
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise Mismatch


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    reasons: tuple[str, ...] = ()
    for member in members:
        try:
            return coerce(value, member)
        except Mismatch as mismatch:
            reasons = reasons or mismatch.args
    raise Mismatch(*reasons)


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
            number = kind(value)
        except OverflowError as error:
            raise Mismatch(str(error)) from None
        if kind is int and number.bit_length() > 63:
            raise Mismatch("of at most 64 bits")
        return number
    raise Mismatch


def _coerce_plugin(value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value.bare()
    if isinstance(value, str):
        return kind.from_specs(value)
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):
        return kind.from_specs(*value)
    raise Mismatch


def to_json(value: Any) -> Json:
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
    if isinstance(value, Configured):
        config = value.get_config()
        return [value.name, config] if hasattr(value, "from_specs") else config  # type: ignore[attr-defined]
    raise TypeError(f"{quote(value)} cannot be written in a configuration")
