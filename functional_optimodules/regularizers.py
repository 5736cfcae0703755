"""Regularizers: the gradient of a penalty on the parameters, added to the loss's.

fedprox   alpha / 2 * ||w - w_ref||²     grads += alpha * (w - w_ref)
lasso     alpha * ||w||_1                grads += alpha * sign(w)
ridge     alpha * ||w||²                 grads += 2 * alpha * w
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from functional_optimodules.brick import Regularizer
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import wide
from functional_optimodules.types import Params, PyTree, Updates


def add_scaled(updates: Updates, alpha: ArrayLike, penalty: Callable[..., jax.Array], *trees: PyTree) -> PyTree:
    """Return `updates + alpha * penalty(*trees)`, leaf by leaf, in the updates' dtypes."""
    return jax.tree.map(
        lambda g, *leaves: (wide(g) + alpha * penalty(*map(wide, leaves))).astype(jnp.result_type(g)), updates, *trees
    )


class ReferenceState(NamedTuple):
    """State of `FedProxRegularizer`, and of others that hold parameters near those at the start of the round.

    Attributes:
      reference: the parameters at the start of the round, of their shapes and dtypes.
      awaits: boolean scalar, whether the next step's parameters become the reference.
    """

    reference: PyTree
    awaits: jax.Array

    @classmethod
    def new(cls, params: Params) -> "ReferenceState":
        """Return the state before any round."""
        return cls(jax.tree.map(jnp.zeros_like, params), jnp.array(True))

    def begun(self, params: Params) -> "ReferenceState":
        """Return the state at the start of a round, of which the parameters may not be known yet."""
        if params is None:
            return self._replace(awaits=jnp.array(True))
        return ReferenceState(jax.tree.map(jnp.copy, params), jnp.array(False))

    def stepped(self, params: Params) -> "ReferenceState":
        """Return the state in a step, in which the reference is known."""
        reference = jax.tree.map(lambda w, ref: jnp.where(self.awaits, w, ref), params, self.reference)
        return ReferenceState(reference, jnp.array(False))


class FedProxRegularizer(Regularizer[ReferenceState]):
    """α/2·‖w − w_ref‖², w_ref the weights at the start of the round (Li et al. 2020).

        Init(alpha):
            reference = 0; awaits = true
        Round(weights):
            reference = weights; awaits = false     # awaits = true if they are not given
        Step(grads, weights):
            if awaits: reference = weights; awaits = false
            grads += alpha * (weights - reference)

    The reference is a copy. The pure `begin_round(state, params)` sets it at once;
    without the parameters the round's first step does.

    Attributes:
      alpha: weight of the penalty.

    References:
      Li et al., "Federated optimization in heterogeneous networks", algorithm 2,
      MLSys 2020, arXiv:1812.06127.
    """

    name: ClassVar[str] = "fedprox"
    packable: ClassVar[bool] = True
    alpha: float = hyperparameter(default=0.01, within="[0, inf)")

    def init(self, params: Params) -> ReferenceState:
        return ReferenceState.new(params)

    def begin_round(self, state: ReferenceState, params: Params = None) -> ReferenceState:
        return state.begun(params)

    def update(
        self, updates: Updates, state: ReferenceState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, ReferenceState]:
        weights = self.require(params)
        state = state.stepped(weights)
        return add_scaled(updates, self.alpha, jnp.subtract, weights, state.reference), state


class LassoRegularizer(Regularizer[optax.EmptyState]):
    """α·‖w‖₁ (Tibshirani 1996).

        Step(grads, weights):
            grads += alpha * sign(weights)

    Attributes:
      alpha: weight of the penalty.

    References:
      Tibshirani, "Regression shrinkage and selection via the lasso", JRSS B, 1996.
    """

    name: ClassVar[str] = "lasso"
    packable: ClassVar[bool] = True
    alpha: float = hyperparameter(default=0.01, within="[0, inf)")

    def init(self, params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: Updates, state: optax.EmptyState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, optax.EmptyState]:
        return add_scaled(updates, self.alpha, jnp.sign, self.require(params)), state


class RidgeRegularizer(Regularizer[optax.EmptyState]):
    """α·‖w‖² (Hoerl & Kennard 1970).

        Step(grads, weights):
            grads += 2 * alpha * weights

    Attributes:
      alpha: weight of the penalty.

    References:
      Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal
      problems", Technometrics 12, 1970.
    """

    name: ClassVar[str] = "ridge"
    packable: ClassVar[bool] = True
    alpha: float = hyperparameter(default=0.01, within="[0, inf)")

    def init(self, params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: Updates, state: optax.EmptyState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, optax.EmptyState]:
        return add_scaled(updates, self.alpha, lambda w: 2 * w, self.require(params)), state
