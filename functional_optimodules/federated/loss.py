"""Losses as users write them, made into one form.

A loss takes `(params, batch)` or `(params, batch, key)` and returns a scalar, or
one value per example, alone or with a dict of metrics of either form.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

RESERVED = ("round", "participants", "examples", "finite", "joined", "loss")


def takes_key(loss_fn: Callable[..., Any]) -> bool:
    """Whether a loss takes a PRNG key as its third argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        parameter
        for parameter in inspect.signature(loss_fn).parameters.values()
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty
    ]
    return len(required) > 2


def averaged(loss_fn: Callable[..., Any], mask: jax.Array | None, count: int) -> Callable[..., Any]:
    """Return a loss that is a scalar, with its metrics, both averaged over the real examples.

    Args:
      loss_fn: the user's loss.
      mask: bool[count], which examples of the batch are real; `None` if all are.
      count: the number of examples in the batch.

    Raises:
      ValueError: if the loss is neither a scalar nor one value per example, or it
        is a scalar and the batch may be padded; or if a metric has a name that
        means something else.
      TypeError: if the loss comes with anything but a dict of metrics.
    """

    def mean(name: str, value: Any) -> jax.Array:
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

    def call(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = loss_fn(params, batch, key) if takes_key(loss_fn) else loss_fn(params, batch)
        value, metrics = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
        if not isinstance(metrics, dict) or isinstance(value, tuple | dict):
            raise TypeError(
                f"the loss returned {output!r}: expected the loss, alone or with a dict of metrics: (loss, metrics)"
            )
        for name in metrics:
            if name in RESERVED:
                raise ValueError(f"the loss has a metric named {name!r}, which means something else: rename it")
        loss = mean("the loss", value)
        return loss, {"loss": loss, **{name: mean(f"the metric {name!r}", metric) for name, metric in metrics.items()}}

    return call
