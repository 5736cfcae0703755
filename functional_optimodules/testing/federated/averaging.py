"""Algorithms that average what clients reach by local descent.

In all oracles: x is the server's parameters, y a client's, g the gradient of its
loss, D_i = y_i - x what it moved by, S the clients whose message arrives, N the
number of all clients, K_i local steps, w_i weights; means are by weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .oracle import GENERAL, UNWEIGHTED, LocalDescent, Oracle
from .problem import Array
from .scenario import RoundPlan


@dataclass
class FedAvg(Oracle):
    """x += eta_g mean_S D_i (McMahan et al. 2017, algorithm 1).

    The server's rate eta_g is that of Reddi et al. 2021, algorithm 1. Local
    momentum, where there is any, starts at zero in each round.

    References:
      McMahan et al., "Communication-efficient learning of deep networks from
      decentralized data", AISTATS 2017, arXiv:1602.05629.
    """

    name: ClassVar[str] = "fedavg"
    scenarios: ClassVar[tuple[str, ...]] = (*GENERAL, "server-rate", "local-momentum")
    lrate: float = 0.1
    server_lrate: float = 1.0
    momentum: float = 0.0

    def client(self, i: int, steps: int) -> Array:
        y, m = self.x, self.zeros()
        for k in range(steps):
            m = self.momentum * m + self.problem.gradient(i, y, k)
            y = y - self.lrate * m
        return y - self.x

    def round(self, plan: RoundPlan) -> None:
        self.x = self.x + self.server_lrate * self.mean({i: self.client(i, plan.steps[i]) for i in plan.arrived})


@dataclass
class FedProx(Oracle):
    """y -= eta (g + mu (y - x)); x += mean_S D_i (Li et al. 2020, algorithm 2).

    The paper lets clients solve their subproblem inexactly; here, by K steps.

    References:
      Li et al., "Federated optimization in heterogeneous networks", MLSys 2020,
      arXiv:1812.06127.
    """

    name: ClassVar[str] = "fedprox"
    scenarios: ClassVar[tuple[str, ...]] = (*GENERAL, "server-rate")
    lrate: float = 0.1
    server_lrate: float = 1.0
    mu: float = 0.7

    def pull(self, y: Array) -> Array:
        return self.mu * (y - self.x)

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * (self.problem.gradient(i, y, k) + self.pull(y))
        return y - self.x

    def round(self, plan: RoundPlan) -> None:
        self.x = self.x + self.server_lrate * self.mean({i: self.client(i, plan.steps[i]) for i in plan.arrived})


@dataclass
class FedNova(Oracle):
    """x += tau_eff sum_S p_i D_i / |a_i|_1, tau_eff = sum_S p_i |a_i|_1 (Wang et al. 2020, algorithm 1 and section 4).

    a_i are the coefficients of client i's gradients in D_i / eta, as the paper
    gives them for plain steps, local momentum rho and a proximal term mu:

        |a|_1 = K;   (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho);   (1 - (1 - eta mu)^K) / (eta mu)

    p_i are the weights, of sum 1 over S. The paper leaves tau_eff open; this one
    makes it FedAvg where all clients work alike.

    References:
      Wang et al., "Tackling the objective inconsistency problem in heterogeneous
      federated optimization", NeurIPS 2020, arXiv:2007.07481.
    """

    name: ClassVar[str] = "fednova"
    scenarios: ClassVar[tuple[str, ...]] = (*GENERAL, "local-momentum", "proximal")
    lrate: float = 0.1
    momentum: float = 0.0
    mu: float = 0.0

    def norm(self, steps: int) -> float:
        if self.momentum and self.mu:
            raise NotImplementedError("the paper has momentum and a proximal term, but not both at once")
        if self.momentum:
            rho = self.momentum
            return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
        if self.mu:
            return (1 - (1 - self.lrate * self.mu) ** steps) / (self.lrate * self.mu)
        return steps

    def effective(self, plan: RoundPlan) -> float:
        return float(self.mean({i: np.array(self.norm(plan.steps[i])) for i in plan.arrived}))

    def client(self, i: int, steps: int) -> Array:
        y, m = self.x, self.zeros()
        for k in range(steps):
            m = self.momentum * m + self.problem.gradient(i, y, k)
            y = y - self.lrate * (m + self.mu * (y - self.x))
        return y - self.x

    def round(self, plan: RoundPlan) -> None:
        normalized = {i: self.client(i, plan.steps[i]) / self.norm(plan.steps[i]) for i in plan.arrived}
        self.x = self.x + self.effective(plan) * self.mean(normalized)


@dataclass
class FedExP(LocalDescent):
    """x += max(1, sum_S |D_i|^2 / (2 |S| (|mean_S D_i|^2 + eps))) mean_S D_i (Jhunjhunwala et al. 2023, algorithm 1).

    The paper evaluates the mean of the last two x; it is not that which is compared.

    References:
      Jhunjhunwala, Wang and Joshi, "FedExP: speeding up federated averaging via
      extrapolation", ICLR 2023, arXiv:2301.09604.
    """

    name: ClassVar[str] = "fedexp"
    scenarios: ClassVar[tuple[str, ...]] = UNWEIGHTED
    eps: float = 1e-3

    def rate(self, deltas: Array, mean: Array) -> float:
        return max(1.0, float(np.sum(deltas**2) / (2 * len(deltas) * (mean @ mean + self.eps))))

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i], self.x) for i in plan.arrived}
        mean = self.mean(deltas)
        self.x = self.x + self.rate(np.array(list(deltas.values())), mean) * mean


@dataclass
class Ditto(LocalDescent):
    """v_i -= eta_v (g(v_i) + lambda (v_i - x)), beside FedAvg's x (Li et al. 2021, algorithm 1).

    A participant moves its own model v_i by as many steps as its part of the
    global one, towards the x that the round began with. `variates` shows the v_i
    as "personal"; they are compared too.

    References:
      Li, Hu, Beirami and Smith, "Ditto: fair and robust federated learning through
      personalization", ICML 2021, arXiv:2012.04221.
    """

    name: ClassVar[str] = "ditto"
    scenarios: ClassVar[tuple[str, ...]] = GENERAL
    compared: ClassVar[tuple[str, ...]] = ("personal",)
    personal_lrate: float = 0.1
    lam: float = 0.5

    def begin(self) -> None:
        self.v = self.zeros_each() + self.x

    def personal(self, i: int, steps: int) -> Array:
        v = self.v[i]
        for k in range(steps):
            v = v - self.personal_lrate * (self.problem.gradient(i, v, k) + self.lam * (v - self.x))
        return v

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i], self.x) for i in plan.arrived}
        for i in plan.arrived:
            self.v[i] = self.personal(i, plan.steps[i])
        self.x = self.x + self.mean(deltas)

    def variates(self) -> dict[str, Array]:
        return {"personal": self.v.copy()}
