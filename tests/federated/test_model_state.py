"""Models with a state that no gradient trains: it is averaged over the participants, or each client's own."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from .test_known import asking

LRATE = 0.1
SIZES = (3, 2, 6)


@functools.cache
def clients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype(np.float32) + i for i, n in enumerate(SIZES)]


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(clients())


def loss(params: Any, stats: Any, batch: Any) -> Any:
    """Squares of what is centered by a running mean, which moves with each batch."""
    seen = 0.5 * stats["seen"] + 0.5 * batch.mean(axis=0)
    error = 0.5 * jnp.sum((params["w"] - (batch - stats["seen"])) ** 2, axis=-1)
    return error, {"count": jnp.full(len(batch), stats["count"])}, {"seen": seen, "count": stats["count"] + 1}


def start() -> Any:
    return {"w": jnp.array([1.0, -2.0])}


def stats(count: Any = 0.0) -> Any:
    return {"seen": jnp.zeros(2), "count": jnp.asarray(count)}


def federation(**options: Any) -> Federation:
    return Federation(loss, fo.Optimizer(LRATE), **{"batch_size": 2, "remainder": "drop", **options})


ROUNDS, LOST = ((0, 1, 2), (2, 0, 1), (1, 2, 0)), ((False,) * 3, (False, True, False), (True,) * 3)


def in_numpy(weights: Any, own: bool) -> Any:
    """Rounds of two steps over all data."""
    w, shared, seen = np.array([1.0, -2.0]), np.zeros(2), np.zeros((3, 2))
    counts, found = np.zeros(3), []
    for chosen, lost in zip(ROUNDS, LOST, strict=True):
        ends = []
        for client, gone in zip(chosen, lost, strict=True):
            y, running, mean = w, seen[client] if own else shared, clients()[client].astype(float).mean(axis=0)
            for _ in range(2):
                y, running = y - LRATE * (y - (mean - running)), 0.5 * running + 0.5 * mean
            if not gone:
                ends.append((weights[client], y, running))
                seen[client] = running
                counts[client] += 2
        if ends:
            heavy, ys, runs = zip(*ends, strict=True)
            w, shared = np.average(ys, axis=0, weights=heavy), np.average(runs, axis=0, weights=heavy)
        found.append((w, shared, seen.copy(), counts.copy()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "own"), [("scan", False), ("vmap", True), (2, False), (2, True)])
def test_the_state_is_averaged_by_weight_over_those_that_joined_or_each_clients_own(mapping: Any, own: bool) -> None:
    # Batches of all data, which differ in size: given ones of one size would be, too.
    batches = np.stack([np.stack([np.resize(each, (6, 2))] * 2) for each in clients()])
    where = federation(mapping=mapping, weighting="examples", local=["**/seen", "count"] if own else [])
    state = where.init(start(), 3, stats=stats(jnp.int32(0) if own else 0.0))
    program = jax.jit(where.round, donate_argnums=0)
    weights = (2.0, 1.0, 3.0)
    resized = [np.resize(each, (6, 2)).astype(float).mean(axis=0) for each in clients()]
    assert np.allclose(resized, [each.mean(axis=0) for each in clients()], atol=1e-6)
    for chosen, lost, (w, shared, seen, counts) in zip(ROUNDS, LOST, in_numpy(weights, own), strict=True):
        who = np.array(chosen)
        heavy = np.array(weights, np.float32)[who]
        state, _ = program(state, batches[who], who, weights=heavy, dropped=np.array(lost))
        np.testing.assert_allclose(state.params["w"], w, atol=1e-5)
        if own:
            models = [where.model(state, client)[1] for client in range(3)]
            np.testing.assert_allclose([model["seen"] for model in models], seen, atol=1e-5)
            assert [int(model["count"]) for model in models] == counts.tolist()
            assert models[0]["count"].dtype == jnp.int32
            np.testing.assert_array_equal(where.model(state)[1]["seen"], 0)
        else:
            np.testing.assert_allclose(state.stats["seen"], shared, atol=1e-5)
            assert where.model(state, 1)[1] is not None


def test_a_saved_state_of_the_model_goes_on_as_if_it_had_not_been_saved() -> None:
    where = federation(local=["seen"])
    state, _ = where.fit(where.init(start(), data(), stats=stats()), data(), 3, participants=2)
    saved = json.loads(json.dumps(where.encode(state), allow_nan=False))
    assert saved["stats"].keys() == {"seen", "count"}
    assert saved["bank"].keys() == {"local/stats/seen"}
    restored = where.decode(saved, where.init(start(), data(), stats=stats()))
    ends = [where.fit(each, data(), 2, participants=2)[0] for each in (restored, state)]
    for left, right in zip(*(jax.tree.leaves((e.params, e.stats, e.bank)) for e in ends), strict=True):
        np.testing.assert_array_equal(left, right)
    assert float(ends[0].stats["count"]) > 0


def test_what_a_caller_gave_is_intact_after_donated_rounds() -> None:
    where, mine = federation(), stats()
    params = start()
    where.fit(where.init(params, data(), stats=mine), data(), 1)
    np.testing.assert_array_equal(mine["seen"], 0)
    np.testing.assert_array_equal(params["w"], [1, -2])


def test_the_gradient_at_the_anchor_is_at_the_models_state_before_the_step() -> None:
    def scaled(params: Any, stats: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum(stats["scale"] * (params["w"] - batch) ** 2, axis=-1), {}, {"scale": stats["scale"] + 1}

    module = asking("anchor_gradient")
    where = Federation(scaled, fo.Optimizer(LRATE, modules=[module]))
    batches = np.zeros((1, 1, 1, 2), np.float32)
    state = where.init({"w": jnp.ones(2)}, 1, stats={"scale": jnp.float32(1)})
    _, metrics = where.round(state, batches, [0])
    # One step from the anchor: it is the gradient, 1 * (w - 0), of either coordinate.
    np.testing.assert_allclose(metrics["client/asking/coin"], [2])


def test_a_gradient_over_all_data_has_no_filling_in_the_models_batches() -> None:
    """Of 3 examples in batches of 2, a loss that looks at its batch as a whole must not see one of them twice."""

    def centered(params: Any, stats: Any, batch: Any) -> Any:
        mean = batch.mean(axis=0)
        return (
            jnp.sum((batch - mean) * params["w"] + params["w"] * mean, axis=-1) + jnp.max(batch) * params["w"][0],
            {},
            {"mean": mean},
        )

    where = Federation(
        centered, fo.Optimizer(LRATE, modules=[asking("full_gradient", end=True)]), batch_size=2, remainder="drop"
    )
    odd = FederatedData.from_clients([np.array([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32)])
    state = where.init({"w": jnp.ones(2)}, odd, stats={"mean": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"what fills it up|full_gradient"):
        where.round(state, odd, np.array([0]))


def test_the_loss_may_take_a_key_and_is_evaluated_by_another() -> None:
    def keyed(params: Any, stats: Any, batch: Any, key: Any) -> Any:
        draw = jax.random.uniform(key)
        return jnp.mean((params["w"] - batch) ** 2) + 0 * draw, {"draw": draw}, {"seen": stats["seen"] + 1}

    def evaluated(params: Any, stats: Any, batch: Any) -> Any:
        return jnp.sum(0 * batch, axis=-1) + stats["seen"], {}, stats

    where = Federation(keyed, fo.Optimizer(LRATE), batch_size=2, remainder="wrap", eval_fn=evaluated)
    state, metrics = where.run(where.init(start(), data(), stats={"seen": jnp.zeros(())}), data(), 2)
    assert len(set(np.asarray(metrics["draw"]).ravel())) == 6
    # The mean of 2, 1 and 3 steps, twice.
    np.testing.assert_allclose(where.evaluate(state, data())["loss"], 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda value, new: value, TypeError, r"expected \(loss, metrics, state\)"),
        (lambda value, new: (value, new), TypeError, r"expected \(loss, metrics, state\)"),
        (lambda value, new: (value, {}, {"seen": new["seen"]}), ValueError, "lacks the leaf 'count'"),
        (lambda value, new: (value, {}, new | {"more": 1.0}), ValueError, "a leaf 'more'"),
        (lambda value, new: (value, {}, new | {"count": jnp.int32(0)}), ValueError, r"int32\[\] at 'count': expected"),
        (lambda value, new: (value, {}, new | {"seen": jnp.zeros(3)}), ValueError, r"float32\[3\] at 'seen'"),
        (lambda value, new: (value, {}, tuple(new.values())), ValueError, "the state that the loss returned"),
    ],
)
def test_wrong_states_that_a_loss_returns(returned: Any, error: Any, message: str) -> None:
    def wrong(params: Any, stats: Any, batch: Any) -> Any:
        value, _, new = loss(params, stats, batch)
        return returned(value, new)

    where = Federation(wrong, fo.Optimizer(LRATE), batch_size=2, remainder="drop")
    with pytest.raises(error, match=message):
        where.run(where.init(start(), data(), stats=stats()), data(), 1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"seen": jnp.zeros(2), "count": jnp.int32(0)}, ValueError, r"'count' is of int32, .*local=\['count'\]"),
        ({"seen": jnp.zeros(2), "count": jnp.array(True)}, ValueError, "'count' is of bool"),
        ({"seen": jnp.zeros(2), "count": jax.random.key(0)}, ValueError, "'count' is of key"),
        ({"seen": jnp.zeros(2), "count": "none"}, TypeError, "at 'count' there is 'none'"),
    ],
)
def test_wrong_states_of_a_model(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        federation().init(start(), data(), stats=given)


def test_partial_batches_are_refused_where_they_would_count_in_the_models_state() -> None:
    where = federation(batch_size=4, remainder="mask")
    with pytest.raises(ValueError, match="what fills it up would count in the model's state: use remainder='drop'"):
        where.run(where.init(start(), data(), stats=stats()), data(), 1)


def test_a_model_whose_state_is_missing_is_told_of() -> None:
    with pytest.raises((TypeError, ValueError), match=r"stats|state"):
        federation().run(federation().init(start(), data()), data(), 1)


def test_evaluation_of_parameters_without_the_models_state_is_told_of() -> None:
    where = federation()
    state = where.init(start(), data(), stats=stats())
    assert where.evaluate(state, data())["loss"].shape == (3,)
    with pytest.raises((TypeError, ValueError), match="state"):
        where.evaluate(state.params, data())


def test_a_saved_state_without_the_models_state_is_refused() -> None:
    where = federation()
    saved = where.encode(where.init(start(), data()))
    with pytest.raises(KeyError, match="lacks the key 'stats'"):
        where.decode(saved, where.init(start(), data(), stats=stats()))
