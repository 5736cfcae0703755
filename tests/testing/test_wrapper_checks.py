"""Each check of wrappers fails on one that breaks it, and says why."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from functional_optimodules import AdamModule, Wrapper, hyperparameter
from functional_optimodules.numerics import wide, zeros_wide
from functional_optimodules.testing import checks_of, contract


class State(NamedTuple):
    kept: Any


class Halving(Wrapper, register=False):
    """Right: a part of each step, and the sum of all. Those below are it, with one fault each."""

    name: ClassVar[str] = "halving"
    part: float = hyperparameter(default=0.5, within="(0, 1]")

    def init(self, params):
        return State(zeros_wide(params))

    def around(self, step, updates, state, inner, params, **known):
        made, inner = step(updates, inner, params)
        made = jax.tree.map(lambda u: (self.part * wide(u)).astype(u.dtype), made)
        return made, State(jax.tree.map(lambda k, u: k + wide(u), state.kept, made)), inner


class Wide(Halving, register=False):
    def eval_params(self, state, params):
        return jax.tree.map(wide, params)


class NotYet(Halving, register=False):
    def eval_params(self, state, params):
        return jax.tree.map(lambda p, k: p + (0 / jnp.sum(wide(k))).astype(p.dtype), params, state.kept)


class OfBuffers(Halving, register=False):
    def eval_params(self, state, params):
        return jax.tree.map(lambda p: p - jnp.mean(p), params)


class Flattening(Halving, register=False):
    def inside(self, params):
        return jax.tree.map(jnp.ravel, params)


class Dropping(Halving, register=False):
    def keep(self, inner):
        return inner._replace(modules={})


class ByHand(Halving, register=False):
    def around(self, step, updates, state, inner, params, **known):
        def halved(node):
            return {key: halved(part) for key, part in node.items()} if isinstance(node, dict) else node * 0.5

        made, inner = step(updates, inner, params)
        return halved(made), state, inner


class Alone(Halving, register=False):
    def around(self, step, updates, state, inner, params, **known):
        made, state, inner = super().around(step, updates, state, inner, params)
        return made, State((state.kept,)) if inner.wrappers else state, inner


class Verbose(Halving, register=False):
    def metrics(self, state):
        return {"kept": jax.tree.leaves(state.kept)[0]}


class Alarmist(Halving, register=False):
    def check(self, state):
        raise FloatingPointError("who knows")


class Narrow(Halving, register=False):
    """It breaks a check of bricks, by what it does to the optimizer's state."""

    def init(self, params):
        return State(jax.tree.map(jnp.zeros_like, params))

    def around(self, step, updates, state, inner, params, **known):
        made, inner = step(updates, inner, params)
        return made, State(jax.tree.map(lambda k, u: k + u.astype(k.dtype), state.kept, made)), inner


class Impure(Halving, register=False):
    calls: ClassVar[list[int]] = []

    def around(self, step, updates, state, inner, params, **known):
        made, state, inner = super().around(step, updates, state, inner, params)
        self.calls.append(1)
        return jax.tree.map(lambda u: u * len(self.calls), made), state, inner


BROKEN = {
    "check_eval_params_are_like_the_parameters": [(Wide, "other parameters"), (NotYet, "before the first step")],
    "check_eval_params_of_packed": [(OfBuffers, "treat elements alike")],
    "check_inside_and_keep_change_dtypes_alone": [
        (Flattening, "`inside` changes shapes"),
        (Dropping, "`keep` changes"),
    ],
    "check_parameters_may_be_lacking": [(ByHand, "lack frozen parameters")],
    "check_two_of_a_kind": [(Alone, "around itself")],
    "check_metrics_are_scalars": [(Verbose, "let it be a scalar"), (Alarmist, "who knows")],
    "check_half_precision_accumulates_wide": [(Narrow, "accumulates in float16")],
    "check_update_is_pure": [(Impure, "not a pure")],
}


@pytest.mark.slow
def test_wrapper_that_the_broken_ones_are_made_of_keeps_the_contract(monkeypatch):
    monkeypatch.setitem(Wrapper._registry, Halving.name, Halving)
    for _, check in contract(Halving):
        check()


@pytest.mark.parametrize(
    ("check", "cls", "message"), [(name, *fault) for name, faults in BROKEN.items() for fault in faults]
)
def test_check_fails_on_a_wrapper_that_breaks_it(check, cls, message):
    run = dict(contract(cls))[f"{check}-default"]
    with pytest.raises(AssertionError, match=message) as failure:
        run()
    assert cls.__name__ in str(failure.value)


def test_checks_of_a_wrapper_are_those_of_bricks_and_its_own_each_shown_to_fail():
    own = checks_of(Halving).keys() - checks_of(AdamModule).keys()
    assert own == {name for name in BROKEN if name not in checks_of(AdamModule)}
    assert checks_of(AdamModule).keys() - checks_of(Halving).keys() == set()
