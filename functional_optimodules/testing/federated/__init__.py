"""Oracles of federated algorithms, for anybody's implementation.

    from functional_optimodules.testing.federated import check, explain

    findings = check(MyAdapter(), "scaffold")
    assert all(finding.ok for finding in findings), explain(findings)

Each algorithm is written again from its paper, in NumPy and float64, over small
quadratic problems. An implementation plugs in by an adapter of three functions
(`Adapter`, with an example in `adapter.py`); `check` runs it beside the oracle in
scenarios with sampled clients, unequal steps and weights, lost messages and
momentum. Where the numbers differ, `explain` says which known mistake, or which
two at once, give the same (`mistakes.py`). `check_invariants` measures what is
true whatever the numbers: fixed points, and sums that have to vanish.

Nothing is imported but NumPy, so that the folder works by itself, in an
environment of whatever is judged: put its parent folder on the path, and
`import federated`.
"""

from .adapter import Adapter, VariatesAdapter
from .check import TOLERANCE, Finding, check, explain, table, trajectory
from .invariants import INVARIANTS, InvariantFinding, check_invariants
from .mistakes import MISTAKES
from .oracle import Oracle
from .oracles import ORACLES
from .problem import Problem, quadratics
from .scenario import SCENARIOS, RoundPlan, Scenario

__all__ = [
    "INVARIANTS",
    "MISTAKES",
    "ORACLES",
    "SCENARIOS",
    "TOLERANCE",
    "Adapter",
    "Finding",
    "InvariantFinding",
    "Oracle",
    "Problem",
    "RoundPlan",
    "Scenario",
    "VariatesAdapter",
    "check",
    "check_invariants",
    "explain",
    "quadratics",
    "table",
    "trajectory",
]
