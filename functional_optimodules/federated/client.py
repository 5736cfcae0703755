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

from functional_optimodules.core.numerics import wide
from functional_optimodules.core.packed import packed_as
from functional_optimodules.core.packing import packing_of, unpack
from functional_optimodules.federated.batches import Batches
from functional_optimodules.federated.loss import averaged

# Measured from 2 to 128 columns, with 20 and 128 examples: beyond 32 it depends on both.
_NARROW = 32


class Report(NamedTuple):
    """What a client's round came to.

    Attributes:
      delta: `y - params`, shaped like the parameters, in at least float32.
      auxes: its auxiliary variables by name.
      metrics: averages over the examples that it stepped over, each a float32 scalar.
      examples: float32 scalar, how many examples it has.
    """

    delta: Any
    auxes: dict[str, Any]
    metrics: dict[str, jax.Array]
    examples: jax.Array


def work(
    client: Any, loss_fn: Callable[..., Any], params: Any, state: Any, broadcast: Any, batches: Batches, key: jax.Array
) -> tuple[Report, Any]:
    """Take a client's local steps, and return what they came to with its state after.

    Args:
      client: its `Optimizer`.
      loss_fn: the user's loss.
      params: the parameters that the round starts from, packed or not.
      state: the optimizer's state since the last round.
      broadcast: the server's auxiliary variables by name, this client's own.
      batches: its batches.
      key: the key of this client in this round.
    """
    state = client.process_channels(broadcast, client.begin_round(state, params))

    def step(index: jax.Array, carry: Any, order: Any, epoch_key: jax.Array) -> Any:
        y, state, averages = carry
        batch, mask = batches.take(order, index)
        loss = averaged(loss_fn, mask, batches.size)
        key = jax.random.fold_in(epoch_key, index + 1)
        gradients, metrics = jax.grad(loss, has_aux=True)(unpack(y), batch, key)
        gradients = packed_as(jax.tree.map(_laid_out, gradients), packing_of(y))
        updates, state = client.update(gradients, state, y)
        return optax.apply_updates(y, updates), state, averages.add(metrics, mask, batches.size)

    def epoch(index: jax.Array, carry: Any) -> Any:
        epoch_key = jax.random.fold_in(key, index)
        order = batches.begin(jax.random.fold_in(epoch_key, 0))
        return jax.lax.fori_loop(0, batches.steps, lambda i, c: step(i, c, order, epoch_key), carry)

    start = (params, state, Averages.start(loss_fn, unpack(params), batches))
    y, state, averages = (
        epoch(jnp.int32(0), start) if batches.epochs == 1 else jax.lax.fori_loop(0, batches.epochs, epoch, start)
    )
    delta = jax.tree.map(lambda new, old: wide(new) - wide(old), y, params)
    report = Report(delta, client.collect_channels(state), averages.value(), batches.examples)
    return report, client.commit(state)


def _laid_out(gradient: jax.Array) -> jax.Array:
    """Have the gradient of a tall, narrow matrix written with its long axis last; its values are the same, to rounding.

    On CPU a product of matrices is vectorised along the last axis of its result: of
    784 x 10 numbers it takes three times as long as of 10 x 784. What is gained is lost
    again where the short axis is beyond some vectors' width.
    """
    narrow = gradient.ndim == 2 and 1 < gradient.shape[1] <= _NARROW and gradient.shape[1] < gradient.shape[0]
    return jax.lax.optimization_barrier(gradient.T).T if narrow and jax.default_backend() == "cpu" else gradient


def assess(loss_fn: Callable[..., Any], params: Any, batches: Batches, key: jax.Array) -> dict[str, jax.Array]:
    """Return a client's loss and metrics at some parameters, averaged over its examples."""
    order = batches.begin(key)

    def step(index: jax.Array, averages: Averages) -> Averages:
        batch, mask = batches.take(order, index)
        metrics = averaged(loss_fn, mask, batches.size)(params, batch, jax.random.fold_in(key, index))[1]
        return averages.add(metrics, mask, batches.size)

    return jax.lax.fori_loop(0, batches.steps, step, Averages.start(loss_fn, params, batches)).value()


class Averages(NamedTuple):
    """Averages of metrics over examples, batch by batch.

    Attributes:
      totals: by name, the sum over examples: a float32 scalar.
      seen: float32 scalar, how many examples these are.
    """

    totals: dict[str, jax.Array]
    seen: jax.Array

    @classmethod
    def start(cls, loss_fn: Callable[..., Any], params: Any, batches: Batches) -> "Averages":
        """Return a zero for each metric of a loss."""

        def first(params: Any, key: jax.Array) -> Any:
            batch, mask = batches.take(batches.begin(key), jnp.int32(0))
            return averaged(loss_fn, mask, batches.size)(params, batch, key)[1]

        names = jax.eval_shape(first, params, jax.random.key(0))
        return cls(jax.tree.map(lambda _: jnp.float32(0), names), jnp.float32(0))

    def add(self, metrics: dict[str, jax.Array], mask: jax.Array | None, size: int) -> "Averages":
        """Add the averages over a batch."""
        real = jnp.float32(size) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        totals = jax.tree.map(lambda total, m: total + real * m.astype(jnp.float32), self.totals, metrics)
        return Averages(totals, self.seen + real)

    def value(self) -> dict[str, jax.Array]:
        """Return the averages, 0 over no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.seen, 1), self.totals)
