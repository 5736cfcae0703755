"""Lookahead: slow weights that take a part of the way of several fast steps, from where these start anew.

Init(sync_period, alpha, params):
    steps = 0; slow = 0
Step(step, grads, params):
    if steps = 0: slow = params
    updates = step(grads, params); steps += 1
    if steps = sync_period:
        slow += alpha * (params + updates - slow)
        updates = slow - params; steps = 0
Eval(params): slow
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class LookaheadState(NamedTuple):
    """State of `LookaheadWrapper`.

    Attributes:
      steps: int32 scalar, how many fast steps were taken since the last slow one.
      slow: the slow weights, shaped like the parameters, in at least float32; of no meaning
        where `steps` is 0, as the parameters are then the slow weights.
    """

    steps: jax.Array
    slow: PyTree


class LookaheadWrapper(Wrapper[LookaheadState]):
    """slow ← slow + α·(fast − slow) every k steps, and fast ← slow (Zhang et al. 2019).

        Init(sync_period, alpha):
            steps = 0; slow = 0
        Step(step, grads, params):
            if steps = 0: slow = params
            updates = step(grads, params)
            steps += 1
            if steps = sync_period:
                slow += alpha * (params + updates - slow)
                updates = slow - params
                steps = 0
        Eval(params):
            params if steps = 0 else slow

    The parameters are the fast weights. Those to evaluate are the slow ones, which algorithm 1
    returns. What is inside keeps its state when fast weights are put back, as in
    the paper's experiments.

    Attributes:
      sync_period: how many fast steps there are to a slow one (k of the paper).
      alpha: which part of the way a slow step takes.
      round_reset: whether a new round starts a new period, from the parameters that it is given.

    References:
      Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back",
      algorithm 1, NeurIPS 2019, arXiv:1907.08610.
    """

    name: ClassVar[str] = "lookahead"
    sync_period: int = hyperparameter(default=5, within="[1, 1073741823]")
    alpha: float = hyperparameter(default=0.5, within="[0, 1]")
    round_reset: bool = False

    def init(self, params: Params) -> LookaheadState:
        return LookaheadState(jnp.zeros((), jnp.int32), zeros_wide(params))

    def around(
        self, step: Step, updates: Updates, state: LookaheadState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, LookaheadState, PyTree]:
        params = self.require(params)
        made, inner = step(updates, inner, params)
        steps = state.steps + 1
        syncs = steps >= self.sync_period

        def slow_step(slow: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
            start = jnp.where(state.steps == 0, wide(param), slow)
            return jnp.where(syncs, start + self.alpha * (wide(param) + wide(update) - start), start)

        slow = jax.tree.map(slow_step, state.slow, params, made)
        back = jax.tree.map(lambda s, p, u: jnp.where(syncs, s - wide(p), wide(u)).astype(u.dtype), slow, params, made)
        return back, LookaheadState(jnp.where(syncs, 0, steps), slow), inner

    def begin_round(self, state: LookaheadState, params: Params = None) -> LookaheadState:
        return state._replace(steps=jnp.zeros_like(state.steps)) if self.round_reset else state

    def eval_params(self, state: LookaheadState, params: Params) -> Params:
        return where(state.steps > 0, cast_like(state.slow, params), params)
