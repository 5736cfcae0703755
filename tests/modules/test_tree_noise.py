"""Tree aggregation: the noise of sums of gradients, node by node, and DP-FTRL by it."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import functional_optimodules as fo
from functional_optimodules.modules.tree_noise import TreeAggregationNoiseModule

SAFE = pytest.mark.parametrize("safe_mode", [True, False])
STD, SIZE, STEPS = 2.5, 20_000, 16
LEAST_P = 1e-3


def sums(safe_mode: bool, size: int = SIZE, steps: int = STEPS) -> np.ndarray:
    """Return the noise of the sum of the first t updates, for t = 0, 1, ..."""
    module = TreeAggregationNoiseModule(std=STD, safe_mode=safe_mode, seed=0)
    zeros = {"w": jnp.zeros(size)}

    def step(state: Any, _: None) -> Any:
        output, state = module.update(zeros, state)
        return state, output["w"]

    _, outputs = jax.jit(lambda: jax.lax.scan(step, module.init(zeros), None, steps))()
    return np.concatenate([np.zeros((1, size)), np.cumsum(np.asarray(outputs, np.float64), axis=0)])


@pytest.mark.slow
@SAFE
def test_the_noise_of_a_sum_is_that_of_as_many_nodes_as_its_length_has_binary_ones(safe_mode: bool) -> None:
    noise = sums(safe_mode)
    for t, nodes in ((1, 1), (2, 1), (3, 2), (4, 1), (7, 3), (8, 1), (15, 4), (16, 1)):
        std = STD * np.sqrt(nodes)
        assert stats.kstest(noise[t] / std, "norm").pvalue > LEAST_P
        for wrong in (0.9, 1.1):
            assert stats.kstest(noise[t] / (wrong * std), "norm").pvalue < LEAST_P


@pytest.mark.slow
@SAFE
def test_the_nodes_are_independent_and_each_has_the_scale_asked_for(safe_mode: bool) -> None:
    noise = sums(safe_mode)
    # The last node of t ends with it, and begins after t without its last binary one.
    nodes = np.stack([noise[t] - noise[t & (t - 1)] for t in range(1, STEPS + 1)])
    correlations = np.corrcoef(nodes) - np.eye(STEPS)
    assert np.abs(correlations).max() < 5 / np.sqrt(SIZE)
    np.testing.assert_allclose(nodes.std(axis=1), STD, rtol=6 / np.sqrt(2 * SIZE))
    neighbours = [np.corrcoef(node[:-1], node[1:])[0, 1] for node in nodes]
    assert np.abs(neighbours).max() < 5 / np.sqrt(SIZE)


@pytest.mark.slow
@SAFE
def test_the_noise_of_a_long_sum_stays_small(safe_mode: bool) -> None:
    noise = sums(safe_mode, size=50, steps=300)
    # 300 independent draws would have a standard deviation of 17 STD.
    assert noise[256].std() < 1.5 * STD
    assert noise[1:].std(axis=1).max() < 1.5 * STD * np.sqrt(8)


@pytest.mark.slow
def test_it_is_added_to_the_gradients_of_all_leaves() -> None:
    gradients = {"a": jnp.arange(5.0), "b": jnp.full((2, 3), -1.0)}
    module = TreeAggregationNoiseModule(seed=1)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    state = module.init(zeros)
    drawn = []
    for _ in range(3):
        noisy, after = module.update(gradients, state)
        noise, state = module.update(zeros, state)
        jax.tree.map(lambda n, z, g: np.testing.assert_allclose(n - z, g, atol=1e-5), noisy, noise, gradients)
        assert int(after.steps) == int(state.steps)
        drawn.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noise)]))
    assert len(np.unique(drawn)) == 33


def test_no_noise_of_scale_zero() -> None:
    gradients = {"w": jnp.arange(5.0)}
    np.testing.assert_array_equal(TreeAggregationNoiseModule(std=0.0).run(gradients)["w"], gradients["w"])


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_with_momentum_it_is_the_papers_ftrl(beta: float) -> None:
    """x = x_0 - rate * momentum, where momentum is a moving sum of the noised sums of gradients."""
    rate, steps, size = 0.1, 12, 6
    gradients = np.random.default_rng(0).normal(size=(steps, size)).astype(np.float32)
    noise = sums(True, size, steps)
    total, velocity, start = np.zeros(size), np.zeros(size), np.linspace(-1, 1, size)
    noisy = TreeAggregationNoiseModule(std=STD, seed=0)
    optimizer = fo.Optimizer(rate, modules=[noisy, fo.MomentumModule(beta=beta)] if beta else [noisy])
    params = {"w": jnp.asarray(start, jnp.float32)}
    for t in range(steps):
        total = total + gradients[t]
        velocity = beta * velocity + total + noise[t + 1]
        params = optimizer.apply_gradients(params, {"w": jnp.asarray(gradients[t])})
        np.testing.assert_allclose(params["w"], start - rate * velocity, rtol=1e-4, atol=1e-4)


@SAFE
@pytest.mark.parametrize("seed", [None, 7])
def test_a_resumed_run_draws_what_it_would_have_drawn(safe_mode: bool, seed: int | None) -> None:
    module, resumed = (TreeAggregationNoiseModule(safe_mode=safe_mode, seed=seed) for _ in range(2))
    zeros = {"w": jnp.zeros(50)}
    past = [np.asarray(module.run(zeros)["w"]) for _ in range(3)]
    resumed.set_state(json.loads(json.dumps(module.get_state(), allow_nan=False)))
    for _ in range(3):
        drawn = np.asarray(resumed.run(zeros)["w"])
        np.testing.assert_array_equal(drawn, module.run(zeros)["w"])
        assert not any((drawn == before).any() for before in past)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_leaves_get_noise_that_was_drawn_and_added_in_float32(dtype: Any) -> None:
    half, full = (TreeAggregationNoiseModule(std=0.5, seed=9) for _ in range(2))
    gradients = jnp.linspace(-1, 1, 100, dtype=dtype)
    for _ in range(4):
        noisy = half.run({"w": gradients})["w"]
        assert noisy.dtype == dtype
        exact = full.run({"w": gradients.astype(jnp.float32)})["w"]
        np.testing.assert_array_equal(noisy, exact.astype(dtype))


def test_init_under_jit_without_a_seed_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"TreeAggregationNoiseModule: seed=None .* call `init` outside of jit"):
        jax.jit(TreeAggregationNoiseModule().init)(jnp.ones(2))
