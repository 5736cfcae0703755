"""Averages of the parameters, kept beside those that are trained.

    ema       average = decay * average + (1 - decay) * params
    polyak    average = (params + ... + params) / n, of all since some step

    Init(params):
        steps = 0; average = 0
    Step(step, grads, params):
        updates = step(grads, params)
        steps += 1
        average += weight * (params + updates - average)
    Eval(params):
        average if steps > 0 else params

Averages are kept in at least float32, and are at any time what they say: no correction is
left for the reader.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, one_minus_power, real, where, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wrappers.wrapper import Step, Wrapper


class AverageState(NamedTuple):
    """State of `EMAWrapper` and `PolyakWrapper`.

    Attributes:
      steps: int32 scalar, how many steps were taken.
      average: shaped like the parameters, in at least float32; zeros before the first step.
    """

    steps: jax.Array
    average: PyTree

    @classmethod
    def new(cls, params: Params) -> "AverageState":
        """Return the state before any step."""
        return cls(jnp.zeros((), jnp.int32), zeros_wide(params))

    def moved(self, values: Params, weight: jax.Array) -> "AverageState":
        """Return the state after a step, in which the average moves a part of the way to some values."""
        average = jax.tree.map(lambda a, x: a + weight.astype(a.dtype) * (wide(x) - a), self.average, values)
        return AverageState(optax.safe_increment(self.steps), average)

    def read(self, params: Params) -> Params:
        """Return the average in the parameters' dtypes, or these before any step."""
        return where(self.steps > 0, cast_like(self.average, params), params)


class EMAWrapper(Wrapper[AverageState]):
    """average ← decay·average + (1 − decay)·w, to evaluate with (Tarvainen & Valpola 2017).

        Init(decay, debias):
            steps = 0; average = 0
        Step(step, grads, params):
            if steps = 0 and not debias: average = params
            updates = step(grads, params)
            steps += 1
            weight = (1 - decay) / (1 - decay ** steps) if debias else 1 - decay
            average += weight * (params + updates - average)
        Eval(params):
            average if steps > 0 else params

    With `debias` it is the average that Adam's bias correction gives: after n steps the
    weights of the n parameters that came of them sum to 1, and where training began has none.
    Without, as in PyTorch's `AveragedModel`, the first parameters have a weight of `decay ** n`,
    which is most of it for the first 0.7 / (1 - decay) steps.

    Attributes:
      decay: weight of the past average.
      debias: whether what training began with has no weight.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J.
      Control Optim. 30, 1992.
      Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017,
      arXiv:1703.01780.
      Kingma and Ba, "Adam: a method for stochastic optimization", section 3, arXiv:1412.6980.
    """

    name: ClassVar[str] = "ema"
    decay: float = hyperparameter(default=0.999, within="[0, 1)")
    debias: bool = True

    def init(self, params: Params) -> AverageState:
        return AverageState.new(params)

    def around(
        self, step: Step, updates: Updates, state: AverageState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, AverageState, PyTree]:
        params = self.require(params)
        updates, inner = step(updates, inner, params)
        weight = real(1 - self.decay)
        if self.debias:
            weight = weight / one_minus_power(self.decay, state.steps + 1)
        else:
            state = state._replace(average=where(state.steps > 0, state.average, jax.tree.map(wide, params)))
        return updates, state.moved(optax.apply_updates(params, updates), weight), inner

    def eval_params(self, state: AverageState, params: Params) -> Params:
        return state.read(params)


class PolyakWrapper(Wrapper[AverageState]):
    """average ← mean of w since some step, to evaluate with (Polyak & Juditsky 1992; Ruppert 1988).

        Init(start):
            steps = 0; average = 0
        Step(step, grads, params):
            updates = step(grads, params)
            steps += 1
            average += (params + updates - average) / max(steps - start, 1)
        Eval(params):
            average if steps > 0 else params

    After n steps it is the mean of the parameters after steps start + 1 to n, and up to
    step `start` those of the last step.

    Attributes:
      start: how many steps are left out.

    References:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J.
      Control Optim. 30, 1992.
      Ruppert, "Efficient estimations from a slowly convergent Robbins-Monro process",
      Cornell University, 1988.
    """

    name: ClassVar[str] = "polyak"
    start: int = hyperparameter(default=0, within="[0, 1073741823]")

    def init(self, params: Params) -> AverageState:
        return AverageState.new(params)

    def around(
        self, step: Step, updates: Updates, state: AverageState, inner: PyTree, params: Params, **known: jax.Array
    ) -> tuple[Updates, AverageState, PyTree]:
        params = self.require(params)
        updates, inner = step(updates, inner, params)
        weight = 1 / real(jnp.maximum(state.steps + 1 - self.start, 1))
        return updates, state.moved(optax.apply_updates(params, updates), weight), inner

    def eval_params(self, state: AverageState, params: Params) -> Params:
        return state.read(params)
