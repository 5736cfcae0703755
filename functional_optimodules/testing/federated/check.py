"""Run an implementation beside the oracle, and say where they part and why."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from .adapter import Adapter
from .mistakes import MISTAKES
from .oracle import Oracle
from .oracles import ORACLES
from .problem import Array
from .scenario import SCENARIOS, Scenario

# Float32 arithmetic stays below 1e-5 of the movement in these scenarios; the mildest known mistake is above 1e-3.
TOLERANCE = 1e-4

_Named = TypeVar("_Named")


@dataclass(frozen=True)
class Finding:
    """What came of one scenario.

    Attributes:
      algorithm: its name.
      scenario: its name.
      differences: by round, the largest difference of a parameter from the oracle's, over the largest movement of a
        parameter of the oracle so far.
      tolerance: the largest difference that passes.
      matches: known mistakes whose numbers these are, within the tolerance. Of a scenario that passes, those that it
        does not show.
      skipped: why the implementation was not run, empty if it was.
      path: what was compared, after each round.
      ran: the scenario itself.
    """

    algorithm: str
    scenario: str
    differences: tuple[float, ...] = ()
    tolerance: float = TOLERANCE
    matches: tuple[str, ...] = ()
    skipped: str = ""
    path: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    ran: Scenario | None = field(default=None, repr=False)

    @property
    def worst(self) -> float:
        """The largest difference of all rounds; NaN if one is."""
        return float(np.max(self.differences)) if self.differences else float("nan")

    @property
    def ok(self) -> bool:
        """Whether the implementation was run, and its numbers are the oracle's."""
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        where = f"{self.algorithm}, {self.scenario}"
        if self.skipped:
            return f"{where}: skipped: {self.skipped}"
        if self.ok:
            return f"{where}: passes, {self.worst:.1e} of the movement"
        first = next(r for r, difference in enumerate(self.differences) if not difference <= self.tolerance)
        matches = "".join(f"\n  matches: {match}" for match in self.matches)
        return f"{where}: differs from round {first + 1} on, by up to {self.worst:.1e} of the movement{matches}"


def check(
    adapter: Adapter, algorithm: str, scenario: str | Scenario | None = None, tolerance: float = TOLERANCE
) -> list[Finding]:
    """Compare an implementation with the oracle.

    Args:
      adapter: the implementation.
      algorithm: one of `ORACLES`.
      scenario: one of `SCENARIOS`, or one of your own; all that the algorithm's paper speaks of by default.
      tolerance: the largest difference that passes, relative to the movement of the parameters.

    Returns:
      One finding a scenario.

    Raises:
      KeyError: no such algorithm or scenario.
      ValueError: the adapter gives parameters of another shape, or other parameters to begin with.
    """
    oracle = named(ORACLES, algorithm, "algorithm")
    if scenario is None:
        scenarios = [SCENARIOS[name] for name in oracle.scenarios]
    else:
        scenarios = [scenario if isinstance(scenario, Scenario) else named(SCENARIOS, scenario, "scenario")]
    return [_compare(adapter, oracle, each, tolerance) for each in scenarios]


def explain(findings: Sequence[Finding]) -> str:
    """Say what `check` found of one algorithm: the known mistake, or two, that all its scenarios agree with."""
    run = [finding for finding in findings if not finding.skipped]
    if not run:
        return "was not run"
    wrong = [finding for finding in run if not finding.ok]
    if not wrong:
        return f"passes {len(run)} of {len(run)} scenarios"
    common = [match for match in wrong[0].matches if all(match in finding.matches for finding in run)]
    names = ", ".join(finding.scenario for finding in wrong)
    because = "; or: ".join(common) if common else _pair(wrong, run)
    return f"differs in {len(wrong)} of {len(run)} scenarios ({names}): {because}"


def _pair(wrong: Sequence[Finding], run: Sequence[Finding]) -> str:
    for first, second in itertools.permutations(MISTAKES[wrong[0].algorithm], 2):
        # What the one overrides and the other does not is the other's.
        both = type(first.__name__ + second.__name__, (first, second), {})
        if all(_gives(both, finding) for finding in (*wrong, *run)):
            return f"{first.summary()}; and: {second.summary()}"
    return "no known mistake, nor any two, give these numbers"


def _gives(oracle: type[Oracle], finding: Finding) -> bool:
    assert finding.ran is not None
    scale = movement(oracle_trajectory(ORACLES[finding.algorithm], finding.ran), finding.ran.problem().start)
    # Two mistakes together may well diverge.
    with np.errstate(all="ignore"):
        path = _run(oracle, finding.ran)
        return bool(np.max(differences([np.array(x) for x in finding.path], path, scale)) <= finding.tolerance)


def table(findings: Iterable[Finding]) -> str:
    """Return findings as a table in Markdown, with the difference after each round."""
    rows = ["| algorithm | scenario | result | difference by round | matches |", "| --- | --- | --- | --- | --- |"]
    for finding in findings:
        result = "skipped" if finding.skipped else "passes" if finding.ok else "differs"
        rounds = finding.skipped or " ".join(f"{difference:.0e}" for difference in finding.differences)
        matches = "" if finding.ok else "; ".join(finding.matches)
        rows.append(f"| {finding.algorithm} | {finding.scenario} | {result} | {rounds} | {matches} |")
    return "\n".join(rows)


def trajectory(adapter: Adapter, algorithm: str, scenario: Scenario) -> list[Array]:
    """Return the implementation's parameters after each round, and what else the oracle compares."""
    oracle, problem = named(ORACLES, algorithm, "algorithm"), scenario.problem()
    state = adapter.make(algorithm, problem, hyper_of(oracle, scenario))
    start = _params(adapter, state, problem.start)
    if not np.allclose(start, problem.start, rtol=1e-5):
        raise ValueError(f"{algorithm}: make's parameters are {start}, and should be problem.start, {problem.start}")
    path = []
    for plan in scenario.plans:
        state = adapter.round(state, plan)
        path.append(np.concatenate([_params(adapter, state, problem.start), *_compared(adapter, oracle, state)]))
    return path


# Each mistake is run in each scenario, for whatever is checked.
@functools.lru_cache(maxsize=4096)
def oracle_trajectory(oracle: type[Oracle], scenario: Scenario) -> list[Array]:
    """Return the oracle's parameters after each round, and what else it compares."""
    return _run(oracle, scenario)


def _run(oracle: type[Oracle], scenario: Scenario) -> list[Array]:
    federation = oracle(scenario.problem(), **hyper_of(oracle, scenario))
    path = []
    for plan in scenario.plans:
        federation.round(plan)
        path.append(federation.shown())
    return path


def hyper_of(oracle: type[Oracle], scenario: Scenario) -> dict[str, float]:
    """Return the oracle's hyper-parameters with those of the scenario."""
    hyper = oracle.hyper()
    for name in scenario.hyper:
        named(hyper, name, f"hyper-parameter of {oracle.name}")
    return {**hyper, **scenario.hyper}


def movement(path: Sequence[Array], start: Array) -> Array:
    """Return, by round, the largest movement of a parameter so far."""
    moved = np.maximum.accumulate([np.max(np.abs(x[: start.size] - start)) for x in path])
    # Where nothing moves, what stands still too is right.
    return np.maximum(moved, np.finfo(np.float64).tiny)


def differences(path: Sequence[Array], reference: Sequence[Array], scale: Array) -> tuple[float, ...]:
    """Return, by round, the largest difference over the scale."""
    # What diverges gives infinity or NaN, which pass nowhere.
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.max(np.abs(np.array(path) - np.array(reference)), axis=1) / scale
    return tuple(float(each) for each in apart)


def named(table: Mapping[str, _Named], name: str, kind: str) -> _Named:
    """Return the entry of that name, or say which there are."""
    if name not in table:
        raise KeyError(f"no {kind} is called {name!r}; there are {', '.join(sorted(table))}")
    return table[name]


def _params(adapter: Adapter, state: object, start: Array) -> Array:
    params = np.array(adapter.params(state), np.float64)
    if params.shape != start.shape:
        raise ValueError(f"{type(adapter).__name__}.params gave the shape {params.shape}; expected {start.shape}")
    return params


def _compared(adapter: Adapter, oracle: type[Oracle], state: object) -> list[Array]:
    if not oracle.compared:
        return []
    if not hasattr(adapter, "variates"):
        names = ", ".join(oracle.compared)
        raise NotImplementedError(f"{oracle.name} is seen in {names}, and the adapter has no `variates`")
    variates = adapter.variates(state)
    return [np.array(named(variates, name, "variate"), np.float64).ravel() for name in oracle.compared]


def _compare(adapter: Adapter, oracle: type[Oracle], scenario: Scenario, tolerance: float) -> Finding:
    try:
        path = trajectory(adapter, oracle.name, scenario)
    except NotImplementedError as why:
        return Finding(oracle.name, scenario.name, tolerance=tolerance, skipped=str(why) or "not implemented")
    reference = oracle_trajectory(oracle, scenario)
    scale = movement(reference, scenario.problem().start)
    matches = []
    for mistake in MISTAKES[oracle.name]:
        if np.max(differences(path, oracle_trajectory(mistake, scenario), scale)) <= tolerance:
            matches.append(mistake.summary())
    apart = differences(path, reference, scale)
    numbers = tuple(tuple(x.tolist()) for x in path)
    return Finding(oracle.name, scenario.name, apart, tolerance, tuple(matches), path=numbers, ran=scenario)
