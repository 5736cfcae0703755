"""From gradients to updates: bricks one after the other, then the rate and the decay.

grads = modules(regularizers(grads, params))
updates = -(lrate * grads + w_decay * params)
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax

from functional_optimodules.brick import Brick
from functional_optimodules.hyperparameters import labelled
from functional_optimodules.metrics import Told
from functional_optimodules.numerics import real, wide
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.types import Params, PyTree, Updates

States: TypeAlias = Mapping[str, PyTree]
"""The states of bricks, by name."""


def adapters(bricks: Sequence[Brick]) -> dict[str, Adapter]:
    """Return bricks by their names, `adam` and `adam-2`, as they act on trees as they come."""
    return {label: adapted(brick) for label, brick in labelled(bricks).items()}


def through(
    chain: tuple[Sequence[Brick], Sequence[Brick]],
    states: tuple[States, States],
    updates: Updates,
    params: Params,
    lrate: jax.Array,
    known: dict[str, PyTree],
    told: Told,
) -> tuple[Updates, dict[str, PyTree], dict[str, PyTree]]:
    """Take updates through bricks.

    Args:
      chain: the regularizers, and the modules.
      states: the states of both, by name.
      updates: the gradients, or what was made of them.
      params: the parameters, or `None`.
      lrate: the learning rate, for bricks that ask for it.
      known: what else bricks may ask for.
      told: takes what is said of the step.

    Returns:
      What the bricks make of the updates, and the new states of both.
    """
    new = dict(states[0]), dict(states[1])
    for bricks, own in zip(chain, new, strict=True):
        for label, brick in adapters(bricks).items():
            before, lent = updates, {"lrate": real(lrate)} if "lrate" in brick.brick.asks().step else {}
            updates, own[label] = brick.update(updates, own[label], params, **{**known, **lent})
            told.brick(label, brick, before, updates, own[label], params)
    return updates, *new


def scaled(updates: Updates, params: Params, lrate: jax.Array, w_decay: jax.Array | None) -> Updates:
    """Return `-(lrate * updates + w_decay * params)` in the dtypes of the updates; `None` is for no decay."""

    def scale(g: jax.Array, *param: jax.Array) -> jax.Array:
        total = _times(lrate, wide(g)) + sum(_times(w_decay, wide(p)) for p in param)
        return (-total).astype(g.dtype)

    return jax.tree.map(scale, updates, *([] if w_decay is None else [params]))


def _times(rate: Any, array: jax.Array) -> jax.Array:
    return rate.astype(array.dtype) * array


def is_zero(rate: object) -> bool:
    """Whether a rate is the number 0, and not one that is being traced."""
    return isinstance(rate, int | float) and rate == 0
