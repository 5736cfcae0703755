"""A round with every place filled is lowered for all platforms, on any; the contract suite does so with plug-ins."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from federated.test_uplink import everyone, everything
from jax.sharding import Mesh

from functional_optimodules.federated import clients_mesh
from functional_optimodules.testing.lowering import lower


def test_what_calls_the_host_is_not_lowered() -> None:
    with pytest.raises(AssertionError, match=r"not lowered for cpu, cuda, rocm, tpu: .*callback"):
        lower(lambda x: jax.pure_callback(lambda y: y, x, x), jnp.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", 3, clients_mesh(jax.devices()[:1])], ids=["scan", "chunks", "mesh"])
def test_a_round_with_every_place_filled_is_lowered_for_every_platform(mapping: Any) -> None:
    federation, params, stats = everything(mapping)
    data = everyone(mapping if isinstance(mapping, Mesh) else None)
    state = federation.init(params, data, seed=1, stats=stats)
    lower(lambda state, data: federation.run(state, data, 2, participants=4, drop_rate=0.3), state, data)
