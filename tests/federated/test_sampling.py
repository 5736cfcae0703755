"""Samples of clients: without repetition, and fair."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from functional_optimodules.federated.sampling import draw, draw_by_shard

DRAWS = 3000


def keys() -> Any:
    return jax.random.split(jax.random.key(0), DRAWS)


@pytest.mark.parametrize(("num_clients", "size"), [(12, 5), (40, 3), (7, 7), (6, 1), (200, 150)])
def test_each_client_is_drawn_once_at_most_and_as_often_as_any_other(num_clients: int, size: int) -> None:
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw(key, num_clients, size)))(keys()))
    assert drawn.shape == (DRAWS, size)
    assert all(len(set(row)) == size for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=num_clients)
    assert len(counts) == num_clients
    if size < num_clients:
        assert chance_of(counts, size / num_clients) > 1e-3
        # The test can tell: here one client is drawn half as often again as it should be.
        counts[0] = 1.5 * counts.mean()
        assert chance_of(counts, size / num_clients) < 1e-3


def chance_of(counts: np.ndarray, share: float) -> float:
    """The probability of counts as uneven, of clients drawn without replacement."""
    expected = DRAWS * share
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - share)) * (len(counts) - 1) / len(counts)
    return float(scipy.stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 6, 9, 10])
def test_shards_are_asked_for_as_many_clients_to_within_one(size: int) -> None:
    # Ten clients in four shards of three slots, two of which are empty.
    slots: Any = jnp.array([0, 3, 6, 9, 1, 4, 7, 10, 2, 5])
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw_by_shard(key, slots, 3, 4, size)))(keys()))
    assert all(len(set(row)) == size for row in drawn.tolist())
    loads = np.stack([(np.asarray(slots)[drawn] // 3 == shard).sum(axis=1) for shard in range(4)])
    assert set((loads.max(axis=0) - loads.min(axis=0)).tolist()) <= {0, 1}
    assert set(drawn.ravel().tolist()) == set(range(10))
