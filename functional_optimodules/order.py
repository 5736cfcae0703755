"""Order, by ways that a platform is quick at: the k largest of a vector, and short columns sorted side by side.

What each is for shows `python -m benchmarks.rounds.places`: `largest` compresses what
clients send, `sorted_by_network` is in the median of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functional_optimodules.types import HostArray


def largest(keys: jax.Array, k: int) -> jax.Array:
    """Whether each of some unsigned integers is among the k largest: of exactly k; of equal ones, the first are.

    `lax.top_k` on CPU, with JAX 0.10.2, takes 0.24 ms for 500 of 50,000 and 4 ms for half
    of them, and a sort 8 ms. Counting digits takes 0.1 ms for any k, and halving 0.3 ms:
    it is for where counters are slow to scatter to, and a reduction is quick.
    """
    size = keys.shape[0]
    if k == size:
        return jnp.ones(size, bool)
    least, left = _kth(keys, jnp.ones(size, bool), jnp.int32(k), 8 * keys.dtype.itemsize)
    equal = keys == least
    backwards = jnp.arange(size - 1, -1, -1, dtype=jnp.uint32)
    last = lax.cond(
        jnp.sum(equal, dtype=jnp.int32) > left,
        lambda: _kth(backwards, equal, left, (size - 1).bit_length())[0],
        lambda: jnp.uint32(0),
    )
    return (keys > least) | (equal & (backwards >= last))


def _kth(keys: jax.Array, among: jax.Array, k: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Return the k-th largest of some keys of so many bits, and how many of its equals are among the k largest."""
    by_digits, by_halving = (functools.partial(way, bits=bits) for way in (_kth_by_digits, _kth_by_halving))
    return lax.platform_dependent(keys, among, k, cpu=by_digits, default=by_halving)


# 2048 counters stay in a core's first cache.
_DIGIT_BITS = 11


def _kth_by_digits(keys: jax.Array, among: jax.Array, k: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    least = jnp.zeros((), keys.dtype)
    while bits:
        width = min(bits, _DIGIT_BITS)
        bits -= width
        base = 2**width
        digits = jnp.where(among, ((keys >> bits) & (base - 1)).astype(jnp.int32), base)
        equal = jnp.zeros(base, jnp.int32).at[digits].add(1, mode="drop")
        at_least = jnp.cumsum(equal[::-1])[::-1]
        digit = jnp.sum(at_least >= k, dtype=jnp.int32) - 1
        k = k - (at_least[digit] - equal[digit])
        among = digits == digit
        least = least | (digit.astype(keys.dtype) << bits)
    return least, k


def _kth_by_halving(keys: jax.Array, among: jax.Array, k: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    def halve(step: jax.Array, least: jax.Array) -> jax.Array:
        trial = least | (jnp.ones((), keys.dtype) << (bits - 1 - step).astype(keys.dtype))
        return jnp.where(jnp.sum(among & (keys >= trial), dtype=jnp.int32) >= k, trial, least)

    least = lax.fori_loop(0, bits, halve, jnp.zeros((), keys.dtype))
    return least, k - jnp.sum(among & (keys > least), dtype=jnp.int32)


def sorted_by_network(rows: jax.Array) -> jax.Array:
    """Return what `jnp.sort(rows, axis=0)` does, by minima and maxima of whole rows."""

    def exchange(rows: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        partner, upper = step
        others = rows.at[partner].get(mode="promise_in_bounds", unique_indices=True)
        return jnp.where(upper, jnp.maximum(rows, others), jnp.minimum(rows, others)), None

    partners, uppers = _network(rows.shape[0])
    return jax.lax.scan(exchange, rows, (jnp.asarray(partners), jnp.asarray(uppers)))[0]


@functools.cache
def _network(count: int) -> tuple[HostArray, HostArray]:
    """Return Batcher's merge exchange of a number of rows (Knuth, volume 3, algorithm 5.2.2M).

    Returns:
      By step and row, the row that it is compared with, itself for none, and whether it
      gets the larger of the two.
    """
    top = 1 << max((count - 1).bit_length() - 1, 0)
    partners, uppers = [], []
    span = top
    while span:
        distance, bit, reach = span, 0, top
        while distance:
            low = np.arange(max(count - distance, 0))
            low = low[low & span == bit]
            high = low + distance
            partner, upper = np.arange(count), np.zeros((count, 1), bool)
            partner[low], partner[high], upper[high] = high, low, True
            partners.append(partner)
            uppers.append(upper)
            distance, bit, reach = reach - span, span, reach // 2
        span //= 2
    return np.array(partners, np.int32), np.array(uppers)
