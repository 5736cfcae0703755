"""Losses as users write them, made into one form, and their averages over examples and by client.

A loss takes `(params, batch)` or `(params, batch, key)` and returns a scalar, or
one value per example, alone or with a dict of metrics of either form.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from functional_optimodules.federated.batches import Batches, walk
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import chunk_size, require_blocks
from functional_optimodules.federated.options import Execution
from functional_optimodules.federated.placement import AXIS, WHOLE, mesh_of
from functional_optimodules.types import Params, PyTree

RESERVED = ("round", "participants", "examples", "finite", "joined", "loss")

LossFn: TypeAlias = Callable[..., PyTree]
"""A loss as its user writes it."""
Metrics: TypeAlias = dict[str, jax.Array]
"""Metrics by name."""
Averaged: TypeAlias = Callable[[Params, PyTree, jax.Array], tuple[jax.Array, Metrics]]


def _call(loss_fn: LossFn, params: Params, batch: PyTree, key: jax.Array) -> tuple[PyTree, dict[str, PyTree]]:
    """Return the loss and its metrics, as the user's function gives them.

    Raises:
      TypeError: if the loss comes with anything but a dict of metrics, or one of
        these is a dict itself.
      ValueError: if a metric has a name that means something else.
    """
    parameters = inspect.signature(loss_fn).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    output = loss_fn(params, batch, key) if len(required) > 2 else loss_fn(params, batch)
    value, metrics = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
    if not isinstance(metrics, dict) or isinstance(value, tuple | dict):
        raise TypeError(f"the loss returned {output!r}: expected it alone or with a dict of metrics: (loss, metrics)")
    for name, metric in metrics.items():
        if name in RESERVED:
            raise ValueError(f"the loss has a metric named {name!r}, which means something else: rename it")
        if isinstance(metric, Mapping):
            raise TypeError(
                f"the metric {name!r} is a {type(metric).__name__}: expected a scalar, or one value per example. Give "
                f"each of several a name of its own, such as '{name}/{next(iter(metric), '')}'"
            )
    return value, metrics


def averaged(loss_fn: LossFn, mask: jax.Array | None, count: int) -> Averaged:
    """Return a loss that is a scalar, with its metrics, both averaged over the real examples.

    Args:
      loss_fn: the user's loss.
      mask: bool[count], which examples of the batch are real; `None` if all are.
      count: the number of examples in the batch.

    Raises:
      ValueError: if the loss is neither a scalar nor one value per example, or it
        is a scalar and the batch may be padded; or as `_call` does.
      TypeError: as `_call` does.
    """

    def mean(name: str, value: PyTree) -> jax.Array:
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        if value.shape == (count,):
            if mask is None:
                return jnp.mean(value)
            real = jnp.where(mask, value, 0)
            return jnp.sum(real) / jnp.maximum(jnp.sum(mask), 1).astype(value.dtype)
        if value.shape != ():
            raise ValueError(
                f"{name} has shape {list(value.shape)} for a batch of {count}: expected a scalar, or one value per "
                "example"
            )
        if mask is not None:
            raise ValueError(
                f"{name} is a scalar, which a partial batch cannot be masked out of: return one value per example, or "
                "use remainder='drop' or 'wrap'"
            )
        return value

    def call(params: Params, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Metrics]:
        value, metrics = _call(loss_fn, params, batch, key)
        loss = mean("the loss", value)
        return loss, {"loss": loss, **{name: mean(f"the metric {name!r}", metric) for name, metric in metrics.items()}}

    return call


def maskable(loss_fn: LossFn, params: Params, batches: Batches, key: jax.Array) -> LossFn:
    """Return a loss of which partial batches can be masked out.

    It is the user's own, but where a batch may be partial and some value is a scalar:
    then each example is a batch of its own.
    """
    batch, mask = jax.eval_shape(lambda key: batches.take(batches.begin(key), jnp.int32(0)), key)
    shapes = jax.eval_shape(lambda *args: _call(loss_fn, *args), params, batch, key)
    if mask is None or all(leaf.shape for leaf in jax.tree.leaves(shapes)):
        return loss_fn

    def by_example(params: Params, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Metrics]:
        def one(index: jax.Array, example: PyTree) -> tuple[jax.Array, Metrics]:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            loss, metrics = averaged(loss_fn, None, 1)(params, alone, jax.random.fold_in(key, index))
            return loss, {name: metric for name, metric in metrics.items() if name != "loss"}

        return jax.vmap(one)(jnp.arange(batches.size), batch)

    return by_example


class Averages(NamedTuple):
    """Averages of metrics over examples, batch by batch.

    Attributes:
      totals: by name, the sum over examples: a float32 scalar.
      seen: float32 scalar, how many examples these are.
    """

    totals: Metrics
    seen: jax.Array

    @classmethod
    def start(cls, loss_fn: LossFn, params: Params, batches: Batches) -> "Averages":
        """Return a zero for each metric of a loss."""

        def first(params: Params, key: jax.Array) -> Metrics:
            batch, mask = batches.take(batches.begin(key), jnp.int32(0))
            return averaged(loss_fn, mask, batches.size)(params, batch, key)[1]

        names = jax.eval_shape(first, params, jax.random.key(0))
        return cls(jax.tree.map(lambda _: jnp.float32(0), names), jnp.float32(0))

    def add(self, metrics: Metrics, mask: jax.Array | None, size: int) -> "Averages":
        """Add the averages over a batch."""
        real = jnp.float32(size) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        totals = jax.tree.map(lambda total, m: total + real * m.astype(jnp.float32), self.totals, metrics)
        return Averages(totals, self.seen + real)

    def value(self) -> Metrics:
        """Return the averages, 0 over no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.seen, 1), self.totals)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def evaluate(
    loss_fn: LossFn, execution: Execution, batch_size: int | None, params: Params, data: FederatedData, key: jax.Array
) -> Metrics:
    """Return each client's loss and metrics at some parameters, in one program; see `Federation.evaluate`."""
    require_blocks(data, execution)
    mesh, chunk = mesh_of(execution), chunk_size(execution, data.per_shard, params)

    def local(params: Params, data: FederatedData, key: jax.Array) -> Metrics:
        def assess(slot: jax.Array) -> Metrics:
            batches = walk(data, slot, batch_size, "mask", epochs=1, shuffled=False)
            own_key = jax.random.fold_in(key, data.ids[slot])
            loss, order = maskable(loss_fn, params, batches, own_key), batches.begin(own_key)

            def step(index: jax.Array, averages: Averages) -> Averages:
                batch, mask = batches.take(order, index)
                metrics = averaged(loss, mask, batches.size)(params, batch, jax.random.fold_in(own_key, index))[1]
                return averages.add(metrics, mask, batches.size)

            return jax.lax.fori_loop(0, batches.steps, step, Averages.start(loss, params, batches)).value()

        by_slot = jax.lax.map(assess, jnp.arange(data.ids.shape[0]), batch_size=chunk)
        found = jax.tree.map(lambda each: jnp.zeros(data.num_clients).at[data.ids].set(each, mode="drop"), by_slot)
        return found if mesh is None else jax.lax.psum(found, AXIS)

    if mesh is None:
        return local(params, data, key)
    specs = WHOLE, data.partition_specs(), WHOLE
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)(params, data, key)
