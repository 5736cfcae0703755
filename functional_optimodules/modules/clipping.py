"""Clipping of gradients by their Euclidean norm.

    l2-clipping           norm of each parameter's gradient on its own
    l2-global-clipping    norm of all gradients together

    grads = grads * min(1, max_norm / norm)

Norms are taken in at least float32: a float16 norm overflows at 256 elements of
256. A gradient of zero stays zero, and so does its derivative.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from functional_optimodules import xla
from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.numerics import abs_sq, real, safe_sqrt, total, wide
from functional_optimodules.packing.policy import map_parameters
from functional_optimodules.packing.tree import unpack
from functional_optimodules.types import Params, PyTree, Updates


def sum_of_squares(gradient: jax.Array) -> jax.Array:
    """Return the squared norm of an array, in at least float32."""
    return jnp.sum(abs_sq(wide(gradient)))


def squared_norm(tree: PyTree) -> jax.Array:
    """Return the squared norm of all arrays of a tree together, in at least float32."""
    return total(map(sum_of_squares, jax.tree.leaves(tree)))


def shrink(gradient: jax.Array, norm: jax.Array, max_norm: ArrayLike) -> jax.Array:
    """Return a gradient scaled down where a norm is above its bound."""
    bound = jnp.asarray(max_norm).astype(norm.dtype)
    above = norm > bound
    scale = jnp.where(above, bound / jnp.where(above, norm, 1), 1)
    return (wide(gradient) * scale.astype(wide(gradient).dtype)).astype(jnp.result_type(gradient))


class L2Clipping(OptiModule[optax.EmptyState]):
    """g · min(1, c / ‖g‖₂), for each parameter on its own.

        Init(max_norm):
            nothing
        Step(grads):
            for each parameter: grad = grad * min(1, max_norm / ||grad||)

    Attributes:
      max_norm: the largest norm of a parameter's gradient.

    References:
      Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
      networks", algorithm 1, ICML 2013.
    """

    name: ClassVar[str] = "l2-clipping"
    packable: ClassVar[bool] = True
    max_norm: float = hyperparameter(default=1.0, within="[0, inf]")

    def init(self, params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: Updates, state: optax.EmptyState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, optax.EmptyState]:
        clipped = map_parameters(lambda g: shrink(g, safe_sqrt(sum_of_squares(g)), self.max_norm), updates)
        return clipped, state

    def measure(
        self, before: Updates, after: Updates, state: optax.EmptyState, params: Params = None
    ) -> dict[str, jax.Array]:
        """Return `clipped`, the share of the parameters whose gradient was clipped."""
        norms = [safe_sqrt(sum_of_squares(g)) for g in jax.tree.leaves(unpack(before))]
        above = [norm > jnp.asarray(self.max_norm).astype(norm.dtype) for norm in norms]
        return {"clipped": jnp.mean(real(jnp.stack(above))) if above else jnp.zeros(())}


class L2GlobalClipping(OptiModule[optax.EmptyState]):
    """g · min(1, c / ‖g‖₂), for all parameters together (Pascanu et al. 2013).

        Init(max_norm):
            nothing
        Step(grads):
            norm = sqrt(sum over parameters of ||grad||²)
            grads = grads * min(1, max_norm / norm)

    Attributes:
      max_norm: the largest norm of all gradients together.

    References:
      Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
      networks", algorithm 1, ICML 2013.
    """

    name: ClassVar[str] = "l2-global-clipping"
    packable: ClassVar[bool] = True
    max_norm: float = hyperparameter(default=1.0, within="[0, inf]")

    def init(self, params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: Updates, state: optax.EmptyState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, optax.EmptyState]:
        norm = xla.norm(squared_norm(updates))
        return jax.tree.map(lambda g: shrink(g, norm, self.max_norm), updates), state

    def measure(
        self, before: Updates, after: Updates, state: optax.EmptyState, params: Params = None
    ) -> dict[str, jax.Array]:
        """Return `clipped`, 1 if the gradients were clipped and 0 if not."""
        norm = xla.norm(squared_norm(before))
        return {"clipped": real(norm > jnp.asarray(self.max_norm).astype(norm.dtype))}
