"""Gaussian noise: its distribution, its independence, and its place in the stream."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl
from scipy import stats

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation
from functional_optimodules.modules.noise import NoiseState

pytestmark = pytest.mark.slow

SAFE = pytest.mark.parametrize("safe_mode", [True, False])
SIZE = 20_000
# A sample that size shows a scale wrong by 10 %: the distance is then about 0.024, and its 0.1 % quantile 0.0138.
LEAST_P = 1e-3


def noise_of(module: fo.GaussianNoiseModule, shape: Any = (SIZE,), steps: int = 1, identity: int | None = None) -> Any:
    zeros = {"w": jnp.zeros(shape)}
    module.reset()
    module.setup(zeros, identity)
    return np.stack([np.asarray(module.run(zeros)["w"]) for _ in range(steps)])


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.corrcoef(left.ravel(), right.ravel())[0, 1])


def assert_independent(*draws: np.ndarray) -> None:
    """No two draws correlate beyond 5 standard errors, and they have no number in common."""
    for index, left in enumerate(draws):
        for right in draws[:index]:
            assert abs(correlation(left, right)) < 5 / np.sqrt(left.size)
            assert not (left == right).any()


@SAFE
def test_the_distribution_is_normal_of_the_scale_asked_for_and_of_no_other(safe_mode: bool) -> None:
    sample = noise_of(fo.GaussianNoiseModule(std=2.5, safe_mode=safe_mode, seed=0)).ravel()
    assert stats.kstest(sample / 2.5, "norm").pvalue > LEAST_P
    for wrong in (0.9, 1.1):
        assert stats.kstest(sample / (wrong * 2.5), "norm").pvalue < LEAST_P
    assert stats.kstest((sample - 0.1) / 2.5, "norm").pvalue < LEAST_P


def test_noise_drawn_from_entropy_has_the_scale_too() -> None:
    module = fo.GaussianNoiseModule(std=0.5)
    sample = noise_of(module).ravel()
    assert abs(sample.std() / 0.5 - 1) < 6 / np.sqrt(2 * SIZE)
    assert_independent(sample, noise_of(module).ravel())


@SAFE
def test_it_is_added_to_the_gradients(safe_mode: bool) -> None:
    module, other = (fo.GaussianNoiseModule(safe_mode=safe_mode, seed=1) for _ in range(2))
    gradients = {"w": jnp.arange(5.0)}
    np.testing.assert_allclose(
        module.run(gradients)["w"] - other.run({"w": jnp.zeros(5)})["w"], gradients["w"], atol=1e-6
    )


def test_no_noise_of_scale_zero() -> None:
    gradients = {"w": jnp.arange(5.0)}
    np.testing.assert_array_equal(fo.GaussianNoiseModule(std=0.0).run(gradients)["w"], gradients["w"])


@SAFE
def test_leaves_steps_clients_and_seeds_are_independent(safe_mode: bool) -> None:
    module = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=3)
    zeros = {"a": jnp.zeros(500), "b": jnp.zeros((20, 25))}
    draws = []
    for identity in (None, 0, 1, 2):
        module.reset()
        module.setup(zeros, identity)
        for _ in range(3):
            draws += [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(module.run(zeros))]
    other = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=4).init(zeros)
    draws += [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(jax.jit(module.update)(zeros, other)[0])]
    assert_independent(*draws)
    assert stats.kstest(np.concatenate(draws), "norm").pvalue > LEAST_P


@SAFE
def test_elements_of_one_draw_are_independent_of_their_neighbours(safe_mode: bool) -> None:
    sample = noise_of(fo.GaussianNoiseModule(safe_mode=safe_mode, seed=5)).ravel()
    assert len(np.unique(sample)) > 0.99 * SIZE
    for lag in (1, 2, 4, 16, 1250):
        assert abs(correlation(sample[:-lag], sample[lag:])) < 5 / np.sqrt(SIZE - lag)


@SAFE
def test_the_pure_fold_in_parts_clients_as_an_identity_does(safe_mode: bool) -> None:
    module = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=6)
    zeros = {"w": jnp.zeros(50)}
    state = module.init(zeros)
    states = jax.vmap(lambda client: module.fold_in(state, client))(jnp.arange(3))
    pure = np.asarray(jax.vmap(lambda s: module.update(zeros, s)[0]["w"])(states))
    assert_independent(*pure)
    for identity in range(3):
        np.testing.assert_allclose(pure[identity], noise_of(module, (50,), identity=identity)[0], rtol=1e-6)


@SAFE
@pytest.mark.parametrize("seed", [None, 7])
def test_a_resumed_run_draws_what_it_would_have_drawn_and_replays_nothing(safe_mode: bool, seed: int | None) -> None:
    module, resumed = (fo.GaussianNoiseModule(safe_mode=safe_mode, seed=seed) for _ in range(2))
    zeros = {"w": jnp.zeros(50)}
    past = [np.asarray(module.run(zeros)["w"]) for _ in range(2)]
    resumed.set_state(json.loads(json.dumps(module.get_state(), allow_nan=False)))
    future = [np.asarray(resumed.run(zeros)["w"]) for _ in range(2)]
    for drawn in future:
        np.testing.assert_array_equal(drawn, module.run(zeros)["w"])
    assert_independent(*past, *future)


@SAFE
def test_a_new_round_replays_nothing(safe_mode: bool) -> None:
    optimizer = fo.Optimizer(1.0, modules=[fo.GaussianNoiseModule(safe_mode=safe_mode, seed=8)])
    zeros = {"w": jnp.zeros(50)}
    draws = []
    for _ in range(3):
        optimizer.start_round()
        draws.append(np.asarray(optimizer.run(zeros)["w"]))
    assert_independent(*draws)


@pytest.mark.parametrize(("safe_mode", "dtype"), [(True, jnp.bfloat16), (False, jnp.float16)])
def test_half_precision_leaves_get_noise_that_was_drawn_and_added_in_float32(safe_mode: bool, dtype: Any) -> None:
    half, full = (fo.GaussianNoiseModule(std=0.5, safe_mode=safe_mode, seed=9) for _ in range(2))
    gradients = jnp.linspace(-1, 1, 1000, dtype=dtype)
    noisy = half.run({"w": gradients})["w"]
    assert noisy.dtype == dtype
    exact = full.run({"w": gradients.astype(jnp.float32)})["w"]
    np.testing.assert_array_equal(noisy, exact.astype(dtype))


@SAFE
def test_double_precision_leaves_get_noise_of_double_precision(safe_mode: bool) -> None:
    with jax.enable_x64(True):
        sample = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=9).run({"w": jnp.zeros(2000)})["w"]
        assert sample.dtype == jnp.float64
        assert (np.asarray(sample) != np.asarray(sample, np.float32)).mean() > 0.99
        assert stats.kstest(np.asarray(sample), "norm").pvalue > LEAST_P


def constant_bits(value: int) -> Any:
    """A generator whose every bit is the same: the ends of the range of uniform numbers."""
    return define_prng_impl(
        key_shape=(1,),
        seed=lambda seed: jnp.zeros(1, jnp.uint32),
        split=lambda key, shape: jnp.zeros((*shape, 1), jnp.uint32),
        random_bits=lambda key, width, shape: jnp.full(shape, value * (2**width - 1), f"uint{width}"),
        fold_in=lambda key, integer: key,
        name=f"constant-{value}",
        tag=f"constant-{value}",
    )


@pytest.mark.parametrize("bit", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_the_extreme_tails_are_finite(bit: int, dtype: Any) -> None:
    module = fo.GaussianNoiseModule(std=3.0)
    state = NoiseState(jax.random.key(0, impl=constant_bits(bit)), jnp.zeros((), jnp.int32))
    noise = np.asarray(module.update({"w": jnp.zeros(3, dtype)}, state)[0]["w"], np.float64)
    assert np.isfinite(noise).all()
    assert (np.sign(noise) == 2 * bit - 1).all()
    assert (np.abs(noise) > 3 * 4).all()


def test_init_under_jit_without_a_seed_is_a_clear_error() -> None:
    module = fo.GaussianNoiseModule()
    for init in (module.init, fo.Optimizer(1.0, modules=[module]).init):
        with pytest.raises(RuntimeError, match=r"GaussianNoiseModule: seed=None .* call `init` outside of jit"):
            jax.jit(init)(jnp.ones(2))


@SAFE
def test_init_under_jit_with_a_seed_is_the_eager_one(safe_mode: bool) -> None:
    module = fo.GaussianNoiseModule(safe_mode=safe_mode, seed=12)
    params = {"w": jnp.zeros(4)}
    traced, eager = jax.jit(module.init)(params), module.init(params)
    np.testing.assert_array_equal(module.update(params, traced)[0]["w"], module.update(params, eager)[0]["w"])


def test_two_inits_without_a_seed_differ_and_fill_the_whole_key() -> None:
    module = fo.GaussianNoiseModule()
    first, second = (module.init(jnp.ones(2)).key.words for _ in range(2))
    assert (first != second).all()
    assert len(set(np.asarray(first).tolist())) == 10


def as_once_saved(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays by name, as they were when keys of the cipher were of a dtype of their own."""
    return {
        name.removesuffix("/words"): {**array, "dtype": "key:chacha20", "shape": array["shape"][:-1]}
        if name.endswith("/words")
        else array
        for name, array in arrays.items()
    }


def test_a_state_that_was_saved_with_keys_of_the_ciphers_own_dtype_is_read() -> None:
    zeros, noise = {"w": jnp.zeros(5)}, {"modules": ["gaussian-noise"], "lrate": 1.0}
    first, second = (fo.Optimizer.from_config(noise) for _ in range(2))
    first.run(zeros)
    saved = first.get_state()
    old = {**saved, "variables": as_once_saved(saved["variables"])}
    assert old["variables"]["modules/gaussian-noise/key"]["shape"] == []
    second.set_state(json.loads(json.dumps(old)))
    assert second.get_state() == saved
    for broken in ({"shape": [2]}, {"shape": 3}, {"dtype": "key:threefry2x32"}):
        key = {**old["variables"]["modules/gaussian-noise/key"], **broken}
        with pytest.raises((KeyError, ValueError), match="gaussian-noise/key"):
            second.set_state({**old, "variables": {**old["variables"], "modules/gaussian-noise/key": key}})
    assert second.get_state() == saved


def test_a_federation_that_was_saved_with_keys_of_the_ciphers_own_dtype_is_read() -> None:
    federation = Federation(lambda w, batch: (w - batch) ** 2, fo.Optimizer(0.1, modules=["gaussian-noise"]))
    data = FederatedData.from_clients([jnp.ones(3), jnp.zeros(3)])
    saved = federation.encode(federation.fit(federation.init(jnp.zeros(()), data), data, 2)[0])
    old = {**saved, "bank": as_once_saved(saved["bank"])}
    assert old["bank"] != saved["bank"]
    assert federation.encode(federation.decode(old, federation.init(jnp.zeros(()), data))) == saved
