"""Plug-ins: frozen, hashable, registered dataclasses of hyper-parameters.

Declaring a subclass makes it a dataclass and registers it under its name; its
fields are its configuration. Nothing here knows what a plug-in does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from functional_optimodules.config.fields import Configured, field_types, hyperparameter, nearest
from functional_optimodules.config.outside import quote
from functional_optimodules.types import Json


class UnknownPlugin(KeyError):
    """No plug-in of a kind is registered under that name."""


@dataclass_transform(frozen_default=True, field_specifiers=(hyperparameter, dataclasses.field))
class Plugin(Configured):
    """Base of the kinds of plug-ins: modules, regularizers, schedulers and aggregators.

    A subclass is a frozen dataclass: its annotated fields are its
    hyper-parameters, and equality, hash and configuration follow from them.

    Attributes:
      name: the name it is registered under, unique among its kind.
      examples: configurations that the contract tests also run, for plug-ins
        whose fields cannot be made up from their types and ranges alone.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Json], ...]] = ()
    _kind: ClassVar[str]
    _registry: ClassVar[dict[str, type[Any]]]
    _final: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, register: bool = True, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._owner = cls.__name__
        if kind is not None:
            cls._kind, cls._registry = kind, {}
            return
        _refuse_overrides(cls)
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        _refuse_shadows(cls)
        if register:
            _register(cls)
        elif not hasattr(cls, "name"):
            cls.name = cls.__name__

    @classmethod
    def from_specs(cls, name: str, config: Mapping[str, Json] | None = None) -> Self:
        """Build the plug-in of this kind that is registered under a name.

        Raises:
          UnknownPlugin: a `KeyError`, if no plug-in of this kind has that name.
          KeyError: as `from_config` does.
          TypeError: if the name is no string, or as `from_config` does.
        """
        if not isinstance(name, str):
            raise TypeError(f"a {cls._kind} is named by a string, not {quote(name)}")
        if name not in cls._registry:
            raise UnknownPlugin(
                f"no {cls._kind} is named {quote(name)}: {nearest(name, cls._registry)}{cls._elsewhere(name)}"
            )
        plugin = cls._registry[name]
        if not issubclass(plugin, cls):
            raise TypeError(f"{name!r} names {plugin.__name__}, which is no {cls.__name__}")
        return plugin.from_config({} if config is None else config)

    @classmethod
    def _elsewhere(cls, name: str) -> str:
        """Return what an error adds about a name that no plug-in of this kind has."""
        return ""

    def bare(self) -> Self:
        """Return an equal plug-in that has no facade's state."""
        twin = object.__new__(type(self))  # and not a new one, whose fields would be read and checked again
        for name in field_types(type(self)):
            object.__setattr__(twin, name, getattr(self, name))
        return twin


def _refuse_overrides(cls: type[Plugin]) -> None:
    for name in vars(cls):
        if name in cls._final or name in ("__post_init__", "__init__"):
            advice = "write `validate` instead" if name.startswith("__") else "it belongs to the facade"
            raise TypeError(f"{cls.__name__} must not define {name!r}: {advice}")


def _refuse_shadows(cls: type[Plugin]) -> None:
    for base in cls.__mro__[1:]:
        attributes = vars(base).keys() | vars(base).get("__annotations__", {}).keys()
        for name in _fields(cls) & (attributes - _fields(base)):
            raise TypeError(f"{cls.__name__}: {name!r} is an attribute of the class: rename the field, or use ClassVar")


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _register(cls: type[Plugin]) -> None:
    name = vars(cls).get("name")  # and not that of a base, which is another's
    if not isinstance(name, str) or not name:
        raise TypeError(f"{cls.__name__} needs a class attribute `name` (or `register=False`), not {name!r}")
    known = cls._registry.get(name, cls)
    if _origin(known) != _origin(cls):
        raise ValueError(f"the name {name!r} is taken by the {cls._kind} {_origin(known)}: give {_origin(cls)} another")
    cls._registry[name] = cls


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
