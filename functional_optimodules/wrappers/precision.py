"""In which dtype parameters and states are kept, and how numbers are rounded to it.

    master-weights        a float32 copy of the parameters, which are its rounding
    state-dtype           moments at rest in another dtype, in float32 while a step is taken
    stochastic-rounding   bfloat16 parameters, rounded up or down at random

Steps are taken in float32 with all three: what differs is what is kept between them.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import wide, zeros_wide
from functional_optimodules.packing.tree import is_packed
from functional_optimodules.random.keys import make_key
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import keystr, matching, show
from functional_optimodules.wrappers.rounding import round_at_random
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class MasterWeightsState(NamedTuple):
    """State of `MasterWeightsWrapper`.

    Attributes:
      master: the parameters in at least float32; zeros before the first step.
    """

    master: PyTree


class MasterWeightsWrapper(Wrapper[MasterWeightsState]):
    """master ← master + step(g, master) in float32, w ← round(master) (Micikevicius et al. 2018).

        Init():
            master = 0
        Step(step, grads, params):
            if params is not round(master), give or take a unit in the last place: master = params
            master += step(float32(grads), master)
            updates = round(master) - params

    What is inside sees float32 alone: gradients, parameters, moments and rates. Parameters
    that somebody else has changed, such as a server at the start of a round, become the master.
    The wrapper belongs outermost.

    `updates` is of the gradients' dtype. Where a step takes a parameter to less than half of
    what it was, `params + updates` may be rounded once more; the next step mends it.

    References:
      Micikevicius et al., "Mixed precision training", section 3.1, ICLR 2018, arXiv:1710.03740.
    """

    name: ClassVar[str] = "master-weights"

    def init(self, params: Params) -> MasterWeightsState:
        return MasterWeightsState(zeros_wide(params))

    def around(
        self, step: Step, updates: Updates, state: MasterWeightsState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, MasterWeightsState, PyTree]:
        params = self.require(params)
        master = jax.tree.map(_recalled, state.master, params)
        made, inner = step(jax.tree.map(wide, updates), inner, master)
        master = jax.tree.map(jnp.add, master, made)

        def move(m: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
            return (wide(m.astype(p.dtype)) - wide(p)).astype(g.dtype)

        return jax.tree.map(move, master, params, updates), MasterWeightsState(master), inner

    def inside(self, params: Params) -> Params:
        return jax.tree.map(wide, params)


def _recalled(master: jax.Array, param: jax.Array) -> jax.Array:
    """Return what a parameter is the rounding of: the master, if that is near, and itself if not."""
    limits = jnp.finfo(param.dtype)
    unit = float(limits.eps) * jnp.abs(master) + float(limits.smallest_subnormal)
    return jnp.where(jnp.abs(wide(param) - master) <= unit, master, wide(param))


class StateDtypeState(NamedTuple):
    """State of `StateDtypeWrapper`.

    Attributes:
      key: typed PRNG key, from which numbers are drawn where rounding is at random; `None` where it is not.
      steps: int32 scalar, how many steps were taken; likewise.
    """

    key: jax.Array | None
    steps: jax.Array | None


class StateDtypeWrapper(Wrapper[StateDtypeState]):
    """state at rest in bfloat16 or float16, and in float32 while a step is taken (Zamirai et al. 2020).

        Init(dtype, match, rounding, seed):
            key = make_key(seed); steps = 0
        Keep(inner):
            float32 arrays of inner that match, in dtype
        Step(step, grads, params):
            those arrays, in float32
            updates = step(grads, params)
            those arrays, rounded to dtype; steps += 1

    An average whose weight is nearer to 1 than dtype tells numbers apart, such as a second moment
    with `beta_2` 0.999 in bfloat16, does not move at all if it is rounded to the nearest: hence
    rounding at random, which leaves its mean as it is.

    Between steps the arrays are in `dtype`, where a module that exchanges auxiliary variables
    acts on its state too: leave such out.

    Attributes:
      dtype: that of the state at rest.
      match: a glob pattern over the paths of the state, or several: `"modules/adam/second/**"`.
        In packed states, paths end at what is shaped like the parameters.
      rounding: to the nearest, or at random, which there is for bfloat16.
      seed: where the random numbers come from; `None` for the operating system.

    Raises:
      ValueError: if float16 is to be rounded at random; in `init` of the optimizer, if a
        pattern matches no path, something whose own dtype that is already, or the state of
        a module that exchanges auxiliary variables.

    References:
      Zamirai et al., "Revisiting BFloat16 training", arXiv:2010.06192.
      Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022, arXiv:2110.02861,
      for states at rest and in use.
    """

    name: ClassVar[str] = "state-dtype"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    match: str | tuple[str, ...] = "**/modules/**"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    seed: int | None = hyperparameter(default=0, within="[0, 4294967295]")

    def validate(self) -> None:
        if self.dtype == "float16" and self.rounding == "stochastic":
            raise ValueError(
                f"{type(self).__name__}: rounding='stochastic' is for bfloat16: dtype='float16' needs "
                "rounding='nearest'"
            )

    def init(self, params: Params) -> StateDtypeState:
        if self.rounding == "nearest":
            return StateDtypeState(None, None)
        return StateDtypeState(make_key(self.seed, params, type(self).__name__), jnp.zeros((), jnp.int32))

    def keep(self, inner: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(inner)
        for (path, leaf), taken in zip(jax.tree.leaves_with_path(inner), self._chosen(inner, self.dtype), strict=True):
            if taken:
                raise ValueError(
                    f"{type(self).__name__}: {show(leaf)} at {keystr(path)!r} has that dtype already, by its module, "
                    "and could not be told from what is narrowed: leave it out of `match`, or put 'master-weights' "
                    "around"
                )
        chosen = self._chosen(inner, "float32")
        return jax.tree.unflatten(
            treedef, [leaf.astype(self.dtype) if taken else leaf for leaf, taken in zip(leaves, chosen, strict=True)]
        )

    def around(
        self, step: Step, updates: Updates, state: StateDtypeState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, StateDtypeState, PyTree]:
        leaves, treedef = jax.tree.flatten(inner)
        chosen = self._chosen(inner, self.dtype)
        in_use = [wide(leaf) if taken else leaf for leaf, taken in zip(leaves, chosen, strict=True)]
        updates, new = step(updates, jax.tree.unflatten(treedef, in_use), params)
        leaves = jax.tree.leaves(new)
        if state.key is None or state.steps is None:
            at_rest = [leaf.astype(self.dtype) if taken else leaf for leaf, taken in zip(leaves, chosen, strict=True)]
            return updates, state, jax.tree.unflatten(treedef, at_rest)
        key = jax.random.fold_in(state.key, state.steps)
        state = state._replace(steps=optax.safe_increment(state.steps))
        return updates, state, _rounded(key, treedef, leaves, chosen)

    def _chosen(self, inner: PyTree, dtype: str) -> list[bool]:
        """Return for each array of a state whether its path matches and it is of some dtype."""
        # A lone parameter has no path: what comes before it is then followed by a slash, and by nothing.
        nodes = [(keystr(path).rstrip("/"), node) for path, node in jax.tree.leaves_with_path(inner, is_leaf=is_packed)]
        patterns = (self.match,) if isinstance(self.match, str) else self.match
        # Live hyper-parameters are no moments, whose paths theirs end like.
        known = [path for path, _ in nodes if not path.startswith("live/")]
        paths = matching(patterns, known, f"{type(self).__name__}: match")
        return [
            path in paths and leaf.dtype == jnp.dtype(dtype) for path, node in nodes for leaf in jax.tree.leaves(node)
        ]


class StochasticRoundingState(NamedTuple):
    """State of `StochasticRoundingWrapper`.

    Attributes:
      key: typed PRNG key.
      steps: int32 scalar, how many steps were taken.
    """

    key: jax.Array
    steps: jax.Array


class StochasticRoundingWrapper(Wrapper[StochasticRoundingState]):
    """w ← round(w + step(g)) at random, E[round(x)] = x, for bfloat16 parameters (Gupta et al. 2015).

        Init(seed):
            key = make_key(seed); steps = 0
        Step(step, grads, params):
            updates = step(float32(grads), float32(params))
            updates = round(params + updates) - params      # of a bfloat16 parameter
            steps += 1

    It does without the 4 bytes of a master weight. What is inside sees float32 gradients and
    parameters. Those of another dtype than bfloat16 are added to as ever. It belongs outermost.

    `updates` is of the gradients' dtype. Where a step takes a parameter to less than half of
    what it was, `params + updates` may be rounded to the nearest once more.

    Attributes:
      seed: where the random numbers come from; `None` for the operating system.

    References:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
      Zamirai et al., "Revisiting BFloat16 training", arXiv:2010.06192.
    """

    name: ClassVar[str] = "stochastic-rounding"
    seed: int | None = hyperparameter(default=0, within="[0, 4294967295]")

    def init(self, params: Params) -> StochasticRoundingState:
        return StochasticRoundingState(make_key(self.seed, params, type(self).__name__), jnp.zeros((), jnp.int32))

    def around(
        self,
        step: Step,
        updates: Updates,
        state: StochasticRoundingState,
        inner: PyTree,
        params: Params,
        **known: jax.Array,
    ) -> tuple[Updates, StochasticRoundingState, PyTree]:
        before = jax.tree.map(wide, self.require(params))
        made, inner = step(jax.tree.map(wide, updates), inner, before)
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.add, before, made))
        halves = [leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params)]
        after = _rounded(jax.random.fold_in(state.key, state.steps), treedef, leaves, halves)

        def move(b: jax.Array, a: jax.Array, u: jax.Array, g: jax.Array) -> jax.Array:
            return (wide(a) - b if a.dtype == jnp.bfloat16 else u).astype(g.dtype)

        moved = jax.tree.map(move, before, after, made, updates)
        return moved, StochasticRoundingState(state.key, optax.safe_increment(state.steps)), inner

    def inside(self, params: Params) -> Params:
        return jax.tree.map(wide, params)


def _rounded(key: jax.Array, treedef: PyTreeDef, leaves: list[jax.Array], chosen: list[bool]) -> Any:
    """Return a tree of these leaves in which the chosen ones, of float32, are rounded to bfloat16 at random."""
    some = jax.tree.unflatten(
        treedef, [leaf if taken else optax.MaskedNode() for leaf, taken in zip(leaves, chosen, strict=True)]
    )
    rounded = iter(jax.tree.leaves(round_at_random(key, some)))
    return jax.tree.unflatten(
        treedef, [next(rounded) if taken else leaf for leaf, taken in zip(leaves, chosen, strict=True)]
    )
