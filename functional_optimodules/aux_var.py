"""Auxiliary variables: what a brick tells its counterpart on the other side.

A pair of bricks declares one type per direction. Its annotated fields are the
variables; their annotations say the rest:

    class Report(FromClients):          # what each client sends
        delta: Params                   # shaped like the parameters; summed over clients
        steps: Max[Scalar]              # one number; the largest of the clients'
        weight: Amount                  # one number of at least 0; summed over clients

    class Directive(FromServer):        # what the server sends
        variate: Params                 # the same to every client
        rate: PerClient[Scalar]         # one for each client, along a leading axis

The types are pytrees, so that they go through `jit`, `vmap` and `psum`. The
reduction over clients is a sum, a maximum or a minimum, field by field: the
order and the grouping of the clients do not matter.

What a client says may be false. A server's facade refuses, by the client's name,
numbers that are not finite, above `Limits`, or not what the annotation says.
"""

import dataclasses
import enum
import functools
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Self, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from functional_optimodules.types import Mark, PyTree

T = TypeVar("T")


class Reduction(enum.Enum):
    """How a variable of clients becomes the server's."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"

    def merge(self, left: PyTree, right: PyTree) -> PyTree:
        """Reduce the values of two (groups of) clients."""
        function = {Reduction.SUM: jnp.add, Reduction.MAX: jnp.maximum, Reduction.MIN: jnp.minimum}[self]
        return jax.tree.map(function, left, right)

    def neutral(self, like: PyTree) -> PyTree:
        """Return values, of such shapes and dtypes, that change nothing when merged with others."""

        def make(leaf: jax.Array) -> jax.Array:
            if self is Reduction.SUM:
                return jnp.zeros(leaf.shape, leaf.dtype)
            info = jnp.finfo(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.iinfo(leaf.dtype)
            return jnp.full(leaf.shape, info.min if self is Reduction.MAX else info.max, leaf.dtype)

        return jax.tree.map(make, like)

    def across(self, values: PyTree, axis: str) -> PyTree:
        """Reduce over the devices along an axis of a mesh, within `shard_map`."""
        function = {Reduction.SUM: jax.lax.psum, Reduction.MAX: jax.lax.pmax, Reduction.MIN: jax.lax.pmin}[self]
        return jax.tree.map(lambda leaf: function(leaf, axis), values)


Scalar: TypeAlias = Annotated[jax.Array, Mark.SCALAR]
"""A variable that is one number."""
Amount: TypeAlias = Annotated[Scalar, Mark.AMOUNT]
"""One number of at least 0, such as a weight: a server's facade refuses another by the client's name."""
Flag: TypeAlias = Annotated[Scalar, Mark.FLAG]
"""One number that is 0 or 1: a server's facade refuses another by the client's name."""
Newcomer: TypeAlias = Annotated[Flag, Mark.NEWCOMER]
"""A flag that is 1 in a client's first message. A server's facade knows the names, and takes nobody's word for it."""

if TYPE_CHECKING:  # each is its variable's own type; what it adds is read when the class is declared
    Max = Annotated[T, Reduction.MAX]
    Min = Annotated[T, Reduction.MIN]
    PerClient = Annotated[T, Mark.PER_CLIENT]
else:

    class _Marking:
        """What stands before the brackets: `Max[Scalar]`; an instance for `help` to show its own words."""

        def __init__(self, mark, words):
            self.mark, self.__doc__ = mark, words

        def __getitem__(self, variable):
            return Annotated[variable, self.mark]

    _SERVER_GETS = "`{0}[Scalar]`: a variable of clients of which the server gets the {1}, element by element."
    Max = _Marking(Reduction.MAX, _SERVER_GETS.format("Max", "largest"))
    Min = _Marking(Reduction.MIN, _SERVER_GETS.format("Min", "smallest"))
    PerClient = _Marking(
        Mark.PER_CLIENT,
        "`PerClient[Scalar]`: with a leading axis of clients on the server's side, without it on theirs.",
    )


class Variable(NamedTuple):
    """What a field's annotation says of it.

    Attributes:
      shaped: whether it is shaped like the parameters.
      scalar: whether it is one number.
      amount: whether that is at least 0.
      flag: whether that is 0 or 1.
      newcomer: whether that is 1 in a client's first message alone.
      per_client: whether it has a leading axis of clients on the server's side.
      reduction: how the clients' values become one.
    """

    shaped: bool
    scalar: bool
    amount: bool
    flag: bool
    newcomer: bool
    per_client: bool
    reduction: Reduction

    @classmethod
    def of(cls, marks: tuple[object, ...]) -> Self:
        """Read the marks of an annotation."""
        reduction = next((mark for mark in marks if isinstance(mark, Reduction)), Reduction.SUM)
        return cls(
            shaped=Mark.SHAPED in marks,
            scalar=Mark.SCALAR in marks,
            amount=Mark.AMOUNT in marks,
            flag=Mark.FLAG in marks,
            newcomer=Mark.NEWCOMER in marks,
            per_client=Mark.PER_CLIENT in marks,
            reduction=reduction,
        )


@dataclass_transform(frozen_default=True)
class AuxVar:
    """Base of `FromClients` and `FromServer`."""

    sender: ClassVar[str]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if AuxVar not in cls.__bases__:
            dataclasses.dataclass(frozen=True)(cls)
            jax.tree_util.register_dataclass(cls)

    @classmethod
    @functools.cache
    def variables(cls) -> Mapping[str, Variable]:
        """Return what the annotation of each field says.

        Raises:
          TypeError: if a field is marked in two ways that exclude each other.
        """
        hints = typing.get_type_hints(cls, include_extras=True)
        found = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            marks = getattr(hints[field.name], "__metadata__", ())
            ways = [mark for mark in marks if isinstance(mark, Reduction) or mark is Mark.PER_CLIENT]
            reduced = any(isinstance(mark, Reduction) for mark in ways)
            if len(ways) > 1 or (reduced and cls.sender == "server"):
                raise TypeError(f"{cls.__name__}: {field.name} cannot be reduced as {sorted(map(str, ways))}")
            found[field.name] = Variable.of(marks)
        return found

    @classmethod
    def is_per_client(cls) -> bool:
        """Whether any variable has a leading axis of clients on the server's side."""
        return any(variable.per_client for variable in cls.variables().values())

    def map_shaped(self, function: Callable[[PyTree], PyTree]) -> Self:
        """Apply a function to each variable that is shaped like the parameters."""
        return self._with({name: function(tree) for name, tree in self._of(lambda variable: variable.shaped).items()})

    def map_per_client(self, function: Callable[[jax.Array], jax.Array]) -> Self:
        """Apply a function to each array of the variables that have a leading axis of clients."""
        own = self._of(lambda variable: variable.per_client)
        return self._with({name: jax.tree.map(function, tree) for name, tree in own.items()})

    def _of(self, chosen: Callable[[Variable], bool]) -> dict[str, PyTree]:
        return {name: getattr(self, name) for name, variable in self.variables().items() if chosen(variable)}

    def _with(self, values: Mapping[str, PyTree]) -> Self:
        return dataclasses.replace(self, **values)  # type: ignore[type-var]


class FromServer(AuxVar):
    """What the server sends to clients: broadcast, except for `PerClient` fields."""

    sender: ClassVar[str] = "server"

    def narrow(self, index: int | jax.Array) -> Self:
        """Return what the client of that index is sent: its own values of `PerClient` fields."""
        return self.map_per_client(lambda leaf: leaf[index])


class FromClients(AuxVar):
    """What each client sends to the server, which gets it reduced over clients.

    A field is summed unless it is annotated as `Max` or `Min`. One annotated as
    `PerClient` reaches the server with a leading axis of clients, zero for those
    that sent nothing.
    """

    sender: ClassVar[str] = "client"

    def merge(self, other: Self) -> Self:
        """Reduce the variables of two (groups of) clients into one."""
        return self._with(
            {name: v.reduction.merge(getattr(self, name), getattr(other, name)) for name, v in self.variables().items()}
        )

    def newcomers(self, new: bool) -> Self:
        """Return the variables with those that tell a client's first message from later ones set."""
        own = self._of(lambda variable: variable.newcomer)
        return self._with({name: jnp.full_like(flag, new) for name, flag in own.items()}) if own else self

    def neutral(self) -> Self:
        """Return variables, shaped like these, that change nothing when merged with others."""
        return self._with({name: v.reduction.neutral(getattr(self, name)) for name, v in self.variables().items()})

    def widen(self, index: int | jax.Array, num_clients: int) -> Self:
        """Give the `PerClient` fields their leading axis, with this client's value at its index."""
        return self.map_per_client(lambda leaf: jnp.zeros((num_clients, *leaf.shape), leaf.dtype).at[index].set(leaf))
