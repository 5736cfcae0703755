"""Arithmetic that bricks share: accumulators' dtypes, and derivatives that stay finite."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.types import PyTree


def wide(array: ArrayLike) -> jax.Array:
    """Return an array in at least float32, the dtype that norms and moments accumulate in."""
    array = jnp.asarray(array)
    return array.astype(_wide_dtype(array.dtype))


def _wide_dtype(dtype: Any) -> Any:
    # Meant, and so allowed where the user has made implicit promotion an error.
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def zeros_wide(params: PyTree, real: bool = False) -> Any:
    """Return zeros shaped and placed like the parameters, in at least float32; real ones on request."""

    def zeros(param: ArrayLike) -> jax.Array:
        dtype = _wide_dtype(jnp.result_type(param))
        return jnp.zeros_like(param, dtype=jnp.finfo(dtype).dtype if real else dtype)

    return jax.tree.map(zeros, params)


def cast_like(tree: PyTree, like: PyTree) -> Any:
    """Return a tree with each leaf in the dtype of its match."""
    return jax.tree.map(lambda leaf, other: leaf.astype(jnp.result_type(other)), tree, like)


def abs_sq(array: jax.Array) -> jax.Array:
    """Return the squared modulus, real also for complex numbers."""
    if jnp.iscomplexobj(array):
        return array.real**2 + array.imag**2
    return array * array


def safe_sqrt(array: jax.Array) -> jax.Array:
    """Return the square root of non-negative numbers, with derivative 0 at 0."""
    positive = array > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, array, 1)), 0)


def is_finite(tree: PyTree) -> jax.Array:
    """Whether all values of a tree are finite; an empty tree is."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def all_finite(tree: PyTree) -> bool:
    """Whether all values of a tree that is not traced are finite, without a program for all of its leaves."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(jax.device_get(flags))


def total(numbers: Iterable[jax.Array]) -> jax.Array:
    """Return the sum of real numbers in the widest of their dtypes, and at least float32; 0 of none."""
    # Meant, and so allowed where the user has made implicit promotion an error.
    with jax.numpy_dtype_promotion("standard"):
        return sum(list(numbers), jnp.zeros((), jnp.float32))


def where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    """Return one tree or another, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def real(number: ArrayLike) -> jax.Array:
    """Return a number in JAX's default precision: float32, or float64 in its 64-bit mode."""
    return jnp.asarray(number).astype(jnp.result_type(float))


def power(base: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """Return `base ** exponent` as `real` does for a base >= 0, also accurate for large exponents.

    The logarithm of a Python number is taken in double precision.
    """
    exponent = real(exponent)
    return jnp.where(exponent == 0, 1, jnp.exp(jnp.where(exponent == 0, 1, exponent) * _log(base)))


def one_minus_power(base: ArrayLike, exponent: ArrayLike) -> jax.Array:
    """Return `1 - base ** exponent` as `real` does for a base in [0, 1) and an exponent > 0.

    It has no cancellation: the difference written out loses four digits where
    the base is 0.999 and the exponent 1.
    """
    return -jnp.expm1(real(exponent) * _log(base))


def _log(base: ArrayLike) -> jax.Array:
    if isinstance(base, int | float):
        return real(math.log(base) if base > 0 else -math.inf)
    base = jnp.asarray(base)
    return jnp.where(base > 0, jnp.log(jnp.where(base > 0, base, 1)), -jnp.inf)
