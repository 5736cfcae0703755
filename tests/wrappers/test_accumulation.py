"""Accumulation: a large batch to rounding, real steps for clocks, and no work in between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import functional_optimodules as fo

from .steps import PARAMS, assert_close, assert_equal, gradients, walk

RATE = ("warmup", {"base": ("exponential-decay", {"base": 0.1, "rate": 0.8}), "warmup": 2})


def means(grads, count):
    return jax.tree.map(lambda g: g.reshape(-1, count, *g.shape[1:]).mean(axis=1), grads)


def test_k_gradients_are_one_step_by_their_mean_and_schedules_count_steps():
    grads = gradients(12)
    accumulated = fo.Optimizer(RATE, 0.01, ["ridge"], ["adam"], wrappers=[("accumulation", {"steps": 3})])
    each, state = walk(accumulated, grads)
    expected, large = walk(fo.Optimizer(RATE, 0.01, ["ridge"], ["adam"]), means(grads, 3))
    assert_close(jax.tree.map(lambda leaf: leaf[2::3], each), expected)
    assert_close(state._replace(wrappers={}), large)
    assert_equal((state.lrate, state.modules["adam"].steps), (large.lrate, large.modules["adam"].steps))


def test_it_is_what_multi_steps_of_optax_gives():
    grads = gradients(12)
    each, _ = walk(fo.Optimizer(0.1, modules=["adam"], wrappers=[("accumulation", {"steps": 4})]), grads)
    reference = optax.MultiSteps(optax.chain(optax.scale_by_adam(b2=0.99, eps=1e-7), optax.scale(-0.1)), 4)
    expected, _ = walk(reference, grads)
    assert_close(each, expected)


def test_gradients_of_micro_batches_are_those_of_one_batch():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(4, 8, 2)), jnp.float32)

    def slope(params, batch):
        return jax.grad(lambda p: jnp.mean(jnp.tanh(batch @ p["w"] + p["b"][:2]) ** 2))(params)

    small = jax.vmap(slope, in_axes=(None, 0))(PARAMS, batch)
    each, _ = walk(fo.Optimizer(0.1, modules=["adam"], wrappers=["accumulation"]), small)
    large = jax.tree.map(lambda g: g[None], slope(PARAMS, batch.reshape(32, 2)))
    expected, _ = walk(fo.Optimizer(0.1, modules=["adam"]), large)
    assert_close(jax.tree.map(lambda leaf: leaf[-1:], each), expected)


def test_in_between_nothing_moves_and_nothing_inside_changes():
    optimizer = fo.Optimizer(0.1, 0.1, modules=["adam"], wrappers=[("accumulation", {"steps": 3})])
    fresh = state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(state._replace(wrappers={}), fresh._replace(wrappers={}))
    updates, state = optimizer.update(PARAMS, state, PARAMS)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates))
    assert_equal(state.wrappers["accumulation"], fresh.wrappers["accumulation"])


def test_compiled_what_is_inside_is_in_a_branch_alone():
    def roots(text):
        """Return the names of the computations that take a root, which only Adam does."""
        computations = text.split("\n}\n")
        return [body for body in computations if " sqrt(" in body or " rsqrt(" in body]

    params = {"w": jnp.ones((8, 4))}
    optimizer = fo.Optimizer(0.1, modules=["adam"], wrappers=["accumulation"])
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    text = lowered.compile().as_text()
    assert " conditional(" in text
    found = roots(text)
    assert found
    assert not any("ENTRY" in body for body in found)
    jaxpr = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    outside = [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name != "cond"]
    assert "sqrt" not in outside
    assert "exp" not in outside


def test_bfloat16_gradients_are_summed_in_float32():
    optimizer = fo.Optimizer(1.0, wrappers=[("accumulation", {"steps": 3})])
    params = {"w": jnp.zeros(1, jnp.bfloat16)}
    state = optimizer.init(params)
    for gradient in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        updates, state = optimizer.update({"w": jnp.full(1, gradient, jnp.bfloat16)}, state, params)
    assert updates["w"] == jnp.bfloat16(-86.0)
    assert state.wrappers["accumulation"].total["w"].dtype == jnp.float32


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_an_error_that_names_the_field(steps):
    with pytest.raises(ValueError, match=rf"AccumulationWrapper: steps={steps} should be in \[1, "):
        fo.Optimizer(0.1, wrappers=[("accumulation", {"steps": steps})])


def test_a_fraction_of_steps_is_an_error():
    with pytest.raises(TypeError, match=r"AccumulationWrapper: steps=2\.5 should be of type int"):
        fo.AccumulationWrapper(2.5)
