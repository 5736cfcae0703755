"""PowerSGD: matrices sent as two thin factors, with the error fed back.

Init:
    right = normal numbers, the same for all clients; error = 0
Step(D):
    u = error + D
    each matrix U of u:
        left = the orthonormal basis of U @ right, by QR
        right = U.T @ left
        U ~ left @ right.T
    error = u - what is sent
"""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from functional_optimodules.brick import OptiModule
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.modules.compression import (
    NUMBER,
    coordinates,
    count,
    from_coordinates,
    lacking,
    owed,
)
from functional_optimodules.numerics import cast_like, safe_sqrt, wide, zeros_wide
from functional_optimodules.types import Params, PyTree, Updates


class PowerSGDState(NamedTuple):
    """State of `PowerSGDModule`.

    Attributes:
      error: what was not sent yet, shaped like the parameters, in at least float32;
        `None` without error feedback.
      right: for each parameter the right factor that the next power iteration starts
        from, of norm 1, in at least float32; `None` for those that are sent as they are.
      bits: float32 scalar, what the last update takes on the wire.
    """

    error: PyTree | None
    right: PyTree
    bits: jax.Array


class PowerSGDModule(OptiModule[PowerSGDState]):
    """P̂ P̂ᵀ U for each matrix, P̂ an orthonormal basis of U Q, Q the last Uᵀ P̂ (Vogels et al. 2019).

        Init(rank, error_feedback, seed):
            right = normal(seed); error = 0
        Step(grads):
            u = error + grads
            for each matrix U of u:
                left = qr(U @ right); right = U.T @ left
                grad = left @ right.T
            others: grad = u
            error = u - grads

    One power iteration a step, which starts from where the last one led: over steps
    that resemble each other it comes to the best approximation of that rank. Each
    client has factors of its own, so that they are not averaged, but what they make.

    An array of more than two axes is a matrix whose columns are its last axis, as
    kernels have it here. Vectors are sent as they are, and so are matrices whose
    factors have no fewer numbers. An update of zero leaves the factors alone. To a
    derivative the basis is constant.

    Bits: 32 rank (rows + columns) for each matrix, and 32 for each other number.

    Attributes:
      rank: how many columns the factors have.
      error_feedback: whether what is not sent is added to the next updates.
      seed: where the first right factors come from.

    References:
      Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient
      compression for distributed optimization", algorithms 1 and 2, NeurIPS 2019,
      arXiv:1905.13727.
    """

    name: ClassVar[str] = "powersgd"
    rank: int = hyperparameter(default=1, within="[1, 2147483647]")
    error_feedback: bool = True
    seed: int = hyperparameter(default=0, within="[0, 4294967295]")

    def init(self, params: Params) -> PowerSGDState:
        leaves, treedef = jax.tree.flatten(params)
        key = jax.random.key(self.seed)
        right = [self._first_right(key, leaf) for leaf in leaves]
        error = zeros_wide(params) if self.error_feedback else None
        return PowerSGDState(error, jax.tree.unflatten(treedef, right), jnp.zeros((), jnp.float32))

    def update(
        self, updates: Updates, state: PowerSGDState, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, PowerSGDState]:
        due = owed(updates, state.error)
        leaves, treedef = jax.tree.flatten(due)
        made, factors, numbers = [], [], 0
        for leaf, right in zip(leaves, jax.tree.leaves(state.right, is_leaf=lambda node: node is None), strict=True):
            if right is None:
                numbers += count(leaf)
            else:
                matrix = coordinates(leaf).reshape(-1, leaf.shape[-1])
                numbers += sum(matrix.shape) * right.shape[1]
                matrix, right = approximated(matrix, right)
                leaf = from_coordinates(matrix.reshape(-1), leaf)
            made.append(leaf)
            factors.append(right)
        sent = cast_like(jax.tree.unflatten(treedef, made), updates)
        right = jax.tree.unflatten(treedef, factors)
        return sent, PowerSGDState(lacking(due, sent, state.error), right, jnp.float32(numbers * NUMBER))

    def metrics(self, state: PowerSGDState) -> dict[str, jax.Array]:
        """Return the bits of the last update."""
        return {"bits": state.bits}

    def _first_right(self, key: jax.Array, param: jax.Array) -> jax.Array | None:
        shape = jnp.shape(param)
        if len(shape) < 2:
            return None
        rows, columns = count(param) // max(1, shape[-1]), shape[-1]
        if self.rank * (rows + columns) >= rows * columns:
            return None
        # The same for equal shapes: an order of the parameters has no part in it.
        right = jax.random.normal(key, (columns, self.rank), wide(param).real.dtype)
        return right / math.sqrt(columns * self.rank)


def approximated(matrix: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a matrix of low rank near to another, and the right factor, of norm 1, to start the next one from."""
    exact = lax.Precision.HIGHEST
    left = jnp.linalg.qr(lax.stop_gradient(jnp.matmul(matrix, right, precision=exact)))[0]
    factor = jnp.matmul(matrix.T, left, precision=exact)
    norm = safe_sqrt(jnp.sum(factor * factor))
    following = jnp.where(norm > 0, factor / jnp.where(norm > 0, norm, 1), right)
    return jnp.matmul(left, factor.T, precision=exact), following
