"""FedCM against algorithm 2 of the paper in NumPy float64, by the pure methods and over JSON."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.fedcm import FedCMClientModule, FedCMServerModule

from .quadratics import (
    ALIKE,
    LRATE,
    SCHEDULE,
    SIZE,
    START,
    WEIGHTS,
    Round,
    assert_near,
    gradient,
    over_json,
    rounds,
    simulated,
    tree,
    vector,
)

ALPHA = 0.3
# The paper's clients all take as many steps.
EQUAL = tuple(Round(dict.fromkeys(steps, 3), lost) for steps, lost in SCHEDULE)


def algorithm_2(schedule: tuple[Round, ...], weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Xu et al. 2021, algorithm 2; x becomes the mean, and K the mean of the numbers of steps where they differ."""
    x, direction = START.copy(), np.zeros(SIZE)
    for steps, lost in schedule:
        heard = [who for who in steps if who not in lost]
        shares = weights[heard] / weights[heard].sum()
        moves = []
        for who in heard:
            y = x.copy()
            for number in range(steps[who]):
                y = y - LRATE * (ALPHA * gradient(who, number, y) + (1 - ALPHA) * direction)
            moves.append(x - y)
        mean, count = shares @ moves, float(shares @ [steps[who] for who in heard])
        direction = mean / (LRATE * count)
        x = x - mean
        yield x, direction


def sides(server_lrate: float = 1.0) -> tuple[fo.Optimizer, fo.Optimizer]:
    client = fo.Optimizer(LRATE, modules=[FedCMClientModule(alpha=ALPHA)])
    return client, fo.Optimizer(server_lrate, modules=[FedCMServerModule()])


CASES = pytest.mark.parametrize(
    ("schedule", "weights"), [(EQUAL, ALIKE), (SCHEDULE, WEIGHTS)], ids=["paper", "unequal"]
)


@CASES
def test_rounds_are_those_of_the_paper(schedule: tuple[Round, ...], weights: np.ndarray) -> None:
    found = rounds(*sides(), schedule=schedule, weights=weights)
    for after, (x, direction) in zip(found, algorithm_2(schedule, weights), strict=True):
        assert_near(after.x, x)
        assert_near(vector(after.server.modules["fedcm-server"].direction), direction, "direction")


@pytest.mark.slow
@pytest.mark.parametrize("run", [over_json, simulated])
@CASES
def test_json_between_peers_and_a_federation_give_the_same(
    schedule: tuple[Round, ...], weights: np.ndarray, run: Any
) -> None:
    found = run(*sides(), schedule=schedule, weights=weights)
    for after, (x, _) in zip(found, algorithm_2(schedule, weights), strict=True):
        assert_near(after, x)


def test_the_direction_is_the_mean_move_whatever_the_servers_rate() -> None:
    (first,) = rounds(*sides(), schedule=EQUAL[:1])
    (half,) = rounds(*sides(0.5), schedule=EQUAL[:1])
    assert_near(half.x - START, (first.x - START) / 2)
    assert_near(*(vector(each.server.modules["fedcm-server"].direction) for each in (first, half)))


def test_rates_that_change_in_a_round_are_added_up() -> None:
    module = FedCMClientModule()
    state = module.begin_round(module.init(tree(START)))
    for lrate in (0.25, 0.5, 1.0):
        _, state = module.update(tree(START), state, lrate=jnp.float32(lrate))
    report = module.collect(module.end_round(state, weight=jnp.float32(2.0)))
    assert (float(report.weight), float(report.span)) == (2.0, 3.5)
    fresh = module.begin_round(state)
    assert (float(fresh.span), float(fresh.weight)) == (0.0, 0.0)


def test_a_round_in_which_nobody_stepped_keeps_the_direction() -> None:
    module = FedCMServerModule()
    state = module.init(tree(START))._replace(direction=tree(START))
    _, state = module.update(tree(np.zeros(SIZE)), state)
    assert_near(vector(state.direction), START)
