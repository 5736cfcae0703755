"""The pure contract that modules, regularizers and optimizers share.

    Init(params) -> state
    Step(updates, state, params) -> updates, state
    Round(state) -> state
    Send(state) -> aux;  once delivered: Commit(state) -> state
    Receive(aux, state) -> state

Each is a pure function over pytrees: it may be called under `jit`, `vmap`,
`scan` and `shard_map`, and reads nothing but the hyper-parameters and its
arguments.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.core.aux_var import AuxVar
from functional_optimodules.core.dependence import reads_values
from functional_optimodules.core.encoding import Layout, is_key
from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.core.facade import AUX_FACADE, CONFIG, FACADE, Facade
from functional_optimodules.core.packed import unpacking
from functional_optimodules.core.paths import ParamsNeeded, PathTree, Spec, is_path_tree

_UNPACKED = ("init", "update", "begin_round", "process")


class Brick(Facade, kind="brick"):
    """A plug-in that transforms updates, pure and stateful.

    `init, update = brick` unpacks it, and it is accepted wherever optax and Flax
    read `.init` and `.update`. The facade of `run` and its kin comes for free.

    Attributes:
      packable: whether the brick may be given packed trees: it treats elements alike
        wherever they lie, or goes through `map_parameters`. One that says nothing
        gets each parameter as the model has it.
    """

    packable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "packable" not in own and any(name in own for name in _UNPACKED):
            cls.packable = False  # what a class says of its methods, it does not say of those that replace them
        if not cls.packable and "kind" not in kwargs:
            for name in _UNPACKED:
                setattr(cls, name, unpacking(getattr(cls, name)))

    @abc.abstractmethod
    def init(self, params: Any) -> Any:
        """Make the state.

        Args:
          params: the parameters, a pytree of arrays.

        Returns:
          A `NamedTuple` of arrays and trees shaped like the parameters, which
          shares no buffer with them.
        """

    @abc.abstractmethod
    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        """Take a step.

        Args:
          updates: gradients, or what the brick before made of them. They point
            uphill: only an `Optimizer` multiplies by minus the learning rate.
          state: what `init` or the last step returned.
          params: the parameters, for bricks that need them.
          **extra_args: what other bricks of a chain need.

        Returns:
          The new updates, of the same dtypes, and the new state.
        """

    def begin_round(self, state: Any, params: Any = None) -> Any:
        """Return the state at the start of a round: unchanged, or as new if `round_reset` is set.

        `params` may be `None`: what needs them then waits for the next `update`.

        Raises:
          ParamsNeeded: a `ValueError`, if `round_reset` is set, `init` reads the
            parameters' values, and they are not given. The facade then begins the
            round with the parameters of its next step.
        """
        if not getattr(self, "round_reset", False):
            return state
        if params is None:
            params = _params_within(self.init, state)
            if reads_values(self.init, params):
                raise ParamsNeeded(f"{type(self).__name__}: round_reset restarts from the parameters: pass `params`")
        fresh = self.init(params)
        return jax.tree.map(lambda new, old: new if is_key(old) else new.astype(old.dtype), fresh, state)

    def collect(self, state: Any) -> Any:
        """Return what the counterpart should get, or `None`. Reads only."""
        return None

    def commit(self, state: Any) -> Any:
        """Return what follows once the collected variables are known to have arrived."""
        return state

    def process(self, aux: Any, state: Any) -> Any:
        """Return the state after receiving what the counterpart collected; reduced over clients on the server.

        Raises:
          NotImplementedError: if the brick receives nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} receives no auxiliary variables")

    def fold_in(self, state: Any, integer: Any) -> Any:
        """Fold an integer into every PRNG key of a state, so that equal bricks draw different numbers."""

        def fold(leaf: Any) -> Any:
            if not is_key(leaf):
                return leaf
            folded = functools.reduce(lambda f, _: jax.vmap(f, (0, None)), range(leaf.ndim), jax.random.fold_in)
            return folded(leaf, integer)

        return jax.tree.map(fold, state)

    def channels(self) -> Mapping[str, Any]:
        """Return the modules that exchange auxiliary variables, by the name of these."""
        return {}

    def collect_channels(self, state: Any) -> dict[str, Any]:
        """Return what each channel sends."""
        return {}

    def process_channels(self, auxes: Mapping[str, Any], state: Any) -> Any:
        """Return the state after each channel took what it receives."""
        return state

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def to_optax(self) -> optax.GradientTransformationExtraArgs:
        """Return an optax transformation, the same for equal bricks; extra arguments pass through a chain."""
        try:
            return _to_optax(self.bare())
        except TypeError:  # hyper-parameters that are being traced cannot be hashed, nor shared
            return optax.GradientTransformationExtraArgs(self.init, self.update)


@functools.lru_cache(maxsize=512)
def _to_optax(brick: Brick) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(brick.init, brick.update)


def _params_within(init: Callable[[Any], Any], state: Any) -> Any:
    """Find a tree shaped like the parameters in a state: `round_reset` needs no more of them."""
    with shapes_only():
        layout = Layout(jax.eval_shape(init, PathTree({"": Spec((), jnp.float32)})))
    return next((value for _, part, value in layout.split(state) if is_path_tree(part)), PathTree())


class OptiModule(Brick, kind="module"):
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

    def channels(self) -> dict[str, "OptiModule"]:
        """Return the module by the name of its auxiliary variables, if it has any."""
        return {self.aux_name or self.name: self} if self.sends or self.receives else {}

    def collect_channels(self, state: Any) -> dict[str, Any]:
        """Return what `collect` returns, by the name of its auxiliary variables."""
        aux = self.collect(state)
        return {} if aux is None else {self.aux_name or self.name: aux}

    def process_channels(self, auxes: Mapping[str, Any], state: Any) -> Any:
        """Return the state after `process`, given what it takes by name."""
        (aux,) = auxes.values()
        return self.process(aux, state)

    def collect_aux_var(self) -> dict[str, Any] | None:
        """Return a message for the counterpart, in JSON values, or `None`; the same again if asked again.

        A server's may be `{"per_client": {client: message}}`, of which each
        client is handed its own. What the message says is committed by the next
        `run`, `on_round_start` or `process_aux_var`, unless it is retracted.
        """
        return next(iter(self._session.collect().values()), None)

    def retract_aux_var(self) -> None:
        """Say that the last collected message is known to be lost: it will not be committed."""
        self._session.retract()

    def process_aux_var(self, aux_var: Mapping[str, Any]) -> None:
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


def list_optim_modules() -> dict[str, type[OptiModule]]:
    """Return the registered modules by name."""
    return dict(sorted(OptiModule._registry.items()))
