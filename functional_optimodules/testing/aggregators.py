"""Checks of aggregators."""

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.federated.aggregation import Aggregator, StackAggregator, SumAggregator
from functional_optimodules.packing.policy import pack
from functional_optimodules.packing.tree import unpack
from functional_optimodules.testing.check import check
from functional_optimodules.testing.trees import assert_same, assert_same_specs, parameters, randoms
from functional_optimodules.types import PyTree

_WEIGHTS = (1.0, 3.0, 0.5, 1.0, 2.0, 1.0)


def _deltas(like: PyTree) -> list[PyTree]:
    return [randoms(like, seed) for seed in range(len(_WEIGHTS))]


def _aggregated(aggregator: Aggregator, deltas: list[PyTree], weights: tuple[float, ...]) -> tuple[PyTree, PyTree]:
    """Return the aggregate of two rounds, as an engine calls an aggregator, and what it keeps."""
    counts, state = jnp.array(weights), aggregator.init(deltas[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)
    if isinstance(aggregator, StackAggregator):
        return aggregator.aggregate(stacked, counts), state
    assert isinstance(aggregator, SumAggregator), "derive from `SumAggregator` or `StackAggregator`"
    delta: PyTree = None
    for _ in range(2):
        state = aggregator.begin_round(state)
        for _ in range(aggregator.passes):
            each = jax.vmap(aggregator.contribute, in_axes=(0, 0, None))(stacked, counts, state)
            delta, state = aggregator.combine(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each), state)
    return delta, state


@check(Aggregator, scope="field")
def check_aggregate_is_like_the_deltas(aggregator: Aggregator) -> None:
    """The aggregate, and what is kept, have the structure, shapes and dtypes that they had, compiled too."""
    deltas = _deltas(parameters())
    delta, state = jax.eval_shape(lambda: _aggregated(aggregator, deltas, _WEIGHTS))
    assert_same_specs(delta, deltas[0], "the aggregate is not like the deltas")
    assert_same_specs(state, aggregator.init(deltas[0]), "what is kept changes from round to round")
    eager = _aggregated(aggregator, deltas, _WEIGHTS)
    compiled = jax.jit(lambda deltas: _aggregated(aggregator, deltas, _WEIGHTS))(deltas)
    assert_same(compiled, eager, "compiled, it gives other numbers", close=True)


@check(Aggregator)
def check_order_of_participants_does_not_matter(aggregator: Aggregator) -> None:
    """Participants may come in any order."""
    deltas = _deltas(parameters())
    expected = _aggregated(aggregator, deltas, _WEIGHTS)
    order = (3, 0, 5, 1, 4, 2)
    found = _aggregated(aggregator, [deltas[i] for i in order], tuple(_WEIGHTS[i] for i in order))
    assert_same(found, expected, "in another order the participants come to something else", close=True)


@check(Aggregator)
def check_who_dropped_out_does_not_count(aggregator: Aggregator) -> None:
    """A participant of weight 0 is as if it had not been asked; over nobody, the aggregate is 0."""
    deltas = _deltas(parameters())
    nothing = jax.tree.map(jnp.zeros_like, deltas[0])
    found = _aggregated(aggregator, [*deltas[:2], nothing, *deltas[2:]], (*_WEIGHTS[:2], 0.0, *_WEIGHTS[2:]))
    expected = _aggregated(aggregator, deltas, _WEIGHTS)
    assert_same(found, expected, "who dropped out counts: leave out what has weight 0", close=True)
    alone, state = _aggregated(aggregator, [nothing, nothing], (0.0, 0.0))
    for leaf in jax.tree.leaves((alone, state)):
        assert np.isfinite(leaf).all(), f"over nobody it gives {leaf}: do not divide by 0"
    assert_same(alone, nothing, "over nobody the aggregate is not 0")


@check(Aggregator, scope="class")
def check_aggregate_of_packed_deltas(aggregator: Aggregator) -> None:
    """Packed deltas come to the same: norms go over whole trees, and coordinates stand for themselves."""
    deltas = _deltas({"first": parameters(), "second": parameters()})
    like = pack(deltas[0])
    found, _ = _aggregated(aggregator, [pack(delta, like=like) for delta in deltas], _WEIGHTS)
    expected, _ = _aggregated(aggregator, deltas, _WEIGHTS)
    assert_same(unpack(found), expected, "packed, the deltas come to something else", close=True)
