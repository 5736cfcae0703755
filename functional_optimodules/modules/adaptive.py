"""Adaptive step sizes: gradients divided by the root of a second moment.

    adagrad   v += g²
    rmsprop   v = beta * v + (1 - beta) * g²
    adam      m = beta_1 * m + (1 - beta_1) * g;   v = beta_2 * v + (1 - beta_2) * g²
    yogi      as adam, with v = v - (1 - beta_2) * sign(v - g²) * g²

    g = g / (sqrt(v) + eps), or with bias correction m̂ / (sqrt(v̂) + eps)

Moments are kept in at least float32. A gradient of zero stays zero, and so does
its derivative.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.momentum import ewma, yogi_average
from functional_optimodules.numerics import abs_sq, cast_like, one_minus_power, safe_sqrt, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


def squares(updates: Updates) -> PyTree:
    """Return the squared moduli of a tree, in at least float32."""
    return jax.tree.map(lambda g: abs_sq(wide(g)), updates)


def divide_by_root(numerators: PyTree, moments: PyTree, eps: ArrayLike, like: PyTree) -> PyTree:
    """Return `numerators / (sqrt(moments) + eps)`, in the dtypes of another tree."""
    # Root and numerator are of one precision: the former is real, also where the latter is complex.
    ratios = jax.tree.map(lambda m, v: wide(m) / (safe_sqrt(v) + eps).astype(wide(m).dtype), numerators, moments)
    return cast_like(ratios, like)


class AdaGradState(NamedTuple):
    """State of `AdaGradModule`.

    Attributes:
      total: sum of squared gradients, shaped like the parameters, in at least float32.
    """

    total: PyTree


class AdaGradModule(OptiModule[AdaGradState]):
    """g / (√Σg² + ε) (Duchi et al. 2011).

        Init(eps):
            total = 0
        Step(grads):
            total += grads ** 2
            grads = grads / (sqrt(total) + eps)

    Attributes:
      eps: added to the divisor.
      round_reset: whether a new round starts from a total of 0.

    References:
      Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning
      and stochastic optimization", JMLR 12, 2011.
    """

    name: ClassVar[str] = "adagrad"
    packable: ClassVar[bool] = True
    eps: float = hyperparameter(default=1e-7, within="(0, inf)")
    round_reset: bool = False

    def init(self, params: Params) -> AdaGradState:
        return AdaGradState(total=zeros_wide(params, real=True))

    def update(
        self, updates: Updates, state: AdaGradState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, AdaGradState]:
        total = jax.tree.map(jnp.add, state.total, squares(updates))
        return divide_by_root(updates, total, self.eps, updates), AdaGradState(total)


class RMSPropState(NamedTuple):
    """State of `RMSPropModule`.

    Attributes:
      second: average of squared gradients, shaped like the parameters, in at least float32.
    """

    second: PyTree


class RMSPropModule(OptiModule[RMSPropState]):
    """g / (√v + ε), v an average of g² (Tieleman & Hinton 2012).

        Init(beta, eps):
            second = 0
        Step(grads):
            second = beta * second + (1 - beta) * grads ** 2
            grads = grads / (sqrt(second) + eps)

    Attributes:
      beta: weight of the past average.
      eps: added to the divisor.
      round_reset: whether a new round starts from an average of 0.

    References:
      Tieleman and Hinton, "Lecture 6.5: RMSProp", Coursera, 2012.
    """

    name: ClassVar[str] = "rmsprop"
    packable: ClassVar[bool] = True
    beta: float = hyperparameter(default=0.9, within="[0, 1)")
    eps: float = hyperparameter(default=1e-7, within="(0, inf)")
    round_reset: bool = False

    def init(self, params: Params) -> RMSPropState:
        return RMSPropState(second=zeros_wide(params, real=True))

    def update(
        self, updates: Updates, state: RMSPropState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, RMSPropState]:
        second = ewma(state.second, squares(updates), self.beta)
        return divide_by_root(updates, second, self.eps, updates), RMSPropState(second)


class AdamState(NamedTuple):
    """State of `AdamModule` and `YogiModule`.

    Attributes:
      steps: int32 scalar, how many steps were taken.
      first: average of gradients, shaped like the parameters, in at least float32.
      second: average of squared gradients, likewise.
      largest: with AMSGrad, the largest corrected `second` so far, likewise;
        `None` without.
    """

    steps: jax.Array
    first: PyTree
    second: PyTree
    largest: PyTree


def init_moments(params: Params, amsgrad: bool) -> AdamState:
    """Return the state of Adam before the first step."""
    largest = zeros_wide(params, real=True) if amsgrad else None
    return AdamState(jnp.zeros((), jnp.int32), zeros_wide(params), zeros_wide(params, real=True), largest)


def corrected(moments: PyTree, beta: ArrayLike, steps: jax.Array) -> PyTree:
    """Return averages that started from 0, divided by the weight of what they are averages of."""
    scale = 1 / one_minus_power(beta, steps)
    return jax.tree.map(lambda m: m * scale.astype(m.dtype), moments)


def adam_step(
    updates: Updates, state: AdamState, second: PyTree, beta_1: ArrayLike, beta_2: ArrayLike, eps: ArrayLike
) -> tuple[Updates, AdamState]:
    """Return Adam's output and its new state, given the second moment's new value."""
    steps = optax.safe_increment(state.steps)
    first = ewma(state.first, jax.tree.map(wide, updates), beta_1)
    v_hat, largest = corrected(second, beta_2, steps), state.largest
    if largest is not None:
        v_hat = largest = jax.tree.map(jnp.maximum, largest, v_hat)
    output = divide_by_root(corrected(first, beta_1, steps), v_hat, eps, updates)
    return output, AdamState(steps, first, second, largest)


class AdamModule(OptiModule[AdamState]):
    """m̂ / (√v̂ + ε), bias-corrected (Kingma & Ba 2014; AMSGrad: Reddi et al. 2018).

        Init(beta_1, beta_2, eps, amsgrad):
            steps = 0; first = 0; second = 0; largest = 0 if amsgrad
        Step(grads):
            steps += 1
            first = beta_1 * first + (1 - beta_1) * grads
            second = beta_2 * second + (1 - beta_2) * grads ** 2
            m_hat = first / (1 - beta_1 ** steps)
            v_hat = second / (1 - beta_2 ** steps)
            if amsgrad: v_hat = largest = max(largest, v_hat)
            grads = m_hat / (sqrt(v_hat) + eps)

    AMSGrad takes the maximum of bias-corrected moments.

    Attributes:
      beta_1: weight of the past first moment.
      beta_2: weight of the past second moment.
      amsgrad: whether to divide by the largest second moment so far.
      eps: added to the divisor.
      round_reset: whether a new round starts from moments of 0.

    References:
      Kingma and Ba, "Adam: a method for stochastic optimization", algorithm 1,
      arXiv:1412.6980.
      Reddi, Kale and Kumar, "On the convergence of Adam and beyond", algorithm 2,
      arXiv:1904.09237.
    """

    name: ClassVar[str] = "adam"
    packable: ClassVar[bool] = True
    beta_1: float = hyperparameter(default=0.9, within="[0, 1)")
    beta_2: float = hyperparameter(default=0.99, within="[0, 1)")
    amsgrad: bool = False
    eps: float = hyperparameter(default=1e-7, within="(0, inf)")
    round_reset: bool = False

    def init(self, params: Params) -> AdamState:
        return init_moments(params, self.amsgrad)

    def update(
        self, updates: Updates, state: AdamState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, AdamState]:
        second = ewma(state.second, squares(updates), self.beta_2)
        return adam_step(updates, state, second, self.beta_1, self.beta_2, self.eps)


class YogiModule(OptiModule[AdamState]):
    """Adam with an additive second moment (Zaheer et al. 2018).

        Init(beta_1, beta_2, eps, amsgrad):
            steps = 0; first = 0; second = 0; largest = 0 if amsgrad
        Step(grads):
            as Adam, but for
            second = second - (1 - beta_2) * sign(second - grads ** 2) * grads ** 2

    Attributes:
      beta_1: weight of the past first moment.
      beta_2: one minus the step of the second moment.
      amsgrad: whether to divide by the largest second moment so far.
      eps: added to the divisor.
      round_reset: whether a new round starts from moments of 0.

    References:
      Zaheer et al., "Adaptive methods for nonconvex optimization", algorithm 2,
      NeurIPS 2018.
    """

    name: ClassVar[str] = "yogi"
    packable: ClassVar[bool] = True
    beta_1: float = hyperparameter(default=0.9, within="[0, 1)")
    beta_2: float = hyperparameter(default=0.99, within="[0, 1)")
    amsgrad: bool = False
    eps: float = hyperparameter(default=1e-7, within="(0, inf)")
    round_reset: bool = False

    def init(self, params: Params) -> AdamState:
        return init_moments(params, self.amsgrad)

    def update(
        self, updates: Updates, state: AdamState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, AdamState]:
        second = yogi_average(state.second, squares(updates), self.beta_2)
        return adam_step(updates, state, second, self.beta_1, self.beta_2, self.eps)
