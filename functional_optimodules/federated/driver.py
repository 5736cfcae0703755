"""Rounds driven from the host: in compiled pieces, with what is done between them."""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.options import History
from functional_optimodules.federated.state import FederationState
from functional_optimodules.types import State

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

Evaluate: TypeAlias = Callable[[Any], Metrics]
"""What `run` and `fit` call after each round, with the parameters or, where it has a state, the model."""


def check_rounds(num_rounds: int, every: int, callback: object) -> None:
    """Raise an error for a number of rounds, or of those of a piece, that is none, or a callback that is no function.

    Raises:
      TypeError, ValueError: naming it.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"Federation: callback={callback!r} should be a function of the state and the history")
    for name, value, least in (("num_rounds", num_rounds, 0), ("every", every, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"Federation: {name}={value!r} should be an integer of at least {least}")


def drive(
    advance: Callable[[State, int], tuple[State, History]],
    state: State,
    num_rounds: int,
    every: int,
    callback: Callable[[State, History], object] | None,
    progress: bool,
) -> tuple[State, History]:
    """Run rounds piece by piece; see `Federation.fit`.

    Args:
      advance: `(state, count) -> state, history`, some rounds.
      state: the state before them.
      num_rounds: how many rounds in all; without any, `advance` is called once for none.
      every: rounds of a piece.
      callback: `(state, history) -> stop`.
      progress: whether to show a progress bar.
    """
    pieces: list[History] = []
    bar: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if progress and jax.process_index() == 0:
        from tqdm.auto import tqdm

        bar = tqdm(total=num_rounds, unit="round")
    with bar as shown:
        for done in range(0, max(num_rounds, 1), every):
            count = min(every, num_rounds - done)
            state, piece = advance(state, count)
            pieces.append(piece)
            if shown is not None:
                shown.update(count)
            if callback is not None and count and _is_true(callback(state, piece)):
                break
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _is_true(stop: object) -> bool:
    # What is compared in NumPy or JAX is a scalar of theirs; what else a callback returns says nothing of it.
    return isinstance(stop, bool | np.bool_ | jax.Array) and np.shape(stop) == () and bool(stop)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def run_piece(
    federation: "Federation",
    participants: int | None,
    evaluate: Evaluate | None,
    every: int,
    state: FederationState,
    data: FederatedData,
    weights: jax.Array | None,
    drop_rate: jax.Array | None,
    count: jax.Array,
) -> tuple[FederationState, Metrics]:
    """Run some rounds, at most `every`; see `repeated`."""
    advance = federation.rounds(data, participants, weights, drop_rate, evaluate)
    return repeated(advance, state, every, count)


def repeated(
    advance: Callable[[State], tuple[State, Metrics]], state: State, most: int, count: jax.Array
) -> tuple[State, Metrics]:
    """Run some rounds in a loop, `count` of at most `most`: return the state, and their metrics in `most` rows.

    Their number is an argument of one program: in another one, XLA may fuse, and so
    round, another way, and a run cut in two would differ from one that is whole.
    """
    shapes = jax.eval_shape(advance, state)[1]
    empty = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

    def body(index: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
        state, history = carry
        state, metrics = advance(state)
        return state, jax.tree.map(lambda rows, row: rows.at[index].set(row), history, metrics)

    return jax.lax.fori_loop(0, count, body, (state, empty))
