"""Compression: the papers' formulas over rounds, means, bits, and what error feedback is for."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from functional_optimodules import order
from functional_optimodules.brick import OptiModule
from functional_optimodules.federated import Federation
from functional_optimodules.modules.compression import QSGDModule, RandomKModule, SignModule, TopKModule
from functional_optimodules.modules.powersgd import PowerSGDModule
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.policy import pack
from functional_optimodules.packing.tree import unpack

SHAPES = {"bias": (7,), "kernel": (4, 5), "scale": ()}
N = 28
FED_BACK = {
    "top-k": TopKModule(fraction=0.2),
    "random-k": RandomKModule(fraction=0.2, error_feedback=True, seed=1),
    "sign": SignModule(),
    "sign-together": SignModule(per_parameter=False),
    "qsgd": QSGDModule(levels=3, error_feedback=True, seed=1),
    "qsgd-each": QSGDModule(levels=3, per_parameter=True, error_feedback=True, seed=1),
    "powersgd": PowerSGDModule(rank=2),
}
Tree = dict[str, np.ndarray]


def deltas(seed: int, dtype: Any = np.float32) -> Tree:
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def exact(tree: Any) -> Tree:
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(tree[name]) for name in sorted(tree)])


def rounds(module: OptiModule, given: list[Any]) -> list[tuple[Any, Any]]:
    """Return what each round sends, and the state after it."""
    state, step, made = module.init(given[0]), jax.jit(module.update), []
    for updates in given:
        sent, state = step(updates, state)
        made.append((sent, state))
    return made


def assert_rounds(module: OptiModule, compress: Callable[[Tree], Tree]) -> None:
    """Four rounds with error feedback are u = e + D; Q(u); e = u - Q(u), in float64, with this Q."""
    given = [deltas(seed) for seed in range(4)]
    error = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for updates, (sent, state) in zip(given, rounds(module, given), strict=True):
        due = {name: error[name] + leaf for name, leaf in exact(updates).items()}
        expected = compress(due)
        error = {name: due[name] - expected[name] for name in due}
        for name in SHAPES:
            np.testing.assert_allclose(sent[name], expected[name], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(state.error[name], error[name], rtol=1e-5, atol=1e-5)
            assert state.error[name].dtype == jnp.float32


def split_like_shapes(vector: np.ndarray) -> Tree:
    sizes = [math.prod(SHAPES[name]) for name in sorted(SHAPES)]
    pieces = np.split(vector, np.cumsum(sizes)[:-1])
    return {name: piece.reshape(SHAPES[name]) for name, piece in zip(sorted(SHAPES), pieces, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "k"), [(0.001, 1), (0.2, 6), (0.5, 14), (1.0, 28)])
def test_top_k_sends_the_k_largest_of_all_parameters_together(fraction: float, k: int) -> None:
    def compress(due: Tree) -> Tree:
        vector = flat(due)
        others = np.argsort(-np.abs(vector))[k:]
        vector[others] = 0
        return split_like_shapes(vector)

    assert_rounds(TopKModule(fraction), compress)


def scaled_sign(vector: np.ndarray) -> np.ndarray:
    return np.abs(vector).mean() * np.where(vector < 0, -1, 1)


def test_sign_sends_the_mean_modulus_of_each_parameter_with_signs() -> None:
    assert_rounds(SignModule(), lambda due: {name: scaled_sign(leaf) for name, leaf in due.items()})


def test_sign_may_take_one_mean_over_all_parameters() -> None:
    assert_rounds(SignModule(per_parameter=False), lambda due: split_like_shapes(scaled_sign(flat(due))))


def test_the_sign_of_zero_is_one_for_a_bit_to_tell_it() -> None:
    ((sent, _),) = rounds(SignModule(), [{"w": jnp.array([0.0, -0.0, 2.0, -4.0])}])
    np.testing.assert_array_equal(sent["w"], [1.5, 1.5, 1.5, -1.5])


@pytest.mark.parametrize("rank", [1, 2])
def test_powersgd_is_one_warm_power_iteration_a_round(rank: int) -> None:
    module = PowerSGDModule(rank=rank, seed=3)
    right = np.asarray(module.init(deltas(0)).right["kernel"], np.float64)
    assert right.shape == (5, rank)

    def compress(due: Tree) -> Tree:
        nonlocal right
        left, _ = np.linalg.qr(due["kernel"] @ right)
        right = due["kernel"].T @ left
        return due | {"kernel": left @ right.T}

    assert_rounds(module, compress)


@pytest.mark.slow
@pytest.mark.parametrize("error_feedback", [True, False])
def test_random_k_sends_k_drawn_coordinates_anew_each_round(error_feedback: bool) -> None:
    module = RandomKModule(fraction=0.2, error_feedback=error_feedback, seed=5)
    given, error, places = [deltas(seed) for seed in range(4)], np.zeros(N), []
    for updates, (sent, state) in zip(given, rounds(module, given), strict=True):
        due, vector = error + flat(exact(updates)), flat(exact(sent))
        drawn = np.flatnonzero(vector)
        assert len(drawn) == 6
        np.testing.assert_allclose(vector[drawn], due[drawn] * (1 if error_feedback else N / 6), rtol=1e-5)
        if error_feedback:
            error = due - vector
            np.testing.assert_allclose(flat(exact(state.error)), error, rtol=1e-5, atol=1e-6)
        else:
            assert state.error is None
        places.append(tuple(drawn))
    assert len(set(places)) == 4


def drawn_by(module: OptiModule, vector: np.ndarray, draws: int) -> np.ndarray:
    """Return what a module sends for one vector, drawn many times."""
    updates = {"w": jnp.asarray(vector, jnp.float32)}
    state = module.init(updates)
    states = jax.vmap(lambda index: module.fold_in(state, index))(jnp.arange(draws))
    return np.asarray(jax.jit(jax.vmap(lambda each: module.update(updates, each)[0]["w"]))(states), np.float64)


def deviations(sample: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return by how many standard errors the means of a sample's columns are off."""
    return np.abs(sample.mean(0) - mean) / (sample.std(0) / math.sqrt(len(sample)))


VECTOR = np.array([3.0, -2.0, 1.0, 0.5, -4.0, 2.5, 0.1, -1.0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        RandomKModule(fraction=0.5, seed=0),
        QSGDModule(levels=1, seed=0),
        QSGDModule(levels=4, seed=0),
        QSGDModule(levels=4, per_parameter=True, seed=0),
    ],
)
def test_unbiased_ones_have_the_mean_and_no_other_scale(module: OptiModule) -> None:
    sample = drawn_by(module, VECTOR, 4000)
    assert deviations(sample, VECTOR).max() < 5
    for wrong in (0.9, 1.1):
        assert deviations(sample * wrong, VECTOR).max() > 5


@pytest.mark.slow
def test_random_k_draws_each_set_of_coordinates_alike_often() -> None:
    sample = drawn_by(RandomKModule(fraction=0.4, seed=1), VECTOR[:5], 5000)
    sets, counts = np.unique(sample != 0, axis=0, return_counts=True)
    assert len(sets) == math.comb(5, 2)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("levels", [1, 4])
def test_qsgd_rounds_to_the_levels_beside_within_the_variance_of_its_paper(levels: int) -> None:
    sample, norm = drawn_by(QSGDModule(levels=levels, seed=2), VECTOR, 4000), np.linalg.norm(VECTOR)
    level = np.abs(sample) / norm * levels
    np.testing.assert_allclose(level, np.round(level), atol=1e-5)
    assert (np.abs(level - np.abs(VECTOR) / norm * levels) < 1).all()
    size = len(VECTOR)
    bound = min(size / levels**2, math.sqrt(size) / levels) * norm**2
    variance = ((sample - VECTOR) ** 2).sum(1).mean()
    # What the rounding of each coordinate adds: p (1 - p) steps².
    part = np.abs(VECTOR) / norm * levels % 1
    np.testing.assert_allclose(variance, (part * (1 - part)).sum() * (norm / levels) ** 2, rtol=0.1)
    assert variance <= bound


def test_qsgd_takes_one_norm_over_all_parameters_or_one_for_each() -> None:
    updates = {"large": jnp.array([30.0, 40.0]), "small": jnp.array([0.3, 0.4])}
    for module, norm in ((QSGDModule(2, seed=0), math.hypot(50, 0.5)), (QSGDModule(2, True, seed=0), 0.5)):
        states = jax.vmap(functools.partial(module.fold_in, module.init(updates)))(jnp.arange(500))
        sent = jax.jit(jax.vmap(lambda state, module=module: module.update(updates, state)[0]))(states)
        found = {round(float(value), 3) for value in np.ravel(sent["small"])}
        assert found <= {0.0, round(norm / 2, 3), round(norm, 3)}
        assert round(norm / 2, 3) in found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_top_k_and_sign_are_contractions(seed: int) -> None:
    updates = deltas(seed)
    vector = flat(exact(updates))
    total = (vector**2).sum()
    for module, least in (
        (TopKModule(0.2), 6 / N),
        (SignModule(per_parameter=False), np.abs(vector).sum() ** 2 / (N * total)),
    ):
        ((_, state),) = rounds(module, [updates])
        assert (flat(exact(state.error)) ** 2).sum() <= (1 - least) * total * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "variance"),
    [(RandomKModule(0.25, True, seed=3), 3), (QSGDModule(1, error_feedback=True, seed=3), math.sqrt(8))],
)
def test_unbiased_ones_are_contractions_with_error_feedback(module: OptiModule, variance: float) -> None:
    sample = drawn_by(module, VECTOR, 4000)
    assert deviations(sample * (1 + variance), VECTOR).max() < 5
    left = ((sample - VECTOR) ** 2).sum(1)
    largest = (1 - 1 / (1 + variance)) * (VECTOR**2).sum()
    assert left.mean() - largest < 5 * left.std() / math.sqrt(len(left))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["_kth_by_digits", "_kth_by_halving"])
@pytest.mark.parametrize("values", [2, 2**32])
def test_exactly_k_are_the_largest_and_of_equal_ones_the_first(
    monkeypatch: pytest.MonkeyPatch, way: str, values: int
) -> None:
    monkeypatch.setattr(order, "_kth", getattr(order, way))
    for size in (2, 37):
        keys = np.random.default_rng(size).integers(0, values, size, dtype=np.uint64).astype(np.uint32)
        for k in {1, size // 2, size - 1, size}:
            expected = np.zeros(size, bool)
            expected[np.argsort(-keys.astype(np.int64), kind="stable")[:k]] = True
            np.testing.assert_array_equal(order.largest(jnp.asarray(keys), k), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["_kth_by_digits", "_kth_by_halving"])
def test_the_largest_are_told_apart_by_the_last_bit_of_64(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(order, "_kth", getattr(order, way))
    with jax.enable_x64(True):
        keys = jnp.asarray([2**63, 2**63 + 1, 7, 2**63 + 2], jnp.uint64)
        np.testing.assert_array_equal(order.largest(keys, 2), [False, True, False, True])


def test_of_equal_moduli_top_k_sends_the_first_in_the_order_of_the_paths() -> None:
    updates = {"b": jnp.array([1.0, -1.0, 2.0]), "a": jnp.array([0.5, -1.0, 1.0])}
    ((sent, _),) = rounds(TopKModule(0.5), [updates])
    np.testing.assert_array_equal(sent["a"], [0, -1, 1])
    np.testing.assert_array_equal(sent["b"], [0, 0, 2])


def test_elsewhere_than_on_cpu_top_k_scatters_nothing() -> None:
    updates = {"w": jnp.zeros(100)}
    module = TopKModule(0.1)
    traced = jax.jit(module.update).trace(updates, module.init(updates))
    scatters = {
        platform: "stablehlo.scatter" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert scatters == {"cpu": True, "cuda": False, "tpu": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", FED_BACK)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_lost_over_rounds(name: str, dtype: Any) -> None:
    given = [deltas(seed, dtype) for seed in range(6)]
    made = rounds(FED_BACK[name], given)
    for leaf in SHAPES:
        total = sum(np.asarray(updates[leaf], np.float64) for updates in given)
        arrived = sum(np.asarray(sent[leaf], np.float64) for sent, _ in made)
        np.testing.assert_allclose(arrived + made[-1][1].error[leaf], total, atol=1e-5)
        assert all(sent[leaf].dtype == dtype for sent, _ in made)
        assert made[-1][1].error[leaf].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", FED_BACK)
def test_zeros_are_sent_as_zeros(name: str) -> None:
    zeros = jax.tree.map(jnp.zeros_like, deltas(0))
    for sent, state in rounds(FED_BACK[name], [zeros, zeros]):
        np.testing.assert_array_equal(flat(sent), np.zeros(N))
        np.testing.assert_array_equal(flat(state.error), np.zeros(N))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "bits"),
    [
        (TopKModule(0.2), 6 * (32 + 5)),
        (TopKModule(1.0), 28 * (32 + 5)),
        (RandomKModule(0.2, seed=0), 6 * 32),
        (SignModule(), 28 + 3 * 32),
        (SignModule(per_parameter=False), 28 + 32),
        (QSGDModule(1, seed=0), 28 * 2 + 32),
        (QSGDModule(127, seed=0), 28 * 8 + 32),
        (QSGDModule(128, per_parameter=True, seed=0), 28 * 9 + 3 * 32),
        (PowerSGDModule(1), 32 * (4 + 5 + 8)),
        (PowerSGDModule(2), 32 * (2 * (4 + 5) + 8)),
        (PowerSGDModule(3), 32 * 28),
    ],
)
def test_bits_are_those_of_the_last_update(module: OptiModule, bits: int) -> None:
    updates = deltas(0)
    state = module.init(updates)
    assert dict(module.metrics(state)) == {"bits": 0}
    _, state = jax.jit(module.update)(updates, state)
    assert module.metrics(state)["bits"].dtype == jnp.float32
    assert dict(module.metrics(state)) == {"bits": bits}


@pytest.mark.slow
@pytest.mark.parametrize("module", [TopKModule(0.2), SignModule(), SignModule(per_parameter=False)])
def test_bits_are_the_same_for_packed_parameters(module: OptiModule) -> None:
    updates = pack(deltas(0))
    ((packed, state),) = rounds(module, [updates])
    ((sent, expected),) = rounds(module, [deltas(0)])
    assert state.bits == expected.bits
    np.testing.assert_allclose(flat(unpack(packed)), flat(sent), rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "sent", "bits"),
    [
        (TopKModule(0.5), [3, -5j], 2 * (32 + 2)),
        (SignModule(), [2.5 + 2.5j, 2.5 - 2.5j], 4 + 32),
        (PowerSGDModule(), [3 + 1j, 1 - 5j], 32 * 4),
    ],
)
def test_a_complex_number_is_two_coordinates(module: OptiModule, sent: list[complex], bits: int) -> None:
    ((found, state),) = rounds(module, [{"w": jnp.array([3 + 1j, 1 - 5j], jnp.complex64)}])
    np.testing.assert_allclose(found["w"], np.array(sent), rtol=1e-6)
    assert state.bits == bits


def minimize(module: OptiModule, gradients: Callable[[np.ndarray, int], list[list[float]]], steps: int) -> np.ndarray:
    """Descend from (1, 1) by the mean of what clients send, each with a state of its own."""
    x, step, states = np.ones(2), jax.jit(module.update), {}
    for t in range(steps):
        sent = []
        for client, gradient in enumerate(gradients(x, t)):
            updates = {"x": jnp.asarray(gradient, jnp.float32)}
            output, states[client] = step(updates, states.get(client, module.init(updates)))
            sent.append(np.asarray(output["x"], np.float64))
        x = x - 0.05 * np.mean(sent, 0)
    return x


@pytest.mark.slow
def test_error_feedback_lets_top_k_reach_what_clients_that_disagree_would_never_send() -> None:
    # f_i(x) = ±2 x_0 + x_1² / 2: the larger coordinate cancels in the mean, and is all that is sent.
    def gradients(x: np.ndarray, _: int) -> list[list[float]]:
        return [[2, x[1]], [-2, x[1]]]

    np.testing.assert_array_equal(minimize(TopKModule(0.5, error_feedback=False), gradients, 200), [1, 1])
    assert abs(minimize(TopKModule(0.5), gradients, 200)[1]) < 0.1


def test_error_feedback_lets_sign_leave_the_line_that_it_would_stay_on() -> None:
    # f_i(x) = (a_i x)² / 2 with a = (1.5, -0.5), (-0.5, 1.5) in turn: signs are ±(1, -1), as in the paper.
    rows = np.array([[1.5, -0.5], [-0.5, 1.5]])

    def gradients(x: np.ndarray, t: int) -> list[list[float]]:
        row = rows[t % 2]
        return [list(row * (row @ x))]

    stalled = minimize(SignModule(error_feedback=False), gradients, 300)
    np.testing.assert_allclose(stalled.sum(), 2, rtol=1e-5)
    assert np.linalg.norm(minimize(SignModule(), gradients, 300)) < 0.01


@pytest.mark.slow
def test_a_round_that_a_client_drops_out_of_leaves_its_error_as_it_was() -> None:
    # A step of rate 1 on (x - c_i)² / 2 leads to c_i, so that what is compressed is x - c_i.
    centres = np.array([[4.0, -3, 2, 1], [-1, 5, -2.5, 0.5], [2, 1, 6, -4]])
    federation = Federation(
        lambda params, batch: 0.5 * jnp.sum((params["x"] - batch) ** 2),
        Optimizer(1.0),
        Optimizer(0.5),
        uplink=[TopKModule(0.25)],
    )
    data = jnp.asarray(centres[:, None, None], jnp.float32)
    state = federation.init({"x": jnp.zeros(4)}, 3)
    step = jax.jit(lambda state, dropped: federation.round(state, data, jnp.arange(3), dropped=dropped))
    x, error = np.zeros(4), np.zeros((3, 4))
    for absent in ([], [1], [], [0, 1], []):
        dropped = np.isin(np.arange(3), absent)
        state, metrics = step(state, jnp.asarray(dropped))
        due = error + x - centres
        largest = np.abs(due) == np.abs(due).max(1, keepdims=True)
        sent = np.where(largest, due, 0)
        error[~dropped] = (due - sent)[~dropped]
        x = x - 0.5 * sent[~dropped].mean(0)
        np.testing.assert_allclose(state.params["x"], x, rtol=1e-5)
    assert metrics["uplink/top-k/bits"].tolist() == [34, 34, 34]


def test_powersgd_comes_to_the_best_approximation_of_its_rank() -> None:
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(6, 6)))[0] for _ in range(2))
    values = np.array([4, 2, 0.5, 0.25, 0.1, 0.05])
    matrix = left * values @ right.T
    made = rounds(PowerSGDModule(rank=2, error_feedback=False), [{"w": jnp.asarray(matrix, jnp.float32)}] * 15)
    found = [np.linalg.norm(np.asarray(sent["w"]) - matrix) for sent, _ in made]
    best = np.linalg.norm(values[2:])
    assert found[0] > 1.05 * best
    np.testing.assert_allclose(found[-1], best, rtol=1e-4)


def test_powersgd_takes_kernels_as_matrices_with_their_last_axis_as_columns() -> None:
    outer = np.einsum("ij,k->ijk", np.arange(1.0, 7).reshape(2, 3), np.array([1.0, -2, 0.5, 3]))
    ((sent, state),) = rounds(PowerSGDModule(), [{"w": jnp.asarray(outer, jnp.float32)}])
    np.testing.assert_allclose(sent["w"], outer, rtol=1e-5)
    assert state.right["w"].shape == (4, 1)
    assert state.bits == 32 * (6 + 4)


@pytest.mark.parametrize("tiny", [0.0, 1e-25])
def test_powersgd_goes_on_after_an_update_of_next_to_nothing(tiny: float) -> None:
    outer = jnp.outer(jnp.arange(1.0, 5), jnp.array([1.0, -2, 0.5]))
    made = rounds(PowerSGDModule(), [{"w": each} for each in (tiny * outer, tiny * outer, outer)])
    np.testing.assert_allclose(made[-1][0]["w"], outer, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKModule(0.0), r"TopKModule: fraction=0.0 should be in \(0, 1\]"),
        (lambda: RandomKModule(1.5), r"RandomKModule: fraction=1.5 should be in \(0, 1\]"),
        (lambda: QSGDModule(0), r"QSGDModule: levels=0 should be in \[1, 65535\]"),
        (lambda: PowerSGDModule(0), r"PowerSGDModule: rank=0 should be in \[1, 2147483647\]"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], OptiModule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
