"""Keys for bricks that draw random numbers."""

import contextlib
import secrets
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

_abstract: ContextVar[bool] = ContextVar("abstract", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let `make_key` be traced without a seed, where only shapes are asked for."""
    token = _abstract.set(True)
    try:
        yield
    finally:
        _abstract.reset(token)


def make_key(seed: int | None, params: Any, owner: str, impl: Any = None) -> jax.Array:
    """Make a typed PRNG key from a seed, or from the operating system's entropy.

    Args:
      seed: the seed, or `None` for entropy.
      params: what the state is made for, which tells whether it is being traced.
      owner: how an error names who asks.
      impl: the generator, as `jax.random.key` takes it; JAX's default if `None`.

    Raises:
      RuntimeError: if entropy is asked for while tracing. A compiled program
        would hold the drawn number as a constant, and repeat it at each call.
    """
    words = secrets.randbits(31) if seed is None else seed
    key = jax.random.key(words, impl=impl)
    if seed is not None or _abstract.get():
        return key
    # Under vmap the key itself is not traced, and would be the same for all.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (key, *jax.tree.leaves(params))):
        raise RuntimeError(
            f"{owner}: seed=None takes a key from the operating system, which a traced program cannot: "
            "call `init` outside of jit, vmap and scan, or give a seed"
        )
    return _mix(key)


def _mix(key: jax.Array) -> jax.Array:
    # A seed has 32 bits: fill the whole key with entropy instead.
    data: Any = jax.random.key_data(key)
    words = [secrets.randbits(32) for _ in range(data.size)]
    fresh = jax.numpy.array(words, jax.numpy.uint32).reshape(data.shape)
    return jax.random.wrap_key_data(fresh, impl=jax.random.key_impl(key))
