"""A mesh of four devices in one process: same numbers, one exchange a round, even loads."""

import json
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from functional_optimodules.federated import FederatedData

from . import problem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(peers: Any) -> Any:
    peers.finish("mesh")
    with np.load(peers.folder / "out.npz") as arrays:
        return {**json.loads((peers.folder / "mesh.json").read_text()), "arrays": dict(arrays)}


@pytest.fixture(scope="module")
def data() -> FederatedData:
    return FederatedData.from_clients(problem.clients())


@pytest.fixture(scope="module")
def alone(data: FederatedData) -> Any:
    return problem.run(problem.federation(), data)


def test_four_devices_give_the_same_parameters_and_metrics(found: Any, alone: Any) -> None:
    state, history = alone
    for name, value in {**state.params, **history}.items():
        np.testing.assert_allclose(found["arrays"][name], value, atol=1e-5, err_msg=name)


def test_a_round_has_one_all_reduce_and_no_other_collective(found: Any) -> None:
    # The program of five rounds is a loop, whose body holds that of each.
    assert found["collectives"].pop("all-reduce") == 1
    assert set(found["collectives"].values()) == {0}


def test_the_bank_is_spread_over_the_devices(found: Any) -> None:
    assert found["shards"] == [4, 4, 4]


def test_draws_of_batches_keys_and_noise_are_the_same_on_four_devices(found: Any, data: FederatedData) -> None:
    history = problem.run(problem.noisy_federation(), data)[1]
    assert np.abs(found["draws"]["draw"]).min() > 0
    for name, value in history.items():
        np.testing.assert_allclose(found["draws"][name], value, atol=1e-5, err_msg=name)


def test_evaluation_of_each_client_is_the_same_on_four_devices(found: Any, alone: Any, data: FederatedData) -> None:
    each = problem.federation().evaluate(alone[0].params, data)["loss"]
    np.testing.assert_allclose(found["each"], each, atol=1e-5)


def test_a_state_saved_on_four_devices_goes_on_with_one(found: Any, alone: Any, data: FederatedData) -> None:
    federation = problem.federation()
    state = federation.decode(found["saved"], federation.init(problem.params(), data))
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(leaf, other, atol=1e-5)


def test_sampling_by_device_asks_each_for_as_many_and_reaches_every_client(found: Any) -> None:
    for sample, devices in zip(found["samples"], found["devices"], strict=True):
        assert len(set(sample)) == 5
        assert sorted(Counter(devices).values()) == [1, 1, 1, 2]
    seen = Counter(client for sample in found["samples"] for client in sample)
    assert set(seen) == set(range(problem.NUM_CLIENTS))
    # 60 rounds of 5 of 7 clients: 43 each if all were equally likely.
    assert min(seen.values()) > 30


def test_batches_given_for_far_clients_without_a_state_are_all_run(found: Any) -> None:
    assert found["far"] == [True, True, True]


@pytest.mark.parametrize("name", problem.AGGREGATIONS)
def test_each_aggregation_is_the_same_on_four_devices(name: str, found: Any, data: FederatedData) -> None:
    alone = problem.aggregated(name, data)
    for here, there in zip(alone, found["aggregated"][name], strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
    assert not np.allclose(alone[1], np.ravel(problem.params()["w"]))
