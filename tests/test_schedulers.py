"""Schedulers' time: steps, rounds, warm-ups, and clocks that are saved, traced and batched."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

COSINE = ("cosine-annealing", {"base": 0.1, "max_lr": 0.9, "duration": 2})
BY_ROUND = ("exponential-decay", {"base": 1.0, "rate": 0.5, "step_level": False})


def facade(scheduler, rounds, steps):
    """Return the rates of some rounds, asked of the facade."""
    seen = []
    for _ in range(rounds):
        scheduler.on_round_start()
        seen += [scheduler.get_next_rate() for _ in range(steps)]
    return seen


def pure(scheduler, rounds, steps):
    """Return the same, by one compiled program."""

    def step(clock, _):
        return scheduler.advance(clock), scheduler.value(clock)

    def round_(clock, _):
        return jax.lax.scan(step, scheduler.begin_round(clock), length=steps)

    return jax.jit(lambda: jax.lax.scan(round_, scheduler.init(), length=rounds)[1])().ravel()


@pytest.mark.parametrize(
    "scheduler",
    [
        fo.ExponentialDecay(0.3, 0.5, step_level=False),
        fo.CosineAnnealing(0.1, 0.9, 5),
        fo.Warmup(COSINE, 4),
        fo.WarmupRounds(BY_ROUND, 1),
        fo.WarmupRounds(("warmup", {"base": COSINE, "warmup": 2}), 1),
    ],
)
def test_pure_clock_under_scan_gives_the_rates_of_the_facade(scheduler):
    np.testing.assert_allclose(pure(scheduler, 3, 4), facade(scheduler, 3, 4), rtol=1e-6)


def test_rounds_count_from_0_whether_or_not_anybody_begins_one():
    scheduler = fo.ExponentialDecay(base=0.8, rate=0.5, step_level=False)
    assert scheduler.get_next_rate() == pytest.approx(0.8)
    scheduler.on_round_start()
    assert scheduler.get_next_rate() == pytest.approx(0.8)
    scheduler.on_round_start()
    assert scheduler.get_next_rate() == pytest.approx(0.4)


@pytest.mark.parametrize("cls", [fo.Warmup, fo.WarmupRounds])
def test_no_climb_is_the_wrapped_scheduler(cls):
    np.testing.assert_allclose(facade(cls(BY_ROUND, 0), 3, 2), [1, 1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(fo.Warmup, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]), (fo.WarmupRounds, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])],
)
def test_climb_to_a_number(cls, expected):
    np.testing.assert_allclose(facade(cls(0.4, 4), 3, 2), expected, rtol=1e-6)


def test_round_in_which_the_climb_over_steps_ends_is_the_wrapped_schedulers_first():
    # Rounds of 2 steps: the climb ends within the second.
    np.testing.assert_allclose(facade(fo.Warmup(BY_ROUND, 3), 4, 2), [1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_steps_of_the_climb_over_rounds_are_not_counted_by_the_wrapped_scheduler():
    by_steps = ("linear-decay", {"base": 1.0, "rate": 0.25})
    np.testing.assert_allclose(facade(fo.WarmupRounds(by_steps, 1), 3, 2), [1, 1, 1, 0.75, 0.5, 0.25])


def test_warmups_nest():
    inner = ("warmup", {"base": 0.8, "warmup": 2})
    # The wrapped warm-up's first value is 0.4, which the outer one climbs to.
    scheduler = fo.Warmup(inner, 2)
    np.testing.assert_allclose([scheduler.get_next_rate() for _ in range(5)], [0.2, 0.4, 0.4, 0.8, 0.8], rtol=1e-6)
    assert fo.Warmup.from_config(json.loads(json.dumps(scheduler.get_config()))) == scheduler


@pytest.mark.parametrize(
    "scheduler", [fo.CosineAnnealing(0.1, 0.9, 9), fo.Warmup(COSINE, 4), fo.WarmupRounds(BY_ROUND, 2)]
)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_saved_clock_goes_on_where_it_was(scheduler, rounds):
    facade(scheduler, rounds, 2)
    copy = fo.Scheduler.from_specs(scheduler.name, json.loads(json.dumps(scheduler.get_config())))
    copy.set_state(json.loads(json.dumps(scheduler.get_state(), allow_nan=False)))
    assert facade(copy, 2, 3) == facade(scheduler, 2, 3)


@pytest.mark.parametrize(
    ("mutilate", "error"),
    [
        (lambda state: state.pop("variables"), KeyError),
        (lambda state: state["variables"].pop("steps"), KeyError),
        (lambda state: state["variables"].update(other=1), KeyError),
        (lambda state: state.update(name="warmup"), ValueError),
        (lambda state: state["variables"]["steps"].update(shape=[2]), ValueError),
        (lambda state: state["variables"]["steps"].update(dtype="float32"), ValueError),
        (lambda state: state["variables"]["steps"].update(data="?"), ValueError),
        (lambda state: state.update(variables=None), ValueError),
    ],
)
def test_mutilated_clock_is_refused_and_time_stays(mutilate, error):
    scheduler = fo.LinearDecay(base=1.0, rate=0.25)
    scheduler.get_next_rate()
    state = scheduler.get_state()
    mutilate(state)
    with pytest.raises(error, match="LinearDecay"):
        scheduler.set_state(state)
    assert scheduler.get_next_rate() == 0.75


def test_scheduler_whose_facade_has_run_is_equal_to_a_new_one_and_starts_anew_in_an_optimizer():
    scheduler = fo.LinearDecay(base=1.0, rate=0.25)
    scheduler.get_next_rate()
    assert scheduler == fo.LinearDecay(base=1.0, rate=0.25)
    optimizer = fo.Optimizer(lrate=scheduler)
    assert optimizer.compute_updates_from_gradients(jnp.ones(()), jnp.ones(())) == -1
    assert scheduler.get_next_rate() == 0.75


def test_hyperparameters_may_be_traced():
    def total(base):
        return pure(fo.Warmup(fo.CosineAnnealing(0.0, base, 4), 2), 1, 6).sum()

    # The climb is base / 2 and base, the cosine half the sum of 1 + cos(pi u / 4), u < 4.
    share = 1.5 + sum(1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose(jax.vmap(total)(jnp.array([0.5, 1.0])), [0.5 * share, share], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(0.5), share, rtol=1e-6)


def test_facade_under_a_trace_says_what_to_use_and_stays_usable():
    scheduler = fo.LinearDecay(base=1.0, rate=0.25)
    with pytest.raises(RuntimeError, match=r"use the pure `value\(clock\)`"):
        jax.jit(scheduler.get_next_rate)()
    assert scheduler.get_next_rate() == 1.0


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (("linear-decai", {}), KeyError, "did you mean 'linear-decay'"),
        (("linear-decay", {"base": 1.0}), KeyError, "LinearDecay needs a value for 'rate'"),
        (("linear-decay", {"base": 1.0, "rate": 0.1, "ratio": 1}), KeyError, "no field 'ratio': did you mean 'rate'"),
        (("linear-decay", {"base": -1.0, "rate": 0.1}), ValueError, r"LinearDecay: base=-1.0 should be in \[0, inf\)"),
        (("linear-decay", {"base": "1", "rate": 0.1}), TypeError, "LinearDecay: base='1' should be of type float"),
        (("cosine-annealing", {"base": 0, "max_lr": 1, "duration": 0}), ValueError, "duration=0"),
        (("cosine-annealing", {"base": 0, "max_lr": 1, "duration": 2.5}), TypeError, "duration=2.5"),
        (("warmup", {"base": -0.1, "warmup": 3}), ValueError, "base=-0.1"),
        (("warmup", {"base": ["linear-decay", {}], "warmup": 3}), KeyError, "LinearDecay needs"),
        (("warmup-rounds", {"base": 0.1, "warmup": -1}), ValueError, "warmup=-1"),
    ],
)
def test_bad_configuration_is_refused_by_name(specs, error, message):
    with pytest.raises(error, match=message):
        fo.Scheduler.from_specs(*specs)


def test_third_party_scheduler_writes_one_method():
    class Halving(fo.Scheduler, register=False):
        name = "halving"
        base: float = 1.0

        def compute_value(self, step, round_):
            return self.base / 2.0 ** (step + round_)

    assert facade(fo.Warmup(Halving(), 1), 2, 2) == [1.0, 1.0, 0.25, 0.125]
    assert "halving" not in fo.list_rate_schedulers()


@pytest.mark.parametrize(("period", "factor"), [(1, 2), (7, 5), (10, 1)])
def test_the_periods_of_sgdr_begin_where_they_should_as_long_as_steps_can_be_counted(period, factor):
    steps = np.append(np.random.default_rng(0).integers(0, 2**31 - 1, 50), 2**31 - 1)
    scheduler = fo.SGDR(0.0, 1.0, period, factor)
    rates = jax.vmap(lambda step: scheduler.compute_value(step, step))(jnp.asarray(steps, jnp.int32))
    expected = []
    for step in map(int, steps):
        begin, length = (step // period * period, period) if factor == 1 else (0, period)
        while step - begin >= length:
            begin, length = begin + length, length * factor
        expected.append((1 + np.cos(np.pi * (step - begin) / length)) / 2)
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_warmups_that_nest_deep_cost_as_much_as_they_are_many():
    scheduler = fo.LinearDecay(1.0, 0.25)
    for _ in range(40):
        scheduler = fo.Warmup(scheduler, 1)
    assert [scheduler.get_next_rate() for _ in range(3)] == [1.0, 1.0, 1.0]
