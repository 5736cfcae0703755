"""Lookahead: algorithm 1 of the paper in NumPy float64, and optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

from .steps import PARAMS, assert_close, assert_equal, exact, gradients, walk


def paper(grads, params, period, alpha, rate, beta):
    """Yield the fast and the slow weights after each step of SGD with momentum."""
    fast = slow = params
    velocity = np.zeros_like(params)
    for step, gradient in enumerate(grads, start=1):
        velocity = beta * velocity + gradient
        fast = fast - rate * velocity
        if step % period == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow
        yield fast, slow


@pytest.mark.parametrize(("period", "alpha"), [(5, 0.5), (3, 0.8), (1, 0.25), (4, 1.0)])
def test_it_is_algorithm_1(period, alpha):
    grads = gradients(11)
    optimizer = fo.Optimizer(
        0.1, modules=["momentum"], wrappers=[("lookahead", {"sync_period": period, "alpha": alpha})]
    )
    each, state = walk(optimizer, grads)
    last = jax.tree.map(lambda leaf: leaf[-1], each)
    read = optimizer.eval_params(state, last)
    for name, first in exact(PARAMS).items():
        expected = list(paper(exact(grads)[name], first, period, alpha, 0.1, 0.9))
        assert_close(each[name], np.stack([fast for fast, _ in expected]))
        assert_close(read[name], expected[-1][1])


def test_it_is_optaxs():
    grads = gradients(11)
    each, state = walk(fo.Optimizer(0.1, modules=["momentum"], wrappers=["lookahead"]), grads)
    reference = optax.lookahead(optax.sgd(0.1, 0.9), sync_period=5, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    theirs = reference.init(pair)
    for step in range(11):
        updates, theirs = reference.update(jax.tree.map(lambda g, at=step: g[at], grads), theirs, pair)
        pair = optax.apply_updates(pair, updates)
    assert_close(jax.tree.map(lambda leaf: leaf[-1], each), pair.fast)
    assert_close(state.wrappers["lookahead"].slow, pair.slow)


def test_parameters_that_a_new_round_gives_are_its_slow_weights():
    optimizer = fo.Optimizer(0.1, wrappers=[("lookahead", {"sync_period": 3, "round_reset": True})])
    given = jax.tree.map(lambda p: p + 1, PARAMS)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        _, state = optimizer.update(PARAMS, state, PARAMS)
    state = optimizer.begin_round(state, given)
    assert_equal(optimizer.eval_params(state, given), given)
    updates, state = optimizer.update(PARAMS, state, given)
    assert_equal(optimizer.eval_params(state, optax.apply_updates(given, updates)), given)


def test_without_round_reset_a_period_goes_on_over_rounds():
    optimizer = fo.Optimizer(0.1, wrappers=[("lookahead", {"sync_period": 2})])
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert optimizer.begin_round(state).wrappers["lookahead"].steps == 1


def test_a_period_of_no_steps_and_a_part_beyond_the_whole_are_errors():
    with pytest.raises(ValueError, match=r"LookaheadWrapper: sync_period=0 should be in \[1, "):
        fo.LookaheadWrapper(sync_period=0)
    with pytest.raises(ValueError, match=r"LookaheadWrapper: alpha=1\.5 should be in \[0, 1\]"):
        fo.LookaheadWrapper(alpha=1.5)


def test_slow_weights_of_bfloat16_parameters_are_kept_in_float32():
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = fo.Optimizer(0.1, wrappers=["lookahead"]).init(halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.wrappers["lookahead"].slow)} == {jnp.dtype(jnp.float32)}
