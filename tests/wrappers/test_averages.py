"""Averages of the parameters: the formulas in NumPy float64, PyTorch's rule, and what is read of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

from .steps import PARAMS, assert_close, assert_equal, exact, gradients, walk

STEPS = 12


def averaged(wrapper, params=PARAMS, modules=("adam",)):
    optimizer = fo.Optimizer(0.1, modules=modules, wrappers=[wrapper])
    each, state = walk(optimizer, gradients(STEPS), params)
    last = jax.tree.map(lambda leaf: leaf[-1], each)
    return exact(each), optimizer.eval_params(state, last), state


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999])
def test_ema_is_adams_corrected_average_of_the_parameters_after_each_step(decay):
    each, found, _ = averaged(("ema", {"decay": decay}))
    average = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:]), each)
    for step in range(STEPS):
        average = jax.tree.map(lambda a, leaf, at=step: decay * a + (1 - decay) * leaf[at], average, each)
    assert_close(found, jax.tree.map(lambda a: a / (1 - decay**STEPS), average))


def test_ema_without_debias_starts_from_the_first_parameters_as_pytorch_does():
    each, found, _ = averaged(("ema", {"decay": 0.9, "debias": False}))
    average = exact(PARAMS)
    for step in range(STEPS):
        average = jax.tree.map(lambda a, leaf, at=step: 0.9 * a + 0.1 * leaf[at], average, each)
    assert_close(found, average)


@pytest.mark.parametrize("start", [0, 5])
def test_polyak_is_the_mean_of_the_parameters_since_some_step(start):
    each, found, _ = averaged(("polyak", {"start": start}))
    assert_close(found, jax.tree.map(lambda leaf: leaf[start:].mean(axis=0), each))


def test_polyak_before_its_start_is_the_last_iterate():
    each, found, _ = averaged(("polyak", {"start": STEPS + 3}))
    assert_equal(found, jax.tree.map(lambda leaf: np.float32(leaf[-1]), each))


@pytest.mark.parametrize("name", ["ema", "polyak"])
def test_training_is_what_it_would_be_without(name):
    each, _, _ = averaged(name)
    plain, _ = walk(fo.Optimizer(0.1, modules=["adam"]), gradients(STEPS))
    assert_equal(each, exact(plain))


@pytest.mark.parametrize("name", ["ema", "polyak"])
def test_average_of_bfloat16_parameters_is_kept_in_float32_and_read_in_bfloat16(name):
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    optimizer = fo.Optimizer(0.1, wrappers=[name])
    params, state, total = halves, optimizer.init(halves), jax.tree.map(lambda p: np.zeros(p.shape), halves)
    for step in range(STEPS):
        gradient = jax.tree.map(lambda g, at=step: g[at], gradients(STEPS, dtype=jnp.bfloat16))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        total = jax.tree.map(lambda t, p: t + np.asarray(p, np.float64), total, params)
    average = state.wrappers[name].average
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype(jnp.float32)}
    if name == "polyak":
        assert_close(average, jax.tree.map(lambda t: t / STEPS, total))
    read = optimizer.eval_params(state, params)
    assert_equal(read, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), average))


def test_what_is_read_before_any_step_is_the_parameters():
    for name in ("ema", "polyak"):
        optimizer = fo.Optimizer(0.1, wrappers=[name])
        assert_equal(optimizer.eval_params(optimizer.init(PARAMS), PARAMS), PARAMS)


def test_without_parameters_an_average_is_an_error_that_names_it():
    optimizer = fo.Optimizer(0.1, wrappers=["ema"])
    with pytest.raises(ValueError, match="EMAWrapper needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


@pytest.mark.parametrize("config", [{"decay": 1.0}, {"decay": -0.1}])
def test_decay_out_of_its_range_is_an_error(config):
    with pytest.raises(ValueError, match=r"EMAWrapper: decay=.* should be in \[0, 1\)"):
        fo.Optimizer(0.1, wrappers=[("ema", config)])
