"""Scaffnew against algorithm 2 of the paper in NumPy float64, by the pure methods and over JSON."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.modules.scaffnew import ScaffnewModule

from .quadratics import (
    CLIENTS,
    HESSIANS,
    LRATE,
    SIZE,
    START,
    TARGETS,
    Round,
    assert_near,
    full_gradient,
    gradient,
    over_json,
    quadratic,
    rounds,
    simulated,
    tree,
    vector,
)

P = 0.4
COINS = np.random.default_rng(3).uniform(size=60) < P


def scheduled(coins: np.ndarray) -> tuple[Round, ...]:
    """Return the rounds that lie between the communications."""
    ends = np.flatnonzero(coins)
    return tuple(Round(dict.fromkeys(range(CLIENTS), int(n))) for n in np.diff(ends, prepend=-1))


def algorithm_2(coins: np.ndarray, over: Any = gradient) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mishchenko et al. 2022, algorithm 2, a step at a time: x and the h_i after each communication."""
    x, h = np.tile(START, (CLIENTS, 1)), np.zeros((CLIENTS, SIZE))
    number = 0
    for communicates in coins:
        z = np.array([x[i] - LRATE * (over(i, number, x[i]) - h[i]) for i in range(CLIENTS)])
        number += 1
        x = z
        if communicates:
            x = np.tile(np.mean(z - LRATE / P * h, axis=0), (CLIENTS, 1))
            number = 0
        h = h + P / LRATE * (x - z)
        if communicates:
            yield x[0], h.copy()


def sides() -> tuple[fo.Optimizer, fo.Optimizer]:
    return fo.Optimizer(LRATE, modules=[ScaffnewModule(probability=P)]), fo.Optimizer(1.0)


def variates(clients: Any, x: np.ndarray) -> np.ndarray:
    """Return the h_i once the clients are told what the last round came to."""
    client, _ = sides()
    told = [client.begin_round(clients[who], tree(x)) for who in range(CLIENTS)]
    return np.array([vector(state.modules["scaffnew"].local) for state in told])


def test_rounds_are_those_of_the_paper() -> None:
    schedule = scheduled(COINS)
    assert len({round_.steps[0] for round_ in schedule}) > 3
    for found, (x, h) in zip(rounds(*sides(), schedule=schedule), algorithm_2(COINS), strict=True):
        assert_near(found.x, x)
        own = variates(found.clients, found.x)
        assert_near(own, h, "h_i")
        assert_near(own.sum(0), np.zeros(SIZE), "the h_i sum to zero")


@pytest.mark.slow
@pytest.mark.parametrize("run", [over_json, simulated])
def test_json_between_peers_and_a_federation_give_the_same(run: Any) -> None:
    for found, (x, _) in zip(run(*sides(), schedule=scheduled(COINS)), algorithm_2(COINS), strict=True):
        assert_near(found, x)


@pytest.mark.slow
def test_rounds_end_at_the_optimum_of_the_mean_loss() -> None:
    over = lambda who, number, y: full_gradient(who, y)  # noqa: E731
    schedule = scheduled(np.random.default_rng(5).uniform(size=400) < P)
    x = list(rounds(*sides(), schedule=schedule, gradient=over))[-1].x
    np.testing.assert_allclose(x, np.linalg.solve(HESSIANS.mean((0, 1)), TARGETS.mean((0, 1))), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_federation_tosses_the_coin() -> None:
    """Client by client over all data, with as many steps a round as the coin says: the optimum, and not near it."""
    examples = {"hessian": jnp.asarray(HESSIANS, jnp.float32), "target": jnp.asarray(TARGETS, jnp.float32)}
    data = FederatedData.from_clients([jax.tree.map(lambda leaf: leaf[who], examples) for who in range(CLIENTS)])  # noqa: B023
    optimum = np.linalg.solve(HESSIANS.mean((0, 1)), TARGETS.mean((0, 1)))

    def end(client: fo.Optimizer) -> np.ndarray:
        federation = Federation(quadratic, client, coin=P)
        state = federation.init(tree(START), data)
        return vector(jax.jit(federation.run, static_argnums=2)(state, data, 150)[0].params)

    np.testing.assert_allclose(end(sides()[0]), optimum, rtol=0, atol=1e-5)
    assert np.abs(end(fo.Optimizer(LRATE)) - optimum).max() > 1e-3


def test_a_client_whose_message_is_lost_keeps_its_variate() -> None:
    steps = dict.fromkeys(range(CLIENTS), 3)
    schedule = tuple(Round(steps, lost) for lost in ((), (1, 2), (), (0,), (), ()))
    x, h = START.copy(), np.zeros((CLIENTS, SIZE))
    for (_, lost), found in zip(schedule, over_json(*sides(), schedule=schedule), strict=True):
        heard, z = [who for who in steps if who not in lost], np.tile(x, (CLIENTS, 1))
        for number in range(3):
            z = np.array([z[i] - LRATE * (gradient(i, number, z[i]) - h[i]) for i in range(CLIENTS)])
        x = z[heard].mean(0)
        h[heard] += P / LRATE * (x - z[heard])
        assert_near(found, x)
        assert_near(h.sum(0), np.zeros(SIZE))


def test_the_variate_moves_when_the_next_round_begins_if_the_last_arrived() -> None:
    module = ScaffnewModule(probability=P)
    state = module.begin_round(module.init(tree(START)), tree(START))
    _, state = module.update(tree(START), state, tree(START), lrate=np.float32(LRATE))
    ended = module.end_round(state, delta=tree(START))
    lost, arrived = (module.begin_round(each, tree(-START)) for each in (ended, module.commit(ended)))
    assert not vector(lost.local).any()
    assert_near(vector(arrived.local), P / LRATE * (-START - 2 * START))
    assert_near(vector(lost.reached), -START)


def test_a_round_without_a_step_moves_nothing() -> None:
    module = ScaffnewModule(probability=P)
    state = module.begin_round(module.init(tree(START)), tree(START))
    ended = module.commit(module.end_round(state, delta=tree(np.zeros(SIZE))))
    assert not vector(module.begin_round(ended, tree(-START)).local).any()


def test_it_needs_the_parameters() -> None:
    module = ScaffnewModule()
    with pytest.raises(ValueError, match=r"ScaffnewModule needs the parameters: pass `params`"):
        module.update(tree(START), module.init(tree(START)), lrate=np.float32(LRATE))
