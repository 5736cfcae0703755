"""What peers do where they differ, as read in their source: variants of the oracles that give their numbers.

Where a known mistake explains a difference, there is none here: `WHERE` then says where it is to be seen.
"""

import numpy as np

from functional_optimodules.testing.federated.averaging import FedNova
from functional_optimodules.testing.federated.mistakes import ScaffoldEarly
from functional_optimodules.testing.federated.servers import FedAdagrad, FedAdam, FedAvgM, FedYogi
from functional_optimodules.testing.federated.variates import FedDyn, Scaffold, ScaffoldOptionI

WHERE = {
    ("flwr", "fedprox"): "the client's loss in the docstring of `FedProx`, serverapp/strategy/fedprox.py",
    ("flwr", "fedadam"): "`FedAdam.aggregate_train`, serverapp/strategy/fedadam.py",
    ("flwr", "fedyogi"): "`FedYogi.aggregate_train`, serverapp/strategy/fedyogi.py",
    ("flwr", "fedadagrad"): "`FedAdagrad.aggregate_train`, serverapp/strategy/fedadagrad.py",
    ("fedjax", "fedadam"): "optax's `scale_by_adam`, for which `fedjax.optimizers.adam` stands",
    ("fluke", "fedavg"): "`Client.fit`, client.py, makes the optimizer once unless `persistency` is off",
    ("pfl", "scaffold"): "`SCAFFOLD.train_one_user`, algorithm/scaffold.py: `get_model_difference` is y - x, not x - y",
}
READINGS = {}


def reading(peer, algorithm, where):
    """Enter a variant as what a peer does, and where that is to be seen."""

    def enter(variant):
        READINGS[peer, algorithm] = variant
        WHERE[peer, algorithm] = where
        return variant

    return enter


@reading("declearn", "scaffold", "`collect_aux_var` of both modules, optimizer/modules/_scaffold.py")
class SeenAndEarly(ScaffoldEarly):
    """The sum of what arrived is divided by the clients heard of so far; a client's variate moves before it arrives."""

    def begin(self):
        super().begin()
        self.total, self.heard = self.zeros(), set()

    def server_variate(self, changes):
        self.total = self.total + np.sum(list(changes.values()), axis=0)
        self.heard |= set(changes)
        return self.total / len(self.heard)


@reading("fedjax", "fedyogi", "optax's `scale_by_yogi`, for which `fedjax.optimizers.yogi` stands")
class OptaxYogi(FedYogi):
    """Moments are corrected for their bias, and both start at 1e-6."""

    def begin(self):
        super().begin()
        self.m, self.v = self.m - 1e-6, self.zeros() + 1e-6

    def move(self):
        first = self.m / (1 - self.beta_1**self.rounds)
        return first / (np.sqrt(self.v / (1 - self.beta_2**self.rounds)) + self.tau)


@reading("fedjax", "fedadagrad", "optax's `scale_by_rss`, for which `fedjax.optimizers.adagrad` stands")
class OptaxAdagrad(FedAdagrad):
    """The divisor is sqrt(v + tau), not sqrt(v) + tau."""

    def move(self):
        return self.m / np.sqrt(self.v + self.tau)


class TwiceTheRate:
    """The server's rate multiplies D too, before its moments are taken; and v starts at 0, not at tau^2."""

    def begin(self):
        super().begin()
        self.v = self.zeros()

    def server(self, delta):
        super().server(self.server_lrate * delta)


FEDOPT = "`FedOptServer`, algorithms/fedopt.py: `hyper_params.lr` is also the rate of `Server.aggregate`"
for oracle in (FedAdam, FedYogi, FedAdagrad):
    variant = type(oracle.__name__, (TwiceTheRate, oracle), {"__doc__": TwiceTheRate.__doc__})
    reading("fluke", oracle.name, FEDOPT)(variant)


@reading("fluke", "fedavgm", "`FedAVGMServer.aggregate`, algorithms/fedavgm.py")
class FirstRoundSkipped(FedAvgM):
    """In the first round the momentum is made, at 0, and does not take up the round's D: nothing moves."""

    begun = False

    def server(self, delta):
        if self.begun:
            super().server(delta)
        self.begun = True


@reading("fluke", "fednova", "`FedNovaServer.aggregate`, algorithms/fednova.py; `Client.fit`, client.py")
class ModelsNotMoves(FedNova):
    """Weights p_i tau_eff / |a_i|_1 are for models, not for moves, and their sum is not 1; local momentum goes on."""

    def begin(self):
        super().begin()
        self.velocity = self.zeros_each()

    def client(self, i, steps):
        y = self.x
        for k in range(steps):
            self.velocity[i] = self.momentum * self.velocity[i] + self.problem.gradient(i, y, k)
            y = y - self.lrate * self.velocity[i]
        return y - self.x

    def round(self, plan):
        effective = self.effective(plan)
        scaled = {i: (self.x + self.client(i, plan.steps[i])) / self.norm(plan.steps[i]) for i in plan.arrived}
        self.x = effective * self.mean(scaled)


@reading("fluke", "scaffold", "`SCAFFOLDServer._get_client_weights`, algorithms/scaffold.py")
class ModelsTimesRate(Scaffold):
    """The server's rate multiplies the mean of the models, not that of the moves."""

    def round(self, plan):
        before = self.x
        super().round(plan)
        self.x = self.x + (self.server_lrate - 1) * before


@reading("fluke", "feddyn", "`FedDynClient.fit`, `receive_model` and `FedDynServer.aggregate`, algorithms/feddyn.py")
class TurnedDual(FedDyn):
    """Duals have the other sign, and alpha twice; h is their mean over S; who is new starts at mean y_i."""

    def begin(self):
        super().begin()
        self.mean_y, self.known = self.x, set()

    def round(self, plan):
        moves = {}
        for i in plan.arrived:
            start = self.x if i in self.known else self.mean_y
            y = start
            for k in range(plan.steps[i]):
                y = y - self.lrate * (self.problem.gradient(i, y, k) + self.alpha * (y - start + self.h_i[i]))
            moves[i] = y
            self.h_i[i] = self.h_i[i] + self.alpha * (start - y)
        self.known |= set(moves)
        self.mean_y = self.mean(moves)
        self.x = self.mean_y + np.mean([self.h_i[i] for i in moves], axis=0)


@reading("pfl", "scaffold-option-1", "`SCAFFOLD.train_one_user`, algorithm/scaffold.py; states in memory")
class NegativeAndShared(ScaffoldOptionI):
    """c_i is minus the gradient; and all that are stored are one buffer, so that it only ever changes at first."""

    def begin(self):
        super().begin()
        self.known = set()

    def round(self, plan):
        deltas, changes = {}, {}
        for i in plan.arrived:
            new = -self.problem.gradient(i, self.x)
            self.c_i[i] = new if i in self.known else self.zeros()
            deltas[i], changes[i] = self.client(i, plan.steps[i]), new - self.c_i[i]
        self.known |= set(deltas)
        self.c = self.server_variate(changes)
        self.x = self.x + self.server_lrate * self.mean(deltas)
