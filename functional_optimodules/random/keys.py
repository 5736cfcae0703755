"""Keys for bricks that draw random numbers: where they come from, and what their generators are saved as."""

import contextlib
import secrets
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.config.outside import quote
from functional_optimodules.types import PyTree

_abstract: ContextVar[bool] = ContextVar("abstract", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let `make_key` be traced without a seed, where only shapes are asked for."""
    token = _abstract.set(True)
    try:
        yield
    finally:
        _abstract.reset(token)


def make_key(seed: int | None, params: PyTree, owner: str, impl: Any = None) -> jax.Array:
    """Make a typed PRNG key from a seed, or from the operating system's entropy.

    Args:
      seed: the seed, or `None` for entropy.
      params: what the state is made for, which tells whether it is being traced.
      owner: how an error names who asks.
      impl: the generator: its name, or as `jax.random.key` takes it; JAX's default if `None`.

    Raises:
      RuntimeError: if entropy is asked for while tracing. A compiled program
        would hold the drawn number as a constant, and repeat it at each call.
    """
    key = jax.random.key(secrets.randbits(31) if seed is None else seed, impl=_generator(impl))
    if seed is not None or _abstract.get():
        return key
    # Under vmap the key itself is not traced, and would be the same for all.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (key, *jax.tree.leaves(params))):
        raise RuntimeError(
            f"{owner}: seed=None takes a key from the operating system, which a traced program cannot: "
            "call `init` outside of jit, vmap and scan, or give a seed"
        )
    # A seed has 32 bits: fill the whole key with entropy instead.
    data = jax.random.key_data(key)
    words = jnp.array([secrets.randbits(32) for _ in range(data.size)], jnp.uint32)
    return jax.random.wrap_key_data(words.reshape(data.shape), impl=jax.random.key_impl(key))


def is_key(leaf: Any) -> bool:
    """Whether an array, or its spec, is of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def generator_name(keys: Any) -> str:
    """Return the name that the generator of keys is saved under.

    Raises:
      TypeError: if it has none.
    """
    generator = jax.random.key_impl(keys)
    if isinstance(generator, str):
        return generator
    if generator != _generator("chacha20"):
        raise TypeError(f"keys of {generator} cannot be saved: JAX knows their generator by no name")
    return "chacha20"


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
    if impl != "chacha20":
        return impl
    # Imported where it is used: it brings much of JAX with it that nothing else needs.
    from functional_optimodules.random.chacha import CHACHA20

    return CHACHA20


def words(leaf: jax.Array) -> jax.Array:
    """Return an array; of one of keys, the words that they are made of."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_words(values: PyTree, like: jax.Array) -> PyTree:
    """Return what `words` was given: the values as they are, or keys, if what they are like holds such."""
    return jax.random.wrap_key_data(jnp.asarray(values), impl=jax.random.key_impl(like)) if is_key(like) else values
