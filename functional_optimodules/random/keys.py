"""Keys for bricks that draw random numbers: where they come from, and what their generators are saved as.

A key of the cipher is kept as its words, and made a typed key where numbers are drawn. Whoever saves typed keys
asks JAX for their generator by its name, and JAX has no public way to be told another name.
"""

import contextlib
import functools
import itertools
import math
import secrets
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.config.outside import quote
from functional_optimodules.types import HostArray, PyTree

CIPHER = "chacha20"
"""The name of the cipher among generators."""
_WORDS = 10
_abstract: ContextVar[bool] = ContextVar("abstract", default=False)
_entropy: ContextVar["_Entropy | None"] = ContextVar("entropy", default=None)


class CipherKey(NamedTuple):
    """Keys of the ChaCha20 cipher in a state, for whatever saves arrays; `typed` makes them keys of `jax.random`.

    Attributes:
      words: uint32[..., 10], the cipher's key (8 words) and nonce (2 words).
    """

    words: jax.Array


class _Entropy(NamedTuple):
    words: jax.Array | HostArray
    numbers: Iterator[int]
    trace: object


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let `make_key` be traced without a seed, where only shapes are asked for."""
    token = _abstract.set(True)
    try:
        yield
    finally:
        _abstract.reset(token)


def draw_entropy() -> HostArray:
    """Draw words for `entropy` from the operating system: uint32[10]. As secret as the keys that come of them."""
    return np.array([secrets.randbits(32) for _ in range(_WORDS)], np.uint32)


@contextlib.contextmanager
def entropy(words: jax.Array | HostArray) -> Iterator[None]:
    """Let keys without a seed come from words that a compiled program is given, and not from the operating system.

        @jax.jit
        def init(params, words):
            with fo.entropy(words):
                return tx.init(params)

        state = init(params, fo.draw_entropy())

    The keys that are made within differ from each other, and follow from the words alone and
    from the order in which they are made.

    Args:
      words: uint32[10], as `draw_entropy` makes them; an argument of the program that is traced.

    Raises:
      ValueError: if they are of another shape or dtype.
    """
    if getattr(words, "shape", None) != (_WORDS,) or words.dtype != np.uint32:
        found = f"{words.dtype}{list(words.shape)}" if hasattr(words, "dtype") else quote(words)
        raise ValueError(f"entropy: {found}: expected uint32[{_WORDS}], as `draw_entropy` makes it")
    token = _entropy.set(_Entropy(words, itertools.count(), _trace()))
    try:
        yield
    finally:
        _entropy.reset(token)


def make_key(seed: int | None, params: PyTree, owner: str, impl: Any = None) -> Any:
    """Make a PRNG key from a seed, or from entropy: the operating system's, or what `entropy` says.

    Args:
      seed: the seed, or `None` for entropy.
      params: what the state is made for, which tells whether it is being traced.
      owner: how an error names who asks.
      impl: the generator: its name, or as `jax.random.key` takes it; JAX's default if `None`.

    Returns:
      A typed key; of `"chacha20"`, a `CipherKey`.

    Raises:
      RuntimeError: if the operating system's entropy is asked for while tracing. A compiled
        program would hold the drawn number as a constant, and repeat it at each call.
    """
    key = jax.random.key(0 if seed is None else seed, impl=_generator(impl))
    if seed is None and not _abstract.get():
        # A seed has 32 bits: the whole key is filled instead.
        key = jax.random.wrap_key_data(_drawn(key, params, owner), impl=jax.random.key_impl(key))
    return CipherKey(jax.random.key_data(key)) if impl == CIPHER else key


def _drawn(key: jax.Array, params: PyTree, owner: str) -> jax.Array:
    """Return as many words of entropy as a key has."""
    shape, given = jax.random.key_data(key).shape, _entropy.get()
    # Under vmap the key itself is not traced, and would be the same for all.
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in (key, *jax.tree.leaves(params)))
    if given is None:
        if traced:
            raise RuntimeError(
                f"{owner}: seed=None takes a key from the operating system, which a traced program cannot: call `init` "
                "outside of jit, vmap and scan, or give a seed, or give the program entropy as an argument\n"
                "    wrong:  jax.jit(tx.init)(params)\n"
                "    right:  def init(params, words):\n"
                "                with fo.entropy(words):\n"
                "                    return tx.init(params)\n"
                "            jax.jit(init)(params, fo.draw_entropy())"
            )
        return jnp.array([secrets.randbits(32) for _ in range(math.prod(shape))], jnp.uint32).reshape(shape)
    if given.trace != _trace() or (traced and not isinstance(given.words, jax.core.Tracer)):
        raise RuntimeError(
            f"{owner}: seed=None, within `entropy` of words that are no argument of the program that is traced: it "
            "would hold them, or give all of a `vmap` the same key: enter `entropy` within the function that is "
            "traced, with words that it is given"
        )
    parent = jax.random.wrap_key_data(jnp.asarray(given.words), impl=_generator(CIPHER))
    return jax.random.bits(jax.random.fold_in(parent, next(given.numbers)), shape, jnp.uint32)


def _trace() -> object:
    """Return what tells one trace from another."""
    # Imported where it is used: it brings much of JAX with it that nothing else needs.
    from jax.extend.core import get_opaque_trace_state

    return get_opaque_trace_state()


def typed(key: Any) -> jax.Array:
    """Return a key that `make_key` made as one of `jax.random`."""
    return jax.random.wrap_key_data(key.words, impl=_generator(CIPHER)) if isinstance(key, CipherKey) else key


def is_key(leaf: Any) -> bool:
    """Whether an array, or its spec, is of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_any_key(node: Any) -> bool:
    """Whether a node is a `CipherKey`, or an array of typed keys; an `is_leaf` for `jax.tree` functions."""
    return isinstance(node, CipherKey) or (hasattr(node, "dtype") and is_key(node))


def is_of_keys(leaf: Any) -> bool:
    """Whether an array, or its spec, is of typed keys or of words of keys: no state has other uint32."""
    return is_key(leaf) or leaf.dtype == np.uint32


def generator_name(keys: Any) -> str:
    """Return the name that the generator of keys is saved under.

    Raises:
      TypeError: if it has none.
    """
    generator = jax.random.key_impl(keys)
    if isinstance(generator, str):
        return generator
    if generator != _generator(CIPHER):
        raise TypeError(f"keys of {generator} cannot be saved: JAX knows their generator by no name")
    return CIPHER


def generator_named(name: str, what: str) -> tuple[Any, tuple[int, ...]]:
    """Return a generator by its name, as `jax.random.key` takes it, and the shape of a key's words.

    Raises:
      ValueError: if there is none of that name; `what` is how it names who asks.
    """
    generator = _generator(name)
    try:
        return generator, jax.random.key_data(jax.random.key(0, impl=generator)).shape
    except (TypeError, ValueError):
        raise ValueError(f"{what}: {quote(name)} is no generator of random numbers that JAX has") from None


def _generator(impl: Any) -> Any:
    """Return a generator as `jax.random.key` takes it."""
    if impl != CIPHER:
        return impl
    # Imported where it is used: it brings much of JAX with it that nothing else needs.
    from functional_optimodules.random.chacha import CHACHA20

    return CHACHA20


def fold_in_keys(state: PyTree, integer: int | jax.Array) -> PyTree:
    """Fold an integer into every PRNG key of a tree."""

    def fold(node: Any) -> Any:
        if not is_any_key(node):
            return node
        keys = typed(node)
        fold_each = functools.reduce(lambda f, _: jax.vmap(f, (0, None)), range(keys.ndim), jax.random.fold_in)
        folded = fold_each(keys, integer)
        return CipherKey(words(folded)) if isinstance(node, CipherKey) else folded

    return jax.tree.map(fold, state, is_leaf=is_any_key)


def words(leaf: Any) -> jax.Array:
    """Return an array; of keys, the words that they are made of."""
    if isinstance(leaf, CipherKey):
        return leaf.words
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_words(values: PyTree, like: jax.Array) -> PyTree:
    """Return what `words` was given: the values as they are, or keys, if what they are like holds such."""
    return jax.random.wrap_key_data(jnp.asarray(values), impl=jax.random.key_impl(like)) if is_key(like) else values
