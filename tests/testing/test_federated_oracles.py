"""The oracles of federated algorithms: right by closed forms, passed by what is right, failed by what is not."""

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

from functional_optimodules.testing import federated
from functional_optimodules.testing.federated import (
    INVARIANTS,
    MISTAKES,
    ORACLES,
    SCENARIOS,
    TOLERANCE,
    RoundPlan,
    Scenario,
    check,
    check_invariants,
    explain,
    quadratics,
    table,
    trajectory,
)
from functional_optimodules.testing.federated import aggregation as aggregate
from functional_optimodules.testing.federated.invariants import consistency

ALL = (0, 1, 2, 3, 4)
CASES = [(name, mistake) for name in ORACLES for mistake in MISTAKES[name]]


class Direct:
    """The adapter of an oracle, or of a mistaken variant of one."""

    def __init__(self, oracle):
        self.oracle = oracle

    def make(self, algorithm, problem, hyper):
        return self.oracle(problem, **hyper)

    def round(self, state, plan):
        state.round(plan)
        return state

    def params(self, state):
        return state.x

    def variates(self, state):
        return state.variates()


class Float32Problem:
    """A problem whose gradients, and all that is made of them, are those of float32."""

    def __init__(self, problem):
        for field in dataclasses.fields(problem):
            setattr(self, field.name, getattr(problem, field.name).astype(np.float32))
        self.num_clients, self.num_batches = problem.num_clients, problem.num_batches

    def gradient(self, client, y, step=None):
        centres = self.centres[client]
        centre = centres.mean(axis=0) if step is None else centres[step % self.num_batches]
        return self.curvatures[client] @ (np.float32(y) - centre)


class Float32(Direct):
    """An implementation in float32."""

    def make(self, algorithm, problem, hyper):
        return self.oracle(Float32Problem(problem), **hyper)

    def round(self, state, plan):
        state.round(plan)
        for name, value in vars(state).items():
            if isinstance(value, np.ndarray):
                setattr(state, name, value.astype(np.float32))
        return state


class WithoutVariates:
    """An adapter that shows parameters alone."""

    def __init__(self, oracle):
        self.make, self.round, self.params = Direct(oracle).make, Direct(oracle).round, Direct(oracle).params


def run(name, scenario, **hyper):
    scenario = SCENARIOS[scenario] if isinstance(scenario, str) else scenario
    oracle = ORACLES[name](scenario.problem(), **hyper)
    for plan in scenario.plans:
        oracle.round(plan)
    return oracle


# What is right passes, what is mistaken does not, and is named


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_passes_its_own_check_in_every_scenario(name):
    findings = check(Direct(ORACLES[name]), name)
    assert [finding.scenario for finding in findings] == list(ORACLES[name].scenarios)
    assert all(finding.worst == 0 for finding in findings)
    assert explain(findings) == f"passes {len(findings)} of {len(findings)} scenarios"


@pytest.mark.parametrize("name", ORACLES)
def test_a_float32_implementation_passes_with_a_margin(name):
    findings = check(Float32(ORACLES[name]), name)
    assert 0 < max(finding.worst for finding in findings) < TOLERANCE / 10
    assert all(finding.ok for finding in check_invariants(Float32(ORACLES[name]), name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mistake"), CASES, ids=[f"{name}-{mistake.__name__}" for name, mistake in CASES])
def test_a_known_mistake_is_caught_and_named(name, mistake):
    findings = check(Direct(mistake), name)
    assert max(finding.worst for finding in findings) > 10 * TOLERANCE
    assert all(mistake.summary() in finding.matches for finding in findings)
    assert explain(findings).endswith(f": {mistake.summary()}")


@pytest.mark.parametrize("name", ORACLES)
def test_mistakes_are_known_of_every_algorithm(name):
    assert MISTAKES[name]
    assert len({mistake.summary() for mistake in MISTAKES[name]}) == len(MISTAKES[name])


def test_a_finding_says_where_numbers_part_and_which_mistake_they_match():
    (mistake,) = (each for each in MISTAKES["scaffold"] if "OverSampled" in each.__name__)
    full, partial = (check(Direct(mistake), "scaffold", name)[0] for name in ("full", "partial"))
    assert full.ok
    assert str(partial).startswith("scaffold, partial: differs from round 2 on, by up to ")
    assert str(partial).endswith(
        "\n  matches: The server divides the changes of variates by the sampled clients, not by N (NIID-Bench #12)"
    )
    head, _, first, second = table([full, partial]).splitlines()
    assert head == "| algorithm | scenario | result | difference by round | matches |"
    assert first.startswith("| scaffold | full | passes | 0e+00 ")
    assert "| differs | 0e+00 " in second
    assert "NIID-Bench #12" in second


def test_numbers_of_no_known_mistake_are_said_to_be_so():
    class Twice(ORACLES["fedavg"]):
        def client(self, i, steps):
            return 2 * super().client(i, steps)

    assert explain(check(Direct(Twice), "fedavg")).endswith(": no known mistake, nor any two, give these numbers")


def test_two_mistakes_at_once_are_named():
    by_name = {mistake.__name__: mistake for mistake in MISTAKES["fedadam"]}
    first, second = by_name["RateCorrectedFedAdam"], by_name["FromZeroFedAdam"]

    class Both(first, second):
        pass

    findings = check(Direct(Both), "fedadam")
    assert not any(match for finding in findings for match in finding.matches)
    assert explain(findings).endswith((f": {first.summary()}; and: {second.summary()}",
                                       f": {second.summary()}; and: {first.summary()}"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_any_two_mistakes_can_be_made_at_once(name):
    plan = SCENARIOS[ORACLES[name].scenarios[-1]].plans[0]
    for pair in itertools.permutations(MISTAKES[name], 2):
        oracle = type("Both", pair, {})(quadratics())
        oracle.round(plan)
        assert oracle.shown().shape == ORACLES[name](quadratics()).shown().shape


def test_variates_that_start_at_the_weights_are_seen_only_with_sampling():
    (mistake,) = (each for each in MISTAKES["scaffold"] if each.__name__ == "ScaffoldFromModel")
    worst = {finding.scenario: finding.worst for finding in check(Direct(mistake), "scaffold")}
    assert worst["full"] < 1e-12
    assert worst["unequal-steps"] < 1e-12
    assert worst["partial"] > 0.1


def test_an_implementation_that_diverges_fails():
    class Diverges(ORACLES["fedavg"]):
        def round(self, plan):
            self.x = self.x + np.inf

    class Nowhere(ORACLES["fedavg"]):
        def round(self, plan):
            self.x = self.x * np.nan

    assert not check(Direct(Diverges), "fedavg", "full")[0].ok
    assert not check(Direct(Nowhere), "fedavg", "full")[0].ok


# Adapters


def test_an_unknown_algorithm_or_scenario_is_an_error_that_lists_those_there_are():
    with pytest.raises(KeyError, match=r"no algorithm is called 'fedavrg'; there are .*fedavg, .*scaffold"):
        check(Direct(ORACLES["fedavg"]), "fedavrg")
    with pytest.raises(KeyError, match=r"no algorithm is called 'fedavrg'"):
        check_invariants(Direct(ORACLES["fedavg"]), "fedavrg")
    with pytest.raises(KeyError, match=r"no scenario is called 'half'; there are .*full, .*partial"):
        check(Direct(ORACLES["fedavg"]), "fedavg", "half")
    with pytest.raises(KeyError, match=r"no hyper-parameter of fedavg is called 'mu'; there are lrate, "):
        check(Direct(ORACLES["fedavg"]), "fedavg", "proximal")


def test_parameters_of_another_shape_or_start_are_errors():
    class Column(Direct):
        def params(self, state):
            return state.x[:, None]

    class Zeros(Direct):
        def make(self, algorithm, problem, hyper):
            return super().make(algorithm, dataclasses.replace(problem, start=np.zeros(3)), hyper)

    with pytest.raises(ValueError, match=r"Column.params gave the shape \(3, 1\); expected \(3,\)"):
        check(Column(ORACLES["fedavg"]), "fedavg")
    with pytest.raises(ValueError, match=r"fedavg: make's parameters are \[0\. 0\. 0\.\], and should be problem.start"):
        check(Zeros(ORACLES["fedavg"]), "fedavg")


def test_what_an_implementation_does_not_have_is_skipped_with_its_reason():
    class NoSampling(Direct):
        def round(self, state, plan):
            if plan.participants != ALL:
                raise NotImplementedError("all clients take part")
            return super().round(state, plan)

    findings = {finding.scenario: finding for finding in check(NoSampling(ORACLES["fedavg"]), "fedavg")}
    assert findings["full"].ok
    assert not findings["partial"].ok
    assert str(findings["partial"]) == "fedavg, partial: skipped: all clients take part"
    assert explain(list(findings.values())).startswith("passes ")
    assert explain([findings["partial"]]) == "was not run"
    assert "| fedavg | partial | skipped | all clients take part |  |" in table(findings.values())


def test_what_is_not_in_the_parameters_needs_variates():
    (finding, *_) = check(WithoutVariates(ORACLES["ditto"]), "ditto")
    assert finding.skipped == "ditto is seen in personal, and the adapter has no `variates`"
    skipped = {finding.invariant for finding in check_invariants(WithoutVariates(ORACLES["scaffold"]), "scaffold")
               if finding.skipped}  # fmt: skip
    assert skipped == {"mean-variate"}


def test_a_scenario_of_ones_own_is_checked():
    mine = Scenario("mine", (RoundPlan((0, 4), (2, 1, 1, 1, 3)),), hyper={"lrate": 0.3})
    (finding,) = check(Direct(ORACLES["fedavg"]), "fedavg", mine)
    assert (finding.scenario, finding.worst, len(finding.differences)) == ("mine", 0, 1)


def test_the_folder_works_by_itself_without_jax():
    code = (
        "import sys, federated\n"
        "assert not any(name.partition('.')[0] in ('jax', 'functional_optimodules') for name in sys.modules)\n"
        "print(len(federated.ORACLES))"
    )
    parent = Path(inspect.getfile(federated)).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(ORACLES))


# Invariants


@pytest.mark.parametrize("name", ORACLES)
def test_invariants_hold_of_the_oracles(name):
    findings = check_invariants(Direct(ORACLES[name]), name)
    assert [f.invariant for f in findings] == [i.name for i in INVARIANTS if name in i.algorithms]
    assert all(finding.ok for finding in findings), [str(finding) for finding in findings]


@pytest.mark.parametrize(
    ("name", "mistake", "broken"),
    [
        ("fedavg", "UnweightedFedAvg", {"descent"}),
        ("fednova", "FedNovaIsFedAvg", {"consistency"}),
        ("fednova", "UnweightedFedNova", {"descent", "consistency"}),
        ("scaffold", "OverSampledScaffold", {"mean-variate"}),
        ("scaffold", "ScaffoldSeen", {"mean-variate"}),
        ("scaffold", "ScaffoldEarly", {"mean-variate"}),
        ("scaffold", "ScaffoldSign", {"optimum"}),
        ("scaffold", "ScaffoldWhole", {"descent", "mean-variate", "optimum"}),
        ("scaffold", "ScaffoldFrozen", {"descent", "mean-variate", "optimum"}),
        ("scaffold-option-1", "OverSampledScaffoldOptionI", {"mean-variate"}),
        ("feddyn", "FedDynOverSampled", {"mean-dual"}),
        ("feddyn", "FedDynEarly", {"mean-dual"}),
        ("feddyn", "FedDynNoH", {"optimum"}),
        ("feddyn", "FedDynHForgets", {"mean-dual", "optimum"}),
        ("scaffnew", "ScaffnewFromStart", {"descent", "zero-sum"}),
        ("scaffnew", "ScaffnewForgets", {"optimum"}),
    ],
)
def test_a_mistake_breaks_an_invariant(name, mistake, broken):
    (mistaken,) = (each for each in MISTAKES[name] if each.__name__ == mistake)
    findings = check_invariants(Direct(mistaken), name)
    assert {finding.invariant for finding in findings if not finding.ok} == broken
    assert all("does not hold" in str(finding) for finding in findings if not finding.ok)


def test_fedavg_is_inconsistent_with_unequal_steps_where_fednova_is_not():
    assert consistency(Direct(ORACLES["fednova"]), "fednova") < 0.01
    assert consistency(Direct(ORACLES["fedavg"]), "fedavg") > 0.2


@pytest.mark.slow
def test_fedavg_converges_to_the_optimum_of_weights_times_steps():
    rounds = tuple(RoundPlan(ALL, (1, 2, 9, 3, 6)) for _ in range(4000))
    fedavg = run("fedavg", Scenario("long", rounds), lrate=2e-3)
    surrogate = fedavg.problem.optimum([1, 2, 9, 3, 6])
    assert np.linalg.norm(fedavg.x - surrogate) < 0.02
    assert np.linalg.norm(fedavg.problem.optimum() - surrogate) > 0.5


# The oracles, by what does not depend on them


@pytest.mark.parametrize("num_batches", [1, 3])
def test_gradients_are_those_of_the_losses_and_vanish_at_the_optimum(num_batches):
    problem = quadratics((5, 1, 3, 2, 4), num_batches)
    assert np.linalg.eigvalsh(problem.curvatures).min() > 0.4
    assert np.linalg.eigvalsh(problem.curvatures).max() < 2.5
    for client in ALL:
        for e in np.eye(3):
            slope = problem.loss(client, problem.start + e / 2) - problem.loss(client, problem.start - e / 2)
            np.testing.assert_allclose(e @ problem.gradient(client, problem.start), slope, atol=1e-12)
        batches = [problem.gradient(client, problem.start, k) for k in range(num_batches)]
        np.testing.assert_allclose(np.mean(batches, axis=0), problem.gradient(client, problem.start), atol=1e-12)
    total = sum(w * problem.gradient(i, problem.optimum()) for i, w in enumerate(problem.weights))
    np.testing.assert_allclose(total, 0, atol=1e-12)


def test_fedavg_of_k_steps_is_a_closed_form():
    scenario = SCENARIOS["mixed-weights"]
    scenario = dataclasses.replace(scenario, num_batches=1)
    problem, x = scenario.problem(), scenario.problem().start
    for plan, params in zip(scenario.plans, trajectory(Direct(ORACLES["fedavg"]), "fedavg", scenario), strict=True):
        ends, weights = [], []
        for i in set(plan.participants) - set(plan.dropped):
            power = np.linalg.matrix_power(np.eye(3) - 0.1 * problem.curvatures[i], plan.steps[i])
            ends.append(problem.centres[i, 0] + power @ (x - problem.centres[i, 0]))
            weights.append(problem.weights[i])
        x = np.einsum("n,nd->d", weights, ends) / sum(weights)
        np.testing.assert_allclose(params, x, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "hyper", "scenario"),
    [
        ("fedprox", {"mu": 0.0}, "mixed-weights"),
        ("fednova", {}, "unequal-weights"),
        ("fednova", {}, "drop-outs"),
        ("fedexp", {"eps": 1e9}, "mixed"),
        ("ditto", {}, "mixed-weights"),
        ("fedavgm", {"server_momentum": 0.0}, "mixed-weights"),
        ("fedacg", {"lam": 0.0, "beta": 0.0}, "mixed"),
        ("fedcm", {"alpha": 1.0}, "drop-outs"),
        ("mimelite", {"momentum": 0.0}, "unequal-steps"),
        ("median", {}, Scenario("two", tuple(RoundPlan((r % 5, (r + 2) % 5), (3,) * 5) for r in range(5)))),
        ("trimmed-mean", {"beta": 0.0}, "mixed"),
        ("geometric-median", {"passes": 0}, "mixed-weights"),
        ("centered-clipping", {"radius": 1e9}, "mixed"),
        ("ef-topk", {"k": 3}, "mixed"),
        ("scaffold", {}, Scenario("once", (RoundPlan(ALL, (4, 1, 2, 3, 5)),))),
    ],
)
def test_without_what_is_its_own_an_algorithm_is_fedavg(name, hyper, scenario):
    np.testing.assert_allclose(run(name, scenario, **hyper).x, run("fedavg", scenario).x, rtol=1e-12)


def test_fedacg_without_momentum_is_fedprox():
    fedacg, fedprox = run("fedacg", "mixed", lam=0.0, beta=0.4), run("fedprox", "mixed", mu=0.4)
    np.testing.assert_allclose(fedacg.x, fedprox.x, rtol=1e-12)


def test_mime_of_one_participant_is_mimelite():
    alone = Scenario("alone", tuple(RoundPlan((r % 5,), (3,) * 5) for r in range(8)))
    np.testing.assert_allclose(run("mime", alone).x, run("mimelite", alone).x, rtol=1e-12)
    assert not np.allclose(run("mime", "partial").x, run("mimelite", "partial").x, rtol=1e-4)


def test_fedbuff_without_staleness_is_fedavg_and_stale_clients_start_from_what_was_there():
    fresh = tuple(dataclasses.replace(plan, staleness=(0, 0, 0)) for plan in SCENARIOS["events"].plans)
    fedbuff = run("fedbuff", Scenario("fresh", fresh))
    np.testing.assert_allclose(fedbuff.x, run("fedavg", Scenario("fresh", fresh)).x, rtol=1e-12)
    stale = (RoundPlan((0, 1), (1,) * 5, staleness=(0, 0)), RoundPlan((2, 3), (1,) * 5, staleness=(1, 0)))
    problem, x0 = quadratics(), quadratics().start
    x1 = x0 - 0.1 * (problem.gradient(0, x0) + problem.gradient(1, x0)) / 2
    x2 = x1 - 0.1 * (problem.gradient(2, x0) / np.sqrt(2) + problem.gradient(3, x1)) / 2
    np.testing.assert_allclose(run("fedbuff", Scenario("stale", stale)).x, x2, rtol=1e-12)


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_norm_of_fednova_is_the_sum_of_the_gradients_coefficients(momentum, mu, steps):
    # How far a gradient of one at every step would carry a client.
    moved, buffer = 0.0, 0.0
    for _ in range(steps):
        buffer = momentum * buffer + 1
        moved = moved + 0.1 * (buffer - mu * moved)
    fednova = ORACLES["fednova"](quadratics(), lrate=0.1, momentum=momentum, mu=mu)
    np.testing.assert_allclose(fednova.norm(steps), moved / 0.1, rtol=1e-12)


def test_fednova_with_momentum_and_a_proximal_term_is_not_in_the_paper():
    fednova = ORACLES["fednova"](quadratics(), momentum=0.9, mu=0.1)
    with pytest.raises(NotImplementedError, match="not both at once"):
        fednova.round(RoundPlan(ALL, (1,) * 5))


def test_scaffolds_variate_is_the_mean_of_the_raw_gradients():
    scaffold = run("scaffold", "partial")
    x, c, c_2 = scaffold.x, scaffold.c, scaffold.c_i[2].copy()
    y, gradients = x, []
    for k in range(4):
        gradients.append(scaffold.problem.gradient(2, y, k))
        y = y - 0.1 * (gradients[-1] - c_2 + c)
    scaffold.round(RoundPlan((2,), (4,) * 5))
    np.testing.assert_allclose(scaffold.c_i[2], np.mean(gradients, axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaffold.c, c + (scaffold.c_i[2] - c_2) / 5, rtol=1e-12)
    np.testing.assert_allclose(scaffold.x, y, rtol=1e-12)


def test_the_dual_of_feddyn_is_the_gradient_where_clients_minimise():
    feddyn = ORACLES["feddyn"](quadratics())
    for _ in range(3):
        x = feddyn.x
        moved = {i: feddyn.client(i, 2000) for i in ALL}
        feddyn.round(RoundPlan(ALL, (2000,) * 5))
        for i in ALL:
            np.testing.assert_allclose(feddyn.h_i[i], feddyn.problem.gradient(i, x + moved[i]), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("fedadam", lambda v, d: 0.99 * v + 0.01 * d**2),
        ("fedyogi", lambda v, d: np.where(v < d**2, v + 0.01 * d**2, v - 0.01 * d**2)),
        ("fedadagrad", lambda v, d: v + d**2),
    ],
)
def test_servers_that_adapt_take_these_two_rounds(name, second):
    b1 = 0.0 if name == "fedadagrad" else 0.9
    problem = quadratics()
    x, m, v = problem.start, np.zeros(3), np.full(3, 1e-6)
    for _ in range(2):
        d = -0.1 * np.mean([problem.gradient(i, x) for i in ALL], axis=0)
        m, v = b1 * m + (1 - b1) * d, second(v, d)
        x = x + 0.1 * m / (np.sqrt(v) + 1e-3)
    twice = Scenario("twice", (RoundPlan(ALL, (1,) * 5),) * 2)
    np.testing.assert_allclose(run(name, twice).x, x, rtol=1e-12)


def test_dilocos_optimizers_are_optaxs():
    inner, outer = optax.adamw(0.05, b2=0.95, weight_decay=0.1), optax.sgd(0.7, momentum=0.9, nesterov=True)
    problem = quadratics(num_batches=2)
    x = problem.start.astype(np.float32)
    inside, outside = {i: inner.init(x) for i in (0, 3)}, outer.init(x)
    plans = tuple(RoundPlan((0, 3), (k, 1, 1, k + 1, 1)) for k in (2, 3, 1))
    for plan in plans:
        moved = []
        for i in plan.participants:
            y = x
            for k in range(plan.steps[i]):
                updates, inside[i] = inner.update(problem.gradient(i, y, k).astype(np.float32), inside[i], y)
                y = y + np.asarray(updates)
            moved.append(y - x)
        updates, outside = outer.update(-np.mean(moved, axis=0), outside)
        x = x + np.asarray(updates)
    np.testing.assert_allclose(run("diloco", Scenario("two", plans, num_batches=2)).x, x, rtol=2e-6)


def test_dittos_personal_models_minimise_their_own_objective():
    ditto = ORACLES["ditto"](quadratics(), lam=0.8, lrate=0.0)
    ditto.round(RoundPlan((0, 2), (500,) * 5))
    np.testing.assert_array_equal(ditto.x, ditto.problem.start)
    for i in (0, 2):
        pull = ditto.problem.gradient(i, ditto.v[i]) + 0.8 * (ditto.v[i] - ditto.x)
        np.testing.assert_allclose(pull, 0, atol=1e-12)
    np.testing.assert_array_equal(ditto.v[1], ditto.problem.start)


def test_fedexps_rate_is_that_of_its_equation():
    fedexp = ORACLES["fedexp"](quadratics())
    deltas = np.array([[3.0, 0.0, 0.0], [-1.0, 2.0, 0.0]])
    mean = np.array([1.0, 1.0, 0.0])
    assert fedexp.rate(deltas, mean) == pytest.approx((9 + 5) / (2 * 2 * 2.001))
    assert fedexp.rate(np.stack([mean, mean]), mean) == 1


# Aggregation

POINTS = np.array([[0.0, 1.0], [0.2, 0.9], [0.1, 1.3], [-0.1, 1.1], [9.0, -7.0]])


def test_medians_and_trimmed_means_are_those_of_each_coordinate():
    np.testing.assert_allclose(aggregate.median(POINTS), [0.1, 1.0])
    np.testing.assert_allclose(aggregate.median(POINTS[:4]), [0.05, 1.05])
    np.testing.assert_allclose(aggregate.trimmed_mean(POINTS, 0.2), [0.1, 1.0])
    np.testing.assert_allclose(aggregate.trimmed_mean(POINTS, 0.1), POINTS.mean(axis=0))


def test_krum_takes_the_point_whose_nearest_others_are_nearest():
    scores = [sorted(float(np.sum((p - q) ** 2)) for q in POINTS)[1:3] for p in POINTS]
    order = np.argsort([sum(score) for score in scores])
    np.testing.assert_array_equal(aggregate.krum(POINTS, 1), POINTS[order[0]])
    np.testing.assert_allclose(aggregate.krum(POINTS, 1, 3), POINTS[order[:3]].mean(axis=0))
    assert 4 not in order[:3]


def test_the_geometric_median_minimises_the_sum_of_distances():
    weights = np.array([1.0, 2.0, 1.0, 1.0, 1.0])

    def total(z):
        return float(weights @ np.linalg.norm(POINTS - z, axis=1))

    z = aggregate.geometric_median(POINTS, weights, 2000, 1e-9)
    assert all(total(z) <= total(z + e) for e in 1e-3 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]))
    assert total(aggregate.geometric_median(POINTS, weights, 2, 1e-9)) < total(np.average(POINTS, 0, weights))


def test_centered_clipping_moves_by_at_most_the_radius_for_each_point():
    v = aggregate.centered_clipping(POINTS, np.zeros(2), 0.5, 1)
    norms = np.linalg.norm(POINTS, axis=1)
    np.testing.assert_allclose(v, np.mean([p * min(1, 0.5 / n) for p, n in zip(POINTS, norms, strict=True)], axis=0))
    again = aggregate.centered_clipping(POINTS, v, 0.5, 1)
    np.testing.assert_allclose(aggregate.centered_clipping(POINTS, np.zeros(2), 0.5, 2), again)
    assert np.linalg.norm(v) <= 0.5


@pytest.mark.parametrize("name", ["ef-topk", "ef-sign"])
def test_what_error_feedback_has_sent_and_what_it_holds_is_all_that_clients_moved(name):
    oracle = ORACLES[name](quadratics())
    moved = np.zeros(3)
    for plan in SCENARIOS["full"].plans:
        moved += np.mean([oracle.client(i, plan.steps[i], oracle.x) for i in ALL], axis=0)
        oracle.round(plan)
        sent = oracle.x - oracle.problem.start
        np.testing.assert_allclose(sent + oracle.variates()["e_i"].mean(axis=0), moved, atol=1e-12)
    assert np.abs(oracle.variates()["e_i"]).max() > 0.1


def test_compressors_send_what_their_equations_say():
    topk, sign = ORACLES["ef-topk"](quadratics(), k=2), ORACLES["ef-sign"](quadratics())
    u = np.array([0.5, -3.0, 1.0])
    np.testing.assert_array_equal(topk.compress(u), [0, -3, 1])
    np.testing.assert_array_equal(sign.compress(u), [1.5, -1.5, 1.5])


# Plans


def test_a_plan_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"RoundPlan.dropped is \(0, 1\); expected some of the participants, \(0, 1\)"):
        RoundPlan((0, 1), (1,) * 5, dropped=(0, 1))
    with pytest.raises(ValueError, match=r"RoundPlan.dropped is \(3,\); expected some of the participants"):
        RoundPlan((0, 1), (1,) * 5, dropped=(3,))
    with pytest.raises(ValueError, match=r"RoundPlan.steps is \(1, 0, 1, 1, 1\); expected at least 1 for each client"):
        RoundPlan((0, 1), (1, 0, 1, 1, 1))
    with pytest.raises(ValueError, match=r"RoundPlan.staleness is \(1,\); expected one for each of \(0, 1\)"):
        RoundPlan((0, 1), (1,) * 5, staleness=(1,))


def test_where_the_oracle_stands_still_an_implementation_has_to():
    still = Scenario("still", SCENARIOS["full"].plans, hyper={"lrate": 0.0})
    assert check(Direct(ORACLES["fedavg"]), "fedavg", still)[0].ok

    class Drifts(ORACLES["fedavg"]):
        def round(self, plan):
            self.x = self.x + 1e-3

    assert not check(Direct(Drifts), "fedavg", still)[0].ok
