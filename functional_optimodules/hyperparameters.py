"""Hyper-parameters by path: those of a configuration that are numbers, to be read and replaced, traced ones too.

A path names a field, or goes through one to a field of what is in it: `lrate`, `lrate/base` of a
scheduler, `modules/adam/beta_1`, `groups/norms/lrate`. What is in a list goes by its name there.
"""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.config.fields import Configured, Interval, field_types, nearest
from functional_optimodules.config.outside import quote
from functional_optimodules.numerics import real

T = TypeVar("T")


class HyperParameter(NamedTuple):
    """A number of a configuration.

    Attributes:
      value: what it is there.
      within: its range, or `None` for any.
      owner: how errors call what it is a field of.
    """

    value: Any
    within: Interval | None
    owner: str

    def checked(self, path: str, value: Any) -> jax.Array:
        """Return a new value as an array, a scalar of JAX's default precision.

        Raises:
          TypeError: if it is no number, or an array of another dtype.
          ValueError: if it is no scalar, or out of its range; a traced value is not looked at.
        """
        what, dtype = f"{self.owner}: the hyper-parameter {path!r}", jnp.result_type(float)
        if isinstance(value, bool) or not (isinstance(value, numbers.Real) or hasattr(value, "dtype")):
            raise TypeError(f"{what} should be a number, not {quote(value)}")
        if hasattr(value, "dtype") and value.dtype != dtype:
            raise TypeError(f"{what} is of {dtype}, not of {value.dtype}: give a Python number, or cast it")
        if getattr(value, "shape", ()) != ():
            raise ValueError(
                f"{what} should be one number, not of the shape {list(value.shape)}: use `vmap` for several"
            )
        if isinstance(value, jax.core.Tracer):
            return real(value)
        with np.errstate(over="ignore"):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf if value > 0 else -math.inf
            rounded = float(dtype.type(number))
        if self.within is not None and not (number in self.within and rounded in self.within):
            other = f", which is {rounded!r} in {dtype}" if number in self.within else ""  # as 1 - 1e-9 and 1e39 are
            raise ValueError(f"{what} should be in {self.within.text}, not {number!r}{other}")
        return real(rounded)


def labelled(plugins: Iterable[T]) -> dict[str, T]:
    """Name plug-ins apart, `adam` and `adam-2`, and what has no name by its place."""
    found: dict[str, T] = {}
    for place, plugin in enumerate(plugins):
        label = getattr(plugin, "name", "") or str(place)
        names = itertools.chain([label], (f"{label}-{number}" for number in itertools.count(2)))
        found[next(name for name in names if name not in found)] = plugin
    return found


def _children(node: Any) -> Mapping[str, Any]:
    """Return what is in a list of plug-ins or groups, by its name there."""
    return labelled(node) if isinstance(node, tuple) and all(isinstance(each, Configured) for each in node) else {}


def hyperparameters(node: Configured, prefix: str = "") -> Iterator[tuple[str, HyperParameter]]:
    """Yield the path of each number of a configuration, and what it is."""
    if node._around is not None:
        yield from hyperparameters(getattr(node, node._around), prefix)
        return
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        value, path = getattr(node, field.name), f"{prefix}{field.name}"
        fixed = field_types(type(node))[field.name] in (int, bool, int | None) or field.metadata.get("static")
        if isinstance(value, float | jax.core.Tracer) and not fixed:
            yield path, HyperParameter(value, field.metadata.get("within"), node._owner)
        elif isinstance(value, Configured):
            yield from hyperparameters(value, f"{path}/")
        for label, child in _children(value).items():
            yield from hyperparameters(child, f"{path}/{label}/")


def require_known(path: str, known: Mapping[str, HyperParameter], node: Configured) -> None:
    """Raise a `ValueError` for a path of no number, naming near ones."""
    if path in known:
        return
    if inside := [name for name in known if name.startswith(f"{path}/")]:
        raise ValueError(f"{node._owner}: {path!r} is no number: it has {', '.join(map(repr, inside))}")
    value = getattr(node, path, None)
    if isinstance(value, Configured) or callable(value):
        raise ValueError(
            f"{node._owner}: {path!r} is no number but {quote(value)}: what may be live beside it is a group's `factor`"
        )
    raise ValueError(f"{node._owner} has no real number {quote(path)}: {nearest(path, known)}")


def replaced(node: Any, values: Mapping[Sequence[str], Any]) -> Any:
    """Return a configuration with other numbers, by the segments of their paths, without checks of their ranges."""
    if node._around is not None:
        return _with(node, {node._around: replaced(getattr(node, node._around), values)})
    by_field: dict[str, dict[Sequence[str], Any]] = {}
    for path, value in values.items():
        by_field.setdefault(path[0], {})[path[1:]] = value
    changes = {}
    for name, inner in by_field.items():
        old = getattr(node, name)
        if () in inner:
            changes[name] = inner[()]
        elif isinstance(old, Configured):
            changes[name] = replaced(old, inner)
        else:
            by_label: dict[str, dict[Sequence[str], Any]] = {}
            for path, value in inner.items():
                by_label.setdefault(path[0], {})[path[1:]] = value
            children = _children(old)
            changes[name] = tuple(
                replaced(child, by_label[label]) if label in by_label else child for label, child in children.items()
            )
    return _with(node, changes)


def _with(node: T, changes: Mapping[str, Any]) -> T:
    twin = object.__new__(type(node))  # and not a new one, which would hash, check and trace what it is made of
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        object.__setattr__(twin, field.name, changes.get(field.name, getattr(node, field.name)))
    return twin
