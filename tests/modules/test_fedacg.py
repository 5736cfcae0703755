"""FedACG: rounds of clients with quadratic losses, against the algorithm of Kim et al. in NumPy float64."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.fedacg import FedACGModule

LRATE, STEPS, LAMBDA, BETA = 0.1, 4, 0.7, 0.3
CURVATURES = np.random.default_rng(0).uniform(0.1, 2.0, size=(4, 5))
OPTIMA = np.random.default_rng(1).normal(size=(4, 5))
START = np.full(5, 2.0)
SCHEDULE = [[0, 1, 2, 3], [1, 3], [2], [0, 2, 3], [3, 0], [1, 2]]


def algorithm() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the parameters after each round, and what its clients were sent."""
    x, m, path = START.copy(), np.zeros(5), []
    for who in SCHEDULE:
        sent, ends = x + LAMBDA * m, []
        for client in who:
            y = sent.copy()
            for _ in range(STEPS):
                y = y - LRATE * (CURVATURES[client] * (y - OPTIMA[client]) + BETA * (y - sent))
            ends.append(y)
        m = LAMBDA * m + np.mean(ends, axis=0) - sent
        x = x + m
        np.testing.assert_allclose(x, np.mean(ends, axis=0))  # the paper's other way to say it
        path.append((x, sent))
    return path


def tree(vector: Any) -> Any:
    return {"a": jnp.asarray(vector[:2], jnp.float32), "b": jnp.asarray(vector[2:], jnp.float32)}


def vector(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])]).astype(np.float64)


CLIENT = fo.Optimizer(LRATE, regularizers=[("fedprox", {"alpha": BETA})])


@jax.jit
def local_delta(sent: Any, curvature: Any, optimum: Any) -> Any:
    state, y = CLIENT.begin_round(CLIENT.init(sent), sent), sent
    for _ in range(STEPS):
        gradient = jax.tree.map(lambda a, w, o: a * (w - o), curvature, y, optimum)
        updates, state = CLIENT.update(gradient, state, y)
        y = jax.tree.map(jnp.add, y, updates)
    return jax.tree.map(jnp.subtract, y, sent)


def mean_gradient(who: list[int], sent: Any) -> Any:
    found = [local_delta(sent, tree(CURVATURES[client]), tree(OPTIMA[client])) for client in who]
    return jax.tree.map(lambda *leaves: -sum(leaves) / len(leaves), *found)


@pytest.mark.slow
def test_rounds_of_the_pure_methods_are_the_papers() -> None:
    server = fo.Optimizer(1.0, modules=[FedACGModule(momentum=LAMBDA)])
    x, state = tree(START), server.init(tree(START))
    for who, (wanted, wanted_sent) in zip(SCHEDULE, algorithm(), strict=True):
        sent = server.share(x, state)
        np.testing.assert_allclose(vector(sent), wanted_sent, rtol=1e-5, atol=1e-5)
        updates, state = server.update(mean_gradient(who, sent), state, x)
        x = jax.tree.map(jnp.add, x, updates)
        np.testing.assert_allclose(vector(x), wanted, rtol=1e-5, atol=1e-5)


def test_rounds_of_the_facade_saved_and_restored_are_the_papers() -> None:
    x, saved = tree(START), None
    for who, (wanted, wanted_sent) in zip(SCHEDULE, algorithm(), strict=True):
        server = fo.Optimizer(1.0, modules=[FedACGModule.from_config({"momentum": LAMBDA})])
        server.setup(x)
        if saved is not None:
            server.set_state(json.loads(saved))
        sent = server.share_params(x)
        np.testing.assert_allclose(vector(sent), wanted_sent, rtol=1e-5, atol=1e-5)
        x = server.apply_gradients(x, mean_gradient(who, sent))
        saved = json.dumps(server.get_state())
        np.testing.assert_allclose(vector(x), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_shared_keeps_its_dtype() -> None:
    module = FedACGModule(momentum=0.5)
    params = jnp.array([1.0, 256.0], jnp.bfloat16)
    _, state = module.update(jnp.array([-0.0625, -0.5], jnp.bfloat16), module.init(params))
    shared = module.share(params, state)
    assert shared.dtype == jnp.bfloat16
    # 256.25 is between bfloat16 numbers 2 apart
    np.testing.assert_array_equal(shared.astype(jnp.float32), [1.03125, 256.0])
