"""Plug-ins: frozen, hashable, registered dataclasses of hyper-parameters.

Declaring a subclass makes it a dataclass and registers it under its name; its
fields are its configuration. Nothing here knows what a plug-in does.
"""

import abc
import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from functional_optimodules.core.fields import (
    Mismatch,
    coerce,
    describe,
    hyperparameter,
    nearest,
    to_json,
)


@dataclass_transform(frozen_default=True, field_specifiers=(hyperparameter, dataclasses.field))
class Plugin(abc.ABC):
    """Base of the three kinds of plug-ins: modules, regularizers and schedulers.

    A subclass is a frozen dataclass: its annotated fields are its
    hyper-parameters, and equality, hash and configuration follow from them.

    Attributes:
      name: the name it is registered under, unique among its kind.
      examples: configurations that the contract tests also run, for plug-ins
        whose fields cannot be made up from their types and ranges alone.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    _kind: ClassVar[str]
    _registry: ClassVar[dict[str, type[Any]]]
    _final: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, register: bool = True, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls._kind, cls._registry = kind, {}
            return
        _refuse_overrides(cls)
        dataclasses.dataclass(frozen=True)(cls)
        _refuse_shadows(cls)
        if register:
            _register(cls)
        elif not hasattr(cls, "name"):
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            try:
                value = coerce(value, hints[field.name])
            except Mismatch as mismatch:
                raise TypeError(
                    f"{type(self).__name__}: {field.name}={value!r} should be of type "
                    f"{describe(hints[field.name])}" + "".join(f": {reason}" for reason in mismatch.args)
                ) from None
            self.check_range(field.name, value, field.metadata.get("within"))
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:  # noqa: B027
        """Check what concerns several fields at once; nothing by default.

        Raises:
          ValueError: if the fields do not go together.
        """

    def check_range(self, field: str, value: Any, within: Any) -> None:
        """Raise a `ValueError` if a number, not traced, is out of its range."""
        if within is not None and isinstance(value, int | float) and value not in within:
            raise ValueError(f"{type(self).__name__}: {field}={value!r} should be in {within.text}")

    def get_config(self) -> dict[str, Any]:
        """Return the hyper-parameters as JSON values.

        Raises:
          TypeError: if a field holds a function or a traced value.
        """
        config = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            try:
                config[field.name] = to_json(getattr(self, field.name))
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: {field.name}={error}") from None
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a plug-in from what `get_config` returned.

        Raises:
          KeyError: if a field without default is missing, or a key is no field.
          TypeError: if a value, or the configuration itself, has a wrong type.
          ValueError: if a value is out of its range.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls.__name__}: a configuration is a mapping, not {config!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in config:
            if key not in fields:
                raise KeyError(f"{cls.__name__} has no field {key!r}: {nearest(key, fields)}")
        missing = [
            name
            for name, field in fields.items()
            if field.default is field.default_factory is dataclasses.MISSING and name not in config
        ]
        if missing:
            raise KeyError(f"{cls.__name__} needs a value for {', '.join(map(repr, missing))}")
        return cls(**config)

    @classmethod
    def from_specs(cls, name: str, config: Mapping[str, Any] | None = None) -> Self:
        """Build the plug-in of this kind that is registered under a name.

        Raises:
          KeyError: if no plug-in of this kind has that name, or as `from_config` does.
          TypeError: if the name is no string, or as `from_config` does.
        """
        if not isinstance(name, str):
            raise TypeError(f"a {cls._kind} is named by a string, not {name!r}")
        if name not in cls._registry:
            raise KeyError(f"no {cls._kind} is named {name!r}: {nearest(name, cls._registry)}")
        plugin = cls._registry[name]
        if not issubclass(plugin, cls):
            raise TypeError(f"{name!r} names {plugin.__name__}, which is no {cls.__name__}")
        return plugin.from_config({} if config is None else config)

    def bare(self) -> Self:
        """Return an equal plug-in that has no facade's state."""
        twin = object.__new__(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(twin, field.name, getattr(self, field.name))
        return twin


@functools.cache
def field_types(cls: type[Plugin]) -> dict[str, Any]:
    """Return the type of each field of a plug-in class."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


_CLASS_ATTRIBUTES = {"name", "examples", "packable", "aux_name", "sends", "receives"}


def _refuse_overrides(cls: type[Plugin]) -> None:
    for name in vars(cls):
        if name in cls._final or name in ("__post_init__", "__init__"):
            advice = "write `validate` instead" if name.startswith("__") else "it belongs to the facade"
            raise TypeError(f"{cls.__name__} must not define {name!r}: {advice}")


def _refuse_shadows(cls: type[Plugin]) -> None:
    bases = [base for base in cls.__mro__[1:] if base is not object]
    inherited = set().union(*(_fields(base) for base in bases))
    for name in _fields(cls) & _CLASS_ATTRIBUTES:
        raise TypeError(
            f"{cls.__name__}: {name!r} is an attribute of the class: annotate it as ClassVar, or not at all"
        )
    for name in _fields(cls) - inherited:
        if any(name in vars(base) for base in bases):
            raise TypeError(f"{cls.__name__}: the field {name!r} would shadow an inherited attribute of that name")


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _register(cls: type[Plugin]) -> None:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{cls.__name__} needs a class attribute `name` (or `register=False`), not {name!r}")
    known = cls._registry.get(name)
    if known is not None and _origin(known) != _origin(cls):
        raise ValueError(
            f"the name {name!r} is taken by the {cls._kind} {'.'.join(_origin(known))}: "
            f"give {'.'.join(_origin(cls))} another"
        )
    cls._registry[name] = cls


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
