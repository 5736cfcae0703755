"""Evaluation of each client's model: its own part of it, and after local steps of which nothing remains."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from .test_known import asking

LRATE, START = 0.25, np.array([1.0, -2.0])
SIZES = (6, 4, 2)


@functools.cache
def clients(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 2)).astype(np.float32) + i for i, n in enumerate(sizes)]


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(clients())


@functools.cache
def held_out() -> FederatedData:
    return FederatedData.from_clients(clients(1))


def squares(params: Any, batch: Any) -> Any:
    error = params["w"] + params["own"] - batch
    return 0.5 * jnp.sum(error**2, axis=-1), {"first": batch[:, 0]}


def start() -> Any:
    return {"w": jnp.asarray(START, jnp.float32), "own": jnp.zeros(2)}


def loss_of(w: np.ndarray, examples: np.ndarray) -> float:
    return float(np.mean(0.5 * np.sum((w - examples.astype(float)) ** 2, axis=-1)))


@functools.cache
def trained(mapping: Any = None) -> Any:
    federation = Federation(squares, fo.Optimizer(LRATE), local=["own"], mapping=mapping)
    state, _ = federation.run(federation.init(start(), data()), data(), 2)
    return federation, state


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "batch_size"), [("scan", None), ("vmap", 4), (2, 4)])
def test_each_client_is_evaluated_with_its_own_part(mapping: Any, batch_size: Any) -> None:
    federation, state = trained(mapping)
    found = federation.evaluate(state, held_out(), batch_size=batch_size)
    models = [federation.model(state, client) for client in range(3)]
    both = [np.asarray(m["w"], float) + np.asarray(m["own"], float) for m in models]
    np.testing.assert_allclose(found["loss"], [loss_of(w, x) for w, x in zip(both, clients(1), strict=True)], rtol=1e-5)
    np.testing.assert_allclose(found["first"], [x[:, 0].mean() for x in clients(1)], rtol=1e-5)
    # Parameters alone are the same for all: the part of their own is what they started from.
    found = federation.evaluate(state.params, held_out())
    w = np.asarray(state.params["w"], float)
    np.testing.assert_allclose(found["loss"], [loss_of(w, x) for x in clients(1)], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "steps"), [("scan", 1), ("vmap", 3), (2, 3)])
def test_local_steps_are_taken_first_on_the_data_to_train_on(mapping: Any, steps: int) -> None:
    federation, state = trained(mapping)
    found = federation.evaluate(state, held_out(), steps=steps, train=data())
    same = federation.evaluate(state, data(), steps=steps)
    expected, fitted = [], []
    for client in range(3):
        model = federation.model(state, client)
        w, own = (np.asarray(model[name], float) for name in ("w", "own"))
        for _ in range(steps):
            slope = w + own - clients()[client].astype(float).mean(axis=0)
            w, own = w - LRATE * slope, own - LRATE * slope
        expected.append(loss_of(w + own, clients(1)[client]))
        fitted.append(loss_of(w + own, clients()[client]))
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(same["loss"], fitted, rtol=1e-4, atol=1e-6)


def test_nothing_remains_of_an_evaluation() -> None:
    federation, state = trained()
    before = jax.tree.map(np.array, (state.params, state.bank, state.server))
    federation.evaluate(state, data(), steps=3)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.bank, state.server), before)


@pytest.mark.slow
def test_the_steps_are_those_of_the_next_round() -> None:
    """By the same order of examples, with what a client's optimizer keeps and what its server sends."""
    client = fo.Optimizer(LRATE, modules=["scaffold-client", "momentum"])
    server = fo.Optimizer(0.5, modules=["scaffold-server"])
    federation = Federation(squares, client, server, batch_size=2, steps=2)
    state, _ = federation.run(federation.init(start(), data()), data(), 3, participants=2)
    for who in range(3):
        # A server's step of rate 1/2 on the delta of one participant goes half of its way.
        new, _ = federation.round(state, data(), np.array([who]))
        end = jax.tree.map(lambda a, b: 2 * a - b, new.params, state.params)
        found = federation.evaluate(state, held_out(), steps=2, train=data())["loss"][who]
        np.testing.assert_allclose(found, federation.evaluate(end, held_out())["loss"][who], rtol=1e-4)


def test_evaluation_is_by_the_evaluations_loss_and_the_steps_by_the_other() -> None:
    def judged(params: Any, batch: Any) -> Any:
        return jnp.abs(params["w"][0] - batch[:, 0]), {"mine": jnp.ones(len(batch))}

    federation = Federation(squares, fo.Optimizer(LRATE), eval_fn=judged)
    state = federation.init(start(), data())
    for given in (state, state.params):
        found = federation.evaluate(given, held_out())
        np.testing.assert_allclose(found["loss"], [np.abs(1 - x[:, 0]).mean() for x in clients(1)], rtol=1e-5)
        assert found.keys() == {"loss", "mine"}
    first = [1 - LRATE * (1 - x[:, 0].mean()) for x in clients()]
    found = federation.evaluate(state, held_out(), steps=1, train=data())["loss"]
    expected = [np.abs(w - x[:, 0]).mean() for w, x in zip(first, clients(1), strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"steps": 4}, {"coin": 0.01}, {"epochs": 3}])
def test_as_many_steps_as_are_asked_for_whatever_a_round_has(options: Any) -> None:
    base = Federation(squares, fo.Optimizer(LRATE))
    other = Federation(squares, fo.Optimizer(LRATE), **options)
    found = [each.evaluate(each.init(start(), data()), data(), steps=2)["loss"] for each in (base, other)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_data_that_is_only_evaluated_may_have_less_than_a_batch_where_rounds_drop_partial_ones() -> None:
    few = FederatedData.from_clients([each[:1] for each in clients(1)])
    federation = Federation(squares, fo.Optimizer(LRATE), batch_size=2, remainder="drop")
    state = federation.init(start(), data())
    expected = federation.evaluate(state.params, few)["loss"]
    np.testing.assert_allclose(federation.evaluate(state, few)["loss"], expected, rtol=1e-6)
    after = federation.evaluate(state, few, steps=1, train=data())["loss"]
    assert not np.allclose(after, expected)


@pytest.mark.slow
def test_a_shared_state_is_evaluated_as_its_parameters_are() -> None:
    for module in ("fedacg", "momentum"):
        federation = Federation(squares, fo.Optimizer(LRATE), fo.Optimizer(1.0, modules=[module]))
        state, _ = federation.run(federation.init(start(), data()), data(), 3)
        found = federation.evaluate(state, data())["loss"]
        np.testing.assert_allclose(found, federation.evaluate(state.params, data())["loss"], rtol=1e-6, err_msg=module)


def test_steps_that_need_no_mean_gradient_are_taken_where_the_server_alone_asks_for_it() -> None:
    server = fo.Optimizer(1.0, modules=[asking("mean_gradient")])
    federation, plain = Federation(squares, fo.Optimizer(LRATE), server), Federation(squares, fo.Optimizer(LRATE))
    found = [each.evaluate(each.init(start(), data()), data(), steps=2)["loss"] for each in (federation, plain)]
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1 should be an integer of at least 0"),
        ({"steps": 1.5}, "steps=1.5 should be an integer of at least 0"),
        ({"steps": True}, "steps=True should be an integer of at least 0"),
        ({"steps": 1, "train": FederatedData.from_clients(clients(0, (2, 2)))}, "data of 2 clients, not laid out as"),
    ],
)
def test_wrong_steps_of_a_state(options: Any, message: str) -> None:
    federation, state = trained()
    with pytest.raises(ValueError, match=message):
        federation.evaluate(state, data(), **options)


@pytest.mark.parametrize("options", [{"steps": 1}, {"train": held_out()}])
def test_parameters_take_no_steps(options: Any) -> None:
    federation, state = trained()
    with pytest.raises(ValueError, match="to evaluate after local steps, pass the federation's state, not parameters"):
        federation.evaluate(state.params, data(), **options)


def test_one_client_alone_has_no_mean_gradient() -> None:
    client = fo.Optimizer(LRATE, modules=[asking("mean_gradient")])
    federation = Federation(squares, client)
    state = federation.init(start(), data())
    assert federation.evaluate(state, data())["loss"].shape == (3,)
    with pytest.raises(ValueError, match="asks for the participants' mean gradient, and one client alone has none"):
        federation.evaluate(state, data(), steps=1)


def test_a_state_of_another_federation_is_not_evaluated() -> None:
    _, state = trained()
    other = Federation(squares, fo.Optimizer(LRATE))
    with pytest.raises(ValueError, match=r"of another federation: local was \('own',\), and is \(\) here"):
        other.evaluate(state, data())
