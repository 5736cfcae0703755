"""Algorithms whose server is an optimizer: adaptive, with momentum, ahead, out of step."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .oracle import GENERAL, UNWEIGHTED, LocalDescent, Oracle
from .problem import Array
from .scenario import RoundPlan


@dataclass
class _Server(LocalDescent):
    """What the server does with the mean of the D_i is the algorithm."""

    def round(self, plan: RoundPlan) -> None:
        self.server(self.mean({i: self.client(i, plan.steps[i], self.x) for i in plan.arrived}))

    @abstractmethod
    def server(self, delta: Array) -> None:
        """Move x, given the mean of the D_i."""


@dataclass
class FedAvgM(_Server):
    """v = beta v + mean_S D_i; x += eta_g v (Hsu, Qi and Brown 2019, section 4).

    References:
      Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution for
      federated visual classification", 2019, arXiv:1909.06335.
    """

    name: ClassVar[str] = "fedavgm"
    scenarios: ClassVar[tuple[str, ...]] = (*GENERAL, "server-rate")
    server_lrate: float = 1.0
    server_momentum: float = 0.9

    def begin(self) -> None:
        self.v = self.zeros()

    def server(self, delta: Array) -> None:
        self.v = self.server_momentum * self.v + delta
        self.x = self.x + self.server_lrate * self.v


@dataclass
class FedAdam(_Server):
    """m = b1 m + (1 - b1) D; v = b2 v + (1 - b2) D^2; x += eta_g m / (sqrt(v) + tau) (Reddi et al. 2021, algorithm 2).

    D = mean_S D_i; m starts at 0, v at tau^2, the least that the paper allows; no bias
    is corrected.

    References:
      Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295.
    """

    name: ClassVar[str] = "fedadam"
    scenarios: ClassVar[tuple[str, ...]] = (*GENERAL, "server-rate")
    server_lrate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def begin(self) -> None:
        self.m, self.v, self.rounds = self.zeros(), self.zeros() + self.tau**2, 0

    def second(self, delta: Array) -> Array:
        return self.beta_2 * self.v + (1 - self.beta_2) * delta**2

    def move(self) -> Array:
        return self.m / (np.sqrt(self.v) + self.tau)

    def server(self, delta: Array) -> None:
        self.rounds += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * delta
        self.v = self.second(delta)
        self.x = self.x + self.server_lrate * self.move()


@dataclass
class FedYogi(FedAdam):
    """As fedadam, with v -= (1 - b2) D^2 sign(v - D^2) (Reddi et al. 2021, algorithm 2)."""

    name: ClassVar[str] = "fedyogi"

    def second(self, delta: Array) -> Array:
        return self.v - (1 - self.beta_2) * delta**2 * np.sign(self.v - delta**2)


@dataclass
class FedAdagrad(FedAdam):
    """As fedadam, with v += D^2, and b1 = 0 in the paper's experiments (Reddi et al. 2021, algorithm 2)."""

    name: ClassVar[str] = "fedadagrad"
    beta_1: float = 0.0

    def second(self, delta: Array) -> Array:
        return self.v + delta**2


@dataclass
class FedACG(Oracle):
    """Send z = x + lambda m; m = lambda m + mean_S (y_i - z); x += m (Kim, Kim and Han 2024, algorithm 1).

    Clients step on g + beta (y - z), held near what was sent. What is compared
    is x, not z. `variates` shows "m".

    References:
      Kim, Kim and Han, "Communication-efficient federated learning with accelerated
      client gradient", CVPR 2024, arXiv:2201.03172.
    """

    name: ClassVar[str] = "fedacg"
    scenarios: ClassVar[tuple[str, ...]] = UNWEIGHTED
    lrate: float = 0.1
    lam: float = 0.85
    beta: float = 0.2

    def begin(self) -> None:
        self.m = self.zeros()

    def sent(self) -> Array:
        return self.x + self.lam * self.m

    def pull(self, y: Array, z: Array) -> Array:
        return self.beta * (y - z)

    def client(self, i: int, steps: int) -> Array:
        z = y = self.sent()
        for k in range(steps):
            y = y - self.lrate * (self.problem.gradient(i, y, k) + self.pull(y, z))
        return y - z

    def round(self, plan: RoundPlan) -> None:
        self.m = self.lam * self.m + self.mean({i: self.client(i, plan.steps[i]) for i in plan.arrived})
        self.x = self.x + self.m

    def variates(self) -> dict[str, Array]:
        return {"m": self.m.copy()}


@dataclass
class FedBuff(_Server):
    """x += eta_g / |B| sum_B D_i / sqrt(1 + s_i), once |B| deltas are there (Nguyen et al. 2022, algorithm 1).

    s_i, the staleness, is the number of the server's updates since client i
    downloaded the parameters that it started from; the weight is that of the paper's experiments.
    A round is one update of the server, its participants those in the buffer.

    References:
      Nguyen et al., "Federated learning with buffered asynchronous aggregation",
      AISTATS 2022, arXiv:2106.06639.
    """

    name: ClassVar[str] = "fedbuff"
    scenarios: ClassVar[tuple[str, ...]] = ("events",)
    server_lrate: float = 1.0

    def begin(self) -> None:
        self.versions = [self.x]

    def scale(self, staleness: int) -> float:
        return 1 / float(np.sqrt(1 + staleness))

    def started(self, staleness: int) -> Array:
        return self.versions[-1 - staleness]

    def buffered(self, deltas: list[Array], scales: list[float]) -> Array:
        return np.asarray(np.mean([s * d for s, d in zip(scales, deltas, strict=True)], axis=0))

    def round(self, plan: RoundPlan) -> None:
        arrivals = list(zip(plan.participants, plan.staleness or [0] * len(plan.participants), strict=True))
        deltas = [self.client(i, plan.steps[i], self.started(s)) for i, s in arrivals]
        self.server(self.buffered(deltas, [self.scale(s) for _, s in arrivals]))

    def server(self, delta: Array) -> None:
        self.x = self.x + self.server_lrate * delta
        self.versions.append(self.x)


@dataclass
class DiLoCo(Oracle):
    """AdamW inside; outside m = mu m + g, x -= eta_g (mu m + g), g = -mean_S D_i (Douillard et al. 2023, algorithm 1).

    AdamW's moments and its count of steps are each worker's own, and go on from
    round to round; its decay is decoupled: y -= eta (m / (sqrt(v) + eps) + w y), moments corrected for bias.

    References:
      Douillard et al., "DiLoCo: distributed low-communication training of language
      models", 2023, arXiv:2311.08105.
    """

    name: ClassVar[str] = "diloco"
    scenarios: ClassVar[tuple[str, ...]] = (*UNWEIGHTED, "server-rate")
    lrate: float = 0.05
    beta_1: float = 0.9
    beta_2: float = 0.95
    eps: float = 1e-8
    w_decay: float = 0.1
    server_lrate: float = 0.7
    server_momentum: float = 0.9

    def begin(self) -> None:
        self.outer = self.zeros()
        self.first, self.second, self.count = self.zeros_each(), self.zeros_each(), [0] * self.problem.num_clients

    def adam(self, i: int, gradient: Array) -> Array:
        self.count[i] += 1
        self.first[i] = self.beta_1 * self.first[i] + (1 - self.beta_1) * gradient
        self.second[i] = self.beta_2 * self.second[i] + (1 - self.beta_2) * gradient**2
        first = self.first[i] / (1 - self.beta_1 ** self.count[i])
        second = self.second[i] / (1 - self.beta_2 ** self.count[i])
        return np.asarray(first / (np.sqrt(second) + self.eps))

    def step(self, i: int, y: Array, gradient: Array) -> Array:
        return y - self.lrate * (self.adam(i, gradient) + self.w_decay * y)

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = self.step(i, y, self.problem.gradient(i, y, k))
        return y - self.x

    def outward(self, gradient: Array) -> Array:
        self.outer = self.server_momentum * self.outer + gradient
        return self.server_momentum * self.outer + gradient

    def round(self, plan: RoundPlan) -> None:
        gradient = -self.mean({i: self.client(i, plan.steps[i]) for i in plan.arrived})
        self.x = self.x - self.server_lrate * self.outward(gradient)
