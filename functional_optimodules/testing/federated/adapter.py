"""How an implementation plugs in: three short functions.

An adapter makes a federation of the implementation for a `Problem`, runs one
round of it by a `RoundPlan`, and reads the parameters. Nothing else of the
implementation is seen. This one adapts ten lines that are FedAvg:

>>> import numpy as np
>>> class Theirs:
...     def __init__(self, problem, lrate, server_lrate):
...         self.problem, self.lrate, self.server_lrate = problem, lrate, server_lrate
...         self.model = problem.start.astype(np.float32)
...
...     def train(self, client, steps):
...         model = self.model
...         for step in range(steps):
...             model = model - self.lrate * self.problem.gradient(client, model, step)
...         return model
...
...     def one_round(self, plan):
...         models = [self.train(client, plan.steps[client]) for client in plan.arrived]
...         examples = [self.problem.weights[client] for client in plan.arrived]
...         delta = np.average(models, axis=0, weights=examples) - self.model
...         self.model = (self.model + self.server_lrate * delta).astype(np.float32)

>>> class TheirAdapter:
...     def make(self, algorithm, problem, hyper):
...         if algorithm != "fedavg" or hyper["momentum"]:
...             raise NotImplementedError("FedAvg without local momentum is all there is")
...         return Theirs(problem, hyper["lrate"], hyper["server_lrate"])
...
...     def round(self, state, plan):
...         state.one_round(plan)
...         return state
...
...     def params(self, state):
...         return state.model

>>> from functional_optimodules.testing.federated import check
>>> for finding in check(TheirAdapter(), "fedavg"):
...     assert finding.ok or finding.skipped, finding

An implementation that wants a loss rather than gradients takes `problem.loss`'s
formula over `problem.curvatures` and `problem.centres`; one that loads data takes
`problem.centres[client]` as that client's examples, a batch each, in order.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .problem import Problem
from .scenario import RoundPlan


class Adapter(Protocol):
    """An implementation, as `check` sees it. A state may be anything, and may be changed in place."""

    def make(self, algorithm: str, problem: Problem, hyper: Mapping[str, float]) -> Any:
        """Return a federation before its first round, its parameters at `problem.start`.

        Args:
          algorithm: its name, one of `ORACLES`.
          problem: the clients.
          hyper: all hyper-parameters of the algorithm, by the names of its oracle's fields; all are floats, whole
            numbers too.

        Raises:
          NotImplementedError: the implementation has no such algorithm, or not with these hyper-parameters:
            the scenario is skipped, for the reason that is given.
        """

    def round(self, state: Any, plan: RoundPlan) -> Any:
        """Return the federation after one more round; `NotImplementedError` where it has no rounds like this."""

    def params(self, state: Any) -> NDArray[np.floating[Any]]:
        """Return the parameters that the server has now, of shape (dimension,)."""


class VariatesAdapter(Adapter, Protocol):
    """An adapter that shows more than the parameters, for the invariants. This is optional."""

    def variates(self, state: Any) -> Mapping[str, NDArray[np.floating[Any]]]:
        """Return what the algorithm keeps besides, by the names that its oracle's `variates` gives; any part of it."""
