"""Checks of schedulers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.schedulers import Scheduler
from functional_optimodules.testing.check import check
from functional_optimodules.testing.configs import through_json
from functional_optimodules.testing.trees import assert_same, assert_same_spec, assert_same_specs
from functional_optimodules.types import PyTree

# One entry a step: whether a round begins before it.
_ROUNDS = (False, True, False, True, True, False, False, True, False)


def _rates(scheduler: Scheduler, rounds: tuple[bool, ...] = _ROUNDS) -> list[float]:
    rates = []
    for begins in rounds:
        if begins:
            scheduler.on_round_start()
        rates.append(scheduler.get_next_rate())
    return rates


@check(Scheduler)
def check_clock_keeps_structure(scheduler: Scheduler) -> None:
    """A clock is made of arrays whose shapes and dtypes stay, and a rate is a finite float32 scalar."""
    clock = scheduler.init()
    for leaf in jax.tree.leaves(clock):
        assert isinstance(leaf, jax.Array), f"`init` returns {leaf!r} in its clock: let it return arrays"
    rate = scheduler.value(clock)
    assert_same_spec(jnp.asarray(rate), jnp.zeros((), jnp.float32), "`value` returns no float32 scalar")
    assert np.isfinite(rate), f"the first rate is {rate}"
    for method in ("advance", "begin_round"):
        new = getattr(scheduler, method)(clock)
        assert_same_specs(new, clock, f"`{method}` changes the clock")


@check(Scheduler, scope="class")
def check_methods_are_pure(scheduler: Scheduler) -> None:
    """The same clock gives the same rate and the same next clock."""
    clock = scheduler.advance(scheduler.begin_round(scheduler.init()))
    for method in ("value", "advance", "begin_round"):
        first, second = (getattr(scheduler, method)(clock) for _ in range(2))
        assert_same(second, first, f"`{method}` is not a pure function: called again on the same clock it differs")


@check(Scheduler, scope="field")
def check_scan_equals_get_next_rate(scheduler: Scheduler) -> None:
    """Rates computed on a traced clock in a `lax.scan` are those of the facade."""

    def body(clock: PyTree, begins: jax.Array) -> PyTree:
        clock = jax.lax.cond(begins, scheduler.begin_round, lambda same: same, clock)
        return scheduler.advance(clock), scheduler.value(clock)

    _, rates = jax.jit(lambda clock: jax.lax.scan(body, clock, jnp.array(_ROUNDS)))(scheduler.init())
    expected = np.array(_rates(scheduler.bare()), np.float32)
    assert np.allclose(rates, expected, rtol=1e-5, atol=1e-9), (
        f"in a scan the rates are {rates}, and `get_next_rate` gives {expected}: compute from the clock alone"
    )


@check(Scheduler, scope="field")
def check_resume(scheduler: Scheduler) -> None:
    """A clock saved as JSON goes on identically in a scheduler built from the configuration."""
    started = scheduler.bare()
    _rates(started)
    saved = through_json(started.get_state(), "the state")
    restored = type(scheduler).from_config(through_json(scheduler.get_config(), "the configuration"))
    restored.set_state(saved)
    assert restored.get_state() == saved, "a restored clock is saved as another"
    found, expected = _rates(restored), _rates(started)
    assert found == expected, f"restored, its rates are {found}, and would have been {expected}: let the clock hold all"


@check(Scheduler, scope="field")
def check_counts_from_zero(scheduler: Scheduler) -> None:
    """The first rate is that of step 0 and round 0, whether or not somebody begins a round."""
    first = float(scheduler.value(scheduler.init()))
    alone, begun = scheduler.bare().get_next_rate(), _rates(scheduler.bare(), (True,))[0]
    assert np.allclose([alone, begun], first, rtol=1e-6), (
        f"the first rate is {alone} where nobody begins a round and {begun} in the first, and should be {first}: the "
        "first round has index 0"
    )


@check(Scheduler)
def check_clock_traced_once(scheduler: Scheduler) -> None:
    """Neither a step, nor a round, nor an equal scheduler built anew traces a second time."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def tick(scheduler: Scheduler, clock: PyTree) -> PyTree:
        traces.append(scheduler)
        return scheduler.value(clock), scheduler.advance(clock)

    clock = scheduler.init()
    for each in (scheduler.bare(), dataclasses.replace(scheduler)):
        for begins in _ROUNDS[:4]:
            clock = each.begin_round(clock) if begins else clock
            _, clock = tick(each, clock)
    assert len(traces) == 1, f"it was traced {len(traces)} times: keep shapes, dtypes and weak types of the clock"
