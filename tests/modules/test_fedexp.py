"""FedExP: rounds of clients with quadratic losses, against the server's step size of the paper in NumPy float64."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.fedexp import FedExPClientModule, FedExPReport, FedExPServerModule

LRATE, STEPS, EPS = 0.2, 3, 0.01
CURVATURES = np.random.default_rng(0).uniform(0.1, 2.0, size=(4, 5))
OPTIMA = np.random.default_rng(1).normal(size=(4, 5))
START = np.full(5, 2.0)
# Who takes part in each round; in the third, one alone, whose step is then half of 1, and so 1.
SCHEDULE = [[0, 1, 2, 3], [1, 3], [2], [0, 2, 3], [3, 0], [0, 1, 2, 3]]
WEIGHTS = {"alike": np.ones(4), "by examples": np.array([10.0, 3.0, 25.0, 7.0])}


def delta_of(client: int, x: np.ndarray) -> np.ndarray:
    y = x.copy()
    for _ in range(STEPS):
        y = y - LRATE * CURVATURES[client] * (y - OPTIMA[client])
    return y - x


def algorithm(weights: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Return the parameters and the server's step size of each round."""
    x, path = START.copy(), []
    for who in SCHEDULE:
        found = np.stack([delta_of(client, x) for client in who])
        share = weights[who] / weights[who].sum()
        mean = share @ found
        rate = max(1.0, float(share @ (found**2).sum(1)) / (2 * (float(mean @ mean) + EPS)))
        x = x + rate * mean
        path.append((x, rate))
    return path


def tree(vector: Any) -> Any:
    return {"a": jnp.asarray(vector[:2], jnp.float32), "b": jnp.asarray(vector[2:], jnp.float32)}


def vector(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])]).astype(np.float64)


@pytest.mark.parametrize("name", WEIGHTS)
def test_rounds_of_the_pure_methods_are_the_papers(name: str) -> None:
    weights = WEIGHTS[name]
    uplink, server = FedExPClientModule(), FedExPServerModule(eps=EPS)
    x, state = tree(START), server.init(tree(START))
    expected = algorithm(weights)
    assert max(rate for _, rate in expected) > 1.2
    for who, (wanted, rate) in zip(SCHEDULE, expected, strict=True):
        reports, total = [], np.zeros(5)
        for client in who:
            given = tree(-delta_of(client, vector(x)))
            sent, up = uplink.update(given, uplink.init(x), x, weight=jnp.float32(weights[client]))
            assert sent is given
            reports.append(uplink.collect(up))
            total += weights[client] * vector(sent)
        reduced = reports[0]
        for report in reports[1:]:
            reduced = reduced.merge(report)
        state = server.process(reduced, state)
        updates, state = server.update(tree(total / weights[who].sum()), state, x)
        x = jax.tree.map(jnp.subtract, x, updates)
        np.testing.assert_allclose(vector(x), wanted, rtol=1e-4, atol=1e-5)
        assert float(server.metrics(state)["rate"]) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_rounds_over_json_are_the_papers(name: str) -> None:
    weights = WEIGHTS[name]
    uplinks = [FedExPClientModule() for _ in range(4)]
    server = fo.Optimizer(1.0, modules=[FedExPServerModule(eps=EPS)])
    x = tree(START)
    for who, (wanted, _) in zip(SCHEDULE, algorithm(weights), strict=True):
        messages, total = {}, np.zeros(5)
        for client in who:
            sent = uplinks[client].run(tree(-delta_of(client, vector(x))), x, weight=weights[client])
            messages[f"client-{client}"] = json.loads(json.dumps(uplinks[client].collect_aux_var()))
            total += weights[client] * vector(sent)
        server.process_aux_var({"fedexp": messages})
        x = server.apply_gradients(x, tree(total / weights[who].sum()))
        np.testing.assert_allclose(vector(x), wanted, rtol=1e-4, atol=1e-5)


def test_the_step_by_hand() -> None:
    server = FedExPServerModule(eps=0.5)
    like = jnp.zeros(2)
    # Deltas (3, 0) and (0, 1): their mean is (1.5, 0.5), and (9 + 1) / (2 * 2 * (2.5 + 0.5)) is below 1.
    low = server.process(FedExPReport(total=jnp.float32(10), weight=jnp.float32(2)), server.init(like))
    np.testing.assert_allclose(server.update(jnp.array([1.5, 0.5]), low)[0], [1.5, 0.5])
    # Deltas (3, 0) and (-1, 0): their mean is (1, 0), and 10 / (2 * 2 * (1 + 0.5)) is 5 / 3.
    np.testing.assert_allclose(server.update(jnp.array([1.0, 0.0]), low)[0], [5 / 3, 0], rtol=1e-6)


def test_deltas_that_cancel_leave_the_parameters() -> None:
    server = FedExPServerModule()
    state = server.process(FedExPReport(total=jnp.float32(10), weight=jnp.float32(2)), server.init(jnp.zeros(2)))
    np.testing.assert_array_equal(server.update(jnp.zeros(2), state)[0], [0, 0])


def test_nobody_reporting_is_a_step_of_one() -> None:
    server = FedExPServerModule()
    np.testing.assert_array_equal(server.update(jnp.ones(2), server.init(jnp.zeros(2)))[0], [1, 1])


def test_the_weight_is_asked_for() -> None:
    assert FedExPClientModule().asks().step == {"weight"}
    with pytest.raises(TypeError, match="weight"):
        FedExPClientModule().run({"w": jnp.ones(2)})
