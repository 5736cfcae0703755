"""The optimizer: regularizers, modules, learning rate and decoupled weight decay.

Init(lrate, w_decay, regularizers, modules, groups, wrappers):
    the clocks of the rates, and the state of each plug-in
Step(grads, params):
    grads = regularizers(grads, params)
    grads = modules(grads)
    for each group: grads = its modules(its regularizers(grads, params)) for its parameters
    updates = -(lrate * grads + w_decay * params), by each group's own rates
    all of this within the wrappers, the first outermost
Send, Receive: those of the modules, by name
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import AuxVar
from functional_optimodules.brick import Brick, OptiModule, Regularizer
from functional_optimodules.checked import name_of, require_like
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.config.outside import quote
from functional_optimodules.contract import KNOWN, Asked, Contract
from functional_optimodules.descent import adapters, is_zero, scaled, through
from functional_optimodules.groups import Group, GroupState, Named, Rate, View, assign, require_distinct
from functional_optimodules.hyperparameters import HyperParameter, hyperparameters, labelled, replaced, require_known
from functional_optimodules.metrics import OF_A_BRICK, OF_A_GROUP, OF_A_STEP, Told, flat, unsaid
from functional_optimodules.numerics import real
from functional_optimodules.packing.adapter import Adapter, adapted, packed_like, packing_for
from functional_optimodules.packing.tree import Packed, Packing, is_packed, packing_of, shapes
from functional_optimodules.schedulers import Scheduler, as_scheduler
from functional_optimodules.types import Json, Params, PyTree, Updates
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs, is_path_tree, matching, show, unwrapped
from functional_optimodules.wrappers.wrapper import Step, Wrapper, require_own_dtypes


class OptimizerState(NamedTuple):
    """State of `Optimizer`.

    Attributes:
      lrate: clock of the learning rate.
      w_decay: clock of the weight decay.
      regularizers: state of each regularizer by name (`ridge`, `ridge-2`, ...).
      modules: state of each module by name.
      groups: state of each group by name, where its parameters alone have any.
      wrappers: state of each wrapper by name.
      live: of each live hyper-parameter by its path the value, a float32 scalar, or the clock
        of the scheduler that drives it.
      watched: what was watched in the last step by name, float32 scalars.
    """

    lrate: PyTree
    w_decay: PyTree
    regularizers: dict[str, PyTree]
    modules: dict[str, PyTree]
    groups: dict[str, GroupState] = {}  # noqa: RUF012
    wrappers: dict[str, PyTree] = {}  # noqa: RUF012
    live: dict[str, PyTree] = {}  # noqa: RUF012
    watched: dict[str, jax.Array] = {}  # noqa: RUF012


class Optimizer(Brick[OptimizerState], register=False):
    """A gradient-descent optimizer made of plug-ins.

        updates = -(lrate * modules(regularizers(grads, params)) + w_decay * params)

    The decay is not multiplied by the learning rate: what AdamW of optax or PyTorch
    calls `weight_decay` is the module `weight-decay` here, after the others.

    It is itself a brick, pure and stateful, accepted as `tx` by Flax and optax.

    Attributes:
      lrate: the learning rate: a number, a `Scheduler` or its `(name, config)`
        pair, or any function of the step, such as an optax schedule.
      w_decay: the rate of decoupled weight decay, likewise.
      regularizers: instances, names or `(name, config)` pairs, applied in order.
      modules: the same, of modules.
      groups: `Group`s, or their configurations: what is done otherwise for some
        parameters, each of which is of the first group that matches it. Regularizers and
        modules come first, for all parameters that are not frozen.
      wrappers: wrappers, as modules are given, around the whole step: the first is outermost.
      live: paths of hyper-parameters that the state holds, such as `"lrate"`,
        `"modules/adam/beta_1"` or a pattern, `"modules/**"`: they are read and set while it
        runs, and no program is compiled for it. A pair of a path and a scheduler has the
        scheduler drive it.
      watch: names, or patterns, of what the state tells about the last step: `gradient_norm`,
        `update_norm`, `param_norm`, `update_ratio`, `lrate`, `w_decay` and `count`, of steps; with
        the prefix `groups/<name>/` all but the last two of a group's; of each regularizer and module
        `<name>/norm_before`, `<name>/norm_after` and what it says itself in `measure`.
      packed: whether the state is kept packed for parameters that come as they are, and
        gradients are packed inside of the step. See `pack` for the better way, to keep
        the parameters packed.

    Raises:
      ValueError: if two modules share the name of their auxiliary variables, groups have one
        name or claim one path, or what is live is no hyper-parameter.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
    """

    name: ClassVar[str] = "optimizer"
    packable: ClassVar[bool] = True
    lrate: float | Scheduler | Callable[[jax.Array], jax.Array] = hyperparameter(within="[0, inf)")
    w_decay: float | Scheduler | Callable[[jax.Array], jax.Array] = hyperparameter(default=0.0, within="[0, inf)")
    regularizers: tuple[Regularizer, ...] = ()
    modules: tuple[OptiModule, ...] = ()
    groups: tuple[Group, ...] = hyperparameter(default=(), omit=True)
    wrappers: tuple[Wrapper, ...] = hyperparameter(default=(), omit=True)
    live: tuple[str | tuple[str, Scheduler], ...] = hyperparameter(default=(), omit=True)
    watch: tuple[str, ...] = hyperparameter(default=(), omit=True)
    packed: bool = hyperparameter(default=False, omit=True)

    if TYPE_CHECKING:  # what is accepted is more than what is stored

        def __init__(
            self,
            lrate: Rate,
            w_decay: Rate = 0.0,
            regularizers: Sequence[Regularizer | Named] = (),
            modules: Sequence[OptiModule | Named] = (),
            groups: Sequence[Group | Mapping[str, Json]] = (),
            wrappers: Sequence[Wrapper | Named] = (),
            live: Sequence[str | tuple[str, Scheduler | Named]] = (),
            watch: Sequence[str] = (),
            packed: bool = False,
        ) -> None: ...

    def validate(self) -> None:
        names = [name for module in self.modules for name in module.channels()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"Optimizer: {names.count(name)} modules exchange auxiliary variables named {name!r}; each name "
                    "may be used once"
                )
        require_distinct(self.groups)
        if names and self._frozen:
            raise ValueError(
                f"Optimizer: group {min(self._frozen)!r} is frozen, and a module exchanges the auxiliary variables "
                f"{names[0]!r}, which are about all parameters: leave out what is frozen from the parameters"
            )
        self._driven()

    def state_name(self) -> str:
        groups = [f"[{label}{_names((*each.regularizers, *each.modules))}]" for label, each in self._groups.items()]
        wrappers = [wrapper.name for wrapper in self.wrappers]
        return " ".join([f"{self.name}{_names((*self.regularizers, *self.modules))}", *groups, *wrappers])

    @property
    def _decays(self) -> bool:
        rates = [self.w_decay, *(group.w_decay for group in self.groups if group.w_decay is not None)]
        return not all(is_zero(rate) for rate in rates)

    @property
    def _rates(self) -> tuple[Scheduler, Scheduler]:
        return as_scheduler(self.lrate), as_scheduler(self.w_decay)

    @property
    def _groups(self) -> dict[str, Group]:
        return labelled(self.groups)

    @property
    def _frozen(self) -> frozenset[str]:
        return frozenset(label for label, group in self._groups.items() if group.frozen)

    @functools.cached_property
    def _hyperparameters(self) -> dict[str, HyperParameter]:
        return dict(hyperparameters(self))

    def _driven(self) -> dict[str, Scheduler | None]:
        """Return what is live by its path, and the scheduler that drives it, if one does.

        Raises:
          ValueError: if there is no such hyper-parameter, or one is named twice.
        """
        driven: dict[str, Scheduler | None] = {}
        for entry in self.live:
            path, scheduler = (entry, None) if isinstance(entry, str) else entry
            if set(path) & set("*?["):
                paths = matching([path], self._hyperparameters, "Optimizer: live", "hyper-parameter")
            else:
                require_known(path, self._hyperparameters, self)
                paths = frozenset({path})
            for each in sorted(paths):
                if driven.setdefault(each, scheduler) is not scheduler:
                    raise ValueError(f"Optimizer: the hyper-parameter {each!r} is live twice, by {scheduler!r} as well")
        return driven

    def _view(self, state: OptimizerState, like: PyTree) -> View:
        """Return how trees such as one are taken in, for a state that is packed where they are not."""
        return View(self.groups, packing_of(state) if self.packed and not is_packed(like) else None, like)

    def sharers(self, specs: Specs) -> tuple[str | None, ...] | None:
        return assign(self.groups, specs) if self.groups else None

    def pack(self, params: Params) -> Packed:
        """Pack parameters, each group's into buffers of its own, so that the step acts on buffers.

        Raises:
          ValueError: if a part of them is packed already, or a group's pattern matches none.
        """
        if is_packed(params):
            return params
        packing = packing_for(self, params) or Packing.of(params, 0)
        return packing.pack(params)

    def init(self, params: Params) -> OptimizerState:
        if self.packed and not is_packed(params) and not is_path_tree(params):
            bare = unwrapped(params)  # nnx wraps parameters where it inits, and not where it updates
            packing = packing_for(self, bare, inside=True)
            params = params if packing is None else packing.pack(bare)
        view = View(self.groups, None, params)
        params = view.thawed(view.whole(params))
        owns = {}
        for label, wrapper in labelled(self.wrappers).items():
            owns[label], params = wrapper.init(params), wrapper.inside(params)
        lrate, w_decay = self._rates
        state = OptimizerState(
            lrate=lrate.init(),
            w_decay=w_decay.init(),
            regularizers={label: brick.init(params) for label, brick in adapters(self.regularizers).items()},
            modules={label: brick.init(params) for label, brick in adapters(self.modules).items()},
            groups={
                label: group.init(view.of(label, params)) for label, group in self._groups.items() if not group.frozen
            },
            live={
                path: real(self._hyperparameters[path].value) if scheduler is None else scheduler.init()
                for path, scheduler in self._driven().items()
            },
        )
        if self.watch:
            names = self._watchable(params, state._replace(wrappers=owns), view)
            state = state._replace(watched=unsaid(names))
        exchanging = [label for label, module in labelled(self.modules).items() if module.channels()]
        for label, wrapper in reversed(labelled(self.wrappers).items()):
            kept = wrapper.keep(state)
            require_own_dtypes(wrapper, {name: (state.modules[name], kept.modules[name]) for name in exchanging})
            state = kept._replace(wrappers={**kept.wrappers, label: owns[label]})
        return state

    def update(
        self, updates: Updates, state: OptimizerState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, OptimizerState]:
        """Take a step: turn gradients into updates that are ready to be added to the parameters.

        Raises:
          ValueError: if the parameters are needed and not given, or a group's pattern matches none.
        """
        self._require_own(state)
        alive = self._at(state)
        if alive._decays and params is None:
            raise ValueError(f"Optimizer with w_decay={self.w_decay!r} needs the parameters: pass `params`")
        given = packed_like(updates, params)
        view = self._view(state, given)
        whole = view.whole(given)
        known = {name: view.whole(tree) if KNOWN.get(name) else tree for name, tree in extra_args.items()}

        def core(updates: Updates, inner: OptimizerState, params: Params) -> tuple[Updates, OptimizerState]:
            made, new = alive._step(updates, inner, params, known, view)
            return made, new._replace(live=self._advanced(inner.live))

        step: Step = core
        for label, wrapper in reversed(labelled(alive.wrappers).items()):
            step = functools.partial(alive._within, label, wrapper, step)
        made, new = step(view.thawed(whole), state, view.thawed(view.whole(params)))
        return view.given(made, jax.tree.map(jnp.zeros_like, whole) if self._frozen else made, given), new

    def _require_own(self, state: OptimizerState) -> None:
        """Raise a `ValueError` for the state of an optimizer that has other groups, wrappers or live numbers."""
        live, wrappers = set(self._driven()), set(labelled(self.wrappers))
        expected = {"groups": set(self._groups) - self._frozen, "wrappers": wrappers, "live": live}
        for name, mine in expected.items():
            found = set(getattr(state, name))
            if found != mine:
                raise ValueError(
                    f"Optimizer: the state is of another optimizer: it has the {name} {quote(sorted(found))}, and not "
                    f"{quote(sorted(mine))}"
                )

    def _within(
        self, label: str, wrapper: Wrapper, step: Step, updates: Updates, state: OptimizerState, params: Params
    ) -> tuple[Updates, OptimizerState]:
        wrappers = dict(state.wrappers)
        own = wrappers.pop(label)
        known = {"lrate": real(self._rates[0].value(state.lrate))} if "lrate" in wrapper.asks() else {}
        made, own, inner = wrapper.around(step, updates, own, state._replace(wrappers=wrappers), params, **known)
        require_like(wrapper, "around", "updates", made, updates)
        return made, inner._replace(wrappers={**inner.wrappers, label: own})

    def _step(
        self, updates: Updates, state: OptimizerState, params: Params, known: dict[str, PyTree], view: View
    ) -> tuple[Updates, OptimizerState]:
        """Take the step that the wrappers are around."""
        lrate, w_decay = self._rates
        rates = lrate.value(state.lrate), None if is_zero(self.w_decay) else w_decay.value(state.w_decay)
        told, gradients = Told(state.watched), updates
        chain, states = (self.regularizers, self.modules), (state.regularizers, state.modules)
        updates, regularizers, modules = through(chain, states, updates, params, rates[0], known, told)
        groups = dict(state.groups)
        if self.groups:
            made: dict[str | None, PyTree] = dict.fromkeys(self._frozen, updates)
            made[None] = scaled(view.of(None, updates), view.of(None, params), *rates)
            for label, own in groups.items():
                of, within = functools.partial(view.of, label), told.under(f"groups/{label}/")
                lent = {name: of(value) if KNOWN.get(name) else value for name, value in known.items()}
                made[label], groups[label] = self._groups[label].update(
                    of(updates), own, of(params), rates, lent, within
                )
                within.norms(of(gradients), made[label], of(params))
            updates = view.merged(made)
        else:
            updates = scaled(updates, params, *rates)
        told.norms(gradients, updates, params)
        told.say("lrate", lambda: rates[0])
        told.say("w_decay", lambda: w_decay.value(state.w_decay))
        told.counted()
        clocks = lrate.advance(state.lrate), w_decay.advance(state.w_decay)
        new = OptimizerState(*clocks, regularizers, modules, groups, state.wrappers, state.live, told.watched)
        return updates, new

    def eval_params(self, state: OptimizerState, params: Params) -> Params:
        """Return the parameters to evaluate and to deploy: those given, unless a wrapper has better ones.

        Args:
          state: the state, that of an `nnx.Optimizer` too.
          params: the parameters that are trained.

        Returns:
          The parameters in the same container and dtypes, such as an average of all that there were.
        """
        state, given = unwrapped(state), unwrapped(params)
        view = self._view(state, given)
        whole = view.whole(given)
        made = view.thawed(whole)
        for label, wrapper in reversed(labelled(self._at(state).wrappers).items()):
            made = wrapper.eval_params(state.wrappers[label], made)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(view.given(made, whole, given)))

    def check(self, state: OptimizerState) -> None:
        """Raise a `FloatingPointError` where a wrapper's state says that training has failed, by a look at it.

        The facade does so before each step.
        """
        for label, wrapper in labelled(self.wrappers).items():
            wrapper.check(state.wrappers[label])

    def require_sound(self, state: OptimizerState) -> None:
        """Raise a `ValueError` for a live hyper-parameter that is out of its range."""
        for path, who, value in self._live(state):
            if who is None:
                self._hyperparameters[path].checked(path, value)

    def begin_round(self, state: OptimizerState, params: Params = None) -> OptimizerState:
        """Begin a round of all rates' clocks, of every brick and of the wrappers."""
        alive, view = self._at(state), self._view(state, params)
        lrate, w_decay = alive._rates
        params = view.thawed(view.whole(params))
        wrappers = {}
        for label, wrapper in labelled(alive.wrappers).items():
            wrappers[label], params = wrapper.begin_round(state.wrappers[label], params), wrapper.inside(params)
        begun = alive._each(state, lambda brick, own, of: brick.begin_round(own, of(params)), view)
        groups = {label: alive._groups[label].moved(own, "begin_round") for label, own in begun.groups.items()}
        live = {path: own if who is None else who.begin_round(own) for path, who, own in self._live(state)}
        clocks = {"lrate": lrate.begin_round(state.lrate), "w_decay": w_decay.begin_round(state.w_decay)}
        return begun._replace(groups=groups, wrappers=wrappers, live=live, **clocks)

    def end_round(self, state: OptimizerState, **known: PyTree) -> OptimizerState:
        shaped = [name for name in known if KNOWN.get(name)]
        view = self._view(state, known[shaped[0]]) if shaped else View((), None, None)
        whole = {name: view.thawed(view.whole(known[name])) for name in shaped}

        def end(brick: Adapter, own: PyTree, of: Callable[[PyTree], PyTree]) -> PyTree:
            return brick.end_round(own, **{**known, **{name: of(tree) for name, tree in whole.items()}})

        return self._at(state)._each(state, end, view)

    def _each(
        self,
        state: OptimizerState,
        function: Callable[[Adapter, PyTree, Callable[[PyTree], PyTree]], PyTree],
        view: View,
    ) -> OptimizerState:
        """Change the state of each brick by a function of it, of the state, and of what its part of a tree is."""

        def made(
            bricks: Sequence[Brick], states: dict[str, PyTree], of: Callable[[PyTree], PyTree]
        ) -> dict[str, PyTree]:
            return {label: function(brick, states[label], of) for label, brick in adapters(bricks).items()}

        def whole(tree: PyTree) -> PyTree:
            return tree

        groups = {}
        for label, own in state.groups.items():
            group, of = self._groups[label], functools.partial(view.of, label)
            states = made(group.regularizers, own.regularizers, of), made(group.modules, own.modules, of)
            groups[label] = GroupState(own.lrate, own.w_decay, *states)
        regularizers, modules = (
            made(self.regularizers, state.regularizers, whole),
            made(self.modules, state.modules, whole),
        )
        return state._replace(regularizers=regularizers, modules=modules, groups=groups)

    def asks(self) -> Asked:
        rules: list[Any] = [self, *self.groups]
        each = [brick.asks() for rule in rules for brick in (*rule.regularizers, *rule.modules)]
        return Asked(*(frozenset().union(*names) for names in zip(Asked(frozenset(), frozenset()), *each, strict=True)))

    def share(self, params: Params, state: OptimizerState) -> Params:
        for label, module in adapters(self._at(state).modules).items():
            params = module.share(params, state.modules[label])
        return params

    def metrics(self, state: OptimizerState) -> dict[str, jax.Array]:
        """Return what is known of the last step, by name: what plug-ins say of their state, and what is watched.

        Names are those that `watch` takes, and `<name>/<metric>` of a module or wrapper. The state
        may be that of an `nnx.Optimizer`.

        Raises:
          ValueError: if two plug-ins name one alike.
        """
        state = unwrapped(state)
        return flat([("", state.watched), *self._at(state)._reported(state)])

    def _reported(self, state: OptimizerState) -> Iterator[tuple[str, Mapping[str, jax.Array]]]:
        """Yield what plug-ins say of their state, and what the names of that begin with."""
        for label, module in labelled(self.modules).items():
            yield f"{label}/", module.metrics(state.modules[label])
        for name, own in state.groups.items():
            for label, module in labelled(self._groups[name].modules).items():
                yield f"groups/{name}/{label}/", module.metrics(own.modules[label])
        for label, wrapper in labelled(self.wrappers).items():
            yield f"{label}/", wrapper.metrics(state.wrappers[label])

    def _watchable(self, params: Params, state: OptimizerState, view: View) -> list[str]:
        """Return the names of what is watched.

        Raises:
          ValueError: if a pattern matches none, two plug-ins name one alike, or one is no scalar.
        """
        said: list[tuple[str, Mapping[str, Any]]] = [("", dict.fromkeys(OF_A_STEP))]

        def add(prefix: str, bricks: Sequence[Brick], states: dict[str, PyTree], params: Params) -> None:
            for label, brick in adapters(bricks).items():
                own = jax.eval_shape(brick.measure, params, params, states[label], params)
                if wrong := next((name for name, each in own.items() if each.shape), None):
                    raise ValueError(
                        f"{name_of(brick.brick)}.measure says {wrong!r} is {show(own[wrong])}: expected a scalar"
                    )
                said.extend([(f"{prefix}{label}/", dict.fromkeys(OF_A_BRICK)), (f"{prefix}{label}/", own)])

        add("", self.regularizers, state.regularizers, params)
        add("", self.modules, state.modules, params)
        for label, own in state.groups.items():
            group, prefix = self._groups[label], f"groups/{label}/"
            said.append((prefix, dict.fromkeys(OF_A_GROUP)))
            add(prefix, group.regularizers, own.regularizers, view.of(label, params))
            add(prefix, group.modules, own.modules, view.of(label, params))
        names = flat(said)
        flat([("", names), ("", jax.eval_shape(lambda state: flat(self._reported(state)), state))])
        return sorted(matching(self.watch, names, "Optimizer: watch", "metric"))

    def hyperparameters(self, state: OptimizerState | None = None) -> dict[str, jax.Array]:
        """Return the rates of the next step and the live hyper-parameters, by path: float32 scalars.

        Args:
          state: the state, that of an `nnx.Optimizer` too; the facade's own if `None`.

        Raises:
          ValueError: if the facade has no state yet.
        """
        state = unwrapped(self._session.existing() if state is None else state)
        lrate, w_decay = self._at(state)._rates
        rates = {"lrate": lrate.value(state.lrate), "w_decay": w_decay.value(state.w_decay)}
        return rates | self._values(state)

    def with_hyperparameters(self, state: OptimizerState, values: Mapping[str, float | jax.Array]) -> OptimizerState:
        """Return a state with other values of live hyper-parameters, for which nothing is traced anew.

        Args:
          state: the state.
          values: numbers by path, or float32 scalars, traced ones too.

        Raises:
          TypeError: if a value is no number, or an array of another dtype.
          ValueError: if a path is not live, or driven by a scheduler, or a value out of its range.
        """
        live = dict(state.live)
        for path, new in self.checked_hyperparameters(values).items():
            # Of an array that is committed to devices, or not, as the old one is, JAX needs no other program.
            placed = not isinstance(live[path], jax.core.Tracer) and getattr(live[path], "committed", False)
            live[path] = jax.device_put(new, live[path].sharding) if placed else new
        return state._replace(live=live)

    def checked_hyperparameters(self, values: Mapping[str, float | jax.Array]) -> dict[str, jax.Array]:
        """Return values for live hyper-parameters by path as float32 scalars.

        Raises:
          TypeError, ValueError: as `with_hyperparameters` does.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"Optimizer: hyper-parameters are a mapping of paths to numbers, not {quote(values)}")
        driven, checked = self._driven(), {}
        for path, value in values.items():
            if path not in driven:
                require_known(path, self._hyperparameters, self)
                names = ", ".join(map(repr, driven)) or "none"
                raise ValueError(f"Optimizer: the hyper-parameter {path!r} is not live: `live` names {names}")
            if driven[path] is not None:
                raise ValueError(f"Optimizer: the hyper-parameter {path!r} cannot be set: {driven[path]!r} drives it")
            checked[path] = self._hyperparameters[path].checked(path, value)
        return checked

    def set_hyperparameters(self, values: Mapping[str, float | jax.Array]) -> None:
        """Set live hyper-parameters of the facade's state, by path, for which nothing is compiled anew.

        Raises:
          TypeError, ValueError: as `with_hyperparameters` does, or if there is no state yet. The
            state stays as it was.
        """
        self._session.change(lambda state: self.with_hyperparameters(state, values))

    def _live(self, state: OptimizerState) -> Iterator[tuple[str, Scheduler | None, PyTree]]:
        """Yield what is live: its path, who drives it, and its value or the clock of that."""
        return ((path, who, state.live[path]) for path, who in self._driven().items())

    def _values(self, state: OptimizerState) -> dict[str, jax.Array]:
        return {path: own if who is None else who.value(own) for path, who, own in self._live(state)}

    def _advanced(self, live: dict[str, PyTree]) -> dict[str, PyTree]:
        return {path: live[path] if who is None else who.advance(live[path]) for path, who in self._driven().items()}

    def _at(self, state: OptimizerState) -> Self:
        """Return the optimizer with the hyper-parameters of a state."""
        if not self.live:
            return self
        return replaced(self, {tuple(path.split("/")): value for path, value in self._values(state).items()})

    def tabulate(self, params: Params) -> str:
        """Return a table of what applies to each parameter: path, shape, group, rules, and bytes of its state.

        Args:
          params: the parameters, or their shapes.

        Raises:
          ValueError: if a group's pattern matches none of them.
        """
        specs = Specs.of(shapes(params))
        layout = Layout(shapes(adapted(self).model(specs.by_path)))
        sizes, others = layout.bytes_by_path()
        members = assign(self.groups, specs) if self.groups else (None,) * len(specs.paths)
        rows = [("path", "shape", "group", "rules", "bytes of state")]
        for path, spec, label in zip(specs.paths, specs.leaves, members, strict=True):
            rows.append((path, show(spec), label or "", self._rules(label), f"{sizes.get(path, 0):,}"))
        rows.append(("in all", "", "", _words(self.wrappers), f"{sum(sizes.values()) + others:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _rules(self, label: str | None) -> str:
        group = Group() if label is None else self._groups[label]
        if group.frozen:
            return "frozen"
        bricks = (*self.regularizers, *self.modules, *group.regularizers, *group.modules)
        lrate = self.lrate if group.lrate is None else group.lrate
        w_decay = self.w_decay if group.w_decay is None else group.w_decay
        rate = f"lrate={_shown(lrate)}" + (f" * {_shown(group.factor)}" if group.scales else "")
        decay = [] if is_zero(w_decay) else [f"w_decay={_shown(w_decay)}"]
        return ", ".join([*(brick.state_name() for brick in bricks), rate, *decay])

    def collect(self, state: OptimizerState) -> dict[str, AuxVar]:
        """Return what the modules send, by the name of their auxiliary variables."""
        auxes: dict[str, AuxVar] = {}
        for label, module in adapters(self._at(state).modules).items():
            auxes |= module.collect(state.modules[label])
        return auxes

    def commit(self, state: OptimizerState) -> OptimizerState:
        modules = {
            label: module.commit(state.modules[label]) for label, module in adapters(self._at(state).modules).items()
        }
        return state._replace(modules=modules)

    def process(self, aux: Mapping[str, AuxVar], state: OptimizerState) -> OptimizerState:
        """Hand what was received, by name, to the modules that it is for.

        Raises:
          KeyError: if no module has such a name.
        """
        for name in aux:
            if name not in self.channels():
                raise KeyError(f"Optimizer: no module takes auxiliary variables named {name!r}")
        modules = dict(state.modules)
        for label, module in adapters(self._at(state).modules).items():
            own = {name: aux[name] for name in module.brick.channels() if name in aux}
            modules[label] = module.process(own, modules[label])
        return state._replace(modules=modules)

    def forget(self, state: OptimizerState, **given: PyTree) -> OptimizerState:
        """Return a server's state without what a client has given; `aux` by the names of auxiliary variables."""
        modules, auxes = dict(state.modules), given.get("aux", {})
        for label, module in adapters(self._at(state).modules).items():
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


def _names(bricks: Sequence[Brick]) -> str:
    return "".join(f" {brick.state_name()}" for brick in bricks)


def _words(wrappers: Sequence[Wrapper]) -> str:
    return ", ".join(wrapper.name for wrapper in wrappers)


def _shown(rate: Any) -> str:
    if isinstance(rate, Scheduler):
        return rate.state_name()
    return "a function" if callable(rate) else f"{rate:g}" if isinstance(rate, float) else "a traced number"
