"""Mime and MimeLite against algorithm 1 of the paper in NumPy float64, by the pure methods and over JSON."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.mime import MimeClientModule, MimeLiteClientModule, MimeServerModule

from .quadratics import (
    ALIKE,
    LRATE,
    SCHEDULE,
    SIZE,
    START,
    WEIGHTS,
    After,
    Round,
    assert_near,
    full_gradient,
    gradient,
    mean_gradient,
    over_json,
    rounds,
    simulated,
    tree,
    vector,
)

BETA_1, BETA_2, EPS, INITIAL = 0.8, 0.9, 0.01, 0.5
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "momentum", "beta_1": 0.0},
    "momentum": {"base": "momentum", "beta_1": BETA_1},
    "rmsprop": {"base": "adam", "beta_1": 0.0, "beta_2": BETA_2, "eps": EPS, "initial": INITIAL},
    "adam": {"base": "adam", "beta_1": BETA_1, "beta_2": BETA_2, "eps": EPS, "initial": INITIAL},
}
CLIENTS = {"mime": MimeClientModule, "lite": MimeLiteClientModule}


def algorithm_1(
    variant: str, base: str, weights: np.ndarray, schedule: tuple[Round, ...] = SCHEDULE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Karimireddy et al. 2021, algorithm 1, with U and V of its table of base algorithms: x, m and v."""
    x, m, v = START.copy(), np.zeros(SIZE), np.full(SIZE, INITIAL)

    def step(g: np.ndarray) -> np.ndarray:
        return {
            "sgd": g,
            "momentum": (1 - BETA_1) * g + BETA_1 * m,
            "rmsprop": g / (EPS + np.sqrt(v)),
            "adam": ((1 - BETA_1) * g + BETA_1 * m) / (EPS + np.sqrt(v)),
        }[base]

    for steps, lost in schedule:
        heard = [who for who in steps if who not in lost]
        shares, c = weights[heard] / weights[heard].sum(), mean_gradient(steps, weights, x)
        ends = []
        for who in heard:
            y = x.copy()
            for number in range(steps[who]):
                g = gradient(who, number, y)
                if variant == "mime":
                    g = g - gradient(who, number, x) + c
                y = y - LRATE * step(g)
            ends.append(y)
        mean = shares @ [full_gradient(who, x) for who in heard]
        m = (1 - BETA_1) * mean + BETA_1 * m
        v = (1 - BETA_2) * mean**2 + BETA_2 * v
        x = shares @ ends
        yield x, m, v


def sides(variant: str, base: str) -> tuple[fo.Optimizer, fo.Optimizer]:
    client = fo.Optimizer(LRATE, modules=[CLIENTS[variant]()])
    return client, fo.Optimizer(1.0, modules=[MimeServerModule(**BASES[base])])


def assert_statistics(after: After, base: str, m: np.ndarray, v: np.ndarray) -> None:
    found = after.server.modules["mime-server"]
    if base in ("momentum", "adam"):
        assert_near(vector(found.first), m, "m")
    if base in ("rmsprop", "adam"):
        assert_near(vector(found.second), v, "v")
    else:
        assert found.second is None


@pytest.mark.parametrize("weights", [ALIKE, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", CLIENTS)
def test_rounds_are_those_of_the_paper(variant: str, base: str, weights: np.ndarray) -> None:
    found = rounds(*sides(variant, base), weights=weights)
    for after, (x, m, v) in zip(found, algorithm_1(variant, base, weights), strict=True):
        assert_near(after.x, x)
        assert_statistics(after, base, m, v)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("variant", CLIENTS)
def test_json_between_peers_gives_the_same(variant: str, base: str) -> None:
    found = over_json(*sides(variant, base), weights=WEIGHTS)
    for after, (x, _, _) in zip(found, algorithm_1(variant, base, WEIGHTS), strict=True):
        assert_near(after, x)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("variant", CLIENTS)
def test_a_federation_gives_the_same(variant: str, base: str) -> None:
    # Given batches are all of a client's data: each of its three comes up as often.
    schedule = tuple(Round({who: 3 * min(n, 2) for who, n in steps.items()}) for steps, _ in SCHEDULE)
    found = simulated(*sides(variant, base), schedule=schedule, weights=WEIGHTS)
    for after, (x, _, _) in zip(found, algorithm_1(variant, base, WEIGHTS, schedule), strict=True):
        assert_near(after, x)


def test_only_mime_asks_for_gradients_at_the_servers_parameters() -> None:
    assert MimeClientModule().asks().step == {"anchor_gradient", "mean_gradient"}
    assert MimeLiteClientModule().asks().step == set()
    assert MimeLiteClientModule().asks().end == MimeClientModule().asks().end == {"full_gradient", "weight"}


def test_the_statistics_of_a_round_stay_as_they_are() -> None:
    module, params = MimeLiteClientModule(), tree(START)
    told = module.process(
        MimeServerModule(base="adam").collect(MimeServerModule(base="adam").init(params)), module.init(params)
    )
    _, state = module.update(params, told)
    for before, after in zip(jax.tree.leaves(told), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(before, after)


def test_complex_parameters_have_real_second_moments() -> None:
    params = {"z": jnp.array([1 + 2j, -1j])}
    server, client = MimeServerModule(base="adam", beta_1=0.0, beta_2=0.0, eps=1.0), MimeLiteClientModule()
    ended = client.end_round(client.init(params), full_gradient=params, weight=jnp.float32(2.0))
    state = server.process(client.collect(ended), server.init(params))
    np.testing.assert_allclose(state.second["z"], [5.0, 1.0], rtol=1e-6)
    output, _ = client.update(params, client.process(server.collect(state), ended))
    np.testing.assert_allclose(output["z"], np.array([1 + 2j, -1j]) / (np.sqrt([5.0, 1.0]) + 1), rtol=1e-6)
