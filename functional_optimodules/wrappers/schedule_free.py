"""Schedule-free: gradients at a point between a fast sequence and its average, in place of a rate that decays.

Init(beta, weight_lr_power, params):
    steps = 0; weights = 0; largest = 0; z = 0
Step(step, grads, params, lrate), params = y = (1 - beta) * z + beta * x:
    if steps = 0: z = params
    largest = max(largest, lrate)
    weights += largest ** weight_lr_power
    c = largest ** weight_lr_power / weights
    delta = step(grads, params)
    z += delta
    x = (1 - c) * x + c * z
    updates = (1 - beta) * z + beta * x - params
    steps += 1
Eval(params): x = params + (1 / beta - 1) * (params - z)
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import power, real, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class ScheduleFreeState(NamedTuple):
    """State of `ScheduleFreeWrapper`.

    Attributes:
      steps: int32 scalar, how many steps were taken.
      weights: float32 scalar, the sum of the weights of the iterates in the average.
      largest: float32 scalar, the largest learning rate so far.
      z: the fast sequence, shaped like the parameters, in at least float32; zeros before the first step.
    """

    steps: jax.Array
    weights: jax.Array
    largest: jax.Array
    z: PyTree


class ScheduleFreeWrapper(Wrapper[ScheduleFreeState]):
    """z ← z − γ·∇f(y), x ← (1 − c)·x + c·z, y = (1 − β)·z + β·x (Defazio et al. 2024).

        Init(beta, weight_lr_power):
            steps = 0; weights = 0; largest = 0; z = 0
        Step(step, grads, params, lrate):
            y = params
            if steps = 0: z = y
            largest = max(largest, lrate)
            weight = largest ** weight_lr_power; weights += weight
            c = weight / weights
            delta = step(grads, y)
            z += delta
            updates = c * (z - y) + (1 - beta) * (1 - c) * delta        # to the next y
            steps += 1
        Eval(params):
            x = params + (1 / beta - 1) * (params - z)

    The parameters are y, where gradients are taken. Those to evaluate and to deploy are x, the
    average, which is not stored: it follows from y and z. Of the paper's two algorithms,
    SGD is this around no modules, and AdamW around `("adam", {"beta_1": 0.0})`: the momentum is in
    `beta`. The decay acts at y. A warm-up of the learning rate belongs to the method, and a
    decay of it does not.

    Attributes:
      beta: how near to the average gradients are taken; 1 would be averaging alone.
      weight_lr_power: iterates count in the average as this power of the largest learning
        rate so far: 2 in the authors' code, and 0 for equal weights.
      round_reset: whether a new round starts a new average, from the parameters that it is given.

    References:
      Defazio et al., "The road less scheduled", algorithm 1, NeurIPS 2024, arXiv:2405.15682.
    """

    name: ClassVar[str] = "schedule-free"
    beta: float = hyperparameter(default=0.9, within="(0, 1)")
    weight_lr_power: float = hyperparameter(default=2.0, within="[0, inf)")
    round_reset: bool = False

    def init(self, params: Params) -> ScheduleFreeState:
        return ScheduleFreeState(jnp.zeros((), jnp.int32), real(0.0), real(0.0), zeros_wide(params))

    def around(  # type: ignore[override]
        self,
        step: Step,
        updates: Updates,
        state: ScheduleFreeState,
        inner: PyTree,
        params: Params,
        *,
        lrate: jax.Array,
        **known: jax.Array,
    ) -> tuple[Updates, ScheduleFreeState, PyTree]:
        params = self.require(params)
        largest = jnp.maximum(state.largest, lrate)
        weight = power(largest, self.weight_lr_power)
        weights = state.weights + weight
        c = jnp.where(weights > 0, weight / jnp.where(weights > 0, weights, 1), 0)
        start = where(state.steps > 0, state.z, jax.tree.map(wide, params))
        delta, inner = step(updates, inner, params)
        z = jax.tree.map(lambda z, d: z + wide(d), start, delta)

        # By the new z, and not the old one, which is then written over in place.
        def move(z: jax.Array, y: jax.Array, d: jax.Array) -> jax.Array:
            to_z, along = c.astype(z.dtype), ((1 - self.beta) * (1 - c)).astype(z.dtype)
            return (to_z * (z - wide(y)) + along * wide(d)).astype(d.dtype)

        moved = jax.tree.map(move, z, params, delta)
        return moved, ScheduleFreeState(optax.safe_increment(state.steps), weights, largest, z), inner

    def begin_round(self, state: ScheduleFreeState, params: Params = None) -> ScheduleFreeState:
        if not self.round_reset:
            return state
        zero = jnp.zeros_like(state.weights)
        return ScheduleFreeState(jnp.zeros_like(state.steps), zero, jnp.zeros_like(state.largest), state.z)

    def eval_params(self, state: ScheduleFreeState, params: Params) -> Params:
        ahead = 1 / self.beta - 1
        x = jax.tree.map(lambda y, z: (wide(y) + ahead * (wide(y) - z)).astype(y.dtype), params, state.z)
        return where(state.steps > 0, x, params)
