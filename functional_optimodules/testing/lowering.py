"""Checks that programs are lowered for all platforms, on any: JAX refuses what only one has, and calls of the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from functional_optimodules.brick import Brick
from functional_optimodules.federated.aggregation import Aggregator, StackAggregator, SumAggregator
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.schedulers import Scheduler
from functional_optimodules.testing.check import check
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import end_round, parameters, randoms, update
from functional_optimodules.types import PyTree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def lower(function: Callable[..., PyTree], *args: PyTree) -> None:
    """Lower a function to one program for all platforms, and hold it to the shapes that it returns here.

    Raises:
      AssertionError: if it is not lowered for one of them, or to another function.
    """
    try:
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    except Exception as error:
        raise AssertionError(
            f"it is not lowered for {', '.join(PLATFORMS)}: {error}\n"
            "let it be made of what JAX has on all of them, without a call of the host; where one needs another way, "
            "choose by `jax.lax.platform_dependent`"
        ) from error
    made = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(function, *args))]
    found = [(out.shape, out.dtype) for out in exported.out_avals]
    assert found == made, f"lowered for all platforms it returns {found}, and here {made}"


@check(Brick, scope="class")
def check_lowered_for_every_platform(brick: Brick) -> None:
    """All that an engine does with a brick in a round is lowered for CPUs, GPUs of both makes and TPUs."""
    params, adapter = parameters(), adapted(brick.bare())
    auxes = received(brick, params)

    def take(updates: PyTree, state: PyTree, params: PyTree, auxes: PyTree) -> PyTree:
        state = adapter.process(auxes, adapter.begin_round(state, params))
        updates, state = update(adapter, updates, state, params)
        state = end_round(adapter, state, params)
        return updates, brick.metrics(state), adapter.collect(state), adapter.commit(state)

    lower(take, randoms(params, 1), brick.init(params), params, auxes)


@check(Scheduler, scope="class")
def check_rate_is_lowered_for_every_platform(scheduler: Scheduler) -> None:
    """A rate, and how the clock goes on, are lowered for CPUs, GPUs of both makes and TPUs."""
    lower(lambda clock: (scheduler.value(clock), scheduler.begin_round(scheduler.advance(clock))), scheduler.init())


@check(Aggregator, scope="class")
def check_aggregate_is_lowered_for_every_platform(aggregator: Aggregator) -> None:
    """What deltas come to is lowered for CPUs, GPUs of both makes and TPUs."""
    delta, weights = parameters(), jnp.arange(1.0, 6.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(randoms(delta, seed) for seed in range(5)))
    if isinstance(aggregator, StackAggregator):
        lower(aggregator.aggregate, stacked, weights)
        return
    assert isinstance(aggregator, SumAggregator), "derive from `SumAggregator` or `StackAggregator`"

    def take(stacked: PyTree, weights: PyTree, state: PyTree) -> PyTree:
        state = aggregator.begin_round(state)
        each = jax.vmap(aggregator.contribute, in_axes=(0, 0, None))(stacked, weights, state)
        return aggregator.combine(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each), state)

    lower(take, stacked, weights, aggregator.init(delta))
