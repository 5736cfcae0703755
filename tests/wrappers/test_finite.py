"""Steps that are not finite are left out, counted, and in the end an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo

from .steps import PARAMS, assert_equal

GOOD = jax.tree.map(jnp.ones_like, PARAMS)
BAD = {**GOOD, "b": jnp.array([1.0, jnp.nan, 1.0])}
INFINITE = {**GOOD, "w": jnp.full((2, 2), -jnp.inf)}


def skipping(most=3, modules=("adam",), updates=False):
    return fo.Optimizer(0.1, 0.1, modules=modules, wrappers=[("skip-non-finite", {"most": most, "updates": updates})])


def stepped(optimizer, *gradients):
    state, step = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state, PARAMS)
    return updates, state


@pytest.mark.parametrize("gradient", [BAD, INFINITE])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(gradient):
    optimizer = skipping()
    _, before = stepped(optimizer, GOOD)
    updates, after = stepped(optimizer, GOOD, gradient)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after._replace(wrappers={}), before._replace(wrappers={}))
    assert after.wrappers["skip-non-finite"] == (1, 1)


def test_steps_that_are_taken_are_those_of_the_optimizer_without():
    optimizer = skipping()
    updates, state = stepped(optimizer, GOOD, BAD, BAD, GOOD)
    expected, plain = stepped(fo.Optimizer(0.1, 0.1, modules=["adam"]), GOOD, GOOD)
    assert_equal(updates, expected)
    assert_equal(state._replace(wrappers={}), plain)
    assert state.wrappers["skip-non-finite"] == (0, 2)
    assert optimizer.metrics(state) == {
        "skip-non-finite/in_a_row": 0,
        "skip-non-finite/skipped": 2,
        "skip-non-finite/failed": False,
    }


def test_after_some_in_a_row_no_step_is_taken_and_the_check_raises():
    optimizer = skipping(most=2)
    _, state = stepped(optimizer, GOOD, BAD)
    optimizer.check(state)
    updates, state = stepped(optimizer, GOOD, BAD, BAD, GOOD)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert optimizer.metrics(state)["skip-non-finite/failed"]
    with pytest.raises(FloatingPointError, match=r"SkipNonFiniteWrapper: 3 steps in a row .* most=2"):
        optimizer.check(state)


def test_check_of_stacked_states_raises_if_one_has_failed():
    optimizer = skipping(most=1)
    states = [stepped(optimizer, gradient)[1] for gradient in (GOOD, BAD)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    with pytest.raises(FloatingPointError, match="SkipNonFiniteWrapper"):
        optimizer.check(stacked)


def test_the_facade_raises_at_the_next_call_and_keeps_what_it_had():
    optimizer, params = skipping(most=2), PARAMS
    params = optimizer.apply_gradients(params, GOOD)
    kept = jax.tree.map(np.asarray, params)
    for _ in range(2):
        params = optimizer.apply_gradients(params, BAD)
    assert_equal(params, kept)
    saved = optimizer.get_state()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="most=2"):
            optimizer.apply_gradients(params, GOOD)
    with pytest.raises(FloatingPointError, match="most=2"):
        optimizer.run(GOOD, params=params)
    assert optimizer.get_state() == saved


def test_updates_that_are_not_finite_are_left_out_on_request():
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e30), PARAMS)  # its square is beyond float32
    _, plain = stepped(skipping(), huge)
    assert not all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(plain.modules["adam"].second))
    optimizer = skipping(updates=True)
    updates, state = stepped(optimizer, huge)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(state._replace(wrappers={}), optimizer.init(PARAMS)._replace(wrappers={}))
    assert state.wrappers["skip-non-finite"] == (1, 1)


def test_around_accumulation_only_the_bad_gradient_is_left_out():
    inside = ("accumulation", {"steps": 2})
    optimizer = fo.Optimizer(0.1, wrappers=["skip-non-finite", inside])
    updates, state = stepped(optimizer, GOOD, BAD, GOOD)
    expected, _ = stepped(fo.Optimizer(0.1, wrappers=[inside]), GOOD, GOOD)
    assert_equal(updates, expected)
    assert state.wrappers["skip-non-finite"] == (0, 1)


def test_at_least_one_step_may_be_left_out():
    with pytest.raises(ValueError, match=r"SkipNonFiniteWrapper: most=0 should be in \[1, "):
        fo.SkipNonFiniteWrapper(most=0)
