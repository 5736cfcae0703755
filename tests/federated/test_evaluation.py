"""Evaluation counts each example once, whatever the rounds do with partial batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

VALUES = [np.arange(5.0, dtype=np.float32), np.arange(3.0, dtype=np.float32)]
DATA = FederatedData.from_clients(VALUES)


def by_example(params: Any, batch: Any) -> Any:
    return batch + params, {"square": batch**2}


def scalar(params: Any, batch: Any) -> Any:
    return jnp.mean(batch + params), {"square": jnp.mean(batch**2)}


def scalar_metric(params: Any, batch: Any) -> Any:
    return batch + params, {"square": jnp.mean(batch**2)}


@pytest.mark.parametrize("loss", [by_example, scalar, scalar_metric])
@pytest.mark.parametrize("remainder", ["mask", "drop", "wrap"])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_means_are_over_each_example_once(loss: Any, remainder: Any, batch_size: int | None) -> None:
    federation = Federation(loss, fo.Optimizer(0.1), batch_size=2, remainder=remainder)
    found = federation.evaluate(jnp.float32(0), DATA, batch_size=batch_size)
    np.testing.assert_allclose(found["loss"], [2, 1])
    np.testing.assert_allclose(found["square"], [np.mean(each**2) for each in VALUES], rtol=1e-6)


def test_a_scalar_loss_gets_whole_batches_where_all_are_full() -> None:
    federation = Federation(lambda p, batch: jnp.max(batch) + p, fo.Optimizer(0.1))
    data = FederatedData.from_clients([VALUES[0][:4], VALUES[0][1:]])
    np.testing.assert_allclose(federation.evaluate(jnp.float32(0), data, batch_size=2)["loss"], [2, 3])


def test_examples_that_are_evaluated_alone_draw_apart() -> None:
    federation = Federation(lambda p, batch, key: jax.random.normal(key) + p * jnp.sum(batch), fo.Optimizer(0.1))
    data = FederatedData.from_clients([np.zeros(2000, np.float32), np.zeros(1999, np.float32)])
    found = federation.evaluate(jnp.float32(0), data)["loss"]
    # One draw for all would be as far from 0 as any: the mean of 2,000 is within 0.1.
    assert np.abs(found).max() < 0.1
    assert found[0] != found[1]
