"""Steps whose numbers are not finite, left out and counted.

Init(most, updates):
    in_a_row = 0; skipped = 0
Step(step, grads, params):
    ok = isfinite(grads) and in_a_row < most
    if ok: updates = step(grads, params)
    else: updates = 0, and what is inside stays
    in_a_row = 0 if ok else in_a_row + 1; skipped += not ok
Check: error if in_a_row = most
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import is_finite, where
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class SkipNonFiniteState(NamedTuple):
    """State of `SkipNonFiniteWrapper`.

    Attributes:
      in_a_row: int32 scalar, how many steps were left out since the last that was taken.
      skipped: int32 scalar, how many steps were left out in all.
    """

    in_a_row: jax.Array
    skipped: jax.Array


class SkipNonFiniteWrapper(Wrapper[SkipNonFiniteState]):
    """no step by gradients that are not finite; after some in a row, none at all (Micikevicius et al. 2018).

        Init(most, updates):
            in_a_row = 0; skipped = 0
        Step(step, grads, params):
            ok = isfinite(grads) and in_a_row < most
            if ok: updates = step(grads, params)        # ok is false as well, if updates are looked at and not finite
            else: updates = 0
            in_a_row = 0 if ok else in_a_row + 1
            skipped += 0 if ok else 1
        Check:
            error if in_a_row >= most

    A step that is left out changes nothing inside: neither moments nor clocks. After `most`
    in a row training has failed: no further step is taken, so that parameters stay what they
    last were, and it is an error. A compiled program cannot raise one. The facade
    raises it at the next call; who holds the state calls `optimizer.check(state)` where he
    reads the loss, or reads `failed` among its metrics.

    Attributes:
      most: how many steps in a row may be left out before training has failed, that one included.
      updates: whether to look also at what the step makes of finite gradients, such as
        moments beyond float32. It costs one more pass over the state.

    References:
      Micikevicius et al., "Mixed precision training", ICLR 2018, arXiv:1710.03740.
    """

    name: ClassVar[str] = "skip-non-finite"
    most: int = hyperparameter(default=10, within="[1, 1073741823]")
    updates: bool = False

    def init(self, params: Params) -> SkipNonFiniteState:
        return SkipNonFiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def around(
        self, step: Step, updates: Updates, state: SkipNonFiniteState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, SkipNonFiniteState, PyTree]:
        zeros = jax.tree.map(jnp.zeros_like, updates)

        def take() -> tuple[Updates, PyTree, jax.Array]:
            made, new = step(updates, inner, params)
            if not self.updates:
                return made, new, jnp.array(True)
            ok = is_finite((made, new))
            return where(ok, made, zeros), where(ok, new, inner), ok

        def leave() -> tuple[Updates, PyTree, jax.Array]:
            return zeros, inner, jnp.array(False)

        made, inner, ok = jax.lax.cond(is_finite(updates) & (state.in_a_row < self.most), take, leave)
        in_a_row = jnp.where(ok, 0, optax.safe_increment(state.in_a_row))
        skipped = jnp.where(ok, state.skipped, optax.safe_increment(state.skipped))
        return made, SkipNonFiniteState(in_a_row, skipped), inner

    def metrics(self, state: SkipNonFiniteState) -> dict[str, jax.Array]:
        return {"in_a_row": state.in_a_row, "skipped": state.skipped, "failed": state.in_a_row >= self.most}

    def check(self, state: SkipNonFiniteState) -> None:
        """Raise a `FloatingPointError` if training has failed; of stacked states, if any has."""
        in_a_row = np.max(np.asarray(state.in_a_row))
        if in_a_row >= self.most:
            raise FloatingPointError(
                f"{type(self).__name__}: {in_a_row} steps in a row had gradients that are not finite, "
                f"most={self.most}: no step was taken since. Go on from a saved state with a lower learning rate, or "
                "with clipping"
            )
