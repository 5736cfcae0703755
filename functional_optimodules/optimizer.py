"""The optimizer: regularizers, then modules, then the learning rate and decoupled weight decay.

Init(lrate, w_decay, regularizers, modules):
    the clocks of the two rates, and the state of each brick
Step(grads, params):
    grads = regularizers(grads, params)
    grads = modules(grads)
    updates = -(lrate * grads + w_decay * params)
Send, Receive: those of the modules, by name
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax

from functional_optimodules.aux_var import AuxVar
from functional_optimodules.brick import Brick, OptiModule, Regularizer
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.contract import Asked, Contract
from functional_optimodules.numerics import real, wide
from functional_optimodules.packing.adapter import Adapter, adapted, packed_like
from functional_optimodules.schedulers import Scheduler, as_scheduler
from functional_optimodules.types import Json, Params, PyTree, Updates

Named = str | tuple[str, Mapping[str, Json]]
"""A plug-in by its name, or by its name and its configuration."""
Rate = float | jax.Array | Scheduler | tuple[str, Mapping[str, Json]] | Callable[[jax.Array], jax.Array]
"""A learning rate or weight decay, in any of its forms."""


class OptimizerState(NamedTuple):
    """State of `Optimizer`.

    Attributes:
      lrate: clock of the learning rate.
      w_decay: clock of the weight decay.
      regularizers: state of each regularizer by name (`ridge`, `ridge-2`, ...).
      modules: state of each module by name.
    """

    lrate: PyTree
    w_decay: PyTree
    regularizers: dict[str, PyTree]
    modules: dict[str, PyTree]


class Optimizer(Brick[OptimizerState], register=False):
    """A gradient-descent optimizer made of plug-ins.

        updates = -(lrate * modules(regularizers(grads, params)) + w_decay * params)

    The decay is not multiplied by the learning rate: what AdamW of optax or PyTorch
    calls `weight_decay` is `w_decay / lrate` here.

    It is itself a brick, pure and stateful, accepted as `tx` by Flax and optax.

    Attributes:
      lrate: the learning rate: a number, a `Scheduler` or its `(name, config)`
        pair, or any function of the step, such as an optax schedule.
      w_decay: the rate of decoupled weight decay, likewise.
      regularizers: instances, names or `(name, config)` pairs, applied in order.
      modules: the same, of modules.

    Raises:
      ValueError: if two modules share the name of their auxiliary variables.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
    """

    name: ClassVar[str] = "optimizer"
    packable: ClassVar[bool] = True
    lrate: float | Scheduler | Callable[[jax.Array], jax.Array] = hyperparameter(within="[0, inf)")
    w_decay: float | Scheduler | Callable[[jax.Array], jax.Array] = hyperparameter(default=0.0, within="[0, inf)")
    regularizers: tuple[Regularizer, ...] = ()
    modules: tuple[OptiModule, ...] = ()

    if TYPE_CHECKING:  # what is accepted is more than what is stored

        def __init__(
            self,
            lrate: Rate,
            w_decay: Rate = 0.0,
            regularizers: Sequence[Regularizer | Named] = (),
            modules: Sequence[OptiModule | Named] = (),
        ) -> None: ...

    def validate(self) -> None:
        names = [name for module in self.modules for name in module.channels()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"Optimizer: {names.count(name)} modules exchange auxiliary variables named {name!r}; each name "
                    "may be used once"
                )

    def state_name(self) -> str:
        return " ".join([self.name, *(brick.state_name() for brick in (*self.regularizers, *self.modules))])

    @property
    def _decays(self) -> bool:
        return not (isinstance(self.w_decay, int | float) and self.w_decay == 0)

    @property
    def _rates(self) -> tuple[Scheduler, Scheduler]:
        return as_scheduler(self.lrate), as_scheduler(self.w_decay)

    @property
    def _regularizers(self) -> dict[str, Adapter]:
        return _labelled(self.regularizers)

    @property
    def _modules(self) -> dict[str, Adapter]:
        return _labelled(self.modules)

    def init(self, params: Params) -> OptimizerState:
        lrate, w_decay = self._rates
        return OptimizerState(
            lrate=lrate.init(),
            w_decay=w_decay.init(),
            regularizers={label: brick.init(params) for label, brick in self._regularizers.items()},
            modules={label: brick.init(params) for label, brick in self._modules.items()},
        )

    def update(
        self, updates: Updates, state: OptimizerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, OptimizerState]:
        """Take a step: turn gradients into updates that are ready to be added to the parameters.

        Raises:
          ValueError: if the parameters are needed and not given.
        """
        if self._decays and params is None:
            raise ValueError(f"Optimizer with w_decay={self.w_decay!r} needs the parameters: pass `params`")
        updates = packed_like(updates, params)
        lrate, w_decay = self._rates
        eta, decay = lrate.value(state.lrate), w_decay.value(state.w_decay)
        if "lrate" in self.asks().step:
            extra_args = {**extra_args, "lrate": real(eta)}
        regularizers, modules = dict(state.regularizers), dict(state.modules)
        for label, regularizer in self._regularizers.items():
            updates, regularizers[label] = regularizer.update(updates, regularizers[label], params, **extra_args)
        for label, module in self._modules.items():
            updates, modules[label] = module.update(updates, modules[label], params, **extra_args)

        def scale(g: jax.Array, *param: jax.Array) -> jax.Array:
            total = _times(eta, wide(g)) + sum(_times(decay, wide(p)) for p in param)
            return (-total).astype(g.dtype)

        updates = jax.tree.map(scale, updates, *([params] if self._decays else []))
        clocks = lrate.advance(state.lrate), w_decay.advance(state.w_decay)
        return updates, OptimizerState(*clocks, regularizers, modules)

    def begin_round(self, state: OptimizerState, params: Params = None) -> OptimizerState:
        """Begin a round of both rates' clocks and of every brick."""
        lrate, w_decay = self._rates
        begun = self._each(state, lambda brick, own: brick.begin_round(own, params))
        return begun._replace(lrate=lrate.begin_round(state.lrate), w_decay=w_decay.begin_round(state.w_decay))

    def end_round(self, state: OptimizerState, **known: PyTree) -> OptimizerState:
        return self._each(state, lambda brick, own: brick.end_round(own, **known))

    def _each(self, state: OptimizerState, function: Callable[[Adapter, PyTree], PyTree]) -> OptimizerState:
        def made(bricks: dict[str, Adapter], states: dict[str, PyTree]) -> dict[str, PyTree]:
            return {label: function(brick, states[label]) for label, brick in bricks.items()}

        regularizers = made(self._regularizers, state.regularizers)
        return state._replace(regularizers=regularizers, modules=made(self._modules, state.modules))

    def asks(self) -> Asked:
        each = [brick.asks() for brick in (*self.regularizers, *self.modules)]
        return Asked(*(frozenset().union(*names) for names in zip(Asked(frozenset(), frozenset()), *each, strict=True)))

    def share(self, params: Params, state: OptimizerState) -> Params:
        for label, module in self._modules.items():
            params = module.share(params, state.modules[label])
        return params

    def metrics(self, state: OptimizerState) -> dict[str, jax.Array]:
        """Return what the modules say of the last step, by `module/metric`."""
        each = {label: module.brick.metrics(state.modules[label]) for label, module in self._modules.items()}
        return {f"{label}/{name}": value for label, found in each.items() for name, value in found.items()}

    def collect(self, state: OptimizerState) -> dict[str, AuxVar]:
        """Return what the modules send, by the name of their auxiliary variables."""
        auxes: dict[str, AuxVar] = {}
        for label, module in self._modules.items():
            auxes |= module.collect(state.modules[label])
        return auxes

    def commit(self, state: OptimizerState) -> OptimizerState:
        return state._replace(
            modules={label: module.commit(state.modules[label]) for label, module in self._modules.items()}
        )

    def process(self, aux: Mapping[str, AuxVar], state: OptimizerState) -> OptimizerState:
        """Hand what was received, by name, to the modules that it is for.

        Raises:
          KeyError: if no module has such a name.
        """
        for name in aux:
            if name not in self.channels():
                raise KeyError(f"Optimizer: no module takes auxiliary variables named {name!r}")
        modules = dict(state.modules)
        for label, module in self._modules.items():
            own = {name: aux[name] for name in module.brick.channels() if name in aux}
            modules[label] = module.process(own, modules[label])
        return state._replace(modules=modules)

    def forget(self, state: OptimizerState, **given: PyTree) -> OptimizerState:
        """Return a server's state without what a client has given; `aux` by the names of auxiliary variables."""
        modules, auxes = dict(state.modules), given.get("aux", {})
        for label, module in self._modules.items():
            own = {name: auxes[name] for name in module.brick.channels() if name in auxes}
            modules[label] = module.forget(modules[label], given.get("delta"), own)
        return state._replace(modules=modules)

    def recalls(self) -> frozenset[str]:
        return frozenset().union(*(module.recalls() for module in self.modules))

    def channels(self) -> dict[str, Contract]:
        return {name: module for each in self.modules for name, module in each.channels().items()}

    def run(  # type: ignore[override]
        self, gradients: Updates, *unnamed: Params, params: Params = None, **extra_args: PyTree
    ) -> PyTree:
        """Do what `compute_updates_from_gradients` does.

        `params` is named: it comes second here and first in the other methods, and
        trees that are swapped would give wrong numbers in silence.

        Raises:
          TypeError: if `params` is not named.
        """
        if unnamed:
            raise TypeError(
                "Optimizer.run takes the parameters by name, lest they be taken for the gradients\n"
                "    wrong:  optimizer.run(gradients, params)\n"
                "    right:  optimizer.run(gradients, params=params)"
            )
        return super().run(gradients, params, **extra_args)

    def compute_updates_from_gradients(self, params: Params, gradients: Updates, **extra_args: PyTree) -> PyTree:
        """Return updates that are ready to be added to the parameters, and keep the new state.

        Args:
          params: the parameters, a pytree of arrays.
          gradients: the gradients, in the same container.
          **extra_args: what else a brick's `update` takes: arrays.

        Raises:
          ValueError: if the structure, a shape or a dtype is not that of the
            state; the state stays as it was.
        """
        return self._session.step(gradients, params, extra_args)

    def apply_gradients(
        self, params: Params, gradients: Updates, *, donate: bool = False, **extra_args: PyTree
    ) -> Params:
        """Return the parameters after a step, by one compiled call, and keep the new state.

        Args:
          params: the parameters, a pytree of arrays.
          gradients: the gradients, in the same container. They are left intact.
          donate: whether the parameters' buffers may be reused: the caller must
            then no longer use the parameters that were passed.
          **extra_args: what else a brick's `update` takes: arrays.

        Raises:
          ValueError: as `compute_updates_from_gradients` does.
        """
        return self._session.apply(params, gradients, extra_args, donate)

    def start_round(self) -> None:
        """Begin a round, also before the first step."""
        self.on_round_start()

    def finish_round(self, **known: PyTree) -> None:
        """End a client's round, before its messages are collected, where a brick asks for what is known of it.

        Args:
          **known: what the bricks ask for, such as `delta`, the parameters after the
            round less those before it, and `num_steps`; see `OptiModule.end_round`.

        Raises:
          TypeError: if a brick asks for something else.
        """
        self.on_round_end(**known)

    def share_params(self, params: Params) -> Params:
        """Return what a server sends to its clients as the parameters: its own, unless a module looks ahead."""
        return self._session.share(params)

    def collect_aux_var(self) -> dict[str, Json]:
        """Return the modules' messages for their counterparts by `aux_name`; the same again if asked again.

        On a server, sending the broadcast begins the round, if nobody has begun it.
        """
        return self._session.collect()

    def retract_aux_var(self) -> None:
        """Say that the last collected messages are known to be lost: they will not be committed.

        Raises:
          RuntimeError: if there are none, or what came since has committed them.
        """
        self._session.retract()

    def process_aux_var(self, aux_var: Mapping[str, Json]) -> None:
        """Take the counterpart's messages by `aux_name`.

        A server takes those of a round as they arrive, `{client: {aux_name: message}}`,
        or sorted, `{aux_name: {client: message}}`.

        Raises:
          KeyError: if no module has such a name, or a variable is missing or unknown.
          TypeError: if a variable is of the wrong kind, or from the wrong side.
          ValueError: if a shape is wrong, a value is not finite, out of its range or above
            `Limits`, there is no client, or one too many. Each names the variable, and on
            a server the client. The state stays as it was.
        """
        self._session.process(aux_var)


def _times(rate: jax.Array, array: jax.Array) -> jax.Array:
    return rate.astype(array.dtype) * array


def _labelled(bricks: Sequence[Brick]) -> dict[str, Adapter]:
    """Name bricks apart: `adam`, `adam-2`."""
    labelled: dict[str, Adapter] = {}
    for brick in bricks:
        names = itertools.chain([brick.name], (f"{brick.name}-{number}" for number in itertools.count(2)))
        labelled[next(name for name in names if name not in labelled)] = adapted(brick)
    return labelled
