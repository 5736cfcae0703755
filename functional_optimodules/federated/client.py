"""The work of one client in one round.

    Begin(state, params, broadcast):
        state = process(broadcast, begin_round(state, params)); y = params
    Step(batch):
        updates, state = client.update(grad(loss)(y, batch), state, y); y += updates
    End:
        send y - params and collect(state); state = commit(state)

It is a pure function of the client's own data, state and key, so that it gives
the same whether clients are run one by one, together, or on several devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.core.numerics import wide, zeros_wide
from functional_optimodules.federated.data import FederatedData, shuffle
from functional_optimodules.federated.loss import averaged


class Batches(NamedTuple):
    """How one client walks through its batches.

    Attributes:
      epochs: how many passes.
      begin: `(key) -> order`, what a pass needs.
      steps: int32 scalar, how many batches a pass has.
      take: `(order, step) -> batch, mask`, where the mask is `None` if all examples are real.
      size: how many examples a batch has.
    """

    epochs: int
    begin: Callable[[jax.Array], Any]
    steps: Any
    take: Callable[[Any, jax.Array], tuple[Any, Any]]
    size: int


class Report(NamedTuple):
    """What a client's round came to.

    Attributes:
      delta: `y - params`, shaped like the parameters, in at least float32.
      auxes: its auxiliary variables by name.
      metrics: averages over its examples, each a float32 scalar.
      examples: float32 scalar, how many examples it stepped over.
    """

    delta: Any
    auxes: dict[str, Any]
    metrics: dict[str, jax.Array]
    examples: jax.Array


def shuffled(
    data: FederatedData, examples: Any, slot: jax.Array, batch_size: int | None, epochs: int, remainder: str
) -> Batches:
    """Walk through a client's rows of a block, in another order at each pass."""
    offset, count = data.offsets[slot], data.sizes[slot]
    size = min(batch_size or data.largest, data.largest)
    steps = count // size if remainder == "drop" else -(-count // size)

    def begin(key: jax.Array) -> jax.Array:
        # The last batch may reach beyond the last example: slices must not be clamped.
        return jnp.pad(shuffle(key, count, data.largest), (0, size))

    def take(order: jax.Array, step: jax.Array) -> tuple[Any, Any]:
        position = step * size + jnp.arange(size, dtype=jnp.int32)
        if remainder == "wrap":
            chosen, mask = order[position % count], None
        else:
            chosen = jax.lax.dynamic_slice(order, (step * size,), (size,))
            mask = position < count if remainder == "mask" else None
        return jax.tree.map(lambda leaf: leaf[offset + chosen], examples), mask

    return Batches(epochs, begin, steps, take, size)


def given(batches: Any, num_steps: jax.Array, mask: Any) -> Batches:
    """Walk once through the batches of a client that are given as arrays of steps x batch x ..."""
    size = jax.tree.leaves(batches)[0].shape[1]

    def take(_: Any, step: jax.Array) -> tuple[Any, Any]:
        return jax.tree.map(lambda leaf: leaf[step], batches), None if mask is None else mask[step]

    return Batches(1, lambda key: jnp.zeros((), jnp.int32), num_steps, take, size)


def work(
    client: Any, loss_fn: Callable[..., Any], params: Any, state: Any, broadcast: Any, batches: Batches, key: jax.Array
) -> tuple[Report, Any]:
    """Take a client's local steps, and return what they came to with its state after."""
    state = client.process_channels(broadcast, client.begin_round(state, params))

    def step(index: jax.Array, carry: Any, order: Any, epoch_key: jax.Array) -> Any:
        y, state, totals, examples = carry
        batch, mask = batches.take(order, index)
        loss = averaged(loss_fn, mask, batches.size)
        gradients, metrics = jax.grad(loss, has_aux=True)(y, batch, jax.random.fold_in(epoch_key, index + 1))
        updates, state = client.update(gradients, state, y)
        real = jnp.float32(batches.size) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        totals = jax.tree.map(lambda total, m: total + real * m.astype(jnp.float32), totals, metrics)
        return optax.apply_updates(y, updates), state, totals, examples + real

    def epoch(index: jax.Array, carry: Any) -> Any:
        epoch_key = jax.random.fold_in(key, index)
        order = batches.begin(jax.random.fold_in(epoch_key, 0))
        return jax.lax.fori_loop(0, batches.steps, lambda i, c: step(i, c, order, epoch_key), carry)

    zeros = metric_zeros(loss_fn, params, batches)
    start = (params, state, zeros, jnp.float32(0))
    y, state, totals, examples = (
        epoch(jnp.int32(0), start) if batches.epochs == 1 else jax.lax.fori_loop(0, batches.epochs, epoch, start)
    )
    delta = jax.tree.map(lambda new, old: wide(new) - wide(old), y, params)
    metrics = jax.tree.map(lambda total: total / jnp.maximum(examples, 1), totals)
    return Report(delta, client.collect_channels(state), metrics, examples), client.commit(state)


def metric_zeros(loss_fn: Callable[..., Any], params: Any, batches: Batches) -> dict[str, jax.Array]:
    """Return a zero for each metric of a loss."""

    def first(params: Any, key: jax.Array) -> Any:
        batch, mask = batches.take(batches.begin(key), jnp.int32(0))
        return averaged(loss_fn, mask, batches.size)(params, batch, key)[1]

    return jax.tree.map(lambda _: jnp.float32(0), jax.eval_shape(first, params, jax.random.key(0)))


def delta_zeros(params: Any) -> Any:
    """Return the delta of a client that did nothing."""
    return zeros_wide(params)
