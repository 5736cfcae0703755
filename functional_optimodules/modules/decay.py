"""Weight decay as a module: the parameters, beside what other modules make of the gradients.

    Init(rate):
        nothing
    Step(grads, params):
        grads += rate * params

The `Optimizer` then multiplies both by the learning rate, as AdamW does in optax and
PyTorch. Its own `w_decay` is not multiplied, as in the paper.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import wide
from functional_optimodules.types import Params, PyTree, Updates


class WeightDecayModule(OptiModule[optax.EmptyState]):
    """g + λ·w, λ times the learning rate in all: AdamW is Adam, then this (Loshchilov & Hutter 2017).

        Init(rate):
            nothing
        Step(grads, params):
            grads += rate * params

    Put it after what adapts the gradients. Before that it is the `ridge` penalty.

    Attributes:
      rate: the factor of the parameters: `weight_decay` of optax and PyTorch.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2,
      arXiv:1711.05101.
    """

    name: ClassVar[str] = "weight-decay"
    packable: ClassVar[bool] = True
    rate: float = hyperparameter(default=1e-2, within="[0, inf)")

    def init(self, params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: Updates, state: optax.EmptyState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, optax.EmptyState]:
        def decay(g: jax.Array, param: jax.Array) -> jax.Array:
            exact = wide(g)
            return (exact + jnp.asarray(self.rate).astype(exact.dtype) * param.astype(exact.dtype)).astype(g.dtype)

        return jax.tree.map(decay, updates, self.require(params)), state
