"""What an oracle is: an algorithm over a problem, in float64, as its paper writes it.

The places where code in use goes wrong are methods of their own, so that a
mistake is a subclass that overrides one of them (`mistakes.py`).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .problem import Array, Problem
from .scenario import RoundPlan

# Which scenarios a paper speaks of, where clients are weighted equally, and where by their examples.
UNWEIGHTED = "full", "one-step", "partial", "unequal-steps", "drop-outs", "batches", "mixed"
GENERAL = (*UNWEIGHTED, "unequal-weights", "mixed-weights")


@dataclass
class Oracle(ABC):
    """A federation of one algorithm; its fields are the algorithm's hyper-parameters, with their defaults.

    Attributes:
      name: how `check` calls the algorithm.
      scenarios: names of the scenarios that the paper says something about.
      compared: what of `variates` is compared besides the parameters, where it is what the algorithm is for.
      problem: the clients.
      x: the server's parameters.
    """

    name: ClassVar[str]
    scenarios: ClassVar[tuple[str, ...]]
    compared: ClassVar[tuple[str, ...]] = ()
    problem: Problem
    x: Array = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.problem.start.copy()
        self.begin()

    def begin(self) -> None:  # noqa: B027 - most have nothing besides the parameters
        """Make what the algorithm keeps between rounds."""

    @abstractmethod
    def round(self, plan: RoundPlan) -> None:
        """Run one round."""

    def variates(self) -> dict[str, Array]:
        """Return what the algorithm keeps besides the parameters, by name."""
        return {}

    def shown(self) -> Array:
        """Return all that is compared, as one vector."""
        return np.concatenate([self.x, *(self.variates()[name].ravel() for name in self.compared)])

    def mean(self, sent: Mapping[int, Array]) -> Array:
        """Return the mean of what clients sent, by weight."""
        return np.asarray(np.average(list(sent.values()), axis=0, weights=self.problem.weights[list(sent)]))

    def zeros(self) -> Array:
        """Return zeros, shaped like the parameters."""
        return np.zeros_like(self.x)

    def zeros_each(self) -> Array:
        """Return zeros, shaped like all clients' parameters."""
        return np.zeros((self.problem.num_clients, self.x.size), self.x.dtype)

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring: the formula, or the mistake."""
        return (cls.__doc__ or "").partition("\n")[0].rstrip(".")

    @classmethod
    def hyper(cls) -> dict[str, float]:
        """Return the hyper-parameters by name, with their defaults."""
        return {f.name: float(f.default) for f in dataclasses.fields(cls) if f.init and f.name != "problem"}  # type: ignore[arg-type]


@dataclass
class LocalDescent(Oracle):
    """What many algorithms share: a client takes K plain steps from where it starts."""

    lrate: float = 0.1

    def client(self, i: int, steps: int, start: Array) -> Array:
        """Return D_i."""
        y = start
        for k in range(steps):
            y = y - self.lrate * self.problem.gradient(i, y, k)
        return y - start
