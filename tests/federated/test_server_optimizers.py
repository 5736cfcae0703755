"""FedAvg, and what moving averages and adaptive modules make of it, come from the server's optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

ROUNDS, LOCAL, SERVER, STEPS, B1, B2, TAU = 6, 0.1, 0.3, 2, 0.9, 0.99, 1e-3
TARGETS = [np.array([1.0, -1.0]), np.array([3.0, 0.5]), np.array([-1.0, 2.0])]

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def ewma(delta: Any, m: Any, v: Any, t: int) -> Any:
    m = B1 * m + (1 - B1) * delta
    return m, m, v


def adagrad(delta: Any, m: Any, v: Any, t: int) -> Any:
    v = v + delta**2
    return delta / (np.sqrt(v) + TAU), m, v


def adam(delta: Any, m: Any, v: Any, t: int) -> Any:
    m, v = B1 * m + (1 - B1) * delta, B2 * v + (1 - B2) * delta**2
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + TAU), m, v


def yogi(delta: Any, m: Any, v: Any, t: int) -> Any:
    m, v = B1 * m + (1 - B1) * delta, v - (1 - B2) * delta**2 * np.sign(v - delta**2)
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + TAU), m, v


BETAS = {"beta_1": B1, "beta_2": B2, "eps": TAU}


@pytest.mark.parametrize(
    ("modules", "rule"),
    [
        ([], lambda delta, m, v, t: (delta, m, v)),
        ([("ewma", {"beta": B1})], ewma),
        ([("adagrad", {"eps": TAU})], adagrad),
        ([("adam", BETAS)], adam),
        ([("yogi", BETAS)], yogi),
    ],
    ids=["fedavg", "ewma", "adagrad", "adam", "yogi"],
)
def test_the_server_steps_along_the_mean_of_the_clients_deltas(modules: Any, rule: Rule) -> None:
    data = FederatedData.from_clients([target[None].astype(np.float32) for target in TARGETS])
    federation = Federation(
        lambda w, batch: 0.5 * jnp.sum((w - batch) ** 2, axis=-1),
        fo.Optimizer(LOCAL),
        fo.Optimizer(SERVER, modules=modules),
        epochs=STEPS,
    )
    state = federation.init(jnp.full(2, 4.0), data)
    state, history = jax.jit(lambda s: federation.run(s, data, ROUNDS))(state)

    x, m, v = np.full(2, 4.0), np.zeros(2), np.zeros(2)
    for t in range(1, ROUNDS + 1):
        delta = np.mean([(1 - (1 - LOCAL) ** STEPS) * (target - x) for target in TARGETS], axis=0)
        step, m, v = rule(delta, m, v, t)
        x = x + SERVER * step
    np.testing.assert_allclose(state.params, x, atol=1e-5)
    losses = np.asarray(history["loss"]).mean(axis=1)
    assert (np.diff(losses) < 0).all()
