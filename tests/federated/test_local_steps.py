"""How many local steps a round has, who drops out of it, and when `fit` ends."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from .test_known import asking

LRATE, START = 0.25, np.array([1.0, -2.0])
SIZES = (6, 4, 2)


@functools.cache
def clients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype(np.float32) + i for i, n in enumerate(SIZES)]


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(clients())


def squares(params: Any, batch: Any) -> Any:
    return 0.5 * jnp.sum((params["w"] - batch) ** 2, axis=-1)


def start() -> Any:
    return {"w": jnp.asarray(START, jnp.float32)}


def counting(**options: Any) -> Federation:
    """A federation whose history says how many steps were taken."""
    return Federation(squares, fo.Optimizer(LRATE, modules=[asking("num_steps", end=True)]), **options)


def taken(history: Any) -> np.ndarray:
    return np.asarray(history["client/asking/coin"])


def after(steps: int) -> np.ndarray:
    """The mean of where steps on full batches lead, in float64."""
    ends = []
    for each in clients():
        w = START
        for _ in range(steps):
            w = w - LRATE * (w - each.astype(float).mean(axis=0))
        ends.append(w)
    return np.mean(ends, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "steps"), [("scan", 5), ("vmap", 1), (2, 5)])
def test_each_client_takes_as_many_steps_whatever_it_has(mapping: Any, steps: int) -> None:
    federation = counting(steps=steps, mapping=mapping)
    state, metrics = federation.round(federation.init(start(), data()), data(), np.arange(3))
    np.testing.assert_allclose(state.params["w"], after(steps), atol=1e-6)
    assert taken(metrics).tolist() == [steps] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("remainder", "passes"), [("mask", 2), ("drop", 3), ("wrap", 1)])
def test_steps_are_those_of_as_many_passes(remainder: Any, passes: int) -> None:
    even = FederatedData.from_clients([each[:2].repeat(3, axis=0) + np.arange(6)[:, None] for each in clients()])
    ends = []
    for options in ({"epochs": passes}, {"steps": 3 * passes}):
        federation = Federation(squares, fo.Optimizer(LRATE), batch_size=2, remainder=remainder, **options)
        state, metrics = federation.run(federation.init(start(), even, seed=4), even, 2, participants=2)
        ends.append((state.params["w"], metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_a_pass_that_is_cut_short_sees_no_example_twice() -> None:
    federation = Federation(lambda p, batch: batch + p, fo.Optimizer(0.0), batch_size=2, steps=2)
    one = FederatedData.from_clients([np.array([0.0, 1.0, 10.0, 100.0, 1000.0, 1e4], np.float32)])
    seen = set()
    for seed in range(10):
        _, metrics = federation.run(federation.init(jnp.float32(0), one, seed=seed), one, 1)
        total = round(float(metrics["loss"][0, 0]) * 4)
        assert all(int(digit) <= 1 for digit in str(total)), total
        seen.add(total)
    assert len(seen) > 3


@pytest.mark.parametrize("mapping", ["scan"])
def test_a_coin_makes_a_number_of_steps_that_all_share_and_that_is_geometric(mapping: Any) -> None:
    probability, rounds = 0.25, 300
    federation = counting(coin=probability, mapping=mapping)
    _, history = federation.run(federation.init(start(), data()), data(), rounds, participants=2)
    steps = taken(history)
    np.testing.assert_array_equal(steps[:, 0], steps[:, 1])
    assert steps.min() == 1
    mean, deviation = 1 / probability, np.sqrt(1 - probability) / probability
    assert abs(steps[:, 0].mean() - mean) < 4 * deviation / np.sqrt(rounds)
    share = np.mean(steps[:, 0] == 1)
    assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / rounds)
    # One round's number says nothing of the next one's.
    assert abs(np.corrcoef(steps[:-1, 0], steps[1:, 0])[0, 1]) < 4 / np.sqrt(rounds)


def test_a_coin_that_always_shows_heads_is_one_step() -> None:
    federation = counting(coin=1.0)
    state, history = federation.run(federation.init(start(), data()), data(), 1)
    assert taken(history).tolist() == [[1, 1, 1]]
    np.testing.assert_allclose(state.params["w"], after(1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2, "epochs": 3}, "epochs=3, steps=2 and coin=None each say how many local steps"),
        ({"steps": 2, "coin": 0.5}, "epochs=1, steps=2 and coin=0.5 each say"),
        ({"epochs": 2, "coin": 0.5}, "give one"),
        ({"steps": 0}, r"steps=0 should be in \[1, "),
        ({"steps": 2.5}, r"steps=2.5 should be of type int"),
        ({"coin": 0.0}, r"coin=0.0 should be in \(0, 1\]"),
        ({"coin": 1.5}, r"coin=1.5 should be in \(0, 1\]"),
        ({"coin": float("nan")}, "coin=nan should be in"),
    ],
)
def test_wrong_numbers_of_steps(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counting(**options)


def test_participants_drop_out_at_the_rate_and_apart() -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    _, history = federation.run(federation.init(start(), data()), data(), 400, drop_rate=0.3)
    joined = np.asarray(history["joined"])
    assert abs(joined.mean() - 0.7) < 4 * np.sqrt(0.21 / joined.size)
    correlations = np.corrcoef(joined.T)
    assert np.abs(correlations[~np.eye(3, dtype=bool)]).max() < 4 / np.sqrt(400)


@pytest.mark.slow
def test_fit_and_run_drop_the_same_participants_and_a_rate_may_change_without_another_program() -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    new = lambda: federation.init(start(), data(), seed=1)  # noqa: E731
    run = jax.jit(lambda state, rate: federation.run(state, data(), 6, participants=2, drop_rate=rate))
    for rate in (0.5, 0.2):
        state, history = federation.fit(new(), data(), 6, participants=2, drop_rate=rate, every=4)
        expected, told = run(new(), rate)
        np.testing.assert_array_equal(history["joined"], told["joined"])
        np.testing.assert_allclose(state.params["w"], expected.params["w"], atol=1e-6)
    assert run._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "all_there"), [(0.0, True), (1.0, False), (1, False)])
def test_nobody_or_everybody_drops_out(rate: Any, all_there: bool) -> None:
    server = fo.Optimizer(1.0, modules=["momentum"])
    federation = Federation(squares, fo.Optimizer(LRATE, modules=["momentum"]), server)
    before = federation.init(start(), data())
    state, history = federation.run(before, data(), 2, drop_rate=rate)
    assert np.asarray(history["joined"]).all() == all_there
    assert np.asarray(history["joined"]).any() == all_there
    assert int(state.round) == 2
    if not all_there:
        for new, old in zip(*(jax.tree.leaves((s.params, s.server, s.bank)) for s in (state, before)), strict=True):
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("rate", [2.0, -0.1, float("nan"), np.ones(3), [0.5]])
@pytest.mark.parametrize("method", ["run", "fit"])
def test_wrong_rates_of_drop_outs(method: str, rate: Any) -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    with pytest.raises(ValueError, match=r"drop_rate=.* should be a number in \[0, 1\]"):
        getattr(federation, method)(federation.init(start(), data()), data(), 1, drop_rate=rate)


@pytest.mark.parametrize("method", ["run", "fit"])
def test_a_rate_of_drop_outs_that_is_text(method: str) -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    with pytest.raises((TypeError, ValueError), match=r"drop_rate='0\.5'"):
        getattr(federation, method)(federation.init(start(), data()), data(), 1, drop_rate="0.5")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, np.bool_(True), jnp.array(True)])
def test_fit_ends_after_the_piece_whose_callback_says_so(stop: Any) -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    pieces = []

    def callback(state: Any, history: Any) -> Any:
        pieces.append(history["round"].tolist())
        return stop if int(state.round) == 4 else None

    state, history = federation.fit(federation.init(start(), data()), data(), 100, every=2, callback=callback)
    assert pieces == [[0, 1], [2, 3]]
    assert int(state.round) == 4
    assert history["round"].tolist() == [0, 1, 2, 3]
    # The state is whole: rounds go on from it.
    assert int(federation.fit(state, data(), 1)[0].round) == 5


@pytest.mark.parametrize("go_on", [None, False, 0, "path/to/saved"])
def test_fit_goes_on_after_a_callback_that_says_nothing_of_it(go_on: Any) -> None:
    federation = Federation(squares, fo.Optimizer(LRATE))
    state, _ = federation.fit(
        federation.init(start(), data()), data(), 4, every=2, callback=lambda state, history: go_on
    )
    assert int(state.round) == 4


def test_batches_that_are_given_say_how_many_steps_there_are() -> None:
    batches = np.stack([np.stack([np.resize(each, (2, 2))] * 4) for each in clients()])
    federation = counting()
    _, metrics = federation.round(federation.init(start(), 3), batches, np.arange(3), num_steps=np.array([4, 1, 0]))
    assert taken(metrics).tolist() == [4, 1, 0]


class AnyModule(fo.OptiModule[Any], register=False):
    """Says things of other dtypes and shapes than float32 scalars."""

    name = "any"
    says: str

    def init(self, params: Any) -> Any:
        return ()

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return updates, state

    def metrics(self, state: Any) -> Any:
        said = {"bool": jnp.array(True), "int": jnp.int32(3), "python": 2.5, "half": jnp.bfloat16(1.5)}
        return {self.says: said[self.says]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("says", "value", "mapping"), [("bool", 1, "scan"), ("int", 3, 2), ("python", 2.5, "scan"), ("half", 1.5, 2)]
)
def test_what_bricks_say_is_in_the_history_by_participant(says: str, value: Any, mapping: Any) -> None:
    federation = Federation(
        squares,
        fo.Optimizer(LRATE, modules=[AnyModule(says), AnyModule(says)]),
        fo.Optimizer(1.0, modules=[AnyModule(says)]),
        uplink=[AnyModule(says)],
        mapping=mapping,
    )
    _, history = federation.fit(federation.init(start(), data()), data(), 3, participants=2, every=2)
    for place in ("client/any", "client/any-2", "uplink/any"):
        assert history[f"{place}/{says}"].astype(float).tolist() == [[value, value]] * 3
    assert history[f"server/any/{says}"].astype(float).tolist() == [value] * 3
