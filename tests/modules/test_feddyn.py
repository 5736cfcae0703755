"""FedDyn against algorithm 1 of the paper in NumPy float64, by the pure methods and over JSON."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.feddyn import FedDynClientModule, FedDynServerModule

from .quadratics import (
    CLIENTS,
    HESSIANS,
    LRATE,
    SCHEDULE,
    SIZE,
    START,
    TARGETS,
    Round,
    assert_near,
    full_gradient,
    gradient,
    over_json,
    rounds,
    simulated,
    tree,
    vector,
)

ALPHA = 0.3


def algorithm_1(schedule: tuple[Round, ...]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Acar et al. 2021, algorithm 1, with gradient descent for the exact minimization: x, h, and the gradients L_i."""
    x, h, local = START.copy(), np.zeros(SIZE), np.zeros((CLIENTS, SIZE))
    for steps, lost in schedule:
        heard, ends = [who for who in steps if who not in lost], []
        for who in heard:
            y = x.copy()
            for number in range(steps[who]):
                y = y - LRATE * (gradient(who, number, y) - local[who] + ALPHA * (y - x))
            ends.append(y)
        for who, y in zip(heard, ends, strict=True):
            local[who] -= ALPHA * (y - x)
        h = h - ALPHA / CLIENTS * np.sum([y - x for y in ends], axis=0)
        x = np.mean(ends, axis=0) - h / ALPHA
        yield x, h, local.copy()


def sides() -> tuple[fo.Optimizer, fo.Optimizer]:
    client = fo.Optimizer(LRATE, modules=[FedDynClientModule(alpha=ALPHA)])
    return client, fo.Optimizer(1.0, modules=[FedDynServerModule(num_clients=CLIENTS)])


def test_rounds_are_those_of_the_paper() -> None:
    for found, (x, h, local) in zip(rounds(*sides()), algorithm_1(SCHEDULE), strict=True):
        assert_near(found.x, x)
        assert_near(ALPHA * vector(found.server.modules["feddyn-server"].excess), h, "h")
        own = [vector(found.clients[who].modules["feddyn-client"].local) for who in range(CLIENTS)]
        assert_near(np.array(own), local, "L_i")
        assert_near(np.mean(own, axis=0), h, "h is the mean of the L_i")


@pytest.mark.parametrize("run", [over_json, simulated])
def test_json_between_peers_and_a_federation_give_the_same(run: Any) -> None:
    for found, (x, _, _) in zip(run(*sides()), algorithm_1(SCHEDULE), strict=True):
        assert_near(found, x)


@pytest.mark.slow
def test_rounds_end_at_the_optimum_of_the_mean_loss() -> None:
    schedule = (Round(dict.fromkeys(range(CLIENTS), 6)),) * 60
    optimum = np.linalg.solve(HESSIANS.mean((0, 1)), TARGETS.mean((0, 1)))

    def end(*both: fo.Optimizer) -> np.ndarray:
        # Of all data: else a client's own batches would move it from where all agree.
        over = lambda who, number, y: full_gradient(who, y)  # noqa: E731
        return list(rounds(*both, schedule=schedule, gradient=over))[-1].x

    np.testing.assert_allclose(end(*sides()), optimum, rtol=0, atol=1e-4)
    assert np.abs(end(fo.Optimizer(LRATE), fo.Optimizer(1.0)) - optimum).max() > 0.01


def test_a_client_needs_the_parameters() -> None:
    module = FedDynClientModule()
    with pytest.raises(ValueError, match=r"FedDynClientModule needs the parameters: pass `params`"):
        module.update(tree(START), module.init(tree(START)))


def test_a_round_that_was_lost_leaves_nothing() -> None:
    module = FedDynClientModule(alpha=ALPHA)
    fresh = module.init(tree(START))
    ended = module.end_round(module.begin_round(fresh, tree(START)), delta=tree(START))
    assert vector(ended.pending).any()
    again = module.commit(module.begin_round(ended, tree(START)))
    assert not vector(again.local).any()
