"""The contract of bricks: what an author writes, as pure functions over pytrees.

    Init(params) -> state
    Step(updates, state, params) -> updates, state
    Round(state) -> state
    Send(state) -> aux;  once delivered: Commit(state) -> state
    Receive(aux, state) -> state

Each may be called under `jit`, `vmap`, `scan` and `shard_map`, and reads nothing but
the hyper-parameters and its arguments.
"""

import abc
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic

import jax
import optax

from functional_optimodules.aux_var import AuxVar, FromClients, Params
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.random.keys import is_key
from functional_optimodules.stateful.dependence import restarted
from functional_optimodules.stateful.facade import AUX_FACADE, CONFIG, FACADE, Facade
from functional_optimodules.types import Json, PyTree, State, Updates


class Brick(Facade, Generic[State], kind="brick"):
    """A plug-in that transforms updates, pure and stateful.

    `init, update = brick` unpacks it, and it is accepted wherever optax and Flax
    read `.init` and `.update`. The facade of `run` and its kin comes for free.

    Attributes:
      packable: whether the brick may be given packed trees: it treats elements alike
        wherever they lie, or goes through `map_parameters`. A class says so in its
        own body; one that says nothing gets each parameter as the model has it.
    """

    packable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What a class says of its methods, it does not say of those that replace them, or that these call.
        cls.packable = vars(cls).get("packable", False)
        if "update" in vars(cls):
            _refuse_optional_arguments(cls)

    @abc.abstractmethod
    def init(self, params: Params) -> State:
        """Make the state.

        Args:
          params: the parameters, a pytree of arrays.

        Returns:
          A `NamedTuple` of arrays and trees shaped like the parameters, which
          shares no buffer with them.
        """

    @abc.abstractmethod
    def update(
        self, updates: Updates, state: State, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        """Take a step.

        Args:
          updates: gradients, or what the brick before made of them. They point
            uphill: only an `Optimizer` multiplies by minus the learning rate.
          state: what `init` or the last step returned.
          params: the parameters, for bricks that need them.
          **extra_args: what other bricks of a chain need. One that this brick needs
            is named, keyword-only and without a default: `*, value, **extra_args`.

        Returns:
          The new updates, of the same dtypes, and the new state.
        """

    def begin_round(self, state: State, params: Params = None) -> State:
        """Return the state at the start of a round: unchanged, or as new if `restarts` says so.

        `params` may be `None`: what needs them then waits for the next `update`.

        Raises:
          ParamsNeeded: a `ValueError`, if it restarts, `init` reads the parameters'
            values, and they are not given. The facade then begins the round with the
            parameters of its next step.
        """
        return restarted(self, state, params) if self.restarts() else state

    def restarts(self) -> bool:
        """Whether each round starts from the state that `init` makes: what a field `round_reset` says."""
        return bool(getattr(self, "round_reset", False))

    def collect(self, state: State) -> AuxVar | Mapping[str, AuxVar] | None:
        """Return what the counterpart should get, or `None`. Reads only."""
        return None

    def commit(self, state: State) -> State:
        """Return what follows once the collected variables are known to have arrived."""
        return state

    def process(self, aux: Any, state: State) -> State:
        """Return the state after receiving what the counterpart collected; reduced over clients on the server.

        Raises:
          NotImplementedError: if the brick receives nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} receives no auxiliary variables")

    def fold_in(self, state: State, integer: int | jax.Array) -> State:
        """Fold an integer into every PRNG key of a state, so that equal bricks draw different numbers."""

        def fold(leaf: jax.Array) -> jax.Array:
            if not is_key(leaf):
                return leaf
            folded = functools.reduce(lambda f, _: jax.vmap(f, (0, None)), range(leaf.ndim), jax.random.fold_in)
            return folded(leaf, integer)

        return jax.tree.map(fold, state)

    def channels(self) -> Mapping[str, "OptiModule"]:
        """Return the modules that exchange auxiliary variables, by the name of these."""
        return {}

    def serves(self) -> bool:
        """Whether it is a server's: it receives what clients send."""
        return any(each.receives and issubclass(each.receives, FromClients) for each in self.channels().values())

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.to_optax())

    def to_optax(self) -> optax.GradientTransformationExtraArgs:
        """Return an optax transformation, the same for equal bricks.

        In a chain it gets extra arguments, and a brick that is not `packable` each
        parameter as the model has it; optax drops the former for what is none of its
        own transformations.
        """
        try:
            return _to_optax(self.bare())
        except TypeError:  # hyper-parameters that are being traced cannot be hashed, nor shared
            return _as_optax(self)


def _as_optax(brick: Brick) -> optax.GradientTransformationExtraArgs:
    adapter = adapted(brick)
    return optax.GradientTransformationExtraArgs(adapter.init, adapter.update)


_to_optax = functools.lru_cache(maxsize=512)(_as_optax)


def _refuse_optional_arguments(cls: type[Brick]) -> None:
    for name, parameter in list(inspect.signature(cls.update).parameters.items())[4:]:
        if parameter.default is not inspect.Parameter.empty:
            raise TypeError(
                f"{cls.__name__}.update: the extra argument {name}={parameter.default!r} has a default, which would be "
                "taken in silence where a wrapper such as `optax.chain` drops extra arguments\n"
                f"    wrong:  def update(self, updates, state, params=None, *, {name}={parameter.default!r}, **extra)\n"
                f"    right:  def update(self, updates, state, params=None, *, {name}, **extra)"
            )


class OptiModule(Brick[State], kind="module"):
    """A brick that transforms gradients, and may exchange auxiliary variables with a counterpart.

    Attributes:
      aux_name: the name that a pair shares, for modules that exchange variables.
      sends: the type of what `collect` returns.
      receives: the type of what `process` takes. A module that receives what
        clients send is a server's.
    """

    aux_name: ClassVar[str | None] = None
    sends: ClassVar[type[AuxVar] | None] = None
    receives: ClassVar[type[AuxVar] | None] = None
    _final: ClassVar[frozenset[str]] = CONFIG | FACADE | AUX_FACADE

    def channels(self) -> "Mapping[str, OptiModule]":
        return {self.aux_name or self.name: self} if self.sends or self.receives else {}

    def clients(self) -> int | None:
        """How many clients there are, for a server's module that knows: what a field `num_clients` says."""
        return getattr(self, "num_clients", None)

    def collect_aux_var(self) -> dict[str, Json] | None:
        """Return a message for the counterpart, in JSON values, or `None`; the same again if asked again.

        A server's may be `{"per_client": {client: message}}`, of which each
        client is handed its own, and sending it begins the round. What the message
        says is committed by the next `run`, `on_round_start` or `process_aux_var`,
        unless it is retracted.
        """
        return next(iter(self._session.collect().values()), None)

    def retract_aux_var(self) -> None:
        """Say that the last collected message is known to be lost: it will not be committed."""
        self._session.retract()

    def process_aux_var(self, aux_var: Mapping[str, Json]) -> None:
        """Take what the counterpart's `collect_aux_var` gave; on a server, a dict of these keyed by client.

        Raises:
          KeyError: if a variable is missing or unknown.
          NotImplementedError: if the module receives nothing.
          TypeError: if a variable is of the wrong kind, or from the wrong side.
          ValueError: if a shape is wrong, a value is not finite, or there is no
            client. Each names the variable, and on a server the client. The
            state stays as it was.
        """
        if self.receives is None:
            raise NotImplementedError(f"{type(self).__name__} receives no auxiliary variables")
        self._session.process({self.aux_name or self.name: aux_var})


class Regularizer(Brick[State], kind="regularizer"):
    """A brick that adds a penalty's gradient, and needs the parameters for it.

    Its contract is that of a module, without auxiliary variables.
    """

    _final: ClassVar[frozenset[str]] = CONFIG | FACADE

    def run(self, gradients: Updates, weights: Params) -> PyTree:  # type: ignore[override]
        """Add the penalty's gradient by one compiled `update`, and keep the new state.

        Args:
          gradients: a pytree of arrays. They are left intact.
          weights: the parameters, in the same container.

        Returns:
          The regularized gradients, of the same shapes and dtypes.

        Raises:
          ValueError: if the weights are `None`, or the structure, a shape or a
            dtype is not that of the state; the state stays as it was.
          RuntimeError: if called while tracing.
        """
        self.require(weights)
        return super().run(gradients, weights)

    def require(self, params: Params) -> Params:
        """Return the parameters, or raise a `ValueError` where there are none."""
        if params is None:
            raise ValueError(
                f"{type(self).__name__} needs the parameters: pass `params` to `update`, `weights` to `run`"
            )
        return params


def list_optim_modules() -> dict[str, type[OptiModule]]:
    """Return the registered modules by name."""
    return dict(sorted(OptiModule._registry.items()))


def list_optim_regularizers() -> dict[str, type[Regularizer]]:
    """Return the registered regularizers by name."""
    return dict(sorted(Regularizer._registry.items()))
