"""Accumulation: one step for the mean of several gradients, as if of one large batch.

Init(steps, params):
    taken = 0; total = 0
Step(step, grads, params):
    total += grads; taken += 1
    if taken < steps: updates = 0
    else: updates = step(total / steps, params); total = 0; taken = 0
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class AccumulationState(NamedTuple):
    """State of `AccumulationWrapper`.

    Attributes:
      taken: int32 scalar, how many gradients are in the total.
      total: their sum, shaped like the parameters, in at least float32.
    """

    taken: jax.Array
    total: PyTree


class AccumulationWrapper(Wrapper[AccumulationState]):
    """one step by (g₁ + … + g_k) / k, and none in between (Ott et al. 2018).

        Init(steps):
            taken = 0; total = 0
        Step(step, grads, params):
            total += grads; taken += 1
            if taken < steps:
                updates = 0
            else:
                updates = step(total / steps, params)
                total = 0; taken = 0

    What is inside takes no part in between: its state stays, and clocks and schedules count
    real steps. A compiled program branches, and does not compute what it then drops.
    Where losses are means over batches of one size, the mean of k gradients is that of one batch
    k times as large, to rounding. Gradients that a round has left over stay for the next.

    Attributes:
      steps: how many gradients make a step.

    References:
      Ott et al., "Scaling neural machine translation", section 3.1, WMT 2018, arXiv:1806.00187.
    """

    name: ClassVar[str] = "accumulation"
    steps: int = hyperparameter(default=4, within="[1, 1073741823]")

    def init(self, params: Params) -> AccumulationState:
        return AccumulationState(jnp.zeros((), jnp.int32), zeros_wide(params))

    def around(
        self, step: Step, updates: Updates, state: AccumulationState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, AccumulationState, PyTree]:
        total = jax.tree.map(lambda t, g: t + wide(g), state.total, updates)
        taken = state.taken + 1

        def take() -> tuple[Updates, PyTree, PyTree]:
            mean = cast_like(jax.tree.map(lambda t: t / self.steps, total), updates)
            return *step(mean, inner, params), jax.tree.map(jnp.zeros_like, total)

        def wait() -> tuple[Updates, PyTree, PyTree]:
            return jax.tree.map(jnp.zeros_like, updates), inner, total

        made, inner, total = jax.lax.cond(taken >= self.steps, take, wait)
        return made, AccumulationState(jnp.where(taken >= self.steps, 0, taken), total), inner
