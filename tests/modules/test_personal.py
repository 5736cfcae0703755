"""Ditto and FedRep against algorithm 1 of each paper in NumPy float64."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import Federation
from functional_optimodules.modules.personal import DittoRegularizer, FedRepModule, ditto_loss

from .quadratics import (
    BATCHES,
    CLIENTS,
    HESSIANS,
    LRATE,
    SCHEDULE,
    SIZE,
    START,
    TARGETS,
    assert_near,
    gradient,
    quadratic,
    tree,
    vector,
)

LAMBDA = 0.7
OWN = np.linspace(2, 0, SIZE)


def own_steps(who: int, steps: int, w: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Li et al. 2021, algorithm 1: a client's steps on the shared model and on its own, both from where they were."""
    y = w.copy()
    for number in range(steps):
        v = v - LRATE * (gradient(who, number, v) + LAMBDA * (v - w))
        y = y - LRATE * gradient(who, number, y)
    return y, v


def both(shared: np.ndarray, personal: np.ndarray) -> Any:
    return {"shared": tree(shared), "personal": tree(personal)}


def both_gradients(who: int, number: int, params: Any) -> Any:
    return both(*(gradient(who, number, vector(params[part])) for part in ("shared", "personal")))


@pytest.mark.parametrize("facade", [False, True], ids=["pure", "facade"])
def test_ditto_is_that_of_the_paper(facade: bool) -> None:
    client = fo.Optimizer(LRATE, regularizers=[DittoRegularizer(alpha=LAMBDA)])
    step = jax.jit(client.update)
    w, personal, expected = START, dict.fromkeys(range(4), OWN), dict.fromkeys(range(4), OWN)
    peers = {who: client.bare() for who in range(4)}
    for steps, _ in SCHEDULE:
        ends = []
        for who, count in steps.items():
            params = both(w, personal[who])
            state = client.begin_round(client.init(params), params)
            peers[who].start_round()
            for number in range(count):
                grads = both_gradients(who, number, params)
                if facade:
                    params = peers[who].apply_gradients(params, grads)
                else:
                    updates, state = step(grads, state, params)
                    params = jax.tree.map(jnp.add, params, updates)
            y, expected[who] = own_steps(who, count, w, expected[who])
            personal[who] = vector(params["personal"])
            assert_near(vector(params["shared"]), y, "shared")
            assert_near(personal[who], expected[who], "personal")
            ends.append(y)
        w = np.mean(ends, axis=0)


def given(steps: int) -> Any:
    """The batches of all clients, as a federation takes them: clients x steps x examples."""
    batches = np.arange(steps) % BATCHES
    data = {"hessian": HESSIANS[:, batches, None], "target": TARGETS[:, batches, None]}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), data)


def test_a_federation_with_a_local_model_is_ditto() -> None:
    client = fo.Optimizer(LRATE, regularizers=[DittoRegularizer(alpha=LAMBDA)])
    federation = Federation(ditto_loss(quadratic), client, local=["personal/**"])
    state = federation.init(both(START, OWN), CLIENTS)
    run, w, personal = jax.jit(federation.round), START, [OWN] * CLIENTS
    for who in ([0, 2], [1, 2], [3, 0], [2, 1]):
        state, _ = run(state, jax.tree.map(lambda leaf: leaf[jnp.array(who)], given(4)), jnp.array(who))  # noqa: B023
        ends = {each: own_steps(each, 4, w, personal[each]) for each in who}
        w = np.mean([y for y, _ in ends.values()], axis=0)
        for each, (_, v) in ends.items():
            personal[each] = v
        assert_near(vector(state.params["shared"]), w)
        for each in range(CLIENTS):
            params = federation.model(state, each)
            assert_near(vector(params["personal"]), personal[each], f"personal of {each}")
            assert_near(vector(params["shared"]), w)


def test_ditto_finds_its_reference_in_any_container_and_by_path_alone() -> None:
    module, grads = DittoRegularizer(alpha=2.0), {"shared": jnp.ones(2), "personal": jnp.zeros(2)}
    start = {"shared": jnp.array([1.0, 2.0]), "personal": jnp.zeros(2)}
    then = {"shared": jnp.zeros(2), "personal": jnp.array([5.0, 5.0])}
    output, _ = module.update(grads, module.begin_round(module.init(start), start), then)
    np.testing.assert_array_equal(output["personal"], [8.0, 6.0])
    np.testing.assert_array_equal(output["shared"], [1.0, 1.0])


def test_ditto_refuses_what_has_no_counterpart() -> None:
    params = {"shared": {"w": jnp.ones(2)}, "personal": {"v": jnp.ones(2)}}
    module = DittoRegularizer()
    with pytest.raises(
        ValueError, match=r"DittoRegularizer: the parameter 'personal/v' has no counterpart at 'shared/v'"
    ):
        module.update(params, module.init(params), params)


def plain(params: Any, batch: Any) -> Any:
    return jnp.sum((params["w"] - batch) ** 2)


def by_example(params: Any, batch: Any) -> Any:
    errors = jnp.sum((params["w"] - batch[:, None]) ** 2, axis=1)
    return errors, {"error": errors}


def with_key(params: Any, batch: Any, key: jax.Array) -> Any:
    return plain(params, batch + jax.random.normal(key)), {"weight": params["w"][0]}


PARAMS = both(START, OWN)


def test_the_loss_of_ditto_has_the_gradient_of_either_model() -> None:
    gradients = jax.grad(ditto_loss(plain))(PARAMS, 3.0)
    for part in ("shared", "personal"):
        np.testing.assert_allclose(gradients[part]["w"], 2 * (PARAMS[part]["w"] - 3.0), rtol=1e-6)


def test_the_metrics_of_ditto_are_those_of_the_own_model() -> None:
    batch = jnp.array([1.0, 2.0])
    loss, metrics = ditto_loss(by_example)(PARAMS, batch)
    expected = [by_example(PARAMS[part], batch)[0] for part in ("shared", "personal")]
    np.testing.assert_allclose(loss, expected[0] + expected[1], rtol=1e-6)
    np.testing.assert_array_equal(metrics["error"], expected[1])


def test_a_loss_that_takes_a_key_still_does() -> None:
    # How many arguments a loss takes is read from its signature.
    assert inspect.signature(ditto_loss(with_key)) == inspect.signature(with_key)
    key = jax.random.key(0)
    loss, metrics = ditto_loss(with_key)(PARAMS, 1.0, key)
    np.testing.assert_allclose(
        loss, with_key(PARAMS["shared"], 1.0, key)[0] + with_key(PARAMS["personal"], 1.0, key)[0]
    )
    assert metrics["weight"] == OWN[0].astype(np.float32)


@pytest.mark.parametrize("params", [tree(START), jnp.ones(2), [jnp.ones(2)]])
def test_the_loss_of_ditto_refuses_other_parameters(params: Any) -> None:
    with pytest.raises(ValueError, match=r"ditto_loss: expected parameters \{'shared': params, 'personal': params\}"):
        ditto_loss(plain)(params, 1.0)


@pytest.mark.parametrize("facade", [False, True], ids=["pure", "facade"])
def test_fedrep_moves_the_head_first_and_then_the_body(facade: bool) -> None:
    """Collins et al. 2021, algorithm 1: each round tau steps of the head, `b` here, and then those of the body."""
    client = fo.Optimizer(LRATE, modules=[FedRepModule(head=("b*",), head_steps=2)])
    step, state, x = jax.jit(client.update), client.init(tree(START)), START.copy()
    params, peer = tree(START), client.bare()
    for steps in (5, 2, 3, 1):
        state = client.begin_round(state, params)
        peer.start_round()
        for number in range(steps):
            grads = tree(gradient(0, number, vector(params)))
            if facade:
                params = peer.apply_gradients(params, grads)
            else:
                updates, state = step(grads, state, params)
                params = jax.tree.map(jnp.add, params, updates)
            g = gradient(0, number, x)
            turn = np.arange(SIZE) == SIZE - 1
            x = x - LRATE * np.where(turn if number < 2 else ~turn, g, 0)
            assert_near(vector(params), x)


def test_a_federation_with_local_heads_is_fedrep() -> None:
    """Collins et al. 2021, algorithm 1: the head stays with its client, the mean of the bodies goes to the server."""
    head, taken = np.arange(SIZE) == SIZE - 1, 5
    client = fo.Optimizer(LRATE, modules=[FedRepModule(head=("b",), head_steps=2)])
    federation = Federation(quadratic, client, local=["b"])
    state, run = federation.init(tree(START), CLIENTS), jax.jit(federation.round)
    own = np.tile(START, (CLIENTS, 1))
    for who in ([0, 2], [1, 2], [3, 0], [2, 1]):
        state, _ = run(state, jax.tree.map(lambda leaf: leaf[jnp.array(who)], given(taken)), jnp.array(who))  # noqa: B023
        for each in who:
            for number in range(taken):
                own[each] -= LRATE * np.where(head == (number < 2), gradient(each, number, own[each]), 0)
        own = np.where(head, own, own[who].mean(0))
        for each in range(CLIENTS):
            assert_near(vector(federation.model(state, each)), own[each], f"client {each}")


def test_a_pattern_of_fedrep_that_matches_nothing_is_refused() -> None:
    module = FedRepModule(head=("haed/**",), head_steps=1)
    params = {"head": {"w": jnp.ones(2)}, "body": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"FedRepModule: head: the pattern 'haed/\*\*' matches no path"):
        module.update(params, module.init(params))


def test_without_a_head_fedrep_moves_everything() -> None:
    module = FedRepModule(head=(), head_steps=3)
    output, _ = module.update(tree(START), module.init(tree(START)))
    assert_near(vector(output), START)
