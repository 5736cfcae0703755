"""FedNova against the paper in NumPy float64: the weights of gradients in a move, and rounds with any local solver."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.modules.fednova import FedNovaClientModule, FedNovaServerModule, total_weight

from .quadratics import (
    ALIKE,
    CLIENTS,
    LRATE,
    SCHEDULE,
    SIZE,
    START,
    WEIGHTS,
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

RHO, MU = 0.8, 2.0
SOLVERS = {"sgd": (0.0, 0.0), "momentum": (RHO, 0.0), "proximal": (0.0, MU)}


def local_work(who: int, steps: int, x: np.ndarray, rho: float, mu: float) -> tuple[np.ndarray, float]:
    """Return a client's move, and |a|_1 by what the gradient of each step adds to it in the end."""
    y, velocity, weights, moved = x.copy(), np.zeros(SIZE), np.zeros(steps), np.zeros(steps)
    for number in range(steps):
        velocity = rho * velocity + gradient(who, number, y) + mu * (y - x)
        y = y - LRATE * velocity
        # The same linear recursion on the weights: y - x is -LRATE times the gradients by `moved`.
        weights = rho * weights - LRATE * mu * moved + np.eye(steps)[number]
        moved = moved + weights
    return y - x, float(moved.sum())


def algorithm(rho: float, mu: float, weights: np.ndarray, schedule: Any = SCHEDULE) -> Iterator[Any]:
    """Wang et al. 2020, section 4: x += tau sum p_i D_i / |a_i|_1, tau = sum p_i |a_i|_1."""
    x = START.copy()
    for steps, lost in schedule:
        heard = [who for who in steps if who not in lost]
        shares = weights[heard] / weights[heard].sum()
        work = [local_work(who, steps[who], x, rho, mu) for who in heard]
        tau = sum(p * norm for p, (_, norm) in zip(shares, work, strict=True))
        x = x + tau * sum(p * move / norm for p, (move, norm) in zip(shares, work, strict=True) if norm)
        yield x, tau


def sides(rho: float, mu: float) -> tuple[fo.Optimizer, fo.Optimizer, FedNovaClientModule]:
    proximal = [("fedprox", {"alpha": mu})] if mu else []
    momentum = [("momentum", {"beta": rho, "round_reset": True})] if rho else []
    client = fo.Optimizer(LRATE, regularizers=proximal, modules=momentum)
    return client, fo.Optimizer(1.0, modules=[FedNovaServerModule()]), FedNovaClientModule(rho, LRATE * mu)


@pytest.mark.parametrize("weights", [ALIKE, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rounds_are_those_of_the_paper(solver: str, weights: np.ndarray) -> None:
    expected = algorithm(*SOLVERS[solver], weights)
    for found, (x, tau) in zip(rounds(*sides(*SOLVERS[solver]), weights=weights), expected, strict=True):
        assert_near(found.x, x)
        np.testing.assert_allclose(found.server.modules["fednova-server"].scale, tau, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("run", [over_json, simulated])
def test_json_between_peers_and_a_federation_give_the_same(solver: str, run: Any) -> None:
    expected = algorithm(*SOLVERS[solver], WEIGHTS)
    for found, (x, _) in zip(run(*sides(*SOLVERS[solver]), weights=WEIGHTS), expected, strict=True):
        assert_near(found, x)


def test_without_a_step_there_is_a_move_of_zero() -> None:
    schedule = (Round({0: 0, 1: 3}), Round({2: 0}), Round({0: 2, 3: 1}))
    found = [after.x for after in rounds(*sides(0.0, 0.0), schedule=schedule)]
    expected = [x for x, _ in algorithm(0.0, 0.0, ALIKE, schedule)]
    assert_near(np.array(found), np.array(expected))
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.slow
def test_unequal_steps_do_not_move_the_fixed_point() -> None:
    """FedNova stays where the weighted mean of the gradients is 0, up to the drift that a small rate leaves."""
    schedule = (Round({0: 1, 1: 8, 2: 2, 3: 4}),) * 60
    shares = WEIGHTS / WEIGHTS.sum()
    hessian = np.array(
        [full_gradient(who, unit) - full_gradient(who, 0 * unit) for who in range(CLIENTS) for unit in np.eye(SIZE)]
    )
    hessian = np.tensordot(shares, hessian.reshape(CLIENTS, SIZE, SIZE), 1)
    optimum = np.linalg.solve(hessian, -sum(p * full_gradient(who, np.zeros(SIZE)) for who, p in enumerate(shares)))
    rate = 0.05

    def distance(server: fo.Optimizer, uplink: FedNovaClientModule | None) -> float:
        over = lambda who, number, y: full_gradient(who, y)  # noqa: E731
        path = rounds(fo.Optimizer(rate), server, uplink, schedule, WEIGHTS, over)
        return float(np.abs(list(path)[-1].x - optimum).max())

    nova = distance(fo.Optimizer(1.0, modules=[FedNovaServerModule()]), FedNovaClientModule())
    assert nova < 0.2 * distance(fo.Optimizer(1.0), None)


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
@pytest.mark.parametrize(("rho", "mu"), [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.0, 0.01), (0.0, 5.0), (0.0, 10.0)])
def test_the_weight_of_a_move_is_the_sum_over_its_gradients(steps: int, rho: float, mu: float) -> None:
    _, expected = local_work(0, steps, START, rho, mu)
    np.testing.assert_allclose(total_weight(steps, rho, LRATE * mu), expected, rtol=1e-5)


def test_the_uplink_is_finite_without_a_step() -> None:
    for module in (FedNovaClientModule(), FedNovaClientModule(momentum=0.9), FedNovaClientModule(proximal=1.0)):
        zero = tree(np.zeros(SIZE))
        known = {"num_steps": jnp.int32(0), "weight": jnp.float32(3.0)}
        output, state = module.update(zero, module.init(zero), **known)
        assert not vector(output).any()
        assert (float(state.weight), float(state.effective)) == (3.0, 0.0)


def test_momentum_and_proximal_together_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"FedNovaClientModule: momentum=0.9 and proximal=0.1: .* leave the other at 0"
    ):
        FedNovaClientModule(momentum=0.9, proximal=0.1)
