"""Auxiliary variables as declearn carries them: one of its `AuxVar` types for each of ours.

A variable that is shaped like the parameters travels as a `NumpyVector`, whatever the
framework of the model; one number as a Python number; any other as a NumPy array.
With them go the parameters' dtypes and shapes, as a brick may hear from its counterpart
before it has seen a gradient. declearn's server adds up what clients send before its
optimizer sees it: an `AuxVar` is that of a group of clients, and adding two reduces
each variable as its declaration says.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from declearn.model.api import Vector
from declearn.model.sklearn import NumpyVector
from declearn.optimizer.modules import AuxVar

from functional_optimodules import aux_var as ours
from functional_optimodules.aux_var import Reduction, Variable
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.outside import quote
from functional_optimodules.stateful.exchange import Received
from functional_optimodules.types import HostArray, Json
from functional_optimodules.wire.arrays import decode_array
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Specs, require_name, specs_from_json


@dataclasses.dataclass
class Carrier(AuxVar, register=False):
    """An `AuxVar` of declearn for one type of auxiliary variables; `carrier_of` makes its subclasses.

    Attributes:
      carries: the type of the variables; there is a field for each, but for those that tell
        a client's first message from later ones, which a server knows by itself.
      params: what the variables are about, `{path: {"dtype": ..., "shape": [...]}}`.
      clients: the identifiers of the clients whose variables these are; none of a server's.
    """

    carries: ClassVar[type[ours.AuxVar]]
    params: dict[str, Any]
    clients: set[str]

    def __post_init__(self) -> None:
        self.clients = set(self.clients)

    @classmethod
    def of(cls, message: Json, clients: set[str]) -> Self:
        """Return what a brick's facade collected."""
        values = {name: _carried(message["variables"][name], variable) for name, variable in _travelling(cls.carries)}
        return cls(params=message["params"], clients=clients, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, of which nothing is copied."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def aggregate(self, other: Self) -> Self:
        """Reduce the variables of two groups of clients into those of both.

        Raises:
          NotImplementedError: if they come from a server.
          TypeError: if they are of different types.
          ValueError: if a client is in both groups, or they are about different parameters.
        """
        if self.carries.sender == "server":
            raise NotImplementedError(f"{self.carries.__name__} comes from a server: there is nothing to aggregate")
        return super().aggregate(other)

    @staticmethod
    def aggregate_clients(left: set[str], right: set[str]) -> set[str]:
        """Return all clients of two groups.

        Raises:
          ValueError: if a client is in both.
        """
        if twice := left & right:
            raise ValueError(f"{quote(sorted(twice))} would be counted twice")
        return left | right

    @staticmethod
    def aggregate_params(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of two groups of clients.

        Raises:
          ValueError: if they are not the same.
        """
        if left != right:
            raise ValueError(f"clients sent variables of different parameters: {quote(left)} and {quote(right)}")
        return left

    def prepare_for_secagg(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what secure aggregation sums, and what stays in clear text.

        Raises:
          NotImplementedError: if it is from a server, or a variable is not summed over clients.
        """
        travelling = dict(_travelling(self.carries))
        if self.carries.sender == "server" or any(v.reduction is not Reduction.SUM for v in travelling.values()):
            raise NotImplementedError(f"{self.carries.__name__} is not summed over clients, as secure aggregation does")
        summed = {name: getattr(self, name) for name in travelling}
        return summed, {"params": self.params, "clients": self.clients}

    def received(self, module: OptiModule[Any], known: Specs | None, heard: tuple[str, ...]) -> Received:
        """Return what this comes to for the facade of a brick.

        Args:
          module: the brick that receives it.
          known: the specs of its parameters, where there are any.
          heard: on a server, the clients that it has heard of.

        Raises:
          TypeError: if a variable is of the wrong kind.
          ValueError: if it is about other parameters, a shape is wrong, a value is not finite or
            larger than what is taken, or there are more clients than the module's `num_clients`.
        """
        what = f"{type(module).__name__}: {self.carries.__name__}"
        specs = specs_from_json(self.params, what, known, limits().leaves)
        if known is not None:
            known.require_same(specs, what)
            specs = known
        senders = sorted(self.clients)
        for client in senders:
            require_name(client, f"{what}: the identifier of a client")
        new = [client for client in senders if client not in heard]
        total = module.clients()
        if total is not None and len(heard) + len(new) > total:
            raise ValueError(f"{what}: num_clients={total} is less than the {len(heard) + len(new)} clients heard of")
        values: dict[str, Any] = {
            name: _opened(getattr(self, name), variable, specs, len(senders), f"{what}, variable {name!r}")
            for name, variable in _travelling(self.carries)
        }
        flags = {name: jnp.asarray(len(new)) for name, each in self.carries.variables().items() if each.newcomer}
        aux = self.carries(**values, **flags)
        return Received(specs, {module.aux_name or module.name: aux}, (*heard, *new), senders)


@functools.cache
def carrier_of(variables: type[ours.AuxVar]) -> type[Carrier]:
    """Return the type that carries some auxiliary variables, registered with declearn under their full name."""
    fields = [(name, Any) for name, _ in _travelling(variables)]
    namespace: dict[str, Any] = {"carries": variables, "__doc__": variables.__doc__}
    for name, variable in _travelling(variables):
        namespace[f"aggregate_{name}"] = staticmethod(_merging(variable.reduction))
    name = f"{variables.__module__}.{variables.__qualname__}"
    return dataclasses.make_dataclass(name, fields, bases=(Carrier,), namespace=namespace)


def _travelling(variables: type[ours.AuxVar]) -> list[tuple[str, Variable]]:
    return [(name, variable) for name, variable in variables.variables().items() if not variable.newcomer]


def _merging(reduction: Reduction) -> Callable[[Any, Any], Any]:
    def merge(left: Any, right: Any) -> Any:
        if reduction is Reduction.SUM:
            return left + right
        if isinstance(left, Vector):
            return left.maximum(right) if reduction is Reduction.MAX else left.minimum(right)
        return np.maximum(left, right) if reduction is Reduction.MAX else np.minimum(left, right)

    return merge


def _carried(payload: Json, variable: Variable) -> NumpyVector | HostArray | float:
    if variable.shaped:
        return NumpyVector({path: np.asarray(decode_array(each, path)) for path, each in payload.items()})
    array = np.asarray(decode_array(payload, "a variable"))
    return array.item() if variable.scalar else array


def _opened(value: Any, variable: Variable, specs: Specs, clients: int, what: str) -> Any:
    if not variable.shaped:
        array = _checked(value, () if variable.scalar else None, clients, what)
        if (variable.flag or variable.amount) and not 0 <= array <= (clients if variable.flag else math.inf):
            most = f" and at most the {clients} clients" if variable.flag else ""
            raise ValueError(f"{what} is {array}: expected at least 0{most}")
        return array
    if not isinstance(value, Vector):
        raise TypeError(f"{what} should be a Vector, not {type(value).__name__}")
    by_path = specs.by_path
    for path in sorted(value.coefs.keys() ^ by_path.keys()):
        fault = "lacks the leaf" if path in by_path else "has an unknown leaf"
        raise ValueError(f"{what} {fault} {quote(path)}")
    packed = value.pack()
    arrays = {
        path: _checked(packed[path], spec.shape, clients, f"{what} at {path!r}") for path, spec in by_path.items()
    }
    return specs.tree(arrays)


def _checked(value: Any, shape: tuple[int, ...] | None, clients: int, what: str) -> jax.Array:
    """Return a value as an array of JAX, if it is one of numbers of that shape that are taken."""
    if not isinstance(value, np.ndarray | np.generic | int | float) or np.asarray(value).dtype.kind not in "biufV":
        raise TypeError(f"{what} should be an array of numbers, not {quote(value)}")
    if shape is not None and np.shape(value) != shape:
        raise ValueError(f"{what} has the shape {np.shape(value)}: expected {shape}")
    with np.errstate(over="ignore"):  # what overflows in JAX's own precision is refused below
        array = jnp.asarray(value)
    numbers = np.asarray(array)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} has values that are not finite")
    most = limits().magnitude * clients
    if clients and np.abs(numbers).max(initial=0) > most:
        raise ValueError(f"{what} has a value above {most:.3g}, the most that {clients} clients may send: see `Limits`")
    return array
