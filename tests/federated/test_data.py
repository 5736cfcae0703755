"""The clients' data: how it is laid out and split, and what is refused."""

from typing import Any

import numpy as np
import pytest

from functional_optimodules.federated import FederatedData, clients_mesh, partition
from functional_optimodules.federated.data import balance

LABELS = np.random.default_rng(0).integers(0, 10, 2_000)


def rows_of(data: FederatedData, client: int) -> np.ndarray:
    slot = int(data.slots[client])
    block = slot // data.per_shard * (len(data.examples) // data.num_shards)
    begin = block + int(data.offsets[slot])
    return np.asarray(data.examples[begin : begin + int(data.sizes[slot])])


def test_from_clients_keeps_each_clients_rows() -> None:
    clients = [np.full((n, 2), n, np.float32) for n in (3, 1, 4)]
    data = FederatedData.from_clients(clients)
    assert (data.num_clients, data.smallest, data.largest) == (3, 1, 4)
    for index, client in enumerate(clients):
        np.testing.assert_array_equal(rows_of(data, index), client)
    assert len(data.examples) == 8


def test_from_ids_numbers_clients_in_their_order() -> None:
    ids = np.array(["b", "a", "b", "c", "a"])
    data = FederatedData.from_ids(np.arange(5.0, dtype=np.float32), ids)
    assert [rows_of(data, client).tolist() for client in range(3)] == [[1, 4], [0, 2], [3]]
    for part, client in zip(partition.by_id(ids), range(3), strict=True):
        np.testing.assert_array_equal(part, rows_of(data, client))


def test_from_local_in_one_process_takes_clients_in_any_order() -> None:
    data = FederatedData.from_local({2: np.full(2, 2.0), 0: np.zeros(3), 1: np.ones(1)}, clients_mesh())
    assert [rows_of(data, client).tolist() for client in range(3)] == [[0, 0, 0], [1], [2, 2]]


def test_balance_gives_shards_as_many_clients_to_within_one_and_about_as_many_examples() -> None:
    sizes = np.random.default_rng(0).lognormal(3, 1, 103).astype(int) + 1
    blocks = balance(sizes, 8)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(103))
    assert {len(block) for block in blocks} == {12, 13}
    loads = [sizes[block].sum() for block in blocks]
    assert max(loads) < 1.1 * np.mean(loads)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "there is no client"),
        ([np.ones((2, 1)), np.ones((0, 1))], "client 1 has no examples"),
        ([{"x": np.ones(2), "y": np.ones(3)}], "client 0 has arrays of different numbers of examples"),
        ([np.float32(1)], "client 0 has arrays of different numbers"),
        ([np.ones((2, 1)), np.ones((2, 2))], r"client 1 has examples of float64\[2\], and client 0 of float64\[1\]"),
        ([np.ones(2, np.float32), np.ones(2, np.int32)], "client 1 has examples of int32"),
        ([{"x": np.ones(2)}, {"z": np.ones(2)}], "client 1 has PyTreeDef"),
    ],
)
def test_clients_that_are_refused(clients: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedData.from_clients(clients)


def test_ids_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids of shape \(2,\) for arrays of \[\(3,\)\] rows"):
        FederatedData.from_ids(np.ones(3), [0, 1])


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({}, "process 0 has no client"),
        ({0: np.ones(1), 2: np.ones(1)}, "from 0 to 1, each once"),
        ({0: np.ones(0)}, "no ex"),
    ],
)
def test_local_clients_that_are_refused(clients: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedData.from_local(clients, clients_mesh())


SPLITS = {
    "iid": lambda seed: partition.iid(len(LABELS), 30, seed),
    "dirichlet": lambda seed: partition.dirichlet(LABELS, 30, 0.3, seed),
    "sorted": lambda seed: partition.sorted_shards(LABELS, 30, 0.1, seed),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_split_is_a_partition_that_its_seed_decides(split: Any) -> None:
    parts = split(0)
    assert len(parts) == 30
    assert min(map(len, parts)) >= 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    for again, part in zip(split(np.random.default_rng(0)), parts, strict=True):
        np.testing.assert_array_equal(again, part)
    assert not all(np.array_equal(a, b) for a, b in zip(split(1), parts, strict=True))


def test_iid_and_sorted_give_clients_as_many_examples_to_within_one() -> None:
    for name in ("iid", "sorted"):
        assert {len(part) for part in SPLITS[name](0)} == {66, 67}


def skew(parts: list[np.ndarray]) -> float:
    """The mean share of a client's most frequent label."""
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))


def test_a_smaller_alpha_is_more_skewed() -> None:
    skews = [skew(partition.dirichlet(LABELS, 10, alpha)) for alpha in (100.0, 1.0, 0.05)]
    assert skews[0] < 0.2 < skews[1] < 0.5 < skews[2]


def test_similarity_is_the_share_of_examples_dealt_out_at_random() -> None:
    for similarity, most in ((0.0, 2), (0.1, 10), (1.0, 10)):
        parts = partition.sorted_shards(LABELS, 20, similarity)
        assert max(len(np.unique(LABELS[part])) for part in parts) <= most
    skews = [skew(partition.sorted_shards(LABELS, 20, similarity)) for similarity in (0.0, 0.1, 1.0)]
    assert skews[0] > skews[1] > 0.6 > 0.25 > skews[2]


def test_dirichlet_draws_again_until_each_client_has_enough() -> None:
    assert min(map(len, partition.dirichlet(LABELS, 20, 0.5, min_examples=30))) >= 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(3, 4), "3 examples for 4 clients: some would have none"),
        (lambda: partition.iid(3, 0), "num_clients=0"),
        (lambda: partition.dirichlet(LABELS, 5, 0.0), r"alpha=0.0 should be > 0"),
        (lambda: partition.dirichlet(LABELS, 5, np.nan), r"alpha=nan should be > 0"),
        (lambda: partition.dirichlet(LABELS, 5, min_examples=401), "from 1 to 400"),
        (lambda: partition.dirichlet(LABELS[:40], 40, 0.01), "take a larger alpha or fewer clients"),
        (lambda: partition.sorted_shards(LABELS, 5, 10), r"similarity=10 should be a share in \[0, 1\]"),
        (lambda: partition.sorted_shards(LABELS[:, None], 5), r"not of shape \[2000, 1\]"),
        (lambda: partition.by_id([]), "0 examples"),
    ],
)
def test_splits_that_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
