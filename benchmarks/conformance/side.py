"""An implementation's side, judged in its own environment: the oracles need nothing but NumPy."""

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "functional_optimodules" / "testing"))

import federated


class Side:
    """An adapter, and what is said of it.

    Attributes:
      adapter: the adapter.
      packages: whose versions are told, the implementation's first.
    """

    def __init__(self, adapter, *packages):
        self.adapter, self.packages = adapter, packages

    def about(self):
        """Return the versions of its packages."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages)

    def judge(self, algorithm):
        """Return a row for each scenario and each invariant, what explains the differences, and where it went."""
        findings, rows, paths = [], [], {}
        # What an implementation fixes is what the oracle is given.
        fixed = getattr(self.adapter, "fixed", {}).get(algorithm, {})
        for name in federated.ORACLES[algorithm].scenarios:
            scenario = federated.SCENARIOS[name]
            try:
                scenario = dataclasses.replace(scenario, hyper={**scenario.hyper, **fixed})
                (finding,) = federated.check(self.adapter, algorithm, scenario)
            except Exception as error:  # whatever an implementation does is a result
                rows.append([name, "raises", f"{type(error).__name__}: {error}"])
                continue
            findings.append(finding)
            if not finding.skipped:
                paths[name] = finding.path
            verdict = "passes" if finding.ok else "differs"
            rows.append([name, *(("not run", finding.skipped) if finding.skipped else (verdict, finding.worst))])
        try:
            invariants = federated.check_invariants(self.adapter, algorithm)
        except Exception:  # it is told above
            invariants = []
        for finding in invariants:
            verdict = "holds" if finding.ok else "does not hold"
            skipped = ("not run", finding.skipped)
            rows.append([f"*{finding.invariant}*", *(skipped if finding.skipped else (verdict, finding.residual))])
        return {"rows": rows, "why": federated.explain(findings), "paths": paths}


def local_descent(problem, client, start, steps, lrate, momentum=0.0, pull=None):
    """Return where a client gets by its own steps in float32, for implementations that leave these to their users.

    Args:
      pull: what is added to the gradient at some parameters.
    """
    import numpy as np

    y, velocity = start, np.zeros_like(start)
    for step in range(steps):
        gradient = np.float32(problem.gradient(client, y, step))
        velocity = np.float32(momentum) * velocity + gradient + (0 if pull is None else pull(y))
        y = y - np.float32(lrate) * velocity
    return y
