"""Each check of schedulers fails on one that breaks it, and says why."""

import itertools
import random
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from functional_optimodules import Scheduler, hyperparameter
from functional_optimodules.testing import checks_of, contract, instances


class Rate(Scheduler, register=False):
    """Right. Those below are it, with one fault each."""

    name: ClassVar[str] = "rate"
    base: float = hyperparameter(default=1.0, within="(0, inf)")

    def compute_value(self, step, round_):
        return self.base / (1 + step + round_)


class RandomRate(Rate, register=False):
    def compute_value(self, step, round_):
        return self.base * random.random()


class TraceAwareRate(Rate, register=False):
    def value(self, clock):
        return super().value(clock) * (2.0 if isinstance(clock.steps, jax.core.Tracer) else 1.0)


class FromOne(Rate, register=False):
    def value(self, clock):
        return jnp.float32(self.base) / (1 + clock.rounds)


class Hollow(Rate, register=False):
    def init(self):
        return super().init()._replace(steps=0)


class HalfRate(Rate, register=False):
    def value(self, clock):
        return super().value(clock).astype(jnp.float16)


class FirstInfinite(Rate, register=False):
    def compute_value(self, step, round_):
        return self.base / (step + round_)


class FloatSteps(Rate, register=False):
    def advance(self, clock):
        return clock._replace(steps=clock.steps + 0.5)


class WeakSteps(Rate, register=False):
    def init(self):
        return super().init()._replace(steps=jnp.asarray(0))

    def advance(self, clock):
        return clock._replace(steps=clock.steps + jnp.int32(1))


class HiddenSteps(Rate, register=False):
    """Its clock is not all of its time."""

    calls: ClassVar[Any] = itertools.count()

    def value(self, clock):
        return jax.pure_callback(
            lambda _: jnp.float32(next(self.calls)), jax.ShapeDtypeStruct((), jnp.float32), clock.steps
        )


@pytest.mark.parametrize(
    ("check", "cls", "message"),
    [
        ("check_methods_are_pure", RandomRate, "not a pure"),
        ("check_scan_equals_get_next_rate", RandomRate, "in a scan"),
        ("check_counts_from_zero", FromOne, "round has index 0"),
        ("check_counts_from_zero", TraceAwareRate, "first rate"),
        ("check_clock_keeps_structure", Hollow, "let it return arrays"),
        ("check_clock_keeps_structure", HalfRate, "float32"),
        ("check_clock_keeps_structure", FirstInfinite, "first rate is inf"),
        ("check_clock_keeps_structure", FloatSteps, "`advance` changes"),
        ("check_clock_traced_once", WeakSteps, "traced 2 times"),
        ("check_resume", HiddenSteps, "would have been"),
        ("check_rate_is_lowered_for_every_platform", HiddenSteps, "without a call of the host"),
    ],
)
def test_check_fails_on_a_scheduler_that_breaks_it(check, cls, message):
    scheduler = next(iter(instances(cls).values()))
    with pytest.raises(AssertionError, match=message):
        checks_of(scheduler)[check](scheduler)


def test_scheduler_that_the_broken_ones_are_made_of_keeps_the_contract():
    for _, check in contract(Rate):
        check()
