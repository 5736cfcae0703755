"""Plug-ins with non-default values of every field, made up from types and ranges."""

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union

from functional_optimodules.config.fields import field_types
from functional_optimodules.config.plugin import Plugin
from functional_optimodules.schedulers import Scheduler
from functional_optimodules.types import PyTree

_FLOATS = (0.5, 0.25, 2.0, 1.5, 0.75, 0.0, 1.0, 10.0, -0.5)
_INTEGERS = (3, 2, 5, 7, 1, 4, 10, 0, -3)


def instances(cls: type[Plugin]) -> dict[str, PyTree]:
    """Return plug-ins of a class, by a label that says how each differs.

    These are the default one, one with every field changed, one for each value
    made up for each field, and the class's `examples`. Values come from the
    annotation and the range of a field: booleans flip, literals take their other
    values, numbers stay within their interval, schedulers and bricks nest.

    Raises:
      AssertionError: if a field cannot be given two values in this way. The
        class should then list configurations as its `examples`.
    """
    found = dict(_candidates(cls))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        values = {_text(getattr(plugin, field.name)) for plugin in found.values()}
        assert len(values) > 1, (
            f"{cls.__name__}: no two values of the field {field.name!r} could be made up from its type and range: "
            "list configurations with several in the class attribute `examples`"
        )
    return found


def _candidates(cls: type[Plugin]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for label, make in _recipes(cls):
        plugin = make()
        if plugin not in seen:
            seen.add(plugin)
            yield label, plugin


def _recipes(cls: type[Plugin]) -> Iterator[tuple[str, Callable[[], Any]]]:
    examples = [(f"example-{index}", cls.from_config(config)) for index, config in enumerate(cls.examples)]
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made_up = {
        name: list(_values(field_types(cls)[name], field, turn)) for turn, (name, field) in enumerate(fields.items())
    }
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if all(made_up[name] for name in required):
        base: Any = cls(**{name: made_up[name][0] for name in required})
        yield "default", lambda: base
    else:
        assert examples, (
            f"{cls.__name__}: no value could be made up for {[name for name in required if not made_up[name]]}: list "
            "configurations in the class attribute `examples`"
        )
        base = examples[0][1]
    others = {
        name: [value for value in values if _text(value) != _text(getattr(base, name))]
        for name, values in made_up.items()
    }
    changed = {name: values[0] for name, values in others.items() if values}
    if changed and _builds(base, changed):
        yield "all-changed", lambda: dataclasses.replace(base, **changed)
    for name, values in others.items():
        for value in values[:1] if field_types(cls)[name] in (int, float) else values:
            if _builds(base, {name: value}):
                yield f"{name}={_text(value)}", lambda change={name: value}: dataclasses.replace(base, **change)  # type: ignore[misc]
    for label, example in examples:
        yield label, lambda plugin=example: plugin  # type: ignore[misc]


def _builds(base: Any, change: dict[str, PyTree]) -> bool:
    # Fields that only go together are what `examples` are for.
    try:
        dataclasses.replace(base, **change)
    except ValueError:
        return False
    return True


def _values(annotation: Any, field: Any, turn: int = 0) -> Iterator[Any]:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    within = field.metadata.get("within")
    if annotation is bool:
        yield from (True, False)
    elif annotation in (int, float):
        pool = [value for value in (_FLOATS if annotation is float else _INTEGERS) if within is None or value in within]
        start = turn % max(1, min(len(pool), 3))  # so that required fields differ from each other
        yield from (pool[start:] + pool[:start])[:2]
    elif origin is Literal:
        yield from members
    elif annotation is type(None):
        yield None
    elif origin in (Union, types.UnionType):
        for member in members:
            yield from list(_values(member, field, turn))[:1]
    elif origin is tuple and members[1:] == (Ellipsis,):
        yield from ((), *((value,) for value in _values(members[0], field, turn)))
    elif origin is collections.abc.Callable:
        return
    elif isinstance(annotation, type) and issubclass(annotation, Plugin):
        yield from _plugins(annotation)


def _plugins(kind: type[Any]) -> Iterator[Any]:
    for cls in kind._registry.values() if "_registry" in vars(kind) else [kind]:
        if not (issubclass(cls, Scheduler) and _nests(cls)) and not cls.examples:
            yield next(iter(dict(_candidates(cls)).values()))
            return


def _nests(cls: type[Scheduler]) -> bool:
    return any("Scheduler" in str(annotation) for annotation in field_types(cls).values())


def _text(value: PyTree) -> str:
    return repr(value)
