"""Programs are lowered for all platforms, on any: every plug-in, and a round with every place filled."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from federated.test_uplink import everyone, everything
from jax.sharding import Mesh

from functional_optimodules import Scheduler, list_optim_modules, list_optim_regularizers, list_rate_schedulers
from functional_optimodules.brick import Brick
from functional_optimodules.federated import clients_mesh
from functional_optimodules.federated.aggregation import Aggregator, StackAggregator, SumAggregator, list_aggregators
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.testing import instances
from functional_optimodules.testing.exchange import received
from functional_optimodules.testing.trees import end_round, parameters, randoms, update

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PLUGINS = {**list_optim_modules(), **list_optim_regularizers(), **list_rate_schedulers(), **list_aggregators()}


def lower(function: Any, *args: Any) -> None:
    """Lower a function, to one program for all platforms. JAX refuses what only one has, and calls of the host."""
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    made = jax.tree.leaves(jax.eval_shape(function, *args))
    assert [(out.shape, out.dtype) for out in exported.out_avals] == [(leaf.shape, leaf.dtype) for leaf in made]


def lower_brick(brick: Brick) -> None:
    """All that an engine does with a brick in a round."""
    params = parameters()
    auxes = received(brick, params)

    def take(updates: Any, state: Any, params: Any, auxes: Any) -> Any:
        state = adapted(brick).begin_round(state, params)
        state = adapted(brick).process(auxes, state) if auxes else state
        updates, state = update(brick, updates, state, params)
        state = end_round(brick, state, params)
        return updates, adapted(brick).collect(state), adapted(brick).commit(state)

    lower(take, randoms(params, 1), brick.init(params), params, auxes)


def lower_scheduler(scheduler: Scheduler) -> None:
    lower(lambda c: (scheduler.value(c), scheduler.begin_round(scheduler.advance(c))), scheduler.init())


def lower_aggregator(aggregator: Aggregator) -> None:
    delta, weights = parameters(), jnp.arange(1.0, 6.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(randoms(delta, seed) for seed in range(5)))
    if isinstance(aggregator, StackAggregator):
        lower(aggregator.aggregate, stacked, weights)
        return
    assert isinstance(aggregator, SumAggregator)

    def take(stacked: Any, weights: Any, state: Any) -> Any:
        state = aggregator.begin_round(state)
        each = jax.vmap(aggregator.contribute, in_axes=(0, 0, None))(stacked, weights, state)
        return aggregator.combine(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each), state)

    lower(take, stacked, weights, aggregator.init(delta))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_every_plug_in_is_lowered_for_every_platform(name: str) -> None:
    plugin = next(iter(instances(PLUGINS[name]).values()))
    kinds = {Scheduler: lower_scheduler, Aggregator: lower_aggregator, Brick: lower_brick}
    kind = next(kind for kind in kinds if isinstance(plugin, kind))
    kinds[kind](plugin)


def test_what_calls_the_host_is_not_lowered() -> None:
    with pytest.raises(NotImplementedError, match="callback"):
        lower(lambda x: jax.pure_callback(lambda y: y, x, x), jnp.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", 3, clients_mesh(jax.devices()[:1])], ids=["scan", "chunks", "mesh"])
def test_a_round_with_every_place_filled_is_lowered_for_every_platform(mapping: Any) -> None:
    federation, params, stats = everything(mapping)
    data = everyone(mapping if isinstance(mapping, Mesh) else None)
    state = federation.init(params, data, seed=1, stats=stats)
    lower(lambda state, data: federation.run(state, data, 2, participants=4, drop_rate=0.3), state, data)
