"""Bricks as plug-ins of declearn: its optimizers run them on the Vectors of any framework.

Each brick of this library that declearn can call is registered with it under the name
`fo-<name>`, and so a declearn server may name it in the configuration of its clients, who
import this module.
"""

import functools
import types
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, overload

from declearn.model.api import Vector
from declearn.optimizer.modules import OptiModule as DeclearnModule
from declearn.optimizer.regularizers import Regularizer as DeclearnRegularizer

from functional_optimodules.aux_var import FromClients
from functional_optimodules.brick import Brick, OptiModule, Regularizer, list_optim_modules, list_optim_regularizers
from functional_optimodules.contract import Contract
from functional_optimodules.integrations.declearn.carriers import Carrier, carrier_of
from functional_optimodules.integrations.declearn.vectors import arrays_of, vector_like
from functional_optimodules.modules.decay import WeightDecayModule
from functional_optimodules.stateful.session import Session
from functional_optimodules.types import Json

PREFIX = "fo-"


class ModuleAdapter(DeclearnModule[Carrier], register=False):
    """A brick as an `OptiModule` of declearn; `to_declearn` makes its subclasses, one for each class of bricks.

    Gradients are computed in JAX's precision: those of float64 in float32, unless JAX is in
    its 64-bit mode. What comes out has the dtypes of what came in.

    Attributes:
      kind: the brick's class.
      sends: the type of what it sends; `None` for nothing.
      receives: the type of what it receives, likewise.
      brick: the brick.
      client: what tells this client from others, where the brick is a client's; it is part of the state.
    """

    kind: ClassVar[type[OptiModule[Any]]]
    sends: ClassVar[type[Carrier] | None]
    receives: ClassVar[type[Carrier] | None]

    def __init__(self, **config: Json) -> None:
        """Build the brick.

        Args:
          **config: its fields, as in its own configuration.

        Raises:
          KeyError, TypeError, ValueError: as the brick's `from_config` does.
        """
        self.brick = self.kind.from_config(config)
        self.client = str(uuid.uuid4())
        self._session = Session(self.brick)

    def run(self, gradients: Vector[Any]) -> Vector[Any]:
        return vector_like(gradients, self._session.step(arrays_of(gradients), None, {}))

    def on_round_start(self) -> None:
        self._session.begin_round()

    def collect_aux_var(self) -> Carrier | None:
        """Return what the brick sends; `None` if nothing, or before anything is known of the parameters.

        It is the same if asked again. What it says is committed by the next step, round or message.
        """
        message = next(iter(self._session.collect().values()), None)
        if message is None or self.sends is None:
            return None
        return self.sends.of(message, {self.client} if issubclass(self.sends.carries, FromClients) else set())

    def process_aux_var(self, aux_var: Carrier) -> None:
        """Take what the counterpart's `collect_aux_var` gave; on a server, of all clients together.

        Raises:
          NotImplementedError: if the brick receives nothing.
          TypeError: if it is of another type, or a variable of the wrong kind.
          ValueError: as `Carrier.received` does. The state stays as it was.
        """
        name = type(self.brick).__name__
        if self.receives is None:
            raise NotImplementedError(f"{name} receives no auxiliary variables")
        if not isinstance(aux_var, self.receives):
            raise TypeError(f"{name}: expected {self.receives.__name__}, not {type(aux_var).__name__}")
        memory = self._session.memory
        self._session.receive(aux_var.received(self.brick, memory.fit and memory.fit.specs, memory.clients))

    def get_config(self) -> dict[str, Any]:
        return self.brick.get_config()

    def get_state(self) -> dict[str, Any]:
        """Return the state as JSON values: that of the brick's facade, and `client`."""
        return {"client": self.client, **self._session.save()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned.

        Raises:
          KeyError, TypeError, ValueError: as the brick's `set_state` does. The state stays as it was.
        """
        if "client" not in state:
            raise KeyError(f"{type(self.brick).__name__}: the state lacks the key 'client'")
        self._session.load({key: value for key, value in state.items() if key != "client"})
        self.client = str(state["client"])


class RegularizerAdapter(DeclearnRegularizer, register=False):
    """A brick as a `Regularizer` of declearn; as `ModuleAdapter`.

    Attributes:
      kind: the brick's class.
      brick: the brick.
    """

    kind: ClassVar[type[Regularizer[Any]]]

    def __init__(self, **config: Json) -> None:
        """Build the brick.

        Args:
          **config: its fields, as in its own configuration.

        Raises:
          KeyError, TypeError, ValueError: as the brick's `from_config` does.
        """
        self.brick = self.kind.from_config(config)
        self._session = Session(self.brick)

    def run(self, gradients: Vector[Any], weights: Vector[Any]) -> Vector[Any]:
        return vector_like(gradients, self._session.step(arrays_of(gradients), arrays_of(weights), {}))

    def on_round_start(self) -> None:
        self._session.begin_round()

    def get_config(self) -> dict[str, Any]:
        return self.brick.get_config()


@overload
def to_declearn(brick: OptiModule[Any]) -> ModuleAdapter: ...
@overload
def to_declearn(brick: Regularizer[Any]) -> RegularizerAdapter: ...
def to_declearn(brick: OptiModule[Any] | Regularizer[Any]) -> ModuleAdapter | RegularizerAdapter:
    """Return a brick as a plug-in of declearn, without its facade's state.

    It may be given to `declearn.optimizer.Optimizer`, runs on Vectors of NumPy, PyTorch, JAX or
    TensorFlow, exchanges auxiliary variables with its counterpart, and is saved by `get_state`. Peers build
    it from its name, `fo-` and the brick's own, and its configuration; of a class that is not this
    library's, each gives an instance to this function first.

    Args:
      brick: a module or a regularizer.

    Raises:
      KeyError: if another class of that name was given before.
      TypeError: if it is neither, needs what declearn does not tell its plug-ins, or has a field that
        cannot be written in a configuration.
    """
    if not isinstance(brick, OptiModule | Regularizer):
        raise TypeError(f"to_declearn takes a module or a regularizer, not {type(brick).__name__}")
    if reason := _obstacle(type(brick)):
        raise TypeError(f"to_declearn: {type(brick).__name__} {reason}")
    return _adapter(type(brick))(**brick.get_config())


def _obstacle(kind: type[Brick[Any]]) -> str:
    """Return why declearn cannot run a class of bricks; nothing if it can."""
    if asked := sorted(frozenset().union(*kind._asked)):
        return f"asks for {', '.join(map(repr, asked))} of the round, which declearn does not tell its plug-ins"
    if kind is WeightDecayModule:
        return "needs the parameters, which declearn gives regularizers alone: its optimizers have a `w_decay`"
    if kind.share is not Contract.share:
        return "chooses the parameters that are sent, which declearn leaves to no plug-in"
    if any(each is not None and each.is_per_client() for each in (kind.sends, kind.receives)):
        return "has variables of each client on the server's side, and declearn sends the same to all"
    variables = {name for each in (kind.sends, kind.receives) if each is not None for name in each.variables()}
    if taken := sorted(variables & {*dir(Carrier), *Carrier.__annotations__}):
        return f"has variables named {taken}, as an `AuxVar` of declearn has attributes"
    return ""


@functools.cache
def _adapter(kind: type[Any]) -> type[Any]:
    base = ModuleAdapter if issubclass(kind, OptiModule) else RegularizerAdapter
    own: dict[str, Any] = {"kind": kind, "name": f"{PREFIX}{kind.name}", "__doc__": kind.__doc__}
    if base is ModuleAdapter:
        sends, receives = (None if each is None else carrier_of(each) for each in (kind.sends, kind.receives))
        aux_name = kind.aux_name and f"{PREFIX}{kind.aux_name}"
        own |= {"sends": sends, "receives": receives, "auxvar_cls": sends or receives, "aux_name": aux_name}
    return types.new_class(kind.__name__, (base,), {}, lambda namespace: namespace.update(own))


# Those of others have no say in what an import does.
for _kind in (*list_optim_modules().values(), *list_optim_regularizers().values()):
    if _kind.__module__.startswith("functional_optimodules.") and not _obstacle(_kind):
        _adapter(_kind)
