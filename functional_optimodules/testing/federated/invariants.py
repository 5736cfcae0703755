"""What is true of an algorithm whatever its numbers: closed forms, invariants of its state, fixed points.

| invariant | algorithms | what is measured |
| --- | --- | --- |
| `descent` | whose one local step is gradient descent | x_r - x* - (I - eta A)^r (x_0 - x*), A the mean curvature |
| `mean-variate` | SCAFFOLD, both options | c - sum c_i / N, with sampled clients and lost messages |
| `mean-dual` | FedDyn | h - sum L_i / N, likewise |
| `zero-sum` | Scaffnew | sum h_i |
| `optimum` | SCAFFOLD, FedDyn, Scaffnew | x - x* in the end, with unequal steps; but for Scaffnew, with samples too |
| `consistency` | FedNova | how much a round moves away from x*, with unequal steps and a small rate |

Each is relative to what it would be were it not so: see the functions.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapter import Adapter
from .check import hyper_of, named, trajectory
from .oracles import ORACLES
from .problem import Array, quadratics
from .scenario import SCENARIOS, RoundPlan, Scenario

Measure = Callable[[Adapter, str], float]


@dataclass(frozen=True)
class Invariant:
    """One of these properties.

    Attributes:
      name: how `check_invariants` calls it.
      algorithms: of which it is true.
      measure: how far an implementation is from it.
      tolerance: the largest measure that passes.
    """

    name: str
    algorithms: tuple[str, ...]
    measure: Measure
    tolerance: float


@dataclass(frozen=True)
class InvariantFinding:
    """What came of one invariant.

    Attributes:
      algorithm: its name.
      invariant: its name.
      residual: how far the implementation is from it, 0 where it holds.
      tolerance: the largest residual that passes.
      skipped: why it was not measured, empty if it was.
    """

    algorithm: str
    invariant: str
    residual: float
    tolerance: float
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was measured, and holds."""
        return self.residual <= self.tolerance

    def __str__(self) -> str:
        where = f"{self.algorithm}, {self.invariant}"
        if self.skipped:
            return f"{where}: skipped: {self.skipped}"
        return f"{where}: {'holds' if self.ok else 'does not hold'}, {self.residual:.1e} (at most {self.tolerance:.0e})"


def check_invariants(adapter: Adapter, algorithm: str) -> list[InvariantFinding]:
    """Measure all that should be true of an algorithm; an empty list where nothing is known.

    Those of the state need the adapter's `variates`, and are skipped without.

    Raises:
      KeyError: no such algorithm.
    """
    named(ORACLES, algorithm, "algorithm")
    findings = []
    for invariant in INVARIANTS:
        if algorithm in invariant.algorithms:
            residual, skipped = float("nan"), ""
            try:
                residual = invariant.measure(adapter, algorithm)
            except NotImplementedError as why:
                skipped = str(why) or "not implemented"
            findings.append(InvariantFinding(algorithm, invariant.name, residual, invariant.tolerance, skipped))
    return findings


def descent(adapter: Adapter, algorithm: str) -> float:
    """Return how far rounds of one step are from gradient descent on the mean objective, relative to the movement."""
    scenario = dataclasses.replace(SCENARIOS["one-step"], weights=_weights(algorithm))
    problem, rate = scenario.problem(), hyper_of(ORACLES[algorithm], scenario)["lrate"]
    optimum, mean = problem.optimum(), np.average(problem.curvatures, axis=0, weights=problem.weights)
    path = trajectory(adapter, algorithm, scenario)
    closed = [
        optimum + np.linalg.matrix_power(np.eye(3) - rate * mean, r) @ (problem.start - optimum)
        for r in range(1, 1 + len(path))
    ]
    apart = np.max(np.abs(np.array(path) - np.array(closed)), axis=1)
    return float(np.max(apart / np.max(np.abs(np.array(closed) - problem.start), axis=1)))


def mean_variate(adapter: Adapter, algorithm: str) -> float:
    """Return how far c is from the mean of the c_i, relative to the largest c_i."""
    return _of_variates(adapter, algorithm, lambda v: (v["c"] - np.mean(v["c_i"], axis=0), v["c_i"]))


def mean_dual(adapter: Adapter, algorithm: str) -> float:
    """Return how far h is from the mean of the h_i, relative to the largest h_i."""
    return _of_variates(adapter, algorithm, lambda v: (v["h"] - np.mean(v["h_i"], axis=0), v["h_i"]))


def zero_sum(adapter: Adapter, algorithm: str) -> float:
    """Return the sum of the h_i, relative to the largest h_i."""
    return _of_variates(adapter, algorithm, lambda v: (np.sum(v["h_i"], axis=0), v["h_i"]))


def optimum(adapter: Adapter, algorithm: str) -> float:
    """Return how far the parameters are from the optimum after many rounds, relative to how far they were."""
    names = ("coins",) if algorithm == "scaffnew" else ("partial", "unequal-steps")
    residuals = []
    for name in names:
        plans = SCENARIOS[name].plans
        scenario = dataclasses.replace(SCENARIOS[name], plans=plans * (1 + ROUNDS // len(plans)))
        problem = scenario.problem()
        away = trajectory(adapter, algorithm, scenario)[-1] - problem.optimum()
        residuals.append(np.linalg.norm(away) / np.linalg.norm(problem.start - problem.optimum()))
    return float(max(residuals))


def consistency(adapter: Adapter, algorithm: str) -> float:
    """Return how much one round moves parameters that are optimal, relative to how much one client alone moves them.

    What remains with a right normalisation is due to the curvature, and vanishes with the rate.
    """
    weights = (5, 1, 3, 2, 4)
    problem = quadratics(weights, start=quadratics(weights).optimum())
    hyper = {**ORACLES[algorithm].hyper(), "lrate": SMALL_RATE}
    plan = RoundPlan((0, 1, 2, 3, 4), (1, 2, 9, 3, 6))

    def moved(plan: RoundPlan) -> Array:
        state = adapter.round(adapter.make(algorithm, problem, hyper), plan)
        return np.array(adapter.params(state), np.float64) - problem.start

    alone = max(np.linalg.norm(moved(dataclasses.replace(plan, participants=(i,)))) for i in plan.participants)
    return float(np.linalg.norm(moved(plan)) / alone)


def _weights(algorithm: str) -> tuple[int, ...]:
    return (5, 1, 3, 2, 4) if "unequal-weights" in ORACLES[algorithm].scenarios else (1, 1, 1, 1, 1)


def _of_variates(
    adapter: Adapter, algorithm: str, residual: Callable[[Mapping[str, Array]], tuple[Array, Array]]
) -> float:
    if not hasattr(adapter, "variates"):
        raise NotImplementedError("the adapter has no `variates`")
    names = [name for name in ("coins", "partial", "drop-outs", "mixed") if name in ORACLES[algorithm].scenarios]
    worst = 0.0
    for scenario in (SCENARIOS[name] for name in names):
        for variates in _variates(adapter, algorithm, scenario):
            away, scale = residual(variates)
            worst = max(worst, float(np.max(np.abs(away)) / max(float(np.max(np.abs(scale))), 1e-12)))
    return worst


def _variates(adapter: Any, algorithm: str, scenario: Scenario) -> list[dict[str, Array]]:
    problem = scenario.problem()
    state = adapter.make(algorithm, problem, hyper_of(ORACLES[algorithm], scenario))
    shown = []
    for plan in scenario.plans:
        state = adapter.round(state, plan)
        shown.append({name: np.array(value, np.float64) for name, value in adapter.variates(state).items()})
    return shown


ROUNDS = 120
SMALL_RATE = 0.01
_DESCENT = "fedavg", "fedprox", "fednova", "scaffold", "scaffold-option-1", "scaffnew"

INVARIANTS: tuple[Invariant, ...] = (
    Invariant("descent", _DESCENT, descent, 1e-4),
    Invariant("mean-variate", ("scaffold", "scaffold-option-1"), mean_variate, 1e-4),
    Invariant("mean-dual", ("feddyn",), mean_dual, 1e-4),
    Invariant("zero-sum", ("scaffnew",), zero_sum, 1e-4),
    Invariant("optimum", ("scaffold", "scaffold-option-1", "feddyn", "scaffnew"), optimum, 1e-3),
    Invariant("consistency", ("fednova",), consistency, 0.05),
)
