"""Robust and compressed aggregation of what clients send."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .oracle import UNWEIGHTED, LocalDescent
from .problem import Array
from .scenario import RoundPlan


def median(deltas: Array) -> Array:
    """Return the median of each coordinate (Yin et al. 2018, algorithm 1, option I, arXiv:1803.01498)."""
    return np.asarray(np.median(deltas, axis=0))


def trimmed_mean(deltas: Array, beta: float) -> Array:
    """Return each coordinate's mean without the share beta at either end (Yin et al. 2018, algorithm 1, option II)."""
    cut = int(beta * len(deltas) + 1e-9)
    return np.asarray(np.sort(deltas, axis=0)[cut : len(deltas) - cut].mean(axis=0))


def krum(deltas: Array, byzantine: int, chosen: int = 1) -> Array:
    """Return the mean of those nearest to their n - f - 2 nearest others (Blanchard et al. 2017, arXiv:1703.02757).

    With one chosen, this is Krum, with more, Multi-Krum.
    """
    apart = np.sum((deltas[:, None] - deltas[None]) ** 2, axis=-1)
    # The first of each sorted row is the distance to itself.
    scores = np.sort(apart, axis=1)[:, 1 : len(deltas) - byzantine - 1].sum(axis=1)
    return np.asarray(deltas[np.argsort(scores, kind="stable")[:chosen]].mean(axis=0))


def geometric_median(deltas: Array, weights: Array, passes: int, smoothing: float) -> Array:
    """Return the smoothed Weiszfeld iterate, from the mean on (RFA, Pillutla et al. 2022, arXiv:1912.13445)."""
    z = np.average(deltas, axis=0, weights=weights)
    for _ in range(passes):
        nearness = weights / np.maximum(smoothing, np.linalg.norm(deltas - z, axis=1))
        z = np.average(deltas, axis=0, weights=nearness)
    return np.asarray(z)


def centered_clipping(deltas: Array, centre: Array, radius: float, passes: int) -> Array:
    """Return v, moved by v += mean (D_i - v) min(1, r / |D_i - v|) (Karimireddy et al. 2021, arXiv:2012.10333)."""
    v = centre
    for _ in range(passes):
        away = deltas - v
        v = v + np.mean(away * np.minimum(1, radius / np.linalg.norm(away, axis=1))[:, None], axis=0)
    return v


@dataclass
class Aggregated(LocalDescent):
    """x += eta_g aggregate_S D_i."""

    scenarios: ClassVar[tuple[str, ...]] = ("full", "one-step", "unequal-steps", "batches", "server-rate")
    server_lrate: float = 1.0

    @abstractmethod
    def aggregate(self, deltas: Array, weights: Array) -> Array:
        """Return what moves x."""

    def round(self, plan: RoundPlan) -> None:
        deltas = np.array([self.client(i, plan.steps[i], self.x) for i in plan.arrived])
        self.x = self.x + self.server_lrate * self.aggregate(deltas, self.problem.weights[list(plan.arrived)])


@dataclass
class Median(Aggregated):
    """x += eta_g median_S D_i, by coordinate (Yin et al. 2018, algorithm 1, option I)."""

    name: ClassVar[str] = "median"
    scenarios: ClassVar[tuple[str, ...]] = (*UNWEIGHTED, "server-rate")

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return median(deltas)


@dataclass
class TrimmedMean(Aggregated):
    """x += eta_g the mean without a share beta at each end, by coordinate (Yin et al. 2018, algorithm 1, option II)."""

    name: ClassVar[str] = "trimmed-mean"
    beta: float = 0.2

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return trimmed_mean(deltas, self.beta)


@dataclass
class Krum(Aggregated):
    """x += eta_g the D_i nearest to its n - f - 2 nearest others (Blanchard et al. 2017)."""

    name: ClassVar[str] = "krum"
    byzantine: float = 1.0

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return krum(deltas, int(self.byzantine))


@dataclass
class MultiKrum(Aggregated):
    """x += eta_g the mean of the m D_i of the best Krum scores (Multi-Krum, Blanchard et al. 2017)."""

    name: ClassVar[str] = "multi-krum"
    byzantine: float = 1.0
    chosen: float = 3.0

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return krum(deltas, int(self.byzantine), int(self.chosen))


@dataclass
class GeometricMedian(Aggregated):
    """x += eta_g the geometric median of D_i, by Weiszfeld's smoothed passes (RFA, Pillutla et al. 2022).

    The first pass begins at the mean by weight.
    """

    name: ClassVar[str] = "geometric-median"
    scenarios: ClassVar[tuple[str, ...]] = (*Aggregated.scenarios, "unequal-weights")
    passes: float = 4.0
    smoothing: float = 1e-6

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return geometric_median(deltas, weights, int(self.passes), self.smoothing)


@dataclass
class CenteredClipping(Aggregated):
    """v += mean_S (D_i - v) min(1, r / |D_i - v|); x += eta_g v (Karimireddy, He and Jaggi 2021).

    v, the centre, is the last round's; at first 0.
    """

    name: ClassVar[str] = "centered-clipping"
    radius: float = 0.3
    passes: float = 1.0

    def begin(self) -> None:
        self.v = self.zeros()

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        self.v = centered_clipping(deltas, self.v, self.radius, int(self.passes))
        return self.v


@dataclass
class ErrorFeedback(LocalDescent):
    """u_i = e_i + D_i; send Q(u_i); e_i = u_i - Q(u_i); x += eta_g mean_S Q(u_i).

    `variates` shows "e_i".
    """

    scenarios: ClassVar[tuple[str, ...]] = (*UNWEIGHTED, "server-rate")
    server_lrate: float = 1.0

    def begin(self) -> None:
        self.e = self.zeros_each()

    @abstractmethod
    def compress(self, u: Array) -> Array:
        """Return Q(u)."""

    def remember(self, i: int, u: Array, sent: Array) -> None:
        self.e[i] = u - sent

    def round(self, plan: RoundPlan) -> None:
        u = {i: self.e[i] + self.client(i, plan.steps[i], self.x) for i in plan.arrived}
        sent = {i: self.compress(u[i]) for i in u}
        for i in u:
            self.remember(i, u[i], sent[i])
        self.x = self.x + self.server_lrate * self.mean(sent)

    def variates(self) -> dict[str, Array]:
        return {"e_i": self.e.copy()}


@dataclass
class ErrorFeedbackTopK(ErrorFeedback):
    """Q(u): the k entries of u of largest modulus, with error feedback (Basu et al. 2019, algorithm 1).

    References:
      Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", NeurIPS 2018, arXiv:1809.07599.
      Basu et al., "Qsparse-local-SGD", NeurIPS 2019, arXiv:1906.02367.
    """

    name: ClassVar[str] = "ef-topk"
    k: float = 1.0

    def compress(self, u: Array) -> Array:
        sent = np.zeros_like(u)
        largest = np.argsort(-np.abs(u), kind="stable")[: int(self.k)]
        sent[largest] = u[largest]
        return sent


@dataclass
class ErrorFeedbackSign(ErrorFeedback):
    """Q(u) = |u|_1 / d sign(u), with error feedback (Karimireddy et al. 2019, algorithm 1).

    References:
      Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression
      schemes", ICML 2019, arXiv:1901.09847.
    """

    name: ClassVar[str] = "ef-sign"

    def compress(self, u: Array) -> Array:
        return np.asarray(np.mean(np.abs(u)) * np.sign(u))
