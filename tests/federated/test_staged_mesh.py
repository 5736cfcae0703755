"""Staged data over a mesh, of one process and of two: the numbers of all on the devices; what is killed goes on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import problem
from .conftest import Peers
from .staged_peer import ROUNDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    peers = Peers(tmp_path_factory.mktemp("staged"), Path(__file__).parent / "staged_peer.py")
    yield peers
    peers.stop()


@pytest.fixture(scope="module")
def found(peers: Any) -> Any:
    peers.finish("mesh")
    return json.loads((peers.folder / "mesh.json").read_text())


@pytest.mark.parametrize(
    "what",
    [
        "scaffold",
        "by device",
        "keys",
        "fedavg",
        "local",
        "model axis",
        "room that grows",
        "resumed",
        "evaluation",
    ],
)
def test_the_numbers_are_those_of_the_same_mesh_with_everything_on_it(what: str, found: Any) -> None:
    assert found["same"][what]


def test_a_piece_has_one_all_reduce_and_no_other_collective(found: Any) -> None:
    assert found["collectives"].pop("all-reduce") == 1
    assert set(found["collectives"].values()) == {0}


@pytest.fixture(scope="module")
def straight(peers: Any) -> Any:
    peers.finish("several", count=2, devices=2)
    return [dict(np.load(peers.folder / f"straight-{index}.npz")) for index in range(2)]


def test_two_processes_give_the_numbers_of_one(peers: Any, found: Any, straight: Any) -> None:
    with np.load(peers.folder / "out.npz") as expected:
        for one in straight:
            for name, value in expected.items():
                np.testing.assert_allclose(one[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(straight[0]["each"], straight[1]["each"])
    assert np.isfinite(straight[0]["each"]).all()


def test_two_processes_have_each_their_own_clients(straight: Any) -> None:
    own = [one["own"].tolist() for one in straight]
    assert sorted(own[0] + own[1]) == list(range(problem.NUM_CLIENTS))
    assert all(len(one["models"]) == len(one["own"]) for one in straight)


def test_two_processes_of_which_one_is_killed_go_on_with_the_same_numbers(peers: Any, straight: Any) -> None:
    first, second = peers.start("killed", count=2, devices=2)
    output = first.communicate(timeout=120)[0]
    second.communicate(timeout=60)
    assert first.returncode != 0
    assert re.search(r"process 0 of 2: the exchange .* broke off", output)
    peers.finish("resumed", count=2, devices=2)
    for index, expected in enumerate(straight):
        with np.load(peers.folder / f"resumed-{index}.npz") as resumed:
            done = int(resumed["done"])
            assert 0 < done < ROUNDS
            for name in set(resumed) - {"done"}:
                rows = expected[name] if name in problem.params() else expected[name][done:]
                np.testing.assert_array_equal(resumed[name], rows, err_msg=name)
    peers.finish("alone")
    text = (peers.folder / "alone.txt").read_text()
    assert re.search(r"is of another run: data processes was \[0, 0, 1, 1\]", text)


def test_two_processes_raise_both_what_one_meets(peers: Any) -> None:
    peers.finish("failing", count=2, devices=1)
    first, second = (json.loads((peers.folder / f"errors-{index}.json").read_text()) for index in range(2))
    assert first[0].startswith("RuntimeError: StagedFederation: process 1 of 2 failed, and says why")
    assert second[0].startswith("OSError: [Errno 28] StagedFederation: No space left on device: round 1 was not")
    expected = "ValueError: StagedFederation: the data of process 1 is not that of process 0: give all the same"
    assert first[1] == second[1] == expected
