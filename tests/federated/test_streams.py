"""What is drawn depends on the client and the round, and on nothing else."""

from typing import Any

import jax
import numpy as np
import pytest

from functional_optimodules.federated import FederatedData

from . import problem

pytestmark = pytest.mark.slow

WHO = np.array([3, 0, 5])


def one_round(mapping: Any, who: Any = WHO, extra: int = 0, weights: Any = None) -> Any:
    """A round of noise and of losses that draw; with some examples for one more client, who is not asked."""
    clients = problem.clients()
    if extra:
        clients.append({"x": np.ones((extra, 3), np.float32), "y": np.zeros(extra, np.int32)})
    data = FederatedData.from_clients(clients)
    federation = problem.noisy_federation(mapping=mapping, epochs=2)
    state = federation.init(problem.params(), data, seed=1)
    return jax.jit(lambda s, d, w: federation.round(s, d, w))(state, data, np.asarray(who))


@pytest.fixture(scope="module")
def reference() -> Any:
    return one_round("scan")


def agree(found: Any, reference: Any, order: Any = slice(None)) -> None:
    for name in ("draw", "loss", "examples"):
        np.testing.assert_allclose(found[1][name], reference[1][name][order], atol=1e-5, err_msg=name)
    for name, value in reference[0].params.items():
        np.testing.assert_allclose(found[0].params[name], value, atol=1e-5, err_msg=name)


def test_draws_differ_from_client_to_client(reference: Any) -> None:
    assert len(set(np.asarray(reference[1]["draw"]).round(4).tolist())) == 3


@pytest.mark.parametrize("mapping", ["vmap", 2])
def test_the_chunk_changes_no_draw(reference: Any, mapping: Any) -> None:
    agree(one_round(mapping), reference)


def test_the_slot_changes_no_draw(reference: Any) -> None:
    order = np.array([1, 2, 0])
    agree(one_round("scan", WHO[order]), reference, order)


def test_the_padding_to_the_largest_client_changes_no_draw(reference: Any) -> None:
    agree(one_round("scan", extra=40), reference)


def test_the_next_round_draws_anew(reference: Any) -> None:
    data = FederatedData.from_clients(problem.clients())
    federation = problem.noisy_federation()
    _, history = problem.run(federation, data, rounds=3, size=None)
    by_client = np.take_along_axis(np.asarray(history["draw"]), np.argsort(history["participants"], axis=1), axis=1)
    assert len(np.unique(by_client.round(5))) == by_client.size
    assert len({tuple(row) for row in np.asarray(history["participants"]).tolist()}) == 3
