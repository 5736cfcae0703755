"""Mistakes of code in use, as variants of the oracles: each overrides what it does otherwise.

The first line of each says what is otherwise, and where it was seen. Some are
no mistakes but other readings that give other numbers, such as a moment corrected
for its bias where the paper's is not; it is then said so.
"""

from collections.abc import Callable, Mapping

import numpy as np

from .aggregation import (
    CenteredClipping,
    ErrorFeedback,
    ErrorFeedbackSign,
    ErrorFeedbackTopK,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    TrimmedMean,
    centered_clipping,
    geometric_median,
    krum,
    trimmed_mean,
)
from .averaging import Ditto, FedAvg, FedExP, FedNova, FedProx
from .oracle import Oracle
from .oracles import ORACLES
from .problem import Array
from .scenario import RoundPlan
from .servers import DiLoCo, FedACG, FedAdagrad, FedAdam, FedAvgM, FedBuff, FedYogi
from .variates import FedCM, FedDyn, Mime, MimeLite, Scaffnew, Scaffold, ScaffoldOptionI

MISTAKES: dict[str, list[type[Oracle]]] = {name: [] for name in ORACLES}


def known(mistake: type[Oracle]) -> type[Oracle]:
    """Enter a mistake under its oracle's name."""
    MISTAKES[mistake.name].append(mistake)
    return mistake


def known_of(*oracles: type[Oracle]) -> Callable[[type[Oracle]], type[Oracle]]:
    """Enter a mistake that several algorithms' code may make, for each of them."""

    def enter(mistake: type[Oracle]) -> type[Oracle]:
        for oracle in oracles:
            known(type(mistake.__name__ + oracle.__name__, (mistake, oracle), {"__doc__": mistake.__doc__}))
        return mistake

    return enter


# Means


@known_of(FedAvg, FedProx, FedNova, Ditto, FedAvgM, FedAdam, FedYogi, FedAdagrad)
class Unweighted(Oracle):
    """The mean is not by weight."""

    def mean(self, sent: Mapping[int, Array]) -> Array:
        return np.asarray(np.mean(list(sent.values()), axis=0))


@known_of(FedAvg, FedProx, FedNova, FedAvgM, FedAdam, FedYogi, FedAdagrad, Scaffold, FedCM, ErrorFeedbackTopK)
class OverAll(Oracle):
    """The sum over those that sent is divided by the weight of all clients."""

    def mean(self, sent: Mapping[int, Array]) -> Array:
        return super().mean(sent) * self.problem.weights[list(sent)].sum() / self.problem.weights.sum()


# FedAvg


@known
class FedAvgCountsDropOuts(FedAvg):
    """Clients that drop out count in the mean as if they had not moved."""

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i]) if i in plan.arrived else self.zeros() for i in plan.participants}
        self.x = self.x + self.server_lrate * self.mean(deltas)


@known
class FedAvgKeepsMomentum(FedAvg):
    """Local momentum goes on from a client's last round."""

    def begin(self) -> None:
        super().begin()
        self.m = self.zeros_each()

    def client(self, i: int, steps: int) -> Array:
        y = self.x
        for k in range(steps):
            self.m[i] = self.momentum * self.m[i] + self.problem.gradient(i, y, k)
            y = y - self.lrate * self.m[i]
        return y - self.x


@known
class FedAvgPartlyLocal(FedAvg):
    """A part of the parameters is never averaged, as in FedBN (PFLlib #260)."""

    def begin(self) -> None:
        super().begin()
        self.last = self.zeros_each()[:, -1] + self.x[-1]

    def client(self, i: int, steps: int) -> Array:
        y, m = np.append(self.x[:-1], self.last[i]), self.zeros()
        for k in range(steps):
            m = self.momentum * m + self.problem.gradient(i, y, k)
            y = y - self.lrate * m
        self.last[i] = y[-1]
        return np.append(y[:-1] - self.x[:-1], 0.0)


@known
class FedAvgByWork(FedAvg):
    """The mean is by weight times local steps: what `num_examples` is where a client returns all that it saw."""

    def round(self, plan: RoundPlan) -> None:
        deltas = {i: self.client(i, plan.steps[i]) for i in plan.arrived}
        work = self.problem.weights[list(deltas)] * np.array([plan.steps[i] for i in deltas])
        self.x = self.x + self.server_lrate * np.average(list(deltas.values()), axis=0, weights=work)


@known
class FedAvgWithoutServerRate(FedAvg):
    """The server's rate is not used."""

    def begin(self) -> None:
        super().begin()
        self.server_lrate = 1.0


# FedProx


@known
class FedProxNorm(FedProx):
    """The term is the norm, not its square: the pull has the same size everywhere (flwr #2210)."""

    def pull(self, y: Array) -> Array:
        away = y - self.x
        return self.mu / 2 * away / max(float(np.linalg.norm(away)), 1e-12)


@known
class FedProxAliased(FedProx):
    """The reference is the client's own model, so that nothing is pulled: FedAvg (FL-bench #165)."""

    def pull(self, y: Array) -> Array:
        return self.zeros()


@known
class FedProxTwice(FedProx):
    """The term is mu |y - x|^2, not mu / 2: twice the pull."""

    def pull(self, y: Array) -> Array:
        return 2 * super().pull(y)


@known
class FedProxPushes(FedProx):
    """The sign of the term is turned."""

    def pull(self, y: Array) -> Array:
        return -super().pull(y)


# FedNova


@known
class FedNovaIsFedAvg(FedNova):
    """Nothing is normalised: FedAvg."""

    def round(self, plan: RoundPlan) -> None:
        self.x = self.x + self.mean({i: self.client(i, plan.steps[i]) for i in plan.arrived})


@known
class FedNovaBySteps(FedNova):
    """The norm is the number of steps, whatever the local optimizer."""

    def norm(self, steps: int) -> float:
        return steps


@known
class FedNovaEffectiveSteps(FedNova):
    """tau_eff = sum p_i K_i though deltas are divided by |a_i|_1 (with a proximal term, JYWa/FedNova's own code)."""

    def effective(self, plan: RoundPlan) -> float:
        return float(self.mean({i: np.array(float(plan.steps[i])) for i in plan.arrived}))


@known
class FedNovaOnce(FedNova):
    """tau_eff is left out: a round moves as far as one step."""

    def effective(self, plan: RoundPlan) -> float:
        return 1.0


# FedExP


@known
class FedExPTwice(FedExP):
    """The 2 in the denominator is left out."""

    def rate(self, deltas: Array, mean: Array) -> float:
        return max(1.0, float(np.sum(deltas**2) / (len(deltas) * (mean @ mean + self.eps))))


@known
class FedExPUnbounded(FedExP):
    """The rate may fall below 1."""

    def rate(self, deltas: Array, mean: Array) -> float:
        return float(np.sum(deltas**2) / (2 * len(deltas) * (mean @ mean + self.eps)))


@known
class FedExPScaledEps(FedExP):
    """eps is multiplied by |S| once more (another reading: Divyansh03/FedExP, the authors' code)."""

    def rate(self, deltas: Array, mean: Array) -> float:
        return max(1.0, float(np.sum(deltas**2) / (2 * len(deltas) * (mean @ mean + len(deltas) * self.eps))))


@known
class FedExPIsFedAvg(FedExP):
    """The rate is 1: FedAvg."""

    def rate(self, deltas: Array, mean: Array) -> float:
        return 1.0


# Ditto


@known
class DittoForgets(Ditto):
    """A personal model starts each round from the server's parameters."""

    def personal(self, i: int, steps: int) -> Array:
        self.v[i] = self.x
        return super().personal(i, steps)


@known
class DittoTowardsTrained(Ditto):
    """Personal models are drawn to the client's trained global model, not to the one that the round began with."""

    def personal(self, i: int, steps: int) -> Array:
        received = self.x
        self.x = received + self.client(i, steps, received)
        v = super().personal(i, steps)
        self.x = received
        return v


@known
class DittoUnbound(Ditto):
    """Personal models are not drawn to the global one: local training."""

    def begin(self) -> None:
        super().begin()
        self.lam = 0.0


# FedAvgM


@known
class FedAvgMDamped(FedAvgM):
    """v = beta v + (1 - beta) D (APPFL #129)."""

    def server(self, delta: Array) -> None:
        super().server((1 - self.server_momentum) * delta)


@known
class FedAvgMNesterov(FedAvgM):
    """Nesterov's momentum: x += eta_g (beta v + D) (another reading)."""

    def server(self, delta: Array) -> None:
        self.v = self.server_momentum * self.v + delta
        self.x = self.x + self.server_lrate * (self.server_momentum * self.v + delta)


@known
class FedAvgMForgets(FedAvgM):
    """Momentum is lost from round to round: FedAvg."""

    def server(self, delta: Array) -> None:
        self.v = self.zeros()
        super().server(delta)


# FedAdam, FedYogi, FedAdagrad


@known_of(FedAdam, FedYogi)
class Corrected(FedAdam):
    """Moments are corrected for their bias (another reading: Kingma and Ba's Adam; fluke #33 has it as a flag)."""

    def move(self) -> Array:
        m, v = self.m / (1 - self.beta_1**self.rounds), self.v / (1 - self.beta_2**self.rounds)
        return np.asarray(m / (np.sqrt(v) + self.tau))


@known_of(FedAdam, FedYogi)
class RateCorrected(FedAdam):
    """The rate is corrected for the moments' bias, by a count of rounds that is one too high (Flower PR #4362)."""

    def move(self) -> Array:
        rounds = self.rounds + 1
        factor = np.sqrt(1 - self.beta_2**rounds) / (1 - self.beta_1**rounds)
        return np.asarray(factor * self.m / (np.sqrt(self.v) + self.tau))


@known_of(FedAdam, FedYogi, FedAdagrad)
class FromZero(FedAdam):
    """v starts at 0, not at tau^2."""

    def begin(self) -> None:
        super().begin()
        self.v = self.zeros()


@known_of(FedAdam, FedYogi)
class NoMomentum(FedAdam):
    """The server moves by D, not by m (Flower #893)."""

    def server(self, delta: Array) -> None:
        self.rounds += 1
        self.m, self.v = delta, self.second(delta)
        self.x = self.x + self.server_lrate * self.move()


@known_of(FedAdam, FedYogi)
class MomentSquared(FedAdam):
    """v is taken from m, not from D (FedMLLM #4)."""

    def server(self, delta: Array) -> None:
        self.rounds += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * delta
        self.v = self.second(self.m)
        self.x = self.x + self.server_lrate * self.move()


@known_of(FedAdam, FedYogi, FedAdagrad)
class TauInside(FedAdam):
    """tau^2 is added within the root, not tau to it."""

    def move(self) -> Array:
        return np.asarray(self.m / np.sqrt(self.v + self.tau**2))


@known_of(FedAdam, FedYogi, FedAdagrad)
class TinyTau(FedAdam):
    """tau is 1e-8, Adam's epsilon, whatever is asked for."""

    def begin(self) -> None:
        self.tau = 1e-8
        super().begin()


@known_of(FedAdam, FedYogi, FedAdagrad)
class Uphill(FedAdam):
    """The sign of D is turned: the server climbs."""

    def server(self, delta: Array) -> None:
        super().server(-delta)


@known
class FedAdagradMomentum(FedAdagrad):
    """b1 = 0.9, FedAdam's default, whatever is asked for."""

    def begin(self) -> None:
        super().begin()
        self.beta_1 = 0.9


@known
class FedYogiIsAdam(FedYogi):
    """v moves as Adam's."""

    def second(self, delta: Array) -> Array:
        return FedAdam.second(self, delta)


@known
class FedYogiSign(FedYogi):
    """The sign in v's update is turned, so that v runs away from D^2."""

    def second(self, delta: Array) -> Array:
        v = self.v + (1 - self.beta_2) * delta**2 * np.sign(self.v - delta**2)
        return np.maximum(v, 0.0)


# FedACG


@known
class FedACGStays(FedACG):
    """The server sends x, not x + lambda m: FedAvgM with a proximal term."""

    def sent(self) -> Array:
        return self.x


@known
class FedACGHeldAtX(FedACG):
    """Clients are held near x, not near what was sent."""

    def pull(self, y: Array, z: Array) -> Array:
        return self.beta * (y - self.x)


@known
class FedACGPullsTwice(FedACG):
    """The term is beta |y - z|^2, not beta / 2: twice the pull."""

    def pull(self, y: Array, z: Array) -> Array:
        return 2 * super().pull(y, z)


@known
class FedACGCountsTwice(FedACG):
    """Deltas are taken from x, so that lambda m counts twice in the new momentum."""

    def client(self, i: int, steps: int) -> Array:
        return super().client(i, steps) + self.lam * self.m


# FedBuff


@known
class FedBuffEqual(FedBuff):
    """Stale deltas weigh as much as fresh ones."""

    def scale(self, staleness: int) -> float:
        return 1.0


@known
class FedBuffNormalized(FedBuff):
    """The sum is divided by the sum of the staleness weights, not by the size of the buffer."""

    def buffered(self, deltas: list[Array], scales: list[float]) -> Array:
        return np.asarray(np.average(deltas, axis=0, weights=scales))


@known
class FedBuffFresh(FedBuff):
    """Clients start from the server's newest parameters, though they are said to be stale."""

    def started(self, staleness: int) -> Array:
        return self.x


@known
class FedBuffInverse(FedBuff):
    """Staleness weighs 1 / (1 + s), without the root."""

    def scale(self, staleness: int) -> float:
        return 1 / (1 + staleness)


@known
class FedBuffModels(FedBuff):
    """What is buffered is the client's model less the server's newest, not less the one that it started from."""

    def client(self, i: int, steps: int, start: Array) -> Array:
        return super().client(i, steps, start) + start - self.x


# DiLoCo


@known
class DiLoCoForgets(DiLoCo):
    """The inner optimizer starts anew in each round."""

    def client(self, i: int, steps: int) -> Array:
        self.first[i], self.second[i], self.count[i] = 0.0, 0.0, 0
        return super().client(i, steps)


@known
class DiLoCoHeavyBall(DiLoCo):
    """The outer momentum is the classical one, not Nesterov's."""

    def outward(self, gradient: Array) -> Array:
        super().outward(gradient)
        return self.outer


@known
class DiLoCoCoupledDecay(DiLoCo):
    """Weight decay is added to the gradient: Adam with L2, not AdamW."""

    def step(self, i: int, y: Array, gradient: Array) -> Array:
        return y - self.lrate * self.adam(i, gradient + self.w_decay * y)


@known
class DiLoCoUphill(DiLoCo):
    """The outer gradient's sign is turned."""

    def outward(self, gradient: Array) -> Array:
        return super().outward(-gradient)


@known
class DiLoCoOuterForgets(DiLoCo):
    """The outer momentum starts anew in each round."""

    def outward(self, gradient: Array) -> Array:
        self.outer = self.zeros()
        return super().outward(gradient)


# SCAFFOLD


@known_of(Scaffold, ScaffoldOptionI)
class OverSampled(Scaffold):
    """The server divides the changes of variates by the sampled clients, not by N (NIID-Bench #12)."""

    def server_variate(self, changes: dict[int, Array]) -> Array:
        return self.c + np.mean(list(changes.values()), axis=0)


@known
class ScaffoldSign(Scaffold):
    """The sign of the correction is turned: g + c_i - c (Fed-BioMed #734)."""

    def correction(self, i: int) -> Array:
        return -super().correction(i)


@known
class ScaffoldSeen(Scaffold):
    """The server divides by the clients seen so far, not by N (declearn 2.9)."""

    def begin(self) -> None:
        super().begin()
        self.seen: set[int] = set()

    def server_variate(self, changes: dict[int, Array]) -> Array:
        moved = self.c_i.copy()
        for i, change in changes.items():
            moved[i] += change
        self.seen |= set(changes)
        return np.asarray(moved.sum(axis=0) / len(self.seen))


@known
class ScaffoldWhole(Scaffold):
    """The server adds the clients' new variates, not their changes (Plato #382)."""

    def server_variate(self, changes: dict[int, Array]) -> Array:
        return super().server_variate({i: self.c_i[i] + change for i, change in changes.items()})


@known
class ScaffoldOnePass(Scaffold):
    """The steps of one pass over the data are counted, not of all passes (PFLlib #160)."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return super().next_variate(i, delta, self.problem.num_batches)


@known
class ScaffoldPasses(Scaffold):
    """What a client moved by is divided by its passes over the data, not by eta K (Plato #386)."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.c_i[i] - self.c - delta / -(-steps // self.problem.num_batches)


@known
class ScaffoldOneMore(Scaffold):
    """One step too many is counted."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return super().next_variate(i, delta, steps + 1)


@known
class ScaffoldSameSteps(Scaffold):
    """All clients are taken to have made as many steps as the first."""

    def round(self, plan: RoundPlan) -> None:
        self.counted = plan.steps[plan.arrived[0]]
        super().round(plan)

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return super().next_variate(i, delta, self.counted)


@known
class ScaffoldSamplesTimesEpochs(Scaffold):
    """Steps are counted as examples times passes, not batches (FL4Health PR #64)."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        examples = int(self.problem.weights[i]) * 8
        return super().next_variate(i, delta, examples * -(-steps // self.problem.num_batches))


@known
class ScaffoldFromModel(Scaffold):
    """Variates start at the model's weights, not at zero (Flower's baseline niid_bench)."""

    def begin(self) -> None:
        super().begin()
        self.c, self.c_i = self.x.copy(), self.c_i + self.x


@known
class ScaffoldEarly(Scaffold):
    """A client's variate moves though its message is lost: c is no longer the mean of the c_i (declearn 2.9)."""

    def round(self, plan: RoundPlan) -> None:
        lost = [i for i in plan.participants if i in plan.dropped]
        moved = {i: self.next_variate(i, self.client(i, plan.steps[i]), plan.steps[i]) for i in lost}
        super().round(plan)
        for i, variate in moved.items():
            self.c_i[i] = variate


@known
class ScaffoldWithoutRate(Scaffold):
    """The local rate is left out: c_i+ = c_i - c + (x - y) / K."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.c_i[i] - self.c - delta / steps


@known
class ScaffoldFrozen(Scaffold):
    """The server's variate never moves (NVFlare #5036)."""

    def server_variate(self, changes: dict[int, Array]) -> Array:
        return self.c


@known
class ScaffoldForgets(Scaffold):
    """The term - c is left out of c_i+, which is then the mean of corrected gradients."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return super().next_variate(i, delta, steps) + self.c


@known
class ScaffoldOptionTwo(ScaffoldOptionI):
    """Option II, in place of option I."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return Scaffold.next_variate(self, i, delta, steps)


@known
class ScaffoldOptionIBatch(ScaffoldOptionI):
    """The gradient is that of the first batch, not of all data."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.problem.gradient(i, self.x, 0)


@known
class ScaffoldOptionIAfter(ScaffoldOptionI):
    """The gradient is taken at y, at the end of the local steps, not at x."""

    def next_variate(self, i: int, delta: Array, steps: int) -> Array:
        return self.problem.gradient(i, self.x + delta)


# FedDyn


@known
class FedDynOverSampled(FedDyn):
    """h is divided by the sampled clients, not by N."""

    def next_h(self, deltas: dict[int, Array]) -> Array:
        return self.h - self.alpha * np.mean(list(deltas.values()), axis=0)


@known
class FedDynHSign(FedDyn):
    """h is added to the mean, not subtracted."""

    def next_x(self, deltas: dict[int, Array]) -> Array:
        return self.x + self.mean(deltas) + self.h / self.alpha


@known
class FedDynHUndivided(FedDyn):
    """h is subtracted without division by alpha."""

    def next_x(self, deltas: dict[int, Array]) -> Array:
        return self.x + self.mean(deltas) - self.h


@known
class FedDynOneX(FedDyn):
    """h moves by sum y_i - x, one x for all y_i (the reading that PFLlib #29 asks about)."""

    def next_h(self, deltas: dict[int, Array]) -> Array:
        return super().next_h(deltas) - self.alpha / self.problem.num_clients * (len(deltas) - 1) * self.x


@known
class FedDynNoH(FedDyn):
    """The server takes the plain mean: h is left out."""

    def next_x(self, deltas: dict[int, Array]) -> Array:
        return self.x + self.mean(deltas)


@known
class FedDynHForgets(FedDyn):
    """h is made of the last round alone."""

    def next_h(self, deltas: dict[int, Array]) -> Array:
        return super().next_h(deltas) - self.h


@known
class FedDynDualSign(FedDyn):
    """L_i is added to the gradient, not subtracted."""

    def direction(self, i: int, y: Array, k: int) -> Array:
        return super().direction(i, y, k) + 2 * self.h_i[i]


@known
class FedDynNoPenalty(FedDyn):
    """The proximal term is left out of the local loss."""

    def direction(self, i: int, y: Array, k: int) -> Array:
        return super().direction(i, y, k) - self.alpha * (y - self.x)


@known
class FedDynPenaltyTwice(FedDyn):
    """The proximal term is alpha |y - x|^2, not alpha / 2."""

    def direction(self, i: int, y: Array, k: int) -> Array:
        return super().direction(i, y, k) + self.alpha * (y - self.x)


@known
class FedDynEarly(FedDyn):
    """A client's L_i moves though its message is lost."""

    def round(self, plan: RoundPlan) -> None:
        lost = [i for i in plan.participants if i in plan.dropped]
        moved = {i: self.next_dual(i, self.client(i, plan.steps[i])) for i in lost}
        super().round(plan)
        for i, dual in moved.items():
            self.h_i[i] = dual


# Mime, MimeLite


@known_of(Mime, MimeLite)
class MomentumMoves(Mime):
    """The momentum moves in the local steps, instead of staying the server's."""

    def client(self, i: int, steps: int, c: Array) -> Array:
        y, m = self.x, self.m
        for k in range(steps):
            m = (1 - self.momentum) * self.corrected(i, y, k, c) + self.momentum * m
            y = y - self.lrate * m
        return y - self.x


@known_of(Mime, MimeLite)
class MomentumFromDeltas(Mime):
    """The server's momentum is taken from what clients moved by, not from the gradients at x."""

    def next_momentum(self, c: Array, deltas: dict[int, Array], plan: RoundPlan) -> Array:
        gradients = {i: -delta / (self.lrate * plan.steps[i]) for i, delta in deltas.items()}
        return (1 - self.momentum) * self.mean(gradients) + self.momentum * self.m


@known_of(Mime, MimeLite)
class MomentumUndamped(Mime):
    """Momentum is m = g + beta m: a rate 1 / (1 - beta) as large (another reading: FedJAX with optax's sgd)."""

    def begin(self) -> None:
        super().begin()
        self.lrate = self.lrate / (1 - self.momentum)


@known
class MimeUncorrected(Mime):
    """Gradients are not corrected: MimeLite."""

    def corrected(self, i: int, y: Array, k: int, c: Array) -> Array:
        return self.problem.gradient(i, y, k)


@known
class MimeLiteCorrected(MimeLite):
    """Gradients are corrected: Mime."""

    def corrected(self, i: int, y: Array, k: int, c: Array) -> Array:
        return Mime.corrected(self, i, y, k, c)


@known
class MimeWholeAnchor(Mime):
    """The gradient at x that is subtracted is of all the client's data, not of the same batch."""

    def corrected(self, i: int, y: Array, k: int, c: Array) -> Array:
        return self.problem.gradient(i, y, k) - self.problem.gradient(i, self.x) + c


# Scaffnew


@known
class ScaffnewBySteps(Scaffnew):
    """h_i moves by (x - z_i) / (K eta), the round's number of steps, in place of p / eta."""

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i] + (self.x - z) / (steps * self.lrate)


@known
class ScaffnewWithoutP(Scaffnew):
    """h_i moves by (x - z_i) / eta, without p."""

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i] + (self.x - z) / self.lrate


@known
class ScaffnewSign(Scaffnew):
    """h_i moves the other way."""

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i] - self.p / self.lrate * (self.x - z)


@known
class ScaffnewForgets(Scaffnew):
    """h_i never moves: local descent with a random number of steps."""

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i]


@known
class ScaffnewFromStart(Scaffnew):
    """h_i moves by what the client moved from the last x, not by what it is away from the new one."""

    def round(self, plan: RoundPlan) -> None:
        self.last = self.x
        super().round(plan)

    def next_variate(self, i: int, z: Array, steps: int) -> Array:
        return self.h_i[i] + self.p / self.lrate * (self.last - z)


# FedCM


@known
class FedCMSwapped(FedCM):
    """alpha weighs the momentum, 1 - alpha the gradient."""

    def direction(self, gradient: Array) -> Array:
        return (1 - self.alpha) * gradient + self.alpha * self.d


@known
class FedCMUndivided(FedCM):
    """D is the mean of what clients moved by, not divided by eta K."""

    def next_d(self, deltas: dict[int, Array], steps: int) -> Array:
        return -self.mean(deltas)


@known
class FedCMOverAll(FedCM):
    """D is divided by all clients, not by those that sent."""

    def next_d(self, deltas: dict[int, Array], steps: int) -> Array:
        return super().next_d(deltas, steps) * len(deltas) / self.problem.num_clients


@known
class FedCMSign(FedCM):
    """The sign of D is turned."""

    def next_d(self, deltas: dict[int, Array], steps: int) -> Array:
        return -super().next_d(deltas, steps)


# Robust aggregation


@known
class MedianLower(Median):
    """Of an even number, the lower middle is taken, not the mean of both (torch.median)."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return np.asarray(np.sort(deltas, axis=0)[(len(deltas) - 1) // 2])


@known
class MedianIsMean(Median):
    """The mean is taken."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return np.asarray(deltas.mean(axis=0))


@known
class TrimmedMeanHalf(TrimmedMean):
    """The share beta is trimmed from both ends together, not from each."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return trimmed_mean(deltas, self.beta / 2)


@known
class TrimmedMeanTop(TrimmedMean):
    """Only the largest values are trimmed."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return np.asarray(np.sort(deltas, axis=0)[: len(deltas) - int(self.beta * len(deltas))].mean(axis=0))


@known
class KrumOneMore(Krum):
    """Scores sum n - f - 1 distances, or count the distance to itself among n - f - 2 of them."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return krum(deltas, int(self.byzantine) + 1)


@known
class KrumFarthest(Krum):
    """The D_i of the largest score is taken."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        others = krum(deltas, int(self.byzantine), len(deltas) - 1) * (len(deltas) - 1)
        return deltas.sum(axis=0) - others


@known
class MultiKrumAll(MultiKrum):
    """The mean is that of n - f, whatever number is asked for."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return krum(deltas, int(self.byzantine), len(deltas) - int(self.byzantine))


@known
class MultiKrumOne(MultiKrum):
    """One is taken: Krum."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return krum(deltas, int(self.byzantine))


@known
class GeometricMedianUnweighted(GeometricMedian):
    """Weights are left out."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return geometric_median(deltas, np.ones(len(deltas)), int(self.passes), self.smoothing)


@known
class GeometricMedianSquared(GeometricMedian):
    """Weiszfeld's weights are one over the squared distance."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        z = np.average(deltas, axis=0, weights=weights)
        for _ in range(int(self.passes)):
            nearness = weights / np.maximum(self.smoothing, np.sum((deltas - z) ** 2, axis=1))
            z = np.average(deltas, axis=0, weights=nearness)
        return np.asarray(z)


@known
class GeometricMedianConverged(GeometricMedian):
    """Passes go on until next to nothing moves, whatever number is asked for."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return geometric_median(deltas, weights, 100, self.smoothing)


@known
class CenteredClippingAtZero(CenteredClipping):
    """The centre is 0 in each round, not the last round's aggregate (another reading: no memory)."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        return centered_clipping(deltas, self.zeros(), self.radius, int(self.passes))


@known
class CenteredClippingElements(CenteredClipping):
    """Each element is clipped, not the norm."""

    def aggregate(self, deltas: Array, weights: Array) -> Array:
        self.v = self.v + np.mean(np.clip(deltas - self.v, -self.radius, self.radius), axis=0)
        return self.v


# Error feedback


@known_of(ErrorFeedbackTopK, ErrorFeedbackSign)
class WithoutMemory(ErrorFeedback):
    """What was not sent is forgotten."""

    def remember(self, i: int, u: Array, sent: Array) -> None:
        self.e[i] = 0.0


@known_of(ErrorFeedbackTopK, ErrorFeedbackSign)
class MemoryMovesEarly(ErrorFeedback):
    """A client's memory moves though its message is lost: what it held is nowhere."""

    def round(self, plan: RoundPlan) -> None:
        for i in plan.participants:
            if i in plan.dropped:
                u = self.e[i] + self.client(i, plan.steps[i], self.x)
                self.remember(i, u, self.compress(u))
        super().round(plan)


@known
class TopKRemembersDelta(ErrorFeedbackTopK):
    """The memory is the round's delta less what was sent: what was left before is lost."""

    def remember(self, i: int, u: Array, sent: Array) -> None:
        self.e[i] = u - self.e[i] - sent


@known
class TopKSigned(ErrorFeedbackTopK):
    """The largest entries are taken, not those of the largest modulus."""

    def compress(self, u: Array) -> Array:
        sent = np.zeros_like(u)
        largest = np.argsort(-u, kind="stable")[: int(self.k)]
        sent[largest] = u[largest]
        return sent


@known
class SignUnscaled(ErrorFeedbackSign):
    """The sign is sent without |u|_1 / d."""

    def compress(self, u: Array) -> Array:
        return np.sign(u)


@known
class SignByNorm(ErrorFeedbackSign):
    """The scale is |u|_2 / d, in place of |u|_1 / d."""

    def compress(self, u: Array) -> Array:
        return np.asarray(np.linalg.norm(u) / u.size * np.sign(u))
