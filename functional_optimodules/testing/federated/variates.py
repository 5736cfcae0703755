"""Algorithms whose clients, or whose server, remember gradients: control variates, duals, momentum."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .oracle import UNWEIGHTED, Oracle
from .problem import Array
from .scenario import RoundPlan


@dataclass
class Scaffold(Oracle):
    """y -= eta (g - c_i + c); c_i+ = c_i - c + (x - y) / (K eta) (Karimireddy et al. 2020, algorithm 1, option II).

    Then x += eta_g mean_S D_i and c += sum_S (c_i+ - c_i) / N. Variates start at
    zero. `variates` shows "c" and "c_i".

    References:
      Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated
      learning", ICML 2020, arXiv:1910.06378.
    """

    name: ClassVar[str] = "scaffold"
    scenarios: ClassVar[tuple[str, ...]] = (*UNWEIGHTED, "server-rate")
    lrate: float = 0.1
    server_lrate: float = 1.0

    def begin(self) -> None:
        self.c, self.c_i = self.zeros(), self.zeros_each()

    def correction(self, i: int) -> Array:
        return self.c - self.c_i[i]

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * (self.problem.gradient(i, y, k) + self.correction(i))
        return y - self.x

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.c_i[i] - self.c - delta / (steps * self.lrate)

    def server_variate(self, changes: dict[int, Array]) -> Array:
        return self.c + np.sum(list(changes.values()), axis=0) / self.problem.num_clients

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i]) for i in plan.arrived}
        changes = {i: self.next_variate(i, deltas[i], plan.steps[i]) - self.c_i[i] for i in plan.arrived}
        self.c = self.server_variate(changes)
        for i, change in changes.items():
            self.c_i[i] += change
        self.x = self.x + self.server_lrate * self.mean(deltas)

    def variates(self) -> dict[str, Array]:
        return {"c": self.c.copy(), "c_i": self.c_i.copy()}


@dataclass
class ScaffoldOptionI(Scaffold):
    """As scaffold, with c_i+ = grad f_i(x), of all its data (Karimireddy et al. 2020, algorithm 1, option I)."""

    name: ClassVar[str] = "scaffold-option-1"

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.problem.gradient(i, self.x)


@dataclass
class FedDyn(Oracle):
    """y -= eta (g - L_i + alpha (y - x)); L_i -= alpha D_i (Acar et al. 2021, algorithm 1).

    Then h -= alpha / N sum_S D_i and x = mean_S y_i - h / alpha. The paper lets a
    client minimise its dynamically regularised loss, whose gradient at the end
    is L_i's new value; here it takes K steps. `variates` shows "h" and "h_i", the L_i.

    References:
      Acar et al., "Federated learning based on dynamic regularization", ICLR 2021,
      arXiv:2111.04263.
    """

    name: ClassVar[str] = "feddyn"
    scenarios: ClassVar[tuple[str, ...]] = UNWEIGHTED
    lrate: float = 0.1
    alpha: float = 0.5

    def begin(self) -> None:
        self.h, self.h_i = self.zeros(), self.zeros_each()

    def direction(self, i: int, y: Array, k: int) -> Array:
        return self.problem.gradient(i, y, k) - self.h_i[i] + self.alpha * (y - self.x)

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * self.direction(i, y, k)
        return y - self.x

    def next_dual(self, i: int, delta: Array) -> Array:
        return self.h_i[i] - self.alpha * delta

    def next_h(self, deltas: dict[int, Array]) -> Array:
        return self.h - self.alpha / self.problem.num_clients * np.sum(list(deltas.values()), axis=0)

    def next_x(self, deltas: dict[int, Array]) -> Array:
        return self.x + self.mean(deltas) - self.h / self.alpha

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i]) for i in plan.arrived}
        for i, delta in deltas.items():
            self.h_i[i] = self.next_dual(i, delta)
        self.h = self.next_h(deltas)
        self.x = self.next_x(deltas)

    def variates(self) -> dict[str, Array]:
        return {"h": self.h.copy(), "h_i": self.h_i.copy()}


@dataclass
class Mime(Oracle):
    """y -= eta ((1 - beta) (g(y) - g(x) + c) + beta m), c = mean_S grad f_i(x) (Karimireddy et al. 2021, algorithm 1).

    The base algorithm is SGD with momentum. m is the server's and does not move in
    a round; at its end, m = (1 - beta) c + beta m. g(y) and g(x) are of one batch,
    grad f_i of all of a client's data. `variates` shows "m".

    References:
      Karimireddy et al., "Breaking the centralized barrier for cross-device federated
      learning", NeurIPS 2021, arXiv:2008.03606.
    """

    name: ClassVar[str] = "mime"
    # A lost message would leave open whether the client's gradient is in c.
    scenarios: ClassVar[tuple[str, ...]] = ("full", "one-step", "partial", "unequal-steps", "batches", "server-rate")
    lrate: float = 0.1
    server_lrate: float = 1.0
    momentum: float = 0.9

    def begin(self) -> None:
        self.m = self.zeros()

    def corrected(self, i: int, y: Array, k: int, c: Array) -> Array:
        return self.problem.gradient(i, y, k) - self.problem.gradient(i, self.x, k) + c

    def client(self, i: int, steps: int, c: Array) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * ((1 - self.momentum) * self.corrected(i, y, k, c) + self.momentum * self.m)
        return y - self.x

    def next_momentum(self, c: Array, deltas: dict[int, Array], plan: RoundPlan) -> Array:
        return (1 - self.momentum) * c + self.momentum * self.m

    def round(self, plan: RoundPlan) -> None:
        c = self.mean({i: self.problem.gradient(i, self.x) for i in plan.arrived})
        deltas = {i: self.client(i, plan.steps[i], c) for i in plan.arrived}
        self.m = self.next_momentum(c, deltas, plan)
        self.x = self.x + self.server_lrate * self.mean(deltas)

    def variates(self) -> dict[str, Array]:
        return {"m": self.m.copy()}


@dataclass
class MimeLite(Mime):
    """As mime, with g(y) itself in place of g(y) - g(x) + c (Karimireddy et al. 2021, algorithm 1)."""

    name: ClassVar[str] = "mimelite"

    def corrected(self, i: int, y: Array, k: int, c: Array) -> Array:
        return self.problem.gradient(i, y, k)


@dataclass
class Scaffnew(Oracle):
    """z_i = y_i - eta (g - h_i); with probability p, x = mean(z_i - eta / p h_i) (Mishchenko et al. 2022, algorithm 2).

    Then h_i += p / eta (x - z_i), and all clients go on from x; else y_i = z_i. A
    round is the steps up to and with a coin that says so: its number of steps is
    given, geometric if coins are tossed; a coin is for all clients, and all take
    part. `variates` shows "h_i".

    References:
      Mishchenko et al., "ProxSkip: yes! Local gradient steps provably lead to
      communication acceleration! Finally!", ICML 2022, arXiv:2202.09357.
    """

    name: ClassVar[str] = "scaffnew"
    scenarios: ClassVar[tuple[str, ...]] = ("coins", "full", "one-step", "batches")
    lrate: float = 0.1
    p: float = 0.3

    def begin(self) -> None:
        self.h_i = self.zeros_each()

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * (self.problem.gradient(i, y, k) - self.h_i[i])
        return y

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i] + self.p / self.lrate * (self.x - z)

    def round(self, plan: RoundPlan) -> None:
        z = {i: self.client(i, plan.steps[i]) for i in plan.arrived}
        self.x = np.mean([z[i] - self.lrate / self.p * self.h_i[i] for i in z], axis=0)
        for i in z:
            self.h_i[i] = self.next_variate(i, z[i], plan.steps[i])

    def variates(self) -> dict[str, Array]:
        return {"h_i": self.h_i.copy()}


@dataclass
class FedCM(Oracle):
    """y -= eta (alpha g + (1 - alpha) D) (Xu et al. 2021).

    Then D = -mean_S D_i / (eta K), the round's mean as a gradient, and
    x -= eta_g eta K D. (The paper's own eta_g is the product; so x += eta_g mean_S D_i.)
    All clients take K steps. `variates` shows "d".

    References:
      Xu, Wang, Wang and Yao, "FedCM: federated learning with client-level momentum",
      2021, arXiv:2106.10874.
    """

    name: ClassVar[str] = "fedcm"
    scenarios: ClassVar[tuple[str, ...]] = ("full", "one-step", "partial", "drop-outs", "batches", "server-rate")
    lrate: float = 0.1
    server_lrate: float = 1.0
    alpha: float = 0.3

    def begin(self) -> None:
        self.d = self.zeros()

    def direction(self, gradient: Array) -> Array:
        return self.alpha * gradient + (1 - self.alpha) * self.d

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            y = y - self.lrate * self.direction(self.problem.gradient(i, y, k))
        return y - self.x

    def next_d(self, deltas: dict[int, Array], steps: int) -> Array:
        return -self.mean(deltas) / (self.lrate * steps)

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i]) for i in plan.arrived}
        self.d = self.next_d(deltas, plan.steps[plan.arrived[0]])
        self.x = self.x + self.server_lrate * self.mean(deltas)

    def variates(self) -> dict[str, Array]:
        return {"d": self.d.copy()}
