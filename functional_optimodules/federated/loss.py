"""Losses as users write them, made into one form, and their averages over examples.

A loss takes `(params, batch)` or `(params, batch, key)` and returns a scalar, or
one value per example, alone or with a dict of metrics of either form. That of a model
with a state, such as statistics of batches, takes `(params, state, batch)` or
`(params, state, batch, key)` and returns `(loss, metrics, state)`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from functional_optimodules.federated.batches import Batches
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.paths import Specs

RESERVED = ("round", "participants", "examples", "finite", "joined", "loss")

LossFn: TypeAlias = Callable[..., PyTree]
"""A loss as its user writes it."""
Metrics: TypeAlias = dict[str, jax.Array]
"""Metrics by name."""
Averaged: TypeAlias = Callable[[Params, PyTree, PyTree, jax.Array], tuple[jax.Array, tuple[Metrics, PyTree]]]


def _call(
    loss_fn: LossFn, params: Params, stats: PyTree, batch: PyTree, key: jax.Array
) -> tuple[PyTree, dict[str, PyTree], PyTree]:
    """Return the loss, its metrics and the model's new state, as the user's function gives them.

    Raises:
      TypeError: if the loss comes with anything but a dict of metrics, and the state of
        a model that has one, or a metric is a dict itself.
      ValueError: if a metric has a name that means something else.
    """
    given = (params, batch) if stats is None else (params, stats, batch)
    parameters = inspect.signature(loss_fn).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    given = (*given, key) if len(required) > len(given) else given
    try:
        output = loss_fn(*given)
    except Exception as error:
        if stats is None and len(given) == 3:
            error.add_note(
                "Federation: the loss was called with (params, batch, key). That of a model with a state needs it: "
                "give `init` its `stats`, and `evaluate` the federation's state"
            )
        raise
    if stats is not None:
        if not isinstance(output, tuple) or len(output) != 3:
            raise TypeError(
                f"the loss of a model with a state returned {output!r}: expected (loss, metrics, state), where the "
                "metrics may be {}"
            )
        *output, new = output
        output = tuple(output)
        Specs.of(stats).require_tree(new, "the state that the loss returned")
        stats = new
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
    return value, metrics, stats


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

    def call(params: Params, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
        value, metrics, stats = _call(loss_fn, params, stats, batch, key)
        loss = mean("the loss", value)
        means = {name: mean(f"the metric {name!r}", metric) for name, metric in metrics.items()}
        return loss, ({"loss": loss, **means}, stats)

    return call


def maskable(loss_fn: LossFn, params: Params, stats: PyTree, batches: Batches, key: jax.Array) -> LossFn:
    """Return a loss of which partial batches can be masked out.

    It is the user's own, but where a batch may be partial and some value is a scalar:
    then each example is a batch of its own, at the same state of the model.
    """
    batch, mask = jax.eval_shape(lambda key: batches.take(batches.begin(key), jnp.int32(0)), key)
    shapes = jax.eval_shape(lambda *args: _call(loss_fn, *args)[:2], params, stats, batch, key)
    if mask is None or all(leaf.shape for leaf in jax.tree.leaves(shapes)):
        return loss_fn

    def by_example(params: Params, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, Metrics, PyTree]:
        def one(index: jax.Array, example: PyTree) -> tuple[jax.Array, Metrics]:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            loss, (metrics, _) = averaged(loss_fn, None, 1)(params, stats, alone, jax.random.fold_in(key, index))
            return loss, {name: metric for name, metric in metrics.items() if name != "loss"}

        return *jax.vmap(one)(jnp.arange(batches.size), batch), stats

    if stats is None:
        return lambda params, batch, key: by_example(params, None, batch, key)[:2]
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
    def start(cls, loss_fn: LossFn, params: Params, stats: PyTree, batches: Batches) -> "Averages":
        """Return a zero for each metric of a loss."""

        def first(params: Params, stats: PyTree, key: jax.Array) -> Metrics:
            batch, mask = batches.take(batches.begin(key), jnp.int32(0))
            return averaged(loss_fn, mask, batches.size)(params, stats, batch, key)[1][0]

        names = jax.eval_shape(first, params, stats, jax.random.key(0))
        return cls(jax.tree.map(lambda _: jnp.float32(0), names), jnp.float32(0))

    def add(self, metrics: Metrics, mask: jax.Array | None, size: int) -> "Averages":
        """Add the averages over a batch."""
        real = jnp.float32(size) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        totals = jax.tree.map(lambda total, m: total + real * m.astype(jnp.float32), self.totals, metrics)
        return Averages(totals, self.seen + real)

    def value(self) -> Metrics:
        """Return the averages, 0 over no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.seen, 1), self.totals)
