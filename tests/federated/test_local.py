"""What each client keeps of the model for itself: it is neither sent nor averaged, and stays with its client."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation

from .test_known import CorrectedModule, EndModule, UplinkModule, metric

LRATE, STEPS = 0.2, 3
SIZES = (4, 2, 3, 5)
ROUNDS = ((0, 1, 2), (3, 1, 0), (2, 0, 1), (1, 3, 2))
LOST = ((False, False, False), (False, True, False), (True, True, True), (False, False, True))
HEAVY = (1.0, 2.0, 0.5, 3.0)


@functools.cache
def clients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype(np.float32) + i for i, n in enumerate(SIZES)]


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(clients())


def loss(params: Any, batch: Any) -> Any:
    """A shared weight and a client's own one, which together lie near the examples."""
    error = params["body"]["w"] + params["head"]["w"] - batch
    return 0.5 * jnp.sum(error**2, axis=-1) + 0.05 * jnp.sum(params["head"]["w"] ** 2)


def start() -> Any:
    return {"body": {"w": jnp.array([1.0, -2.0])}, "head": {"w": jnp.array([0.5, 0.25])}}


def gradients(w: np.ndarray, h: np.ndarray, client: int) -> tuple[np.ndarray, np.ndarray]:
    error = w + h - clients()[client].astype(float).mean(axis=0)
    return error, error + 0.1 * h


def fedper(mapping: Any = None, **options: Any) -> Federation:
    options = {"steps": STEPS, "local": ["head/**"], **options}
    return Federation(loss, fo.Optimizer(LRATE), mapping=mapping, **options)


def fedper_in_numpy(scaffold: bool = False) -> Any:
    """Algorithm 1 of FedPer, and with SCAFFOLD on what is shared: shared weights and heads after each round."""
    w, heads, found = np.array([1.0, -2.0]), np.tile([0.5, 0.25], (4, 1)), []
    variates, variate = np.zeros((4, 2)), np.zeros(2)
    for chosen, lost in zip(ROUNDS, LOST, strict=True):
        deltas, weights, moved = [], [], np.zeros(2)
        for client, gone in zip(chosen, lost, strict=True):
            y, h, total = w, heads[client], np.zeros(2)
            for _ in range(STEPS):
                for_y, for_h = gradients(y, h, client)
                total = total + for_y
                y = y - LRATE * (for_y - (variates[client] - variate if scaffold else 0))
                h = h - LRATE * for_h
            if not gone:
                heads[client] = h
                deltas.append(y - w)
                weights.append(HEAVY[client])
                moved = moved + total / STEPS - variates[client]
                variates[client] = total / STEPS
        if deltas:
            w, variate = w + np.average(deltas, axis=0, weights=weights), variate + moved / 4
        found.append((w, heads.copy()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "scaffold"), [("scan", False), ("vmap", True), (2, True)])
def test_heads_of_their_own_are_those_of_fedper(mapping: Any, scaffold: bool) -> None:
    client = fo.Optimizer(LRATE, modules=["scaffold-client"] if scaffold else [])
    server = fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": 4})] if scaffold else [])
    federation = Federation(loss, client, server, steps=STEPS, local=["head/**"], mapping=mapping)
    state, program = federation.init(start(), data()), jax.jit(federation.round, donate_argnums=0)
    for chosen, lost, (w, heads) in zip(ROUNDS, LOST, fedper_in_numpy(scaffold), strict=True):
        weights = np.array(HEAVY, np.float32)[list(chosen)]
        state, _ = program(state, data(), np.array(chosen), weights=weights, dropped=np.array(lost))
        np.testing.assert_allclose(state.params["body"]["w"], w, atol=1e-5)
        models = [federation.model(state, each) for each in range(4)]
        np.testing.assert_allclose([model["head"]["w"] for model in models], heads, atol=1e-5)
        for model in models:
            np.testing.assert_array_equal(model["body"]["w"], state.params["body"]["w"])
        # What a client starts from stays what it was.
        np.testing.assert_array_equal(federation.model(state)["head"]["w"], start()["head"]["w"])


@pytest.mark.slow
def test_saved_parts_of_clients_go_on_as_if_they_had_not_been_saved() -> None:
    federation = fedper()
    state, _ = federation.fit(federation.init(start(), data()), data(), 3, participants=2)
    saved = json.loads(json.dumps(federation.encode(state), allow_nan=False))
    assert saved["bank"].keys() == {"local/params/head/w"}
    restored = federation.decode(saved, federation.init(start(), data(), seed=5))
    ends = [federation.fit(each, data(), 3, participants=2)[0] for each in (restored, state)]
    for left, right in zip(*(jax.tree.leaves((end.params, end.bank)) for end in ends), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_uplink_and_what_reckons_at_a_rounds_end_see_what_is_shared_alone() -> None:
    client = fo.Optimizer(LRATE, modules=[EndModule()])
    federation = Federation(loss, client, uplink=[UplinkModule()], steps=1, local=["head/w"])
    state = federation.init(start(), data())
    _, metrics = federation.round(state, data(), np.arange(4))
    own, sent = metric(metrics, "client/end", "delta"), metric(metrics, "uplink/sent", "delta")
    both = [np.concatenate(gradients(np.array([1.0, -2.0]), np.array([0.5, 0.25]), c)) for c in range(4)]
    np.testing.assert_allclose(sent, -LRATE * np.array(both)[:, :2], atol=1e-6)
    np.testing.assert_array_equal(own, sent)
    np.testing.assert_allclose(metric(metrics, "uplink/sent", "full_gradient"), np.array(both)[:, :2], atol=1e-6)


def test_a_bound_on_the_norm_is_one_on_what_is_shared() -> None:
    bound = ("norm-bounded-mean", {"bound": 0.1})
    federation = fedper(aggregation=bound)
    state, _ = federation.round(federation.init(start(), data()), data(), np.array([3]))
    moved = np.asarray(state.params["body"]["w"]) - [1.0, -2.0]
    np.testing.assert_allclose(np.linalg.norm(moved), 0.1, rtol=1e-5)


def test_a_head_that_starts_at_its_clients_optimum_stays_whatever_others_do() -> None:
    def apart(params: Any, batch: Any) -> Any:
        return jnp.sum((params["w"] - batch) ** 2, axis=-1) + jnp.sum((params["own"] - 3) ** 2)

    federation = Federation(apart, fo.Optimizer(0.1), local=["own"])
    state = federation.init({"w": jnp.zeros(2), "own": jnp.full(2, 3.0)}, data())
    state, _ = federation.run(state, data(), 3)
    for client in range(4):
        np.testing.assert_array_equal(federation.model(state, client)["own"], 3)


def test_the_mean_gradient_tells_nothing_of_what_clients_keep_for_themselves() -> None:
    def apart(params: Any, batch: Any) -> Any:
        squares = [0.5 * jnp.sum((params[name] - batch) ** 2, axis=-1) for name in ("w", "own")]
        return sum(squares)

    client = fo.Optimizer(1.0, modules=[CorrectedModule()])
    federation = Federation(apart, client, steps=1, local=["own"])
    state, _ = federation.run(federation.init({"w": jnp.zeros(2), "own": jnp.zeros(2)}, data()), data(), 1)
    # One step of rate 1 at the anchor: where the client's own gradient leads.
    for client in range(4):
        own = federation.model(state, client)["own"]
        np.testing.assert_allclose(own, clients()[client].mean(axis=0), atol=1e-5)


@pytest.mark.slow
def test_many_small_parameters_of_clients_own() -> None:
    params = {f"{i:02d}": {"b": jnp.zeros(3), "w": jnp.eye(3)} for i in range(10)}

    def deep(params: Any, batch: Any) -> Any:
        x = jnp.concatenate([batch, batch[:, :1]], axis=1)
        for layer in sorted(params):
            x = jnp.tanh(x @ params[layer]["w"] + params[layer]["b"])
        return jnp.sum(x**2, axis=-1)

    client = fo.Optimizer(0.1, modules=["scaffold-client", "momentum"])
    server = fo.Optimizer(1.0, modules=["scaffold-server"])
    federation = Federation(deep, client, server, local=["0[2-9]/*", "**/b"])
    state, _ = federation.round(federation.init(fo.pack(params), data()), data(), np.array([1, 2]))
    own = [federation.model(state, each) for each in range(4)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(own[1]):
        layer, name = (key.key for key in path)
        alone = name == "b" or int(layer) >= 2
        assert np.array_equal(leaf, own[2][layer][name]) != alone
        assert np.array_equal(own[0][layer][name], params[layer][name]) == alone


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["heads/**"], "local: the pattern 'heads/\\*\\*' matches no path: "),
        (["head"], "the pattern 'head' matches no path"),
        (["head/*", "nothing"], "the pattern 'nothing' matches no path"),
        (["**"], r"local=\['\*\*'\] leaves no parameter for clients to share"),
        (["head/w", "body/*"], "leaves no parameter for clients to share"),
        ("head/**", "local='head/.*' should be of type list of str"),
        ([3], r"local=\[3\] should be of type list of str"),
        (["head/[z-a]"], "pattern 'head/\\[z-a\\]'"),
    ],
)
def test_wrong_patterns(patterns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedper(local=patterns).init(start(), data())


@pytest.mark.parametrize("client", [-1, 4, True, 1.0])
def test_wrong_clients(client: Any) -> None:
    federation = fedper()
    with pytest.raises(ValueError, match=f"client={client!r} should be one of the 4 clients, from 0"):
        federation.model(federation.init(start(), data()), client)


def test_a_number_of_numpy_is_a_client_too() -> None:
    federation = fedper()
    found = federation.model(federation.init(start(), data()), np.int64(3))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found["head"]["w"], start()["head"]["w"])
