"""The functions of a library by name, with JSON arguments: what their signatures say is what is taken."""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, Union

import jax
import numpy as np

from functional_optimodules.config.fields import Mismatch, coerce, describe, nearest
from functional_optimodules.config.outside import quote
from functional_optimodules.types import Json

# A configuration may come from a peer: what it can ask for is bounded.
MOST_INTEGER = 2**32
_NUMERIC = (float, complex, np.number, np.ndarray, jax.Array)
_SAID = {bool: "a boolean", int: "an integer", str: "a string", float: "a number", types.NoneType: "null"}


class _Nothing:
    """No JSON value is one."""


def find(library: ModuleType, name: str, owner: str, makes: str) -> Any:
    """Return the public function or class of a library that has a dotted name.

    Args:
      library: the library; what it only imports is out of reach.
      name: the name within the library, such as `"contrib.muon"`.
      owner: how errors call who asks.
      makes: what the function should make.

    Raises:
      ValueError: if there is none of the name, which then names near ones, or it is neither.
    """
    place: Any = library
    root = library.__name__
    for part in name.split("."):
        if part.startswith("_") or not hasattr(place, part):
            inner = [each for each in dir(place) if inspect.ismodule(getattr(place, each)) and not each.startswith("_")]
            within = [f"{each}.{part}" for each in inner if hasattr(getattr(place, each), part)]
            hint = nearest(part, within or [each for each in dir(place) if not each.startswith("_")])
            near = hint if hint.startswith("did") else "nothing there is named nearly so"
            raise ValueError(f"{owner}: {root} has no public {quote(name)}: {near}")
        place = getattr(place, part)
        function = place.func if isinstance(place, functools.partial) else place
        # A configuration may come from a peer: it must not reach what the library happens to import.
        if getattr(inspect.getmodule(function), "__name__", "").split(".")[0] != root:
            break
    else:
        if inspect.isfunction(function) or inspect.isclass(function):
            return place
    raise ValueError(f"{owner}: {root}.{name} makes no {makes}: it is {quote(place)}")


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the options of a union, or the annotation alone."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def require_names(config: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a `ValueError` that names the first key which is no argument, and near ones."""
    known = list(known)
    for key in config:
        if key not in known:
            raise ValueError(f"{what} takes no argument {quote(key)}: {nearest(key, known)}")


def require_small(value: Json, key: str, what: str, most: int = MOST_INTEGER) -> None:
    """Raise a `ValueError` for an integer above what is taken, wherever in a value it is."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, list | Mapping):
            require_small(each, key, what, most)
        elif isinstance(each, int) and abs(each) > most:
            raise ValueError(f"{what} takes at most {most} for {key!r}, not {quote(each)}")


def refusal(value: Json, key: str, what: str, expected: str) -> ValueError:
    """Return the error for a value that an argument does not take."""
    return ValueError(f"{what} takes {expected} for {key!r}, not {quote(value)}")


def argument(parameter: inspect.Parameter, value: Json, what: str, *others: str) -> Any:
    """Return a JSON value as a parameter of a function takes it: lists as tuples, numbers as numbers.

    Args:
      parameter: the parameter.
      value: the value.
      what: how errors name the function.
      *others: what else the parameter takes, for the error.

    Raises:
      ValueError: if the parameter takes no such value; it names the function, the
        parameter, the value and what is expected.
    """
    kinds = _kinds(parameter.annotation, parameter.default)
    try:
        return coerce(value, functools.reduce(operator.or_, kinds or [_Nothing]))
    except Mismatch:
        expected = [*map(_said, (kind for kind in kinds if not (kind is int and float in kinds))), *others]
        said = " or ".join(expected) or "a function or an object, which JSON does not have,"
        raise refusal(value, parameter.name, what, said) from None


def _kinds(annotation: Any, default: Any) -> list[Any]:
    """Return the types of JSON values that stand for an annotation."""
    if annotation is inspect.Parameter.empty:
        annotation = Any if default is inspect.Parameter.empty else type(default)
    options = members(annotation)
    numeric = any(option in _NUMERIC for option in options)
    kinds: list[Any] = [int, float] if numeric else []
    for option in options:
        origin, inside = typing.get_origin(option), typing.get_args(option)
        if origin in (tuple, Sequence) or option in (list, tuple):
            kinds.append(_tuple(inside if origin is tuple else (*(inside or (Any,)), ...)))
        elif origin is Literal or option in (str, types.NoneType) or (option in (bool, int) and not numeric):
            kinds.append(option)
    return kinds + [types.NoneType] * (default is None and types.NoneType not in kinds)


def _tuple(inside: tuple[Any, ...]) -> Any:
    made = [... if each is ... else functools.reduce(operator.or_, _kinds(each, 0) or [Any]) for each in inside]
    return tuple[tuple(made)]  # type: ignore[misc]


def _said(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    said = _SAID.get(kind) or describe(kind)
    return f"a {said}" if said.startswith("list") else said
