"""Rounds driven from the host, in compiled pieces."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.federated.checks import check_history
from functional_optimodules.federated.processes import naming_lost_peers


def fit(
    federation: Any,
    state: Any,
    data: Any,
    num_rounds: int,
    advance: tuple[int | None, Any, Callable[..., Any] | None],
    every: int,
    callback: Callable[[Any, dict[str, Any]], None] | None,
    progress: bool,
) -> tuple[Any, dict[str, Any]]:
    """Run rounds in compiled pieces; see `Federation.fit`."""
    for name, value, least in (("num_rounds", num_rounds, 0), ("every", every, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"Federation: {name}={value!r} should be an integer of at least {least}")
    participants, weights, evaluate = advance
    pieces: list[dict[str, Any]] = []
    with _bar(num_rounds, progress) as bar:
        for done in range(0, max(num_rounds, 1), every):
            count = min(every, num_rounds - done)
            with naming_lost_peers():
                state, history = _piece(
                    federation, participants, evaluate, every, state, data, weights, np.int32(count)
                )
                pieces.append(jax.tree.map(lambda values, count=count: np.asarray(values)[:count], history))
            check_history(federation, pieces[-1])
            if bar is not None:
                bar.update(count)
            if callback is not None and count:
                callback(state, pieces[-1])
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _piece(
    federation: Any,
    participants: int | None,
    evaluate: Callable[..., Any] | None,
    every: int,
    state: Any,
    data: Any,
    weights: Any,
    count: jax.Array,
) -> tuple[Any, dict[str, Any]]:
    """Run some rounds, at most `every`.

    Their number is an argument of one program: in another one, XLA may fuse, and so
    round, another way, and a run cut in two would differ from one that is whole.
    """
    advance = federation.rounds(data, participants, weights, evaluate)
    shapes = jax.eval_shape(advance, state)[1]
    empty = jax.tree.map(lambda leaf: jnp.zeros((every, *leaf.shape), leaf.dtype), shapes)

    def body(index: jax.Array, carry: Any) -> Any:
        state, history = carry
        state, metrics = advance(state)
        return state, jax.tree.map(lambda rows, row: rows.at[index].set(row), history, metrics)

    return jax.lax.fori_loop(0, count, body, (state, empty))


def _bar(total: int, progress: bool) -> Any:
    """Return a progress bar, or a context of `None`."""
    if not progress or jax.process_index() > 0:
        return contextlib.nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="round")
