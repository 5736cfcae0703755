"""The ChaCha20 stream cipher as a generator of random bits for `jax.random`.

A key of this generator is the cipher's key (8 words) and nonce (2 words). Bits
are the key stream; a child key is the first words of the key stream of a nonce
that the parent never draws bits with.

    block(key, counter, nonce): 10 double rounds of the 4 x 4 words
        "expa" "nd 3" "2-by" "te k" / key[0:8] / counter, domain, nonce[0:2]
    and the sum with the input (RFC 8439, section 2.3)

Reference: Nir and Langley, "ChaCha20 and Poly1305 for IETF protocols", RFC 8439.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jax.typing import ArrayLike

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_QUARTERS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
# What a block is for; the same key and nonce never serve two purposes.
_BITS, _SEED, _SPLIT, _FOLD = range(4)


def _rotate(word: jax.Array, by: int) -> jax.Array:
    return (word << by) | (word >> (32 - by))


def _double_round(_: int, words: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x = list(words)
    for a, b, c, d in _QUARTERS:
        x[a] += x[b]
        x[d] = _rotate(x[d] ^ x[a], 16)
        x[c] += x[d]
        x[b] = _rotate(x[b] ^ x[c], 12)
        x[a] += x[b]
        x[d] = _rotate(x[d] ^ x[a], 8)
        x[c] += x[d]
        x[b] = _rotate(x[b] ^ x[c], 7)
    return tuple(x)


def blocks(key: jax.Array, counter: jax.Array, nonce: tuple[ArrayLike, ArrayLike, ArrayLike]) -> jax.Array:
    """Return blocks of the key stream.

    Args:
      key: uint32[8].
      counter: uint32[n], the number of each block.
      nonce: three uint32 scalars.

    Returns:
      uint32[16, n]: the 16 words of each block.
    """
    words = [*map(jnp.uint32, _CONSTANTS), *key, counter, *nonce]
    start = tuple(jnp.broadcast_to(jnp.asarray(word, jnp.uint32), counter.shape) for word in words)
    end = jax.lax.fori_loop(0, 10, _double_round, start)
    return jnp.stack([a + b for a, b in zip(start, end, strict=True)])


def _block(data: jax.Array, counter: ArrayLike, domain: int) -> jax.Array:
    counter = jnp.asarray(counter, jnp.uint32).reshape(-1)
    return blocks(data[:8], counter, (jnp.uint32(domain), data[8], data[9]))


def _seed(seed: jax.Array) -> jax.Array:
    key = jnp.zeros(10, jnp.uint32).at[0].set(seed.astype(jnp.uint32))
    if seed.dtype.itemsize == 8:
        key = key.at[1].set((seed >> 32).astype(jnp.uint32))
    return _block(key, 0, _SEED)[:10, 0]


def _split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    children = _block(data, jnp.arange(math.prod(shape), dtype=jnp.uint32), _SPLIT)
    return children[:10].T.reshape(*shape, 10)


def _fold_in(data: jax.Array, integer: ArrayLike) -> jax.Array:
    return _block(data, integer, _FOLD)[:10, 0]


def _random_bits(data: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    count = -(-size * bit_width // 512)
    words = _block(data, jnp.arange(count, dtype=jnp.uint32), _BITS).reshape(-1)
    if bit_width == 64:
        low, high = jnp.split(words, 2)
        words = (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    elif bit_width < 32:
        words = jax.lax.bitcast_convert_type(words, jnp.dtype(f"uint{bit_width}")).reshape(-1)
    return words[:size].reshape(shape)


CHACHA20 = define_prng_impl(
    key_shape=(10,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="chacha20",
)
"""The generator: `jax.random.key(seed, impl=CHACHA20)`."""
