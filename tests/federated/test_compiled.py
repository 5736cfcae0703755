"""What the compiled programs take: memory that grows with the chunk, and with nothing else."""

import re
from typing import Any

import jax
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.federated.execution import chunk_size

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
@pytest.mark.parametrize("mapping", ["scan", 4, None])
def test_temporary_memory_depends_neither_on_the_bank_nor_on_the_participants(mapping: Any, optimized: Any) -> None:
    small, _, _ = memory(100, 10, mapping, optimized)
    large, aliased, bank = memory(10_000, 60, mapping, optimized)
    # A participant's metrics and its place are some words; a row of the bank is 804 bytes.
    assert large - small < (60 - 10) * 64
    # Of 10,000 rows, a chunk of ten has some copies of ten.
    assert large < bank / (50 if mapping is None else 100)
    assert aliased > bank


@pytest.mark.slow
def test_vmap_takes_memory_by_participant(optimized: Any) -> None:
    assert memory(100, 64, "vmap", optimized)[0] > 4 * memory(100, 8, "vmap", optimized)[0]


SHAPES = {"small": (100, 10), "middling": (1000, 128), "large": (1000, 1000), "kernel": (3, 3, 1, 8)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others go by the memory that they have")
@pytest.mark.parametrize(
    ("shape", "participants", "alike", "expected"),
    [
        ("small", 100, True, 10),
        ("small", 100, False, 1),
        ("small", 4, True, 4),
        ("small", 11, True, 6),  # two chunks as even as they can be
        ("middling", 100, True, 4),
        ("large", 100, True, 1),
        ("kernel", 100, True, 1),
    ],
)
def test_on_a_cpu_small_models_with_as_many_steps_run_several_at_once(
    shape: str, participants: int, alike: bool, expected: int
) -> None:
    params = {"w": jax.ShapeDtypeStruct(SHAPES[shape], np.float32)}
    assert chunk_size(None, participants, params, alike) == expected
    assert chunk_size("scan", participants, params, alike) == 1
    mesh = clients_mesh(jax.devices()[:1])
    assert chunk_size(mesh, participants, params, alike) == expected


@pytest.mark.parametrize("given", [False, True])
def test_what_is_run_at_once_by_default_comes_to_the_same_as_one_by_one(given: bool) -> None:
    rng = np.random.default_rng(0)
    clients = [
        {"x": rng.normal(size=(8, 3)).astype(np.float32), "y": rng.integers(0, 2, 8).astype(np.int32)} for _ in range(7)
    ]
    data = FederatedData.from_clients(clients)
    batches = jax.tree.map(lambda leaf: leaf.reshape(7, 2, 4, *leaf.shape[1:])[:5], data.examples)
    ends = []
    for mapping in ("scan", None):
        federation = problem.federation(7, mapping=mapping)
        state, program = federation.init(problem.params(), data), jax.jit(federation.round)
        for _ in range(2):
            state, metrics = program(state, batches if given else data, np.arange(5))
        ends.append((state.params, state.bank, metrics))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), *ends)


def test_rows_of_the_bank_are_flat_and_saved_as_the_model_is() -> None:
    federation, client = problem.federation(2), {"x": np.ones((8, 3), np.float32), "y": np.zeros(8, np.int32)}
    data = FederatedData.from_clients([client] * 2)
    state = federation.init(problem.params(), data)
    state, _ = federation.fit(state, data, 1)
    # A TPU would put the clients of matrices last, and copy them to read a client's row.
    assert max(leaf.ndim for leaf in state.bank) == 2
    saved: Any = federation.encode(state)
    shapes = [rows["shape"] for name, rows in saved["bank"].items() if name.endswith("/w")]
    assert shapes
    assert all(shape == [2, 3, 2] for shape in shapes)
    again = federation.decode(saved, federation.init(problem.params(), data))
    jax.tree.map(np.testing.assert_array_equal, again.bank, state.bank)


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


@pytest.mark.slow
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
