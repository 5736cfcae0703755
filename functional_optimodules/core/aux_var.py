"""Auxiliary variables: what a brick tells its counterpart on the other side.

A pair of bricks declares one type per direction. Its annotated fields are the
variables; their annotations say the rest:

    class Report(FromClients):          # what each client sends
        delta: Params                   # shaped like the parameters; summed over clients
        steps: Max[Scalar]              # one number; the largest of the clients'

    class Directive(FromServer):        # what the server sends
        variate: Params                 # the same to every client
        rate: PerClient[Scalar]         # one for each client, along a leading axis

The types are pytrees, so that they go through `jit`, `vmap` and `psum`. The
reduction over clients is a sum, a maximum or a minimum, field by field: the
order and the grouping of the clients do not matter.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

T = TypeVar("T")

Params = Annotated[Any, "params"]
"""A variable shaped like the parameters."""
Scalar = Annotated[jax.Array, "scalar"]
"""A variable that is one number."""
Max = Annotated[T, "max"]
"""A variable of clients of which the server gets the largest, element by element."""
Min = Annotated[T, "min"]
"""A variable of clients of which the server gets the smallest, element by element."""
PerClient = Annotated[T, "per-client"]
"""A variable with a leading axis of clients on the server's side, and without it on theirs."""

_REDUCE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
}


@dataclass_transform(frozen_default=True)
class AuxVar:
    """Base of `FromClients` and `FromServer`."""

    sender: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if AuxVar not in cls.__bases__:
            dataclasses.dataclass(frozen=True)(cls)
            jax.tree_util.register_dataclass(cls)

    @classmethod
    @functools.cache
    def variables(cls) -> dict[str, frozenset[str]]:
        """Return what the annotation of each field says: `{"delta": {"params"}, ...}`."""
        hints = typing.get_type_hints(cls, include_extras=True)
        variables = {
            field.name: frozenset(getattr(hints[field.name], "__metadata__", ()))
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        }
        for name, marks in variables.items():
            if len(marks & {"max", "min", "per-client"}) > 1 or (marks & {"max", "min"} and cls.sender == "server"):
                raise TypeError(f"{cls.__name__}: {name} cannot be reduced as {sorted(marks)}")
        return variables


class FromServer(AuxVar):
    """What the server sends to clients: broadcast, except for `PerClient` fields."""

    sender: ClassVar[str] = "server"

    def narrow(self, index: Any) -> Self:
        """Return what the client of that index is sent: its own values of `PerClient` fields."""
        own = {
            name: jax.tree.map(lambda leaf: leaf[index], getattr(self, name))
            for name, marks in self.variables().items()
            if "per-client" in marks
        }
        return dataclasses.replace(self, **own)


class FromClients(AuxVar):
    """What each client sends to the server, which gets it reduced over clients.

    A field is summed unless it is annotated as `Max` or `Min`. One annotated as
    `PerClient` reaches the server with a leading axis of clients, zero for those
    that sent nothing.
    """

    sender: ClassVar[str] = "client"

    def merge(self, other: Self) -> Self:
        """Reduce the variables of two (groups of) clients into one."""
        merged = {}
        for name, marks in self.variables().items():
            reduce = _REDUCE[next(iter(marks & _REDUCE.keys()), "sum")]
            merged[name] = jax.tree.map(reduce, getattr(self, name), getattr(other, name))
        return type(self)(**merged)

    def widen(self, index: Any, num_clients: int) -> Self:
        """Give the `PerClient` fields their leading axis, with this client's value at its index."""

        def place(leaf: jax.Array) -> jax.Array:
            return jnp.zeros((num_clients, *leaf.shape), leaf.dtype).at[index].set(leaf)

        wide = {
            name: jax.tree.map(place, getattr(self, name))
            for name, marks in self.variables().items()
            if "per-client" in marks
        }
        return dataclasses.replace(self, **wide)
