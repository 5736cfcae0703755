"""Aggregators: their numbers are those of the papers' formulas in NumPy float64."""

import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import functional_optimodules as fo
from functional_optimodules.federated.aggregation import (
    Aggregator,
    CenteredClippingAggregator,
    GeometricMedianAggregator,
    GradientMaskedAggregator,
    KrumAggregator,
    MeanAggregator,
    MedianAggregator,
    MultiKrumAggregator,
    NormBoundedMeanAggregator,
    StackAggregator,
    SumAggregator,
    TrimmedMeanAggregator,
    list_aggregators,
)

SUMS: list[SumAggregator[Any]] = [
    MeanAggregator(),
    NormBoundedMeanAggregator(0.7),
    CenteredClippingAggregator(0.7, passes=2),
    GeometricMedianAggregator(passes=3),
    GradientMaskedAggregator(0.4),
]
STACKS: list[StackAggregator] = [
    MedianAggregator(),
    TrimmedMeanAggregator(0.2),
    KrumAggregator(1),
    MultiKrumAggregator(1, 3),
]
WEIGHTS = np.array([3.0, 0.0, 1.0, 0.5, 2.0, 0.0, 4.0])


def each(aggregators: Any) -> Any:
    return pytest.mark.parametrize("aggregator", aggregators, ids=lambda aggregator: aggregator.name)


def draw(count: int, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Deltas of two leaves, in float64, that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    shapes = {"b": (count, 3), "w": (count, 2, 4)}
    return {name: (scale * rng.normal(size=shape)).astype(np.float32).astype(float) for name, shape in shapes.items()}


def flat(deltas: dict[str, np.ndarray]) -> np.ndarray:
    """One row a participant."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in deltas.values()], axis=1)


def without_absent(deltas: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """What the engine hands over: zeros for those that dropped out."""
    return {name: np.where(weights.reshape(-1, *[1] * (d.ndim - 1)) > 0, d, 0) for name, d in deltas.items()}


def narrow(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.complex64 if np.iscomplexobj(leaf) else jnp.float32), tree)


def round_of(aggregator: Aggregator, deltas: Any, weights: Any, state: Any = None) -> tuple[Any, Any]:
    """One round as the engine takes it: the aggregated delta, and what is kept."""
    deltas, weights = narrow(deltas), jnp.asarray(weights, jnp.float32)
    state = aggregator.init(jax.tree.map(lambda leaf: leaf[0], deltas)) if state is None else state
    return _round_of(aggregator, deltas, weights, state)


@functools.partial(jax.jit, static_argnums=0)
def _round_of(aggregator: Aggregator, deltas: Any, weights: jax.Array, state: Any) -> tuple[Any, Any]:
    if isinstance(aggregator, StackAggregator):
        return aggregator.aggregate(deltas, weights), state
    assert isinstance(aggregator, SumAggregator)
    sum_aggregator = aggregator

    def one_pass(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        _, state = carry
        contributions = jax.vmap(sum_aggregator.contribute, in_axes=(0, 0, None))(deltas, weights, state)
        return sum_aggregator.combine(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), contributions), state)

    start = jax.tree.map(lambda leaf: leaf[0], deltas), aggregator.begin_round(state)
    return jax.lax.fori_loop(0, aggregator.passes, one_pass, start)


def aggregated(aggregator: Aggregator, deltas: Any, weights: Any) -> np.ndarray:
    """The aggregated delta as a vector."""
    return vector(round_of(aggregator, without_absent(deltas, np.asarray(weights)), weights)[0])


def vector(delta: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in delta.values()])


def assert_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.max(np.abs(expected)))


def mean(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ rows / weights.sum()


def shrunk(rows: np.ndarray, bound: float) -> np.ndarray:
    return rows * np.minimum(1, bound / np.linalg.norm(rows, axis=1, keepdims=True))


def test_the_registered_aggregators_are_built_by_name_and_say_whether_they_are_sums() -> None:
    named = {aggregator.name: aggregator for aggregator in [*SUMS, *STACKS]}
    assert named.keys() == list_aggregators().keys()
    for name, aggregator in named.items():
        assert Aggregator.from_specs(name, aggregator.get_config()) == aggregator
        assert aggregator.sums is isinstance(aggregator, SumAggregator)
    assert [aggregator.passes for aggregator in SUMS] == [1, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("norm-bounded-mean", {"bound": -1}, r"NormBoundedMeanAggregator: bound=-1.0 should be in \[0, inf\]"),
        ("centered-clipping", {"radius": 0}, r"radius=0.0 should be in \(0, inf\)"),
        ("geometric-median", {"passes": 0}, r"passes=0 should be in \[1, inf\)"),
        ("trimmed-mean", {"share": 0.5}, r"share=0.5 should be in \[0, 0.5\)"),
        ("multi-krum", {"attackers": 1, "selected": 0}, r"selected=0 should be in \[1, inf\)"),
        ("gradient-masked", {"threshold": 1.5}, r"threshold=1.5 should be in \[0, 1\]"),
    ],
)
def test_a_value_out_of_its_range_is_an_error_that_names_it(name: str, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aggregator.from_specs(name, config)


def test_an_aggregator_of_someone_else_takes_one_pass_unless_it_says_more() -> None:
    class Halved(MeanAggregator, register=False):
        def combine(self, sums: Any, state: Any) -> Any:
            return jax.tree.map(lambda d: d / 2, sums.mean()), state

    class Repeated(SumAggregator[Any], register=False):
        name: ClassVar[str] = "repeated"
        passes: int = fo.hyperparameter(default=5, within="[1, inf)")

        def contribute(self, delta: Any, weight: Any, state: Any) -> Any:
            return delta

        def combine(self, sums: Any, state: Any) -> Any:
            return sums, state

    deltas = draw(7)
    assert (Halved().passes, Repeated().passes, Repeated(passes=2).passes) == (1, 5, 2)
    assert Repeated(passes=2).get_config() == {"passes": 2}
    assert_close(aggregated(Halved(), deltas, WEIGHTS), mean(flat(deltas), WEIGHTS) / 2)


def test_mean() -> None:
    deltas = draw(7)
    assert_close(aggregated(MeanAggregator(), deltas, WEIGHTS), mean(flat(deltas), WEIGHTS))


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, 100.0, np.inf])
def test_norm_bounded_mean(bound: float) -> None:
    deltas = draw(7)
    norms = np.linalg.norm(flat(deltas), axis=1)
    assert norms.min() < 3 < norms.max()
    found = aggregated(NormBoundedMeanAggregator(bound), deltas, WEIGHTS)
    assert_close(found, mean(shrunk(flat(deltas), bound), WEIGHTS))


@pytest.mark.parametrize("passes", [1, 3])
def test_centered_clipping_goes_on_from_the_last_round(passes: int) -> None:
    aggregator, state, v = CenteredClippingAggregator(1.5, passes=passes), None, np.zeros(11)
    for round_ in range(4):
        deltas = draw(7, seed=round_)
        found, state = round_of(aggregator, without_absent(deltas, WEIGHTS), WEIGHTS, state)
        for _ in range(passes):
            v = v + mean(shrunk(flat(deltas) - v, 1.5), WEIGHTS)
        assert_close(vector(found), v)


def test_centered_clipping_keeps_its_center_over_a_round_without_anybody() -> None:
    aggregator = CenteredClippingAggregator(1.5)
    found, state = round_of(aggregator, draw(7), WEIGHTS)
    nothing, after = round_of(aggregator, without_absent(draw(7), np.zeros(7)), np.zeros(7), state)
    assert not vector(nothing).any()
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert vector(found).any()


@pytest.mark.parametrize("smoothing", [1e-6, 3.0])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_geometric_median(passes: int, smoothing: float) -> None:
    aggregator, state = GeometricMedianAggregator(passes, smoothing), None
    for round_ in range(2):  # each starts anew
        deltas = draw(7, seed=round_)
        rows = flat(deltas)
        distances = np.linalg.norm(rows - mean(rows, WEIGHTS), axis=1)
        assert distances.min() < 3 < distances.max()
        v = mean(rows, WEIGHTS)
        for _ in range(passes - 1):
            v = mean(rows, WEIGHTS / np.maximum(smoothing, np.linalg.norm(rows - v, axis=1)))
        found, state = round_of(aggregator, without_absent(deltas, WEIGHTS), WEIGHTS, state)
        assert_close(vector(found), v)


def test_geometric_median_with_many_passes_minimises_the_sum_of_distances() -> None:
    deltas = draw(7)
    rows, found = flat(deltas), aggregated(GeometricMedianAggregator(passes=100), deltas, WEIGHTS)
    away = found - rows
    pulls = WEIGHTS[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)
    assert np.linalg.norm(pulls.sum(axis=0)) < 1e-5 * WEIGHTS.sum()


def test_geometric_median_stays_at_a_delta_that_most_of_the_weight_agrees_on() -> None:
    deltas = draw(5)
    for leaf in deltas.values():
        leaf[1] = leaf[2] = leaf[0]
    assert_close(aggregated(GeometricMedianAggregator(passes=30), deltas, np.ones(5)), flat(deltas)[0])


def masked_mean(rows: np.ndarray, weights: np.ndarray, threshold: float) -> np.ndarray:
    agreement = np.abs(mean(np.sign(rows), weights))
    return mean(rows, weights) * np.where(agreement >= threshold, 1, agreement)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_gradient_masked(threshold: float) -> None:
    deltas = draw(7)
    deltas["b"][:, 0] = np.abs(deltas["b"][:, 0])
    found = aggregated(GradientMaskedAggregator(threshold), deltas, WEIGHTS)
    assert_close(found, masked_mean(flat(deltas), WEIGHTS, threshold))


def test_gradient_masked_counts_in_full_where_agreement_is_at_the_threshold() -> None:
    deltas = {"w": np.array([[2.0, 4.0], [6.0, -2.0], [-1.0, -1.0], [1.0, -1.0]])}
    assert aggregated(GradientMaskedAggregator(0.5), deltas, np.ones(4)).tolist() == [2.0, 0.0]
    assert aggregated(GradientMaskedAggregator(0.51), deltas, np.ones(4)).tolist() == [1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.35, 0.8])
def test_gradient_masked_is_declearns(threshold: float) -> None:
    reference = pytest.importorskip("declearn.aggregator", reason="no release for this Python", exc_type=ImportError)
    vectors = pytest.importorskip("declearn.model.sklearn")
    theirs, deltas, steps = reference.GradientMaskedAveraging(threshold=threshold), draw(5), [3, 1, 4, 2, 6]
    sent = [
        theirs.prepare_for_sharing(vectors.NumpyVector({name: leaf[i] for name, leaf in deltas.items()}), steps[i])
        for i in range(5)
    ]
    expected = vector(theirs.finalize_updates(sum(sent[1:], start=sent[0])).coefs)
    assert_close(aggregated(GradientMaskedAggregator(threshold), deltas, np.array(steps, float)), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 13])
def test_median(count: int) -> None:
    deltas = draw(count)
    deltas["w"] = np.round(deltas["w"])  # ties
    for absent in range(count):  # one after the other
        weights = np.arange(1.0, count + 1)
        weights[:absent] = 0
        found = aggregated(MedianAggregator(), deltas, weights)
        assert_close(found, np.median(flat(deltas)[weights > 0], axis=0), 1e-6)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 700])
def test_median_of_any_number_of_coordinates(size: int) -> None:
    rows = np.random.default_rng(0).normal(size=(6, size)).astype(np.float32)
    found, _ = round_of(MedianAggregator(), {"w": rows}, np.ones(6))
    np.testing.assert_allclose(found["w"], np.median(rows.astype(float), axis=0), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.49])
def test_trimmed_mean(share: float) -> None:
    for seed, absent in enumerate([[], [3], [0, 5, 6]]):
        deltas, weights = draw(9, seed), np.arange(1.0, 10)
        deltas["b"] = np.round(deltas["b"])  # ties
        weights[absent] = 0
        expected = scipy.stats.trim_mean(flat(deltas)[weights > 0], share, axis=0)
        assert_close(aggregated(TrimmedMeanAggregator(share), deltas, weights), expected)


def test_trimmed_mean_cuts_as_many_as_the_share_says_however_it_is_rounded() -> None:
    rows = np.random.default_rng(0).normal(size=(150, 3))
    assert np.floor(np.float32(0.42) * np.float32(150)) == 62
    found = aggregated(TrimmedMeanAggregator(0.42), {"w": rows}, np.ones(150))
    assert_close(found, np.sort(rows, axis=0)[63:-63].mean(axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 9, 11])
def test_each_rank_is_where_it_belongs(count: int) -> None:
    # What sorts all columns of zeros and ones sorts everything.
    rows = np.array(list(itertools.product([0.0, 1.0], repeat=count))).T
    cuts = np.arange((count + 1) // 2)
    trimmed = jax.vmap(lambda share: TrimmedMeanAggregator(share).aggregate(narrow(rows), jnp.ones(count)))
    for cut, found in zip(cuts, trimmed(jnp.asarray(cuts / count, jnp.float32)), strict=True):
        assert_close(found, np.sort(rows, axis=0)[cut : count - cut].mean(axis=0), 1e-6)


@each([MedianAggregator(), TrimmedMeanAggregator(0.2)])
def test_medians_are_the_same_where_xla_sorts(aggregator: StackAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = draw(9)
    expected = aggregated(aggregator, deltas, np.arange(9))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    found = aggregator.aggregate(narrow(deltas), jnp.arange(9.0))
    np.testing.assert_allclose(vector(found), expected, rtol=1e-6)


def krum_scores(rows: np.ndarray, attackers: int) -> np.ndarray:
    squares = ((rows[:, None] - rows) ** 2).sum(axis=-1)
    others = [np.delete(squares[i], i) for i in range(len(rows))]
    return np.array([np.sort(row)[: max(len(rows) - attackers - 2, 1)].sum() for row in others])


@pytest.mark.parametrize("attackers", [0, 1, 3])
@pytest.mark.parametrize("absent", [[], [4], [0, 1, 8]])
def test_krum_and_multi_krum(attackers: int, absent: list[int]) -> None:
    for seed in range(3):
        deltas, weights = draw(10, seed), np.arange(1.0, 11)
        weights[absent] = 0
        there = flat(deltas)[weights > 0]
        order = np.argsort(krum_scores(there, attackers))
        assert_close(aggregated(KrumAggregator(attackers), deltas, weights), there[order[0]], 1e-6)
        for selected in (2, 4):
            expected = there[order[:selected]].mean(axis=0)
            assert_close(aggregated(MultiKrumAggregator(attackers, selected), deltas, weights), expected)


def test_multi_krum_of_more_than_are_there_is_their_mean() -> None:
    deltas = draw(7)
    expected = flat(deltas)[WEIGHTS > 0].mean(axis=0)
    for selected in (5, 7, 50):
        assert_close(aggregated(MultiKrumAggregator(1, selected), deltas, WEIGHTS), expected)


@pytest.mark.parametrize("far", [1e4, 1e8, 1e30, 3e38])
@pytest.mark.parametrize("sides", [(1, 1), (1, -1)])
def test_krum_tells_neighbours_apart_however_far_they_or_attackers_are(far: float, sides: tuple[int, int]) -> None:
    deltas = draw(9)
    for leaf in deltas.values():
        leaf[:7] += 3000
        leaf[7], leaf[8] = far * sides[0], far * sides[1]
    deltas = {name: leaf.astype(np.float32).astype(float) for name, leaf in deltas.items()}
    order = np.argsort(krum_scores(flat(deltas), 2))
    assert_close(aggregated(KrumAggregator(2), deltas, np.ones(9)), flat(deltas)[order[0]], 1e-7)
    assert_close(aggregated(MultiKrumAggregator(2, 3), deltas, np.ones(9)), flat(deltas)[order[:3]].mean(axis=0), 3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
@each([*SUMS, *STACKS])
def test_of_nobody_the_delta_is_zero(aggregator: Aggregator, count: int) -> None:
    assert aggregated(aggregator, draw(count), np.zeros(count)).tolist() == [0.0] * 11


@pytest.mark.slow
@each([*SUMS, *STACKS])
def test_of_one_alone_it_is_his_own(aggregator: Aggregator) -> None:
    rows = {name: leaf / 10 for name, leaf in draw(5).items()}
    assert np.linalg.norm(flat(rows)[3]) < 0.7
    assert_close(aggregated(aggregator, rows, [0, 0, 0, 2.5, 0]), flat(rows)[3])
    alone = {name: leaf[3:4] for name, leaf in rows.items()}
    assert_close(aggregated(aggregator, alone, [2.5]), flat(rows)[3])


@pytest.mark.slow
@each([*SUMS, *STACKS])
def test_equal_deltas_come_out_as_they_are(aggregator: Aggregator) -> None:
    rows = {name: np.repeat(leaf / 10, 7, axis=0) for name, leaf in draw(1, seed=3).items()}
    assert np.linalg.norm(flat(rows)[0]) < 0.7
    assert_close(aggregated(aggregator, rows, WEIGHTS), flat(rows)[0])


@each([*SUMS, *STACKS])
def test_deltas_of_zero_come_out_as_zeros(aggregator: Aggregator) -> None:
    assert aggregated(aggregator, {"w": np.zeros((7, 3))}, WEIGHTS).tolist() == [0.0] * 3


@each(STACKS)
def test_weights_say_who_is_there_and_no_more(aggregator: Aggregator) -> None:
    deltas = draw(7)
    expected = aggregated(aggregator, deltas, WEIGHTS > 0)
    assert aggregated(aggregator, deltas, WEIGHTS).tolist() == expected.tolist()


@each([*SUMS, *STACKS])
def test_who_is_there_is_no_matter_of_the_program(aggregator: Aggregator) -> None:
    deltas = draw(7)
    there = {name: leaf[WEIGHTS > 0] for name, leaf in deltas.items()}
    assert_close(aggregated(aggregator, deltas, WEIGHTS), aggregated(aggregator, there, WEIGHTS[WEIGHTS > 0]))


@pytest.mark.slow
@each([*SUMS, KrumAggregator(1), MultiKrumAggregator(1, 3)])
def test_complex_numbers_are_pairs_of_real_ones_to_norms(aggregator: Aggregator) -> None:
    rng = np.random.default_rng(1)
    pairs = rng.normal(size=(7, 4, 2))
    if isinstance(aggregator, GradientMaskedAggregator):
        z = pairs[..., 0] + 1j * pairs[..., 1]
        agreement = np.abs(mean(z / np.abs(z), WEIGHTS))
        expected = mean(z, WEIGHTS) * np.where(agreement >= 0.4, 1, agreement)
    else:
        parts = aggregated(aggregator, {"w": pairs.reshape(7, 8)}, WEIGHTS).reshape(4, 2)
        expected = parts[:, 0] + 1j * parts[:, 1]
    found = aggregated(aggregator, {"w": pairs[..., 0] + 1j * pairs[..., 1]}, WEIGHTS)
    assert np.iscomplexobj(found)
    assert_close(found, expected)


@each([MedianAggregator(), TrimmedMeanAggregator(0.2)])
def test_parts_of_complex_numbers_are_coordinates(aggregator: Aggregator) -> None:
    rng = np.random.default_rng(1)
    real, imaginary = rng.normal(size=(2, 7, 3))
    found = aggregated(aggregator, {"b": real, "w": real + 1j * imaginary}, WEIGHTS)
    parts = aggregated(aggregator, {"b": real, "w": np.concatenate([real, imaginary], axis=1)}, WEIGHTS)
    assert_close(found, np.concatenate([parts[:3], parts[3:6] + 1j * parts[6:]]))


@pytest.mark.parametrize("far", [1e2, 1e6, 1e12])
@each([CenteredClippingAggregator(1.0), GeometricMedianAggregator(passes=200), *STACKS, MeanAggregator()])
def test_two_attackers_of_nine_move_it_by_a_bounded_amount(aggregator: Aggregator, far: float) -> None:
    deltas = draw(9)
    if isinstance(aggregator, KrumAggregator | MultiKrumAggregator):
        aggregator = type(aggregator)(**{**aggregator.get_config(), "attackers": 2})
    if isinstance(aggregator, TrimmedMeanAggregator):
        aggregator = TrimmedMeanAggregator(2 / 9)
    honest = flat(deltas)[:7]
    for leaf in deltas.values():
        leaf[7:] = far
    moved = np.linalg.norm(aggregated(aggregator, deltas, np.ones(9)) - honest.mean(axis=0))
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    share = 2 / 9
    assert (moved <= 2 * (1 - share) / (1 - 2 * share) * spread) == (not isinstance(aggregator, MeanAggregator))


def test_no_honest_bound_is_left_by_the_coordinates_of_a_median() -> None:
    deltas = draw(9)
    honest = flat(deltas)[:5]
    for leaf in deltas.values():
        leaf[5:] = np.array([1e9, -1e9, 1e30, 1e30]).reshape(-1, *[1] * (leaf.ndim - 1))
    found = aggregated(MedianAggregator(), deltas, np.ones(9))
    assert np.all((honest.min(axis=0) <= found) & (found <= honest.max(axis=0)))
    assert not np.all(aggregated(MeanAggregator(), deltas, np.ones(9)) <= honest.max(axis=0))


@pytest.mark.slow
@each([*SUMS, *STACKS])
def test_dtypes_are_not_promoted_by_chance(aggregator: Aggregator) -> None:
    with jax.numpy_dtype_promotion("strict"):
        found, _ = round_of(aggregator, draw(7), np.ones(7))
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float32)}
