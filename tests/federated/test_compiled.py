"""What the compiled programs take: memory that grows with the chunk, and with nothing else."""

import re
from typing import Any

import jax
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from . import problem


def memory(num_clients: int, participants: int, mapping: Any, options: Any) -> Any:
    client = {"x": np.ones((8, 3), np.float32), "y": np.zeros(8, np.int32)}
    data = FederatedData.from_clients([client] * num_clients)
    federation = problem.federation(num_clients, mapping=mapping)
    params = {"w": np.zeros((3, 50), np.float32), "b": np.zeros(50, np.float32)}
    state = federation.init(params, data)
    bank = sum(leaf.nbytes for leaf in state.bank)
    program = jax.jit(lambda s, d, w: federation.round(s, d, w), donate_argnums=0)
    lowered = program.lower(state, data, jax.ShapeDtypeStruct((participants,), np.int32))
    found = lowered.compile(options).memory_analysis()
    return found.temp_size_in_bytes, found.alias_size_in_bytes, bank


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", 4])
def test_temporary_memory_depends_neither_on_the_bank_nor_on_the_participants(mapping: Any, optimized: Any) -> None:
    small, _, _ = memory(100, 8, mapping, optimized)
    large, aliased, bank = memory(10_000, 64, mapping, optimized)
    # A participant's metrics and its place are some words; a row of the bank is 804 bytes.
    assert large - small < (64 - 8) * 64
    assert large < bank / 100
    assert aliased > bank


@pytest.mark.slow
def test_vmap_takes_memory_by_participant(optimized: Any) -> None:
    assert memory(100, 64, "vmap", optimized)[0] > 4 * memory(100, 8, "vmap", optimized)[0]


@pytest.mark.parametrize(("platform", "transposed"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_the_layout_of_gradients_is_chosen_for_the_platform_that_a_round_is_lowered_for(
    platform: str, transposed: bool
) -> None:
    data = FederatedData.from_clients([{"x": np.ones((8, 300), np.float32), "y": np.zeros(8, np.int32)}])
    federation = Federation(problem.loss, fo.Optimizer(0.1), batch_size=4, mapping="scan")
    state = federation.init({"w": np.ones((300, 10), np.float32), "b": np.zeros(10, np.float32)}, data)
    traced = jax.jit(lambda s, d: federation.round(s, d, np.zeros(1, np.int32))).trace(state, data)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert bool(re.search(r"optimization_barrier %\w+ : tensor<10x300xf32>", text)) == transposed


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends lay out results as they like")
@pytest.mark.parametrize(("shape", "long_axis_last"), [((300, 10), True), ((300, 48), False), ((10, 300), False)])
def test_the_gradient_of_a_tall_narrow_matrix_is_written_with_its_long_axis_last(
    shape: tuple[int, int], long_axis_last: bool, optimized: Any
) -> None:
    client = {"x": np.ones((8, shape[0]), np.float32), "y": np.zeros(8, np.int32)}
    data = FederatedData.from_clients([client] * 2)
    federation = Federation(problem.loss, fo.Optimizer(0.1), batch_size=4, mapping="scan")
    state = federation.init({"w": np.ones(shape, np.float32), "b": np.zeros(shape[1], np.float32)}, data)
    program = jax.jit(lambda s, d, w: federation.round(s, d, w))
    text = program.lower(state, data, np.arange(2, dtype=np.int32)).compile(optimized).as_text()
    sizes = "|".join(map(str, shape))
    found = re.findall(rf"= f32\[((?:{sizes}),(?:{sizes}))\]\{{(\d,\d)\}} dot\(", text)
    # As they lie in memory, however XLA says it: [10,300]{1,0} lies as [300,10]{0,1} does.
    order = [dims.split(",") if layout == "1,0" else dims.split(",")[::-1] for dims, layout in found]
    assert order == [[str(size) for size in (sorted(shape) if long_axis_last else shape)]]
