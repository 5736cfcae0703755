"""What becomes of deltas on their way up; and all places of a round together, on one device and on four."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.aux_var import FromClients, FromServer, Scalar
from functional_optimodules.federated import FederatedData, Federation, clients_mesh
from functional_optimodules.numerics import cast_like, wide, zeros_wide

LRATE, START = 0.5, np.array([1.0, -2.0])
SIZES = (4, 2, 3, 5)


@functools.cache
def clients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype(np.float32) + i for i, n in enumerate(SIZES)]


def squares(params: Any, batch: Any) -> Any:
    return 0.5 * jnp.sum((params["w"] - batch) ** 2, axis=-1)


def start() -> Any:
    return {"w": jnp.asarray(START, jnp.float32)}


class LackState(NamedTuple):
    lack: Any


class HalvesModule(fo.OptiModule[LackState], register=False):
    """Sends half of what is due, and owes the other half."""

    name = "halves"

    def init(self, params: Any) -> LackState:
        return LackState(zeros_wide(params))

    def update(self, updates: Any, state: LackState, params: Any = None, **extra: Any) -> Any:
        half = jax.tree.map(lambda g, e: (wide(g) + e) / 2, updates, state.lack)
        return cast_like(half, updates), LackState(half)

    def metrics(self, state: LackState) -> Any:
        return {"first": jax.tree.leaves(state.lack)[0].ravel()[0]}


class Sum(FromClients):
    total: Scalar


class Bound(FromServer):
    factor: Scalar


class NumberState(NamedTuple):
    number: Any


class SpeaksModule(fo.OptiModule[NumberState], register=False):
    """Multiplies by what the server says, and tells it the sum of what it sends."""

    name = "speaks"
    aux_name = "talk"
    sends = Sum
    receives = Bound

    def init(self, params: Any) -> NumberState:
        return NumberState(jnp.ones(2))

    def update(self, updates: Any, state: NumberState, params: Any = None, **extra: Any) -> Any:
        made = jax.tree.map(lambda g: g * state.number[0].astype(g.dtype), updates)
        return made, NumberState(jnp.stack([state.number[0], sum(map(jnp.sum, jax.tree.leaves(made)))]))

    def collect(self, state: NumberState) -> Sum:
        return Sum(state.number[1])

    def process(self, aux: Bound, state: NumberState) -> NumberState:
        return NumberState(state.number.at[0].set(aux.factor))


class ListensModule(fo.OptiModule[NumberState], register=False):
    """Says half of what it said last, and remembers what it was told."""

    name = "listens"
    aux_name = "talk"
    sends = Bound
    receives = Sum

    def init(self, params: Any) -> NumberState:
        return NumberState(jnp.array([1.0, 0.0]))

    def update(self, updates: Any, state: NumberState, params: Any = None, **extra: Any) -> Any:
        return updates, state

    def collect(self, state: NumberState) -> Bound:
        return Bound(state.number[0])

    def process(self, aux: Sum, state: NumberState) -> NumberState:
        return NumberState(jnp.stack([state.number[0] / 2, aux.total]))

    def metrics(self, state: NumberState) -> Any:
        return {"told": state.number[1]}


ROUNDS = ((0, 1, 2), (3, 1, 0), (2, 0, 1), (1, 3, 2))
LOST = ((False, False, False), (False, True, False), (True, True, True), (False, False, True))
HEAVY = (1.0, 2.0, 0.5, 3.0)


def halves_in_numpy() -> Any:
    """Rounds of one full step, with halves owed: parameters and debts after each."""
    w, owed, found = START, np.zeros((4, 2)), []
    for chosen, lost in zip(ROUNDS, LOST, strict=True):
        sent, weights = [], []
        for client, gone in zip(chosen, lost, strict=True):
            half = (LRATE * (w - clients()[client].astype(float).mean(axis=0)) + owed[client]) / 2
            if not gone:
                owed[client] = half
                sent.append(half)
                weights.append(HEAVY[client])
        if sent:
            w = w - np.average(sent, axis=0, weights=weights)
        found.append((w, owed.copy()))
    return found


def halves(mapping: Any = None) -> Federation:
    return Federation(squares, fo.Optimizer(LRATE), uplink=[HalvesModule()], mapping=mapping)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["scan", "vmap", 2])
def test_each_client_has_its_own_state_of_the_uplink_which_drop_outs_do_not_move(mapping: Any) -> None:
    federation, data = halves(mapping), FederatedData.from_clients(clients())
    program = jax.jit(federation.round, donate_argnums=0)
    state = federation.init(start(), data)
    for chosen, lost, (w, owed) in zip(ROUNDS, LOST, halves_in_numpy(), strict=True):
        weights = np.array(HEAVY, np.float32)[list(chosen)]
        state, metrics = program(state, data, np.array(chosen), weights=weights, dropped=np.array(lost))
        np.testing.assert_allclose(state.params["w"], w, atol=1e-6)
        np.testing.assert_allclose(state.bank[0], owed, atol=1e-6)
        kept = [not gone for gone in lost]
        said = np.asarray(metrics["uplink/halves/first"])[kept]
        np.testing.assert_allclose(said, owed[np.array(chosen)[kept], 0], atol=1e-6)


@pytest.mark.slow
def test_a_saved_uplink_goes_on_as_if_it_had_not_been_saved() -> None:
    federation, data = halves(), FederatedData.from_clients(clients())
    state, _ = federation.fit(federation.init(start(), data, seed=1), data, 3, participants=2)
    saved = json.loads(json.dumps(federation.encode(state), allow_nan=False))
    assert saved["bank"].keys() == {"uplink/modules/halves/lack/w"}
    restored = federation.decode(saved, federation.init(start(), data))
    assert federation.encode(restored) == saved
    ends = [federation.fit(each, data, 3, participants=2)[0] for each in (restored, state)]
    np.testing.assert_array_equal(ends[0].params["w"], ends[1].params["w"])
    np.testing.assert_array_equal(ends[0].bank[0], ends[1].bank[0])


@pytest.mark.slow
def test_no_module_on_the_uplink_is_no_uplink() -> None:
    data = FederatedData.from_clients(clients())
    texts = []
    for options in ({}, {"uplink": []}, {"aggregation": "mean"}, {"local": [], "steps": None}):
        federation = Federation(squares, fo.Optimizer(LRATE), **options)
        state = federation.init(start(), data)
        assert state.bank == []
        texts.append(jax.jit(federation.round).lower(state, data, np.arange(2)).as_text())
    assert len(set(texts)) == 1


@pytest.mark.parametrize("mapping", ["scan", "vmap", 2])
def test_a_module_of_the_uplink_talks_to_its_counterpart(mapping: Any) -> None:
    server = fo.Optimizer(1.0, modules=[ListensModule()])
    federation = Federation(squares, fo.Optimizer(LRATE), server, uplink=[SpeaksModule()], mapping=mapping)
    data = FederatedData.from_clients(clients())
    state, program = federation.init(start(), data), jax.jit(federation.round)
    w, factor = START, 1.0
    for number in range(3):
        sent = [factor * LRATE * (w - clients()[c].astype(float).mean(axis=0)) for c in (2, 0)]
        state, metrics = program(state, data, np.array([2, 0, 1]), dropped=np.array([False, False, True]))
        w, factor = w - np.mean(sent, axis=0), factor / 2
        np.testing.assert_allclose(state.params["w"], w, atol=1e-6, err_msg=str(number))
        np.testing.assert_allclose(metrics["server/listens/told"], np.sum(sent), atol=1e-5)


@pytest.mark.slow
def test_clients_draw_apart_on_the_uplink_and_anew_each_round() -> None:
    noise = ("gaussian-noise", {"std": 1.0, "safe_mode": False, "seed": 0})
    deltas = []
    for mapping in ("scan", "vmap"):
        federation = Federation(squares, fo.Optimizer(0.0), uplink=[noise], mapping=mapping)
        data = FederatedData.from_clients(clients())
        state, moves = federation.init(start(), data), []
        for client in (0, 1, 0):
            new, _ = federation.round(state, data, np.array([client]))
            moves.append(np.asarray(new.params["w"] - state.params["w"]))
            state = new
        assert len({move.tobytes() for move in moves}) == 3
        deltas.append(moves)
    np.testing.assert_array_equal(*deltas)


def test_the_uplink_takes_deltas_of_float32_where_parameters_are_of_less() -> None:
    def loss(params: Any, batch: Any) -> Any:
        return squares(params, batch.astype(jnp.bfloat16))

    federation = Federation(loss, fo.Optimizer(LRATE), uplink=["momentum", HalvesModule()])
    data = FederatedData.from_clients([np.full((4, 2), 0.5, np.float32)] * 2)
    state, _ = federation.run(federation.init({"w": jnp.zeros(2, jnp.bfloat16)}, data), data, 1)
    assert state.params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.params["w"].astype(jnp.float32), 0.125)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uplink": ["scaffold-client"]}, ValueError, "'scaffold' have .* None on the server's: expected a module and"),
        ({"uplink": ["scaffold-server"]}, ValueError, "ScaffoldServerModule.* on the clients' side and None"),
        ({"uplink": [SpeaksModule()]}, ValueError, "'talk' have SpeaksModule.* and None on the server's"),
        ({"uplink": [ListensModule()], "server": [ListensModule()]}, ValueError, "expected a module and its counter"),
        ({"uplink": [SpeaksModule()], "client": [SpeaksModule()]}, ValueError, "two modules of a client exchange"),
        ({"uplink": "momentum"}, ValueError, "uplink='momentum' should be of type list of OptiModule"),
        ({"uplink": ["fedprox"]}, KeyError, "no module is named 'fedprox'"),
        ({"uplink": [fo.Optimizer(0.1)]}, ValueError, "should be of type list of OptiModule"),
        ({"uplink": [("momentum", {"beta": 2.0})]}, ValueError, r"beta=2.0 should be in"),
        ({"aggregation": "middle"}, KeyError, "no aggregator is named 'middle'"),
        ({"aggregation": ("trimmed-mean", {"share": 0.5})}, ValueError, r"share=0.5 should be in \[0, 0.5\)"),
        ({"aggregation": "median", "sums_only": True}, ValueError, "needs each client's delta, and sums_only allows"),
        ({"sums_only": "yes"}, ValueError, "sums_only='yes' should be of type bool"),
    ],
)
def test_wrong_places(options: dict[str, Any], error: type[Exception], message: str) -> None:
    client, server = fo.Optimizer(0.1, modules=options.pop("client", [])), options.pop("server", [])
    with pytest.raises(error, match=message):
        Federation(squares, client, fo.Optimizer(1.0, modules=server), **options)


# All places at once.

LAYERS = 6


@functools.cache
def everything(mapping: Any = None, small: bool = False) -> tuple[Federation, Any, Any]:
    """A federation with something in each place, its parameters and its model's state."""
    if small:
        params: Any = {f"{i:02d}": {"b": jnp.zeros(3), "w": jnp.eye(3) * 0.9} for i in range(LAYERS)}
    else:
        params = {"body": {"w": jnp.eye(3) * 0.9}, "head": {"w": jnp.full((3,), 0.1)}}

    def loss(params: Any, stats: Any, batch: Any) -> Any:
        x = (batch["x"] - stats["shared"]) / 2
        new = {"own": 0.9 * stats["own"] + 0.1 * batch["x"][0], "shared": 0.5 * stats["shared"] + 0.5 * x.mean(axis=0)}
        for name in sorted(params):
            w = params[name]["w"]
            x = (
                x + jnp.tanh(x @ w + params[name]["b"])
                if small
                else x * w + 0.1 * stats["own"]
                if w.ndim == 1
                else x @ w
            )
        error = (x.sum(axis=-1) - batch["y"]) ** 2
        return error, {"error": error}, new

    client = fo.Optimizer(0.05, modules=["scaffold-client", "l2-clipping", "momentum"])
    server = fo.Optimizer(0.1, modules=[("scaffold-server", {"num_clients": 7}), ("adam", {"eps": 0.1})])
    federation = Federation(
        loss,
        client,
        server,
        batch_size=2,
        steps=5,
        remainder="drop",
        weighting="examples",
        mapping=mapping,
        uplink=[HalvesModule(), ("gaussian-noise", {"std": 0.01, "safe_mode": False, "seed": 0}), "momentum"],
        aggregation=("centered-clipping", {"radius": 0.5, "passes": 2}),
        local=[] if small else ["head/**", "own"],
    )
    return federation, params, {"own": jnp.zeros(3), "shared": jnp.zeros(3)}


def everyone(mesh: Any = None) -> FederatedData:
    rng = np.random.default_rng(2)
    sizes = (3, 9, 4, 14, 6, 2, 8)
    trees = [{"x": rng.normal(size=(n, 3)).astype(np.float32), "y": np.ones(n, np.float32) * n / 9} for n in sizes]
    return FederatedData.from_clients(trees, mesh)


def take(mapping: Any, small: bool = False, mesh: Any = None, saved: Any = None) -> dict[str, Any]:
    """Two rounds and, of the state that is saved then or of another one, two more: all that can be told of them."""
    federation, params, stats = everything(mapping, small)
    data = everyone(mesh)
    state = federation.init(params, data, seed=1, stats=stats)
    state, history = federation.fit(state, data, 2, participants=4, drop_rate=0.3)
    mine = json.loads(json.dumps(federation.encode(state), allow_nan=False))
    state = federation.decode(mine if saved is None else saved, federation.init(params, data, stats=stats))
    state, more = federation.fit(state, data, 2, participants=4, drop_rate=0.3)
    found = {f"first/{name}": value for name, value in history.items()}
    found |= {f"more/{name}": value for name, value in more.items()}
    found["evaluated"] = federation.evaluate(state, data)["loss"]
    found["adapted"] = federation.evaluate(state, data, steps=2)["loss"]
    models = [federation.model(state, client) for client in range(7)]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(models))
    found |= {
        f"models-{i}": leaf for i, leaf in enumerate(jax.tree.leaves((arrays, jax.device_get(state.aggregation))))
    }
    return {"saved": mine, "found": {name: np.asarray(value) for name, value in found.items()}}


def alike(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=2e-5, err_msg=name)


@functools.cache
def alone(small: bool = False) -> Any:
    return take("scan", small)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [3])
def test_all_places_together_give_the_same_however_participants_are_run(mapping: Any) -> None:
    assert 0 < alone()["found"]["first/joined"].mean() < 1
    assert len({tuple(row) for row in alone()["found"]["models-1"].reshape(7, -1).tolist()}) == 7
    alike(take(mapping)["found"], alone()["found"])


@pytest.mark.slow
def test_all_places_together_are_the_same_over_packed_parameters() -> None:
    packed = alone(True)
    fo.set_small_leaf(0)
    try:
        plain = take("scan", True)
    finally:
        fo.set_small_leaf(None)
    assert {name: rows["shape"] for name, rows in packed["saved"]["bank"].items()} == {
        name: rows["shape"] for name, rows in plain["saved"]["bank"].items()
    }
    assert packed["saved"]["aggregation"].keys() == plain["saved"]["aggregation"].keys()
    # The centre of the aggregation is packed here and not there.
    models = lambda each: {k: v for k, v in each["found"].items() if not k.startswith("models")}  # noqa: E731
    alike(models(packed), models(plain))


def on_a_mesh(folder: str) -> None:
    """Run in a process of four devices: from its own state, and from one that one device has saved."""
    mesh = clients_mesh()
    assert mesh.size == 4
    saved = json.loads((Path(folder) / "alone.json").read_text())
    for name, given in (("own", None), ("given", saved)):
        made = take(mesh, mesh=mesh, saved=given)
        np.savez(Path(folder) / f"{name}.npz", **made["found"])
        (Path(folder) / f"{name}.json").write_text(json.dumps(made["saved"]))


@pytest.mark.slow
def test_four_devices_give_the_same_and_take_each_others_states(tmp_path: Path) -> None:
    (tmp_path / "alone.json").write_text(json.dumps(alone()["saved"]))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    code = f"from federated.test_uplink import on_a_mesh; on_a_mesh({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("own", "given"):
        with np.load(tmp_path / f"{name}.npz") as found:
            alike(dict(found), alone()["found"])
    back = take("scan", saved=json.loads((tmp_path / "own.json").read_text()))
    alike(back["found"], alone()["found"])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"uplink": ["momentum"]}, "uplink"),
        ({"aggregation": "median"}, "aggregation"),
        ({"local": ["b"]}, "local"),
        ({"steps": 3}, "steps"),
        ({"coin": 0.5}, "coin"),
    ],
)
def test_a_state_of_another_federation_is_refused_by_the_field(options: Any, field: str) -> None:
    data = FederatedData.from_clients(clients())
    params = start() | {"b": jnp.zeros(())}
    mine, other = (Federation(squares, fo.Optimizer(LRATE), **each) for each in ({}, options))
    states = mine.init(params, data), other.init(params, data)
    for (to, like), (of, state) in (((mine, states[0]), (other, states[1])), ((other, states[1]), (mine, states[0]))):
        with pytest.raises(ValueError, match=f"is of another federation: {field} was"):
            to.decode(of.encode(state), like)
        if field not in ("steps", "coin"):  # which nothing in a state depends on
            with pytest.raises(ValueError, match=f"the state is of another federation: {field} was"):
                to.round(state, data, np.arange(2))
