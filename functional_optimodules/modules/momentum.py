"""Momentum and moving averages.

momentum        velocity = beta * velocity + g;     g = velocity
  (nesterov)                                        g = beta * velocity + g
ewma            average = beta * average + (1 - beta) * g;                      g = average
yogi-momentum   average = average - (1 - beta) * sign(average - g) * g;         g = average
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import cast_like, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


def ewma(average: PyTree, values: PyTree, beta: ArrayLike) -> PyTree:
    """Return the exponentially weighted moving average of a tree after new values."""
    return jax.tree.map(lambda a, x: beta * a + (1 - beta) * x, average, values)


def yogi_average(average: PyTree, values: PyTree, beta: ArrayLike) -> PyTree:
    """Return Yogi's average: it moves by an amount that depends on the values alone."""
    return jax.tree.map(lambda a, x: a - (1 - beta) * jnp.sign(a - x) * x, average, values)


class MomentumState(NamedTuple):
    """State of `MomentumModule`.

    Attributes:
      velocity: shaped like the parameters, in at least float32.
    """

    velocity: PyTree


class MomentumModule(OptiModule[MomentumState]):
    """velocity ← β·velocity + g (Sutskever et al. 2013, as in PyTorch).

        Init(beta, nesterov):
            velocity = 0
        Step(grads):
            velocity = beta * velocity + grads
            grads = beta * velocity + grads if nesterov else velocity

    The learning rate multiplies the whole velocity, not only the last gradient:
    this differs from the paper where the rate changes with time.

    Attributes:
      beta: weight of the past velocity.
      nesterov: whether to look ahead by one step.
      round_reset: whether a new round starts with no velocity.

    References:
      Sutskever et al., "On the importance of initialization and momentum in deep
      learning", ICML 2013.
    """

    name: ClassVar[str] = "momentum"
    packable: ClassVar[bool] = True
    beta: float = hyperparameter(default=0.9, within="[0, 1)")
    nesterov: bool = False
    round_reset: bool = False

    def init(self, params: Params) -> MomentumState:
        return MomentumState(velocity=zeros_wide(params))

    def update(
        self, updates: Updates, state: MomentumState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, MomentumState]:
        velocity = jax.tree.map(lambda v, g: self.beta * v + wide(g), state.velocity, updates)
        output = velocity
        if self.nesterov:
            output = jax.tree.map(lambda v, g: self.beta * v + wide(g), velocity, updates)
        return cast_like(output, updates), MomentumState(velocity)


class EWMAState(NamedTuple):
    """State of `EWMAModule` and `YogiMomentumModule`.

    Attributes:
      average: shaped like the parameters, in at least float32.
    """

    average: PyTree


class EWMAModule(OptiModule[EWMAState]):
    """average ← β·average + (1 − β)·g, without bias correction.

        Init(beta):
            average = 0
        Step(grads):
            average = beta * average + (1 - beta) * grads
            grads = average

    Attributes:
      beta: weight of the past average.
      round_reset: whether a new round starts from an average of 0.
    """

    name: ClassVar[str] = "ewma"
    packable: ClassVar[bool] = True
    beta: float = hyperparameter(default=0.9, within="[0, 1)")
    round_reset: bool = False

    def init(self, params: Params) -> EWMAState:
        return EWMAState(average=zeros_wide(params))

    def update(
        self, updates: Updates, state: EWMAState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, EWMAState]:
        average = ewma(state.average, jax.tree.map(wide, updates), self.beta)
        return cast_like(average, updates), EWMAState(average)


class YogiMomentumModule(OptiModule[EWMAState]):
    """average ← average − (1 − β)·sign(average − g)·g (Zaheer et al. 2018).

        Init(beta):
            average = 0
        Step(grads):
            average = average - (1 - beta) * sign(average - grads) * grads
            grads = average

    It is meant for squared gradients, as a part of Yogi.

    Attributes:
      beta: one minus the step of the average.
      round_reset: whether a new round starts from an average of 0.

    References:
      Zaheer et al., "Adaptive methods for nonconvex optimization", NeurIPS 2018.
    """

    name: ClassVar[str] = "yogi-momentum"
    packable: ClassVar[bool] = True
    beta: float = hyperparameter(default=0.9, within="[0, 1)")
    round_reset: bool = False

    def init(self, params: Params) -> EWMAState:
        return EWMAState(average=zeros_wide(params))

    def update(
        self, updates: Updates, state: EWMAState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, EWMAState]:
        average = yogi_average(state.average, jax.tree.map(wide, updates), self.beta)
        return cast_like(average, updates), EWMAState(average)
