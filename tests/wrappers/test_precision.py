"""Precision: what is kept in which dtype, that rounding at random is fair, and that training does not notice."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import functional_optimodules as fo
from functional_optimodules.packing.tree import unpack

from . import attention
from .steps import PARAMS, assert_close, assert_equal, gradients, walk

HALVES = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
SLOW = ("adam", {"beta_2": 0.999})


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


# Master weights.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_master_is_the_float32_run_of_the_same_gradients_and_parameters_are_its_rounding(dtype):
    halves = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = gradients(20, dtype=dtype)
    rules = {"lrate": 0.01, "w_decay": 1e-4, "modules": ["adam"]}
    each, state = walk(fo.Optimizer(**rules, wrappers=["master-weights"]), grads, halves)
    expected, _ = walk(fo.Optimizer(**rules), wide(grads), wide(halves))
    assert_close(state.wrappers["master-weights"].master, jax.tree.map(lambda leaf: leaf[-1], expected), rtol=1e-6)
    assert dtypes(each) == {dtype.dtype.name}
    unit = float(jnp.finfo(dtype).eps)
    assert_close(wide(each), expected, rtol=unit, atol=1e-7)  # half a unit would do, were float32 runs equal bit by bit


def test_steps_below_a_unit_of_bfloat16_are_not_lost():
    params, steps = {"w": jnp.ones(3, jnp.bfloat16)}, 100
    grads = {"w": jnp.ones((steps, 3), jnp.bfloat16)}
    plain, _ = walk(fo.Optimizer(1e-3), grads, params)
    assert_equal(plain["w"][-1], params["w"])  # 1 - 0.001 is 1
    kept, _ = walk(fo.Optimizer(1e-3, wrappers=["master-weights"]), grads, params)
    assert_equal(kept["w"][-1], jnp.full(3, 0.9, jnp.bfloat16))


def test_parameters_that_somebody_else_has_changed_become_the_master():
    optimizer = fo.Optimizer(0.01, wrappers=["master-weights"])
    _, state = walk(optimizer, gradients(3, dtype=jnp.bfloat16), HALVES)
    other = jax.tree.map(lambda p: p * 3, HALVES)
    zeros = jax.tree.map(jnp.zeros_like, other)
    updates, state = optimizer.update(zeros, state, other)
    assert_equal(updates, zeros)
    assert_equal(state.wrappers["master-weights"].master, wide(other))


def test_what_is_inside_of_master_weights_is_made_for_float32_and_so_are_its_rounds():
    optimizer = fo.Optimizer(0.1, regularizers=["fedprox"], wrappers=["master-weights", "ema"])
    state = optimizer.begin_round(optimizer.init(HALVES), HALVES)
    assert dtypes(state.regularizers["fedprox"].reference) == {"float32"}
    updates, _ = optimizer.update(HALVES, state, HALVES)
    assert dtypes(updates) == {"bfloat16"}


# States at rest.


def test_moments_rounded_to_the_nearest_are_those_of_numpy():
    grads, beta_1, beta_2 = gradients(6), 0.9, 0.99
    optimizer = fo.Optimizer(0.1, modules=["adam"], wrappers=[("state-dtype", {"rounding": "nearest"})])
    each, state = walk(optimizer, grads)
    for name, param in PARAMS.items():
        first = second = np.zeros(param.shape, ml_dtypes.bfloat16)
        found = np.asarray(param, np.float64)
        for step, g in enumerate(np.asarray(grads[name], np.float64), start=1):
            m = beta_1 * first.astype(np.float64) + (1 - beta_1) * g
            v = beta_2 * second.astype(np.float64) + (1 - beta_2) * g**2
            found = found - 0.1 * (m / (1 - beta_1**step)) / (np.sqrt(v / (1 - beta_2**step)) + 1e-7)
            first, second = m.astype(np.float32).astype(first.dtype), v.astype(np.float32).astype(second.dtype)
        assert_close(each[name][-1], found)
        assert_equal(state.modules["adam"].second[name], second)


def test_a_second_moment_stagnates_if_it_is_rounded_to_the_nearest_and_does_not_at_random():
    grads = jax.tree.map(lambda p: jnp.ones((2000, *p.shape)), PARAMS)

    def second(rounding):
        optimizer = fo.Optimizer(1e-3, modules=[SLOW], wrappers=[("state-dtype", {"rounding": rounding})])
        _, state = walk(optimizer, grads)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(wide(state.modules["adam"].second))])

    expected = 1 - 0.999**2000
    assert abs(second("stochastic").mean() / expected - 1) < 0.05
    assert second("nearest").mean() / expected < 0.6


@pytest.mark.parametrize("packed", [False, True])
def test_a_pattern_says_what_is_narrowed_and_all_else_stays(packed):
    params = fo.pack(PARAMS) if packed else PARAMS
    optimizer = fo.Optimizer(
        0.1, modules=["momentum", "adam"], wrappers=[("state-dtype", {"match": "modules/adam/second/**"})]
    )
    state = optimizer.init(params)
    _, later = optimizer.update(params, state, params)
    for each in (state, later):
        assert dtypes(each.modules["adam"].second) == {"bfloat16"}
        assert dtypes((each.modules["adam"].first, each.modules["momentum"])) == {"float32"}
    assert later.modules["adam"].steps.dtype == jnp.int32


def test_numbers_drawn_for_packed_states_are_those_for_others():
    optimizer = fo.Optimizer(0.1, modules=["adam"], wrappers=["state-dtype", "ema"])
    found = []
    for params in (PARAMS, fo.pack(PARAMS)):
        state = optimizer.init(params)
        for _ in range(3):
            _, state = optimizer.update(params, state, params)
        found.append(unpack(state.modules["adam"]))
    assert_equal(*found)


def test_it_takes_half_of_the_bytes():
    def size(wrappers):
        return sum(
            leaf.nbytes for leaf in jax.tree.leaves(fo.Optimizer(0.1, modules=["adam"], wrappers=wrappers).init(big))
        )

    big = {"w": jnp.zeros((100, 100))}
    assert size(["state-dtype"]) < 0.51 * size([])


def test_a_pattern_that_matches_no_path_of_the_state_is_an_error_with_near_ones():
    optimizer = fo.Optimizer(0.1, modules=["adam"], wrappers=[("state-dtype", {"match": "modules/adam/secnd/*"})])
    with pytest.raises(ValueError, match=r"StateDtypeWrapper: match: the pattern .*secnd.* did you mean .*second"):
        optimizer.init(PARAMS)


def test_what_has_that_dtype_by_itself_is_refused_by_its_path():
    optimizer = fo.Optimizer(0.1, regularizers=["fedprox"], wrappers=[("state-dtype", {"match": "regularizers/**"})])
    with pytest.raises(ValueError, match=r"bfloat16\[3\] at 'regularizers/fedprox/reference/b' .* 'master-weights'"):
        optimizer.init(HALVES)
    around = fo.Optimizer(
        0.1, regularizers=["fedprox"], wrappers=["master-weights", ("state-dtype", {"match": "regularizers/**"})]
    )
    _, state = around.update(HALVES, around.init(HALVES), HALVES)
    assert dtypes(state.regularizers["fedprox"].reference) == {"bfloat16"}


def test_the_state_of_a_module_that_exchanges_messages_is_refused_and_may_be_left_out():
    modules = ["scaffold-client", "adam"]
    with pytest.raises(ValueError, match=r"at 'modules/scaffold-client/.* would be kept in bfloat16.*leave it out"):
        fo.Optimizer(0.1, modules=modules, wrappers=["state-dtype"]).init(PARAMS)
    state = fo.Optimizer(0.1, modules=modules, wrappers=[("state-dtype", {"match": "modules/adam/**"})]).init(PARAMS)
    assert dtypes(state.modules["adam"].second) == {"bfloat16"}


def test_float16_is_rounded_to_the_nearest_alone():
    with pytest.raises(ValueError, match="rounding='stochastic' is for bfloat16"):
        fo.StateDtypeWrapper("float16")
    fo.StateDtypeWrapper("float16", rounding="nearest")
    with pytest.raises(TypeError, match="StateDtypeWrapper: dtype='int8'"):
        fo.StateDtypeWrapper("int8")


# Rounding at random.

_MANY = 2**18


def moved(start, step, dtype=jnp.bfloat16, seed=0):
    """Return by how much many equal parameters move in one step by plain descent, in float64."""
    params = {"w": jnp.full(_MANY, start, jnp.bfloat16)}
    optimizer = fo.Optimizer(1.0, wrappers=[("stochastic-rounding", {"seed": seed})])
    updates, _ = jax.jit(optimizer.update)({"w": jnp.full(_MANY, -step, dtype)}, optimizer.init(params), params)
    return np.asarray(optax.apply_updates(params, updates)["w"], np.float64) - float(params["w"][0])


def z_score(samples, mean):
    return (samples.mean() - mean) / (samples.std() / np.sqrt(len(samples)))


@pytest.mark.parametrize(
    ("start", "step"), [(1.0, 2**-12), (1.0, -(2**-12)), (-1.0, 2**-11), (3.0, 0.001953125), (0.1, -0.00002)]
)
def test_the_mean_of_what_is_rounded_is_the_number_itself(start, step):
    exact = float(jnp.asarray(step, jnp.bfloat16))
    samples = moved(start, step)
    assert len(np.unique(samples)) == 2
    assert abs(z_score(samples, exact)) < 4
    for wrong in (0.0, 0.9 * exact, 1.1 * exact, -exact):
        assert abs(z_score(samples, wrong)) > 4


def test_what_bfloat16_holds_is_not_rounded():
    assert_equal(moved(1.0, 0.5), np.full(_MANY, 0.5))


def test_numbers_follow_from_the_seed_and_differ_from_step_to_step():
    assert_equal(moved(1.0, 0.001), moved(1.0, 0.001))
    assert (moved(1.0, 0.001) != moved(1.0, 0.001, seed=1)).any()
    params = {"w": jnp.ones(1000, jnp.bfloat16)}
    grads = {"w": jnp.full((2, 1000), 0.001, jnp.bfloat16)}
    each, _ = walk(fo.Optimizer(1.0, wrappers=["stochastic-rounding"]), grads, params)
    first, second = each["w"][0] != 1, each["w"][1] != each["w"][0]
    assert (first != second).any()


def test_what_is_not_finite_stays_so():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    gradient = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0], jnp.bfloat16)}
    optimizer = fo.Optimizer(1.0, wrappers=["stochastic-rounding"])
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    found = optax.apply_updates(params, updates)["w"].astype(jnp.float32)
    assert_equal(found, np.array([np.nan, -np.inf, np.inf, 1.0], np.float32))


def test_parameters_of_other_dtypes_are_added_to_as_ever():
    optimizer, plain = (fo.Optimizer(0.1, modules=["adam"], wrappers=w) for w in (["stochastic-rounding"], []))
    found, expected = (walk(each, gradients(4))[0] for each in (optimizer, plain))
    assert_close(found, expected)


# A small transformer.

_STEPS, _WINDOW = 200, 20


@functools.cache
def curve(dtype, *wrappers):
    optimizer = fo.Optimizer(3e-4, modules=[SLOW], wrappers=wrappers)
    return np.asarray(attention.curve(optimizer, dtype, _STEPS)).reshape(-1, _WINDOW).mean(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "wrappers"),
    [
        ("bfloat16", ("master-weights",)),
        ("float16", ("master-weights",)),
        ("bfloat16", ("stochastic-rounding",)),
        ("float32", ("state-dtype",)),
        ("bfloat16", ("stochastic-rounding", "state-dtype")),
    ],
)
def test_a_transformer_learns_as_in_float32(dtype, wrappers):
    exact, plain = curve("float32"), curve("bfloat16")
    found = curve(dtype, *wrappers)
    assert exact[-1] < exact[0] - 0.4
    assert np.abs(found - exact).max() < 0.02
    assert np.abs(plain - exact).max() > 0.2  # bfloat16 alone does not
