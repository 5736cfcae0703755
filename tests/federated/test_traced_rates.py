"""A federation whose rate is traced: a whole experiment as a function of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from . import problem


def experiment(rate: Any, data: FederatedData) -> Any:
    server = fo.Optimizer(1.0, modules=["scaffold-server"])
    federation = Federation(
        problem.loss, fo.Optimizer(rate, modules=["scaffold-client", "momentum"]), server, batch_size=4
    )
    state = federation.init(problem.params(), data, seed=3)
    state, _ = federation.round(state, data, jnp.arange(3))
    state, history = federation.run(state, data, 2, participants=3)
    return history["loss"], federation.evaluate(state.params, data)["loss"]


@pytest.mark.slow
def test_rounds_and_evaluation_under_jit_and_vmap_are_those_of_rates_that_are_numbers() -> None:
    data = FederatedData.from_clients(problem.clients())
    rates = jnp.array([0.05, 0.2])
    together = jax.jit(jax.vmap(experiment, (0, None)))(rates, data)
    alone = jax.jit(experiment)(rates[1], data)
    expected = experiment(0.2, data)
    for index in range(2):
        np.testing.assert_allclose(alone[index], expected[index], atol=1e-5)
        np.testing.assert_allclose(together[index][1], expected[index], atol=1e-5)
    assert not np.allclose(together[1][0], together[1][1])
