"""FedOpt: a server's adaptive step on the clients' mean delta.

With g = -D, the clients' mean delta as a gradient, and `first` and `second` as they were after the last round:

    first = beta_1 * first + (1 - beta_1) * g
    fedadagrad   second += g²
    fedyogi      second -= (1 - beta_2) * g² * sign(second - g²)
    fedadam      second = beta_2 * second + (1 - beta_2) * g²
    g = first / (sqrt(second) + tau)

    fedavgm      velocity = beta * velocity + g;   g = velocity

This is algorithm 2 of Reddi et al.: `second` starts at tau² or above, tau is 1e-3
rather than a guard against division by 0, and no bias is corrected. The learning
rate is that of the server's `Optimizer`.

What goes by these names elsewhere differs:

    `adam`, `yogi`, `adagrad` here    second starts at 0, eps = 1e-7; the first two correct the bias
    the paper's released code         second starts at 0; FedAdam is the Adam of Keras, which corrects the bias
    Flower 1.42                       second starts at 0; FedAdam corrects the bias, with exponents of t + 1 in round
                                      t = 1, 2, ...; FedYogi and FedAdagrad do not
    fluke 0.8.1                       second starts at 0; beta_2 = 0.999, tau = 1e-4; no bias is corrected (a flag
                                      that does, off by default, came later: its pull request 33)
    FedLab, commit 5665e5d            second starts at 0; no bias is corrected

Where `second` starts is the field `initial`.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.adaptive import divide_by_root, squares
from functional_optimodules.modules.momentum import ewma, yogi_average
from functional_optimodules.numerics import cast_like, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class FedOptState(NamedTuple):
    """State of `FedAdamModule`, `FedYogiModule` and `FedAdagradModule`.

    Attributes:
      first: average of gradients, shaped like the parameters, in at least float32.
      second: second moment of gradients, likewise.
    """

    first: PyTree
    second: PyTree


def init_fedopt(params: Params, tau: ArrayLike, initial: ArrayLike | None) -> FedOptState:
    """Return the state before the first round: a second moment of `initial`, or of tau² for `None`."""
    start = tau**2 if initial is None else initial
    second = jax.tree.map(lambda zeros: zeros + start, zeros_wide(params, real=True))
    return FedOptState(first=zeros_wide(params), second=second)


def fedopt_step(
    updates: Updates, state: FedOptState, second: PyTree, beta_1: ArrayLike, tau: ArrayLike
) -> tuple[Updates, FedOptState]:
    """Return a FedOpt module's output and its new state, given the second moment's new value."""
    first = ewma(state.first, jax.tree.map(wide, updates), beta_1)
    return divide_by_root(first, second, tau, updates), FedOptState(first, second)


class FedAdamModule(OptiModule[FedOptState]):
    """m / (√v + τ), v an average of g² that starts at τ² (Reddi et al. 2021, algorithm 2).

        Init(beta_1, beta_2, tau, initial):
            first = 0; second = tau ** 2, or initial if given
        Step(grads):
            first = beta_1 * first + (1 - beta_1) * grads
            second = beta_2 * second + (1 - beta_2) * grads ** 2
            grads = first / (sqrt(second) + tau)

    For a server. No bias is corrected: `adam` does that.

    Attributes:
      beta_1: weight of the past first moment.
      beta_2: weight of the past second moment.
      tau: added to the divisor: the larger, the less adaptive.
      initial: where the second moment starts; `None` for tau², the least that the
        paper's analysis allows.

    References:
      Reddi et al., "Adaptive federated optimization", algorithm 2, ICLR 2021,
      arXiv:2003.00295.
    """

    name: ClassVar[str] = "fedadam"
    packable: ClassVar[bool] = True
    beta_1: float = hyperparameter(default=0.9, within="[0, 1)")
    beta_2: float = hyperparameter(default=0.99, within="[0, 1)")
    tau: float = hyperparameter(default=1e-3, within="(0, inf)")
    initial: float | None = hyperparameter(default=None, within="[0, inf)")

    def init(self, params: Params) -> FedOptState:
        return init_fedopt(params, self.tau, self.initial)

    def update(
        self, updates: Updates, state: FedOptState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedOptState]:
        second = ewma(state.second, squares(updates), self.beta_2)
        return fedopt_step(updates, state, second, self.beta_1, self.tau)


class FedYogiModule(OptiModule[FedOptState]):
    """m / (√v + τ), v moved by ±(1 − β₂)·g² from τ² on (Reddi et al. 2021, algorithm 2).

        Init(beta_1, beta_2, tau, initial):
            first = 0; second = tau ** 2, or initial if given
        Step(grads):
            first = beta_1 * first + (1 - beta_1) * grads
            second = second - (1 - beta_2) * grads ** 2 * sign(second - grads ** 2)
            grads = first / (sqrt(second) + tau)

    For a server. No bias is corrected: `yogi` does that.

    Attributes:
      beta_1: weight of the past first moment.
      beta_2: one minus the step of the second moment.
      tau: added to the divisor: the larger, the less adaptive.
      initial: where the second moment starts; `None` for tau², the least that the
        paper's analysis allows.

    References:
      Reddi et al., "Adaptive federated optimization", algorithm 2, ICLR 2021,
      arXiv:2003.00295.
    """

    name: ClassVar[str] = "fedyogi"
    packable: ClassVar[bool] = True
    beta_1: float = hyperparameter(default=0.9, within="[0, 1)")
    beta_2: float = hyperparameter(default=0.99, within="[0, 1)")
    tau: float = hyperparameter(default=1e-3, within="(0, inf)")
    initial: float | None = hyperparameter(default=None, within="[0, inf)")

    def init(self, params: Params) -> FedOptState:
        return init_fedopt(params, self.tau, self.initial)

    def update(
        self, updates: Updates, state: FedOptState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedOptState]:
        second = yogi_average(state.second, squares(updates), self.beta_2)
        return fedopt_step(updates, state, second, self.beta_1, self.tau)


class FedAdagradModule(OptiModule[FedOptState]):
    """m / (√v + τ), v the sum of g² from τ² on (Reddi et al. 2021, algorithm 2).

        Init(beta_1, tau, initial):
            first = 0; second = tau ** 2, or initial if given
        Step(grads):
            first = beta_1 * first + (1 - beta_1) * grads
            second += grads ** 2
            grads = first / (sqrt(second) + tau)

    For a server.

    Attributes:
      beta_1: weight of the past first moment: 0 in the paper's experiments.
      tau: added to the divisor: the larger, the less adaptive.
      initial: where the second moment starts; `None` for tau², the least that the
        paper's analysis allows.

    References:
      Reddi et al., "Adaptive federated optimization", algorithm 2, ICLR 2021,
      arXiv:2003.00295.
    """

    name: ClassVar[str] = "fedadagrad"
    packable: ClassVar[bool] = True
    beta_1: float = hyperparameter(default=0.0, within="[0, 1)")
    tau: float = hyperparameter(default=1e-3, within="(0, inf)")
    initial: float | None = hyperparameter(default=None, within="[0, inf)")

    def init(self, params: Params) -> FedOptState:
        return init_fedopt(params, self.tau, self.initial)

    def update(
        self, updates: Updates, state: FedOptState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedOptState]:
        second = jax.tree.map(jnp.add, state.second, squares(updates))
        return fedopt_step(updates, state, second, self.beta_1, self.tau)


class FedAvgMState(NamedTuple):
    """State of `FedAvgMModule`.

    Attributes:
      velocity: shaped like the parameters, in at least float32.
    """

    velocity: PyTree


class FedAvgMModule(OptiModule[FedAvgMState]):
    """velocity ← β·velocity + g, on a server (Hsu et al. 2019).

        Init(beta):
            velocity = 0
        Step(grads):
            velocity = beta * velocity + grads
            grads = velocity

    It is `momentum` by the name that federated learning has for it; Nesterov's form
    on a server is `momentum` with `nesterov`.

    Attributes:
      beta: weight of the past velocity.

    References:
      Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution
      for federated visual classification", arXiv:1909.06335.
    """

    name: ClassVar[str] = "fedavgm"
    packable: ClassVar[bool] = True
    beta: float = hyperparameter(default=0.9, within="[0, 1)")

    def init(self, params: Params) -> FedAvgMState:
        return FedAvgMState(velocity=zeros_wide(params))

    def update(
        self, updates: Updates, state: FedAvgMState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, FedAvgMState]:
        velocity = jax.tree.map(lambda v, g: self.beta * v + wide(g), state.velocity, updates)
        return cast_like(velocity, updates), FedAvgMState(velocity)
