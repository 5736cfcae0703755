"""What the compiled programs take: memory that grows with the chunk, and with nothing else."""

from typing import Any

import jax
import numpy as np
import pytest

from functional_optimodules.federated import FederatedData

from . import problem


def memory(num_clients: int, participants: int, mapping: Any) -> Any:
    client = {"x": np.ones((8, 3), np.float32), "y": np.zeros(8, np.int32)}
    data = FederatedData.from_clients([client] * num_clients)
    federation = problem.federation(mapping=mapping)
    params = {"w": np.zeros((3, 50), np.float32), "b": np.zeros(50, np.float32)}
    state = federation.init(params, data)
    bank = sum(leaf.nbytes for leaf in state.bank)
    program = jax.jit(lambda s, d, w: federation.round(s, d, w), donate_argnums=0)
    found = program.lower(state, data, jax.ShapeDtypeStruct((participants,), np.int32)).compile().memory_analysis()
    return found.temp_size_in_bytes, found.alias_size_in_bytes, bank


@pytest.mark.parametrize("mapping", ["scan", 4])
def test_temporary_memory_depends_neither_on_the_bank_nor_on_the_participants(mapping: Any) -> None:
    small, _, _ = memory(100, 8, mapping)
    large, aliased, bank = memory(10_000, 64, mapping)
    # A participant's metrics and its place are some words; a row of the bank is 804 bytes.
    assert large - small < (64 - 8) * 64
    assert large < bank / 100
    assert aliased > bank


def test_vmap_takes_memory_by_participant() -> None:
    assert memory(100, 64, "vmap")[0] > 4 * memory(100, 8, "vmap")[0]
