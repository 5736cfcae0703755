"""Rounds driven from the host: pieces, checks, saved states, evaluation."""

import copy
import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from . import problem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data() -> FederatedData:
    return FederatedData.from_clients(problem.clients())


def fit(federation: Federation, state: Any, data: FederatedData, rounds: int, **options: Any) -> Any:
    return federation.fit(state, data, rounds, participants=3, every=2, **options)


def state_of(federation: Federation, data: FederatedData) -> Any:
    return federation.init(problem.params(), data, seed=3)


def same_bits(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(data: FederatedData) -> Any:
    federation = problem.federation()
    return fit(federation, state_of(federation, data), data, 5)


def test_fit_runs_the_rounds_of_run(whole: Any, data: FederatedData) -> None:
    state, history = problem.run(problem.federation(), data)
    for name, value in history.items():
        np.testing.assert_allclose(whole[1][name], value, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(whole[0].params["w"], state.params["w"], atol=1e-6)
    assert whole[1]["round"].tolist() == [0, 1, 2, 3, 4]


def test_a_run_saved_as_json_and_resumed_is_the_same_to_the_last_bit(whole: Any, data: FederatedData) -> None:
    federation = problem.federation()
    saved: list[str] = []
    seen: list[int] = []

    def save(state: Any, history: Any) -> None:
        saved.append(json.dumps(federation.encode(state), allow_nan=False))
        seen.extend(history["round"].tolist())

    _, first = fit(federation, state_of(federation, data), data, 3, callback=save)
    assert seen == [0, 1, 2]
    restored = federation.decode(json.loads(saved[-1]), state_of(federation, data))
    state, rest = fit(federation, restored, data, 2)
    same_bits(state, whole[0])
    for name in first:
        np.testing.assert_array_equal(np.concatenate([first[name], rest[name]]), whole[1][name])


def test_no_rounds_change_nothing(data: FederatedData) -> None:
    federation = problem.federation()
    state, history = fit(federation, state_of(federation, data), data, 0)
    same_bits(state, state_of(federation, data))
    assert history["loss"].shape == (0, 3)


def test_a_progress_bar_counts_rounds_and_is_imported_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, data: FederatedData
) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, unit: str) -> None:
            self.total, self.count = total, 0
            bars.append(self)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, count: int) -> None:
            self.count += count

    federation = problem.federation()
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    fit(federation, state_of(federation, data), data, 1)
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    fit(federation, state_of(federation, data), data, 5, progress=True)
    assert [(bar.total, bar.count) for bar in bars] == [(5, 5)]


@pytest.fixture(scope="module")
def poisoned() -> FederatedData:
    clients = problem.clients()
    clients[2]["x"][0, 0] = np.nan
    return FederatedData.from_clients(clients)


def test_fit_stops_after_the_piece_in_which_a_client_sent_nan_and_names_it(poisoned: FederatedData) -> None:
    federation = problem.federation()
    pieces: list[int] = []
    participants = np.asarray(problem.run(federation, poisoned)[1]["participants"])
    first = int(np.flatnonzero((participants == 2).any(axis=1))[0])
    with pytest.raises(FloatingPointError, match=rf"in round {first}, clients \[2\] sent values that are not finite"):
        fit(federation, state_of(federation, poisoned), poisoned, 5, callback=lambda s, h: pieces.append(1))
    assert len(pieces) == first // 2


def test_fit_leaves_such_a_client_out_on_request(poisoned: FederatedData) -> None:
    federation = problem.federation(on_nonfinite="skip")
    state, history = fit(federation, state_of(federation, poisoned), poisoned, 5)
    assert np.isfinite(state.params["w"]).all()
    assert set(history["participants"][~history["joined"]].tolist()) == {2}


def test_evaluation_gives_the_loss_and_the_metrics_of_each_client(whole: Any, data: FederatedData) -> None:
    params = whole[0].params
    expected = [float(jnp.mean(problem.loss(params, client))) for client in problem.clients()]
    for options in ({}, {"batch_size": 4}):
        found = problem.federation().evaluate(params, data, **options)
        np.testing.assert_allclose(found["loss"], expected, atol=1e-5)
    found = problem.noisy_federation(mapping=3).evaluate(params, data, key=jax.random.key(5))
    assert found["draw"].shape == (problem.NUM_CLIENTS,)
    assert len(set(np.asarray(found["draw"]).tolist())) == problem.NUM_CLIENTS


def test_what_evaluate_returns_and_weights_by_client_enter_each_round(data: FederatedData) -> None:
    federation = problem.federation()
    weights = jnp.zeros(problem.NUM_CLIENTS).at[4].set(2.0)
    run = jax.jit(lambda s: federation.run(s, data, 2, weights=weights, evaluate=lambda p: {"b": p["b"]}))
    state, history = run(state_of(federation, data))
    np.testing.assert_array_equal(history["b"][-1], state.params["b"])
    only = jax.jit(lambda s: federation.round(s, data, jnp.arange(7), weights=weights)[0])(state_of(federation, data))
    np.testing.assert_allclose(history["b"][0], only.params["b"], atol=1e-6)


@pytest.fixture(scope="module")
def saved(whole: Any) -> Any:
    return json.loads(json.dumps(problem.federation().encode(whole[0])))


class TestDecode:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"batch_size": 5}, r"batch_size was 4, and is 5"),
            ({"epochs": 1}, "epochs was 2, and is 1"),
            (
                {"client": fo.Optimizer(0.1, regularizers=["fedprox"], modules=["scaffold-client"])},
                "client.lrate was 0.2",
            ),
            ({"loss_fn": problem.noisy_loss}, "loss_fn was 'loss', and is 'noisy_loss'"),
        ],
    )
    def test_refuses_the_state_of_another_federation_and_names_the_field(
        self, saved: Any, change: Any, field: str
    ) -> None:
        client, server = problem.optimizers()
        options = {"loss_fn": problem.loss, "client": client, "server": server, "batch_size": 4, "epochs": 2}
        other = Federation(**{**options, "weighting": "examples", **change})
        with pytest.raises(ValueError, match=field):
            other.decode(saved, other.init(problem.params(), problem.NUM_CLIENTS))

    def test_takes_a_state_to_another_mapping(self, saved: Any, whole: Any, data: FederatedData) -> None:
        federation = problem.federation(mapping="vmap")
        same_bits(federation.decode(saved, state_of(federation, data)), whole[0])

    def test_keeps_the_template_and_clients_keys(self, data: FederatedData) -> None:
        federation = problem.noisy_federation()
        state = federation.init(problem.params(), data)
        other = federation.init(problem.params(), data, seed=9)
        same_bits(federation.decode(json.loads(json.dumps(federation.encode(state))), other), state)
        same_bits(other, federation.init(problem.params(), data, seed=9))

    @pytest.mark.parametrize(
        ("path", "value", "error", "message"),
        [
            (["num_clients"], 8, ValueError, "num_clients=8 was saved, and is 7"),
            (["round"], -1, ValueError, "'round' should be a count"),
            (["clients"], [0, 1], ValueError, r"lacks the rows of the clients \[2, 3, 4, 5, 6\]"),
            (["clients"], list(range(8)), ValueError, r"has shape \[7(, \d)*\]: expected \[8(, \d)*\]"),
            (["clients"], "all", ValueError, "list of numbers"),
            (["bank"], {}, ValueError, "'bank' should hold"),
            (["values", "w"], {"dtype": "float32", "shape": [3, 2], "data": "!"}, ValueError, "base64"),
            (["params", "w", "shape"], [2, 3], ValueError, "at 'w'"),
            (["key"], None, ValueError, "the key"),
            (["extra"], 1, KeyError, "unknown key 'extra'"),
        ],
    )
    def test_refuses_a_damaged_state_and_says_where(
        self, saved: Any, data: FederatedData, path: Any, value: Any, error: Any, message: str
    ) -> None:
        federation = problem.federation()
        damaged = copy.deepcopy(saved)
        node = damaged
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        with pytest.raises(error, match=message):
            federation.decode(damaged, state_of(federation, data))

    @pytest.mark.parametrize("key", ["federation", "values", "server", "bank"])
    def test_refuses_a_state_that_lacks_a_part(self, saved: Any, data: FederatedData, key: str) -> None:
        federation = problem.federation()
        with pytest.raises(KeyError, match=key):
            federation.decode({k: v for k, v in saved.items() if k != key}, state_of(federation, data))
