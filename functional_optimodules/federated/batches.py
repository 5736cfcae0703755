"""How a client walks through its examples, batch after batch.

What pads a batch, or a walk, is never read as it is: a masked place repeats an
example of the same client, so that no number, however odd, comes from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.options import Remainder
from functional_optimodules.types import PyTree


class Batches(NamedTuple):
    """How one client walks through its batches.

    Attributes:
      epochs: how many passes.
      begin: `(key) -> order`, what a pass needs.
      steps: int32 scalar, how many batches a pass has.
      take: `(order, step) -> batch, mask`, where the mask is `None` if all examples are real.
      size: how many examples a batch has.
      examples: float32 scalar, how many examples the client has.
      total: int32 scalar, how many batches in all, passes being started as they are
        needed; `None` for those of `epochs` passes.
    """

    epochs: int
    begin: Callable[[jax.Array], jax.Array]
    steps: jax.Array
    take: Callable[[jax.Array, jax.Array], tuple[PyTree, jax.Array | None]]
    size: int
    examples: jax.Array
    total: jax.Array | None = None

    def taken(self) -> jax.Array:
        """Return how many batches are walked through: an int32 scalar."""
        return self.epochs * self.steps if self.total is None else self.total


def check_batches(data: FederatedData, batch_size: int | None, remainder: Remainder) -> int:
    """Return the size of a batch.

    Raises:
      ValueError: if a client has less than one batch, and nothing fills it up.
    """
    size = data.largest if batch_size is None else batch_size
    if remainder == "drop" and data.smallest < size:
        raise ValueError(
            f"Federation: batches of {size} with remainder='drop', and a client of {data.smallest} examples, of which "
            "nothing would remain: take smaller batches, or remainder='mask' or 'wrap'"
        )
    return min(size, data.largest)


def walk(
    data: FederatedData, slot: jax.Array, batch_size: int | None, remainder: Remainder, epochs: int, shuffled: bool
) -> Batches:
    """Walk through a client's rows of a block, in another order at each pass, or as they lie."""
    offset, count = data.offsets[slot], data.sizes[slot]
    size = check_batches(data, batch_size, remainder)
    steps = count // size if remainder == "drop" else -(-count // size)
    partial = remainder == "mask" and not (data.smallest == data.largest and data.largest % size == 0)

    def begin(key: jax.Array) -> jax.Array:
        order = shuffle(key, count, data.largest) if shuffled else jnp.arange(data.largest, dtype=jnp.int32)
        # The last batch may reach beyond the last example: slices must not be clamped.
        return jnp.pad(order, (0, size))

    def take(order: jax.Array, step: jax.Array) -> tuple[PyTree, jax.Array | None]:
        position = step * size + jnp.arange(size, dtype=jnp.int32)
        chosen = jax.lax.dynamic_slice(order, (step * size,), (size,))
        mask = position < count if partial else None
        if mask is not None:
            chosen = jnp.where(mask, chosen, order[0])
        elif remainder == "wrap":
            chosen = jnp.where(position < count, chosen, order[position % jnp.maximum(count, 1)])
        return jax.tree.map(lambda leaf: leaf[offset + chosen], data.examples), mask

    return Batches(epochs, begin, steps, take, size, count.astype(jnp.float32))


def walk_given(batches: PyTree, num_steps: jax.Array, mask: jax.Array | None) -> Batches:
    """Walk once through the batches of a client that are given as arrays of steps x batch x ...

    Batches without any real example are no steps.
    """
    most, size = jax.tree.leaves(batches)[0].shape[:2]
    if mask is None:

        def take(order: jax.Array, step: jax.Array) -> tuple[PyTree, None]:
            return jax.tree.map(lambda leaf: leaf[step], batches), None

        return Batches(1, lambda key: jnp.int32(0), num_steps, take, size, (num_steps * size).astype(jnp.float32))
    steps = jnp.arange(most) < num_steps
    real = steps & jnp.any(mask, axis=1)

    def take_real(order: jax.Array, step: jax.Array) -> tuple[PyTree, jax.Array]:
        at = order[step]
        chosen = jnp.where(mask[at], jnp.arange(size), jnp.argmax(mask[at]))
        return jax.tree.map(lambda leaf: leaf[at, chosen], batches), mask[at]

    examples = jnp.sum(mask & steps[:, None], dtype=jnp.float32)
    count = jnp.sum(real, dtype=jnp.int32)
    return Batches(1, lambda key: jnp.argsort(~real, stable=True), count, take_real, size, examples)


def shuffle(key: jax.Array, size: jax.Array, largest: int) -> jax.Array:
    """Return a random order of `range(size)`, followed by what is not in it.

    The order depends on the key and the size alone, and not on how many indices
    follow.

    Returns:
      int32[largest].
    """
    indices = jnp.arange(largest, dtype=jnp.int32)
    # The bits of an index do not depend on how many are drawn; of equal bits, the
    # last index of all is padding's.
    bits = jnp.where(indices < size, jax.random.bits(key, (largest,), jnp.uint32), jnp.uint32(2**32 - 1))
    return jax.lax.sort((bits, indices), num_keys=1, is_stable=True)[1]
