"""Buffered asynchronous rounds are algorithm 1 of Nguyen et al. 2022, by event simulation in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.federated.buffered import DURATIONS, BufferedFederation, _draw_idle
from functional_optimodules.testing.federated import ORACLES, RoundPlan, quadratics

LRATE, STEPS = 0.1, 3
WEIGHTS = (5, 1, 3, 2, 4)
PROBLEM = quadratics(WEIGHTS)
CLIENTS = PROBLEM.num_clients


def quadratic(params: Any, batch: Any) -> Any:
    away = params["w"] - batch["centre"]
    return 0.5 * jnp.einsum("nd,nde,ne->n", away, batch["curvature"], away)


@functools.cache
def quadratic_data() -> FederatedData:
    """The problem's clients, each with as many times its one example as it weighs."""
    clients = zip(PROBLEM.centres, PROBLEM.curvatures, WEIGHTS, strict=True)
    return FederatedData.from_clients(
        [
            {"centre": np.repeat(b, n, axis=0).astype(np.float32), "curvature": np.stack([a] * n).astype(np.float32)}
            for b, a, n in clients
        ]
    )


def start() -> Any:
    return {"w": jnp.asarray(PROBLEM.start, jnp.float32)}


def work(client: int, x: Any) -> Any:
    y = x
    for _ in range(STEPS):
        y = y - LRATE * PROBLEM.gradient(client, y)
    return y - x


def simulate(starts: list[tuple[int, float]], concurrency: int, buffer: int, updates: int, discount: Any, weights: Any):
    """Run the algorithm, event by event, on the clients that start and the time that each takes."""
    queue, at_work, now, x, number, rows, moments = iter(starts), [], 0.0, PROBLEM.start, 0, [], []
    for version in range(updates):
        total, arrived = np.zeros_like(x), []
        while len(arrived) < buffer:
            if not any(end <= now for end, *_ in at_work):
                while len(at_work) < concurrency:
                    client, duration = next(queue)
                    assert client not in [other for _, _, other, _, _ in at_work]
                    at_work.append((now + duration, number, client, version, x))
                    number += 1
            now, _, client, began, sent = first = min(at_work, key=lambda each: each[:2])
            at_work.remove(first)
            arrived.append((client, version - began))
            moments.append(now)
            total = total + weights[client] * discount(version - began) * work(client, sent)
        x = x + total / sum(weights[client] for client, _ in arrived)
        rows.append((now, *zip(*arrived, strict=True), x))
    return [*map(np.array, zip(*rows, strict=True)), moments]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concurrency", "buffer", "weighting", "discount"),
    [(3, 2, "uniform", "inverse-sqrt"), (4, 3, "examples", lambda staleness: jnp.maximum(1 - staleness / 2, 0))],
)
def test_events_and_parameters_are_those_of_a_simulation(
    concurrency: int, buffer: int, weighting: Any, discount: Any
) -> None:
    updates, starts, draw = 12, [], np.random.default_rng(concurrency)

    def duration(key: jax.Array, client: jax.Array) -> jax.Array:
        def host(client: Any) -> Any:
            # Quarters, so that several clients are often done at the same moment.
            starts.append((int(client), draw.integers(1, 6) / 4))
            return np.float32(starts[-1][1])

        return jax.experimental.io_callback(host, jax.ShapeDtypeStruct((), jnp.float32), client, ordered=True)

    federation = Federation(quadratic, fo.Optimizer(LRATE), steps=STEPS, weighting=weighting)
    buffered = BufferedFederation(federation, concurrency, buffer, duration, discount)
    data = quadratic_data()
    state = buffered.init(federation.init(start(), data), data)
    run = jax.jit(lambda state, data: buffered.run(state, data, updates, evaluate=lambda params: {"x": params["w"]}))
    state, history = jax.block_until_ready(run(state, data))
    jax.effects_barrier()

    scale = {"inverse-sqrt": lambda s: 1 / np.sqrt(1 + s)}.get(discount, lambda s: max(1 - s / 2, 0))
    weights = WEIGHTS if weighting == "examples" else np.ones(CLIENTS)
    time, who, staleness, x, moments = simulate(starts, concurrency, buffer, updates, scale, weights)
    np.testing.assert_array_equal(history["time"], time)
    np.testing.assert_array_equal(history["participants"], who)
    np.testing.assert_array_equal(history["staleness"], staleness)
    np.testing.assert_allclose(history["x"], x, atol=2e-6)
    assert history["round"].tolist() == list(range(updates))
    assert staleness.max() >= 2
    assert len(np.unique(moments)) < updates * buffer - 5
    if discount == "inverse-sqrt":
        oracle = ORACLES["fedbuff"](PROBLEM)
        for row, stale in zip(who, staleness, strict=True):
            oracle.round(RoundPlan(tuple(row), (STEPS,) * CLIENTS, staleness=tuple(stale)))
        np.testing.assert_allclose(state.federation.params["w"], oracle.x, atol=2e-6)


def layers_loss(params: Any, batch: Any) -> Any:
    return sum(quadratic(layer, batch) for layer in params.values())


def with_statistics(params: Any, stats: Any, batch: Any) -> Any:
    value = quadratic({"w": params["shared"] + params["own"]}, batch)
    stats = {name: 0.5 * old + 0.5 * jnp.mean(batch["centre"]) for name, old in stats.items()}
    return value, {}, stats


def scaffold() -> tuple[Federation, Any, Any]:
    """Clients and a server that talk, of packed parameters, with a state on the uplink too."""
    federation = Federation(
        layers_loss,
        fo.Optimizer(LRATE, modules=["scaffold-client", "momentum"]),
        fo.Optimizer(0.5, modules=[("scaffold-server", {"num_clients": CLIENTS}), "fedadam"]),
        epochs=2,
        weighting="examples",
        uplink=[("l2-global-clipping", {"max_norm": 0.5}), "momentum"],
    )
    return federation, {f"{index}": start() for index in range(5)}, None


def personal() -> tuple[Federation, Any, Any]:
    """Clients of a model with a state, that keep a part of both, and an aggregation of all deltas at once."""
    federation = Federation(
        with_statistics,
        fo.Optimizer(LRATE),
        fo.Optimizer(1.0, modules=["fedavgm"]),
        steps=STEPS,
        local=["own"],
        aggregation="median",
        remainder="wrap",
    )
    stats = {"mean": jnp.zeros(())}
    return federation, {"shared": start()["w"], "own": jnp.zeros(3)}, stats


@functools.cache
def equal_durations(make: Any, concurrency: int = CLIENTS) -> Any:
    federation, params, stats = make()
    data = quadratic_data()
    buffered = BufferedFederation(federation, concurrency, concurrency, "constant")
    fresh = federation.init(params, data, stats=stats)
    return fresh, buffered.init(fresh, data), jax.jit(lambda state, data: buffered.run(state, data, 5))


def same(left: Any, right: Any, atol: float = 0.0) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("make", [scaffold, personal])
def test_clients_that_all_take_as_long_are_rounds_of_all_clients(make: Any) -> None:
    fresh, begun, run = equal_durations(make)
    state, history = run(begun, quadratic_data())
    federation = make()[0]
    expected, rounds = jax.jit(lambda state, data: federation.run(state, data, 5))(fresh, quadratic_data())
    same(state.federation, expected, atol=2e-5)
    assert (fresh.packing is not None) == (make is scaffold)
    assert history["time"].tolist() == [1, 2, 3, 4, 5]
    assert not history["staleness"].any()
    by_client = np.take_along_axis(np.asarray(history["loss"]), np.argsort(history["participants"], axis=1), axis=1)
    in_rounds = np.take_along_axis(np.asarray(rounds["loss"]), np.argsort(rounds["participants"], axis=1), axis=1)
    np.testing.assert_allclose(by_client, in_rounds, rtol=1e-4)


@pytest.mark.slow
def test_a_late_clock_does_not_stand_still() -> None:
    _, begun, run = equal_durations(personal)
    late = float(2**25)
    state, history = run(begun._replace(clock=jnp.float32(late)), quadratic_data())
    # The floats there are 4 apart, and each update adds 1.
    assert history["time"].tolist() == [late, late, late + 4, late + 4, late + 4]
    assert float(state.clock) - float(state.behind) == late + 5
    np.testing.assert_array_equal(history["participants"], run(begun, quadratic_data())[1]["participants"])


def drawing(params: Any, batch: Any, key: jax.Array) -> Any:
    """The loss, with what was drawn for each example."""
    return quadratic(params, batch), {"draw": jax.random.uniform(key, batch["centre"].shape[:1])}


@functools.cache
def noisy() -> Any:
    """Stateful everywhere, keys included, with the paper's durations."""
    client = fo.Optimizer(LRATE, modules=["scaffold-client"])
    federation = Federation(
        drawing,
        client,
        fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": CLIENTS}), "momentum"]),
        batch_size=2,
        uplink=[("gaussian-noise", {"std": 0.1, "safe_mode": False, "seed": 0})],
    )
    buffered = BufferedFederation(federation, concurrency=3, buffer=2)
    data = quadratic_data()
    run = jax.jit(lambda state, count: buffered.run(state, data, count), static_argnums=1)
    return federation, buffered.init(federation.init(start(), data), data), run


@pytest.mark.slow
def test_updates_in_pieces_are_those_of_one_run_bit_by_bit() -> None:
    _, begun, run = noisy()
    whole, history = run(begun, 6)
    first, one = run(begun, 1)
    second, more = run(first, 5)
    same(second, whole)
    same(jax.tree.map(lambda a, b: np.concatenate([a, b]), one, more), history)
    assert jax.random.key_data(second.key).tolist() == jax.random.key_data(whole.key).tolist()
    assert int(whole.starts) == 3 + 6 * 2 - 1  # a place is filled as the clock moves on


@pytest.mark.slow
def test_every_start_draws_anew() -> None:
    _, begun, run = noisy()
    _, history = run(begun, 6)
    assert len(np.unique(history["draw"])) == 12 > len(np.unique(history["participants"]))


@pytest.mark.slow
def test_the_variate_is_the_mean_of_the_clients_however_stale() -> None:
    federation, begun, run = noisy()
    state, history = run(begun, 6)
    assert np.asarray(history["staleness"]).max() > 0
    (local,) = [leaf for leaf in state.federation.bank if leaf.shape == (CLIENTS, 3)]
    total = state.federation.server.modules["scaffold-server"].total["w"]
    assert np.abs(local).max() > 0.1
    np.testing.assert_allclose(total, np.sum(local, axis=0), atol=1e-5)
    federation.check(history)


def test_whoever_sends_nan_takes_a_place_and_counts_for_nothing() -> None:
    federation = Federation(
        lambda w, batch: jnp.sum((w - batch) ** 2, axis=-1) / 2, fo.Optimizer(0.5), on_nonfinite="skip"
    )
    buffered = BufferedFederation(federation, 2, 2, "constant")
    run = jax.jit(lambda state, data: buffered.run(state, data, 2))
    good, bad = np.full((1, 2), 4.0, np.float32), np.full((1, 2), np.nan, np.float32)
    one, none = (FederatedData.from_clients([bad, other]) for other in (good, bad))
    begun = buffered.init(federation.init(jnp.zeros(2), one), one)
    state, history = run(begun, one)
    assert state.federation.params.tolist() == [3.0, 3.0]
    assert np.array_equal(history["joined"], np.asarray(history["participants"]) == 1)
    state, history = run(begun, none)
    assert state.federation.params.tolist() == [0.0, 0.0]
    assert int(state.federation.round) == 2
    with pytest.raises(FloatingPointError, match="in round 0, clients"):
        Federation(quadratic, fo.Optimizer(0.5)).check(history)


@pytest.mark.slow
def test_where_nothing_counts_the_models_state_stays() -> None:
    federation, params, _ = personal()
    stats, data = {"mean": jnp.float32(7)}, quadratic_data()
    buffered = BufferedFederation(federation, 2, 2, discount=lambda staleness: 0 * staleness)
    state, history = jax.jit(lambda state: buffered.run(state, data, 2))(
        buffered.init(federation.init(params, data, stats=stats), data)
    )
    assert float(state.federation.stats["mean"]) == 7
    same(state.federation.params, params)
    assert history["joined"].all()
    assert np.count_nonzero(np.any(np.asarray(state.federation.bank[0]), axis=1)) == len(
        np.unique(history["participants"])
    )


def test_a_negative_duration_is_seen_in_the_clock() -> None:
    federation = Federation(lambda w, batch: jnp.sum((w - batch) ** 2, axis=-1), fo.Optimizer(0.5))
    data = FederatedData.from_clients([np.ones((1, 2), np.float32)] * 3)
    buffered = BufferedFederation(federation, 1, 1, lambda key, client: -1.0)
    _, history = jax.jit(lambda state: buffered.run(state, data, 1))(
        buffered.init(federation.init(jnp.zeros(2), data), data)
    )
    assert np.isnan(history["time"]).all()


@pytest.mark.slow
def test_who_starts_is_any_of_those_that_are_not_at_work_alike() -> None:
    nobody = np.iinfo(np.int32).max
    busy = jnp.array([6, nobody, 0, 3, 2, nobody], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda key: _draw_idle(key, busy, 8))(keys))
    counts = np.bincount(drawn, minlength=8)
    assert np.flatnonzero(counts).tolist() == [1, 4, 5, 7]
    assert np.abs(counts[[1, 4, 5, 7]] - 1000).max() < 4 * np.sqrt(4000 * 3 / 16)
    only = jnp.array([2, 0], jnp.int32)
    assert int(_draw_idle(keys[0], only, 3)) == 1


@pytest.mark.parametrize(
    ("name", "mean", "square"), [("half-normal", np.sqrt(2 / np.pi), 1), ("exponential", 1, 2), ("constant", 1, 1)]
)
def test_durations_by_name(name: str, mean: float, square: float) -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.vmap(lambda key: DURATIONS[name](key, jnp.int32(0)))(keys))
    assert drawn.dtype == np.float32
    assert (drawn >= 0).all()
    np.testing.assert_allclose([drawn.mean(), (drawn**2).mean()], [mean, square], rtol=0.05)


class MeanModule(fo.OptiModule[tuple[()]], register=False):
    def init(self, params: Any) -> tuple[()]:
        return ()

    def update(self, updates: Any, state: Any, params: Any = None, *, mean_gradient: Any, **extra_args: Any) -> Any:
        return mean_gradient, state


class CoinModule(fo.OptiModule[tuple[()]], register=False):
    def init(self, params: Any) -> tuple[()]:
        return ()

    def update(self, updates: Any, state: Any, params: Any = None, *, coin: Any, **extra_args: Any) -> Any:
        return jax.tree.map(lambda g: g * coin, updates), state


def plain(**options: Any) -> Federation:
    return Federation(quadratic, fo.Optimizer(0.1), **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (plain, {"concurrency": 0}, r"concurrency=0 should be in \[1, inf\)"),
        (plain, {"buffer": 0}, r"buffer=0 should be in \[1, inf\)"),
        (plain, {"buffer": 1.5}, r"buffer=1.5 should be of type int"),
        (plain, {"duration": "half-norm"}, "duration='half-norm' is not known: did you mean 'half-normal'"),
        (plain, {"discount": "sqrt"}, "discount='sqrt' is not known"),
        (plain, {"duration": lambda key, client: jnp.ones(2)}, r"duration=.* returns float32\[2\]: expected a float"),
        (plain, {"discount": lambda staleness: 1}, r"discount=.* returns int32\[\]: expected a float scalar"),
        (lambda: plain(coin=0.5), {}, r"federation.coin=0.5 is tossed by all"),
        (lambda: plain(mapping=clients_mesh()), {}, "federation.mapping is a mesh"),
        (
            lambda: plain(server=fo.Optimizer(1.0, modules=[MeanModule()])),
            {},
            r"MeanModule\(\) asks for 'mean_gradient'",
        ),
        (lambda: plain(uplink=[CoinModule()]), {}, r"CoinModule\(\) asks for 'coin'"),
    ],
)
def test_what_has_no_meaning_is_refused(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BufferedFederation(make(), **{"concurrency": 2, "buffer": 2, **options})


def test_states_and_data_of_others_are_refused() -> None:
    federation, data = plain(), quadratic_data()
    state = federation.init(start(), data)
    buffered = BufferedFederation(federation, 2, 2)
    begun = buffered.init(state, data)
    with pytest.raises(ValueError, match="concurrency=6 should be at most the 5 clients"):
        BufferedFederation(federation, 6, 2).init(state, data)
    with pytest.raises(ValueError, match="a state of 2 places for concurrency=3"):
        BufferedFederation(federation, 3, 2).run(begun, data, 1)
    other = BufferedFederation(Federation(quadratic, fo.Optimizer(0.1, modules=["momentum"])), 2, 2)
    with pytest.raises(ValueError, match="the state is of another federation: client was"):
        other.run(begun, data, 1)
    with pytest.raises(TypeError, match="data should be FederatedData, not dict"):
        buffered.init(state, {})
    with pytest.raises(ValueError, match=r"num_updates=-1 should be an integer of at least 0"):
        buffered.run(begun, data, -1)
    with pytest.raises(ValueError, match="`evaluate` returns a metric 'time'"):
        buffered.run(begun, data, 1, evaluate=lambda params: {"time": jnp.float32(0)})


def test_a_metric_of_the_loss_with_the_name_of_an_updates_is_refused() -> None:
    federation = Federation(
        lambda params, batch: (quadratic(params, batch), {"staleness": batch["centre"][:, 0]}), fo.Optimizer(0.1)
    )
    buffered = BufferedFederation(federation, 2, 2)
    begun = buffered.init(federation.init(start(), quadratic_data()), quadratic_data())
    with pytest.raises(ValueError, match="the loss has a metric 'staleness'"):
        buffered.run(begun, quadratic_data(), 1)
