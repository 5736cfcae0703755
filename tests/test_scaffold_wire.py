"""SCAFFOLD between peers that exchange nothing but JSON, against algorithm 1 of the paper in NumPy float64."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import functional_optimodules as fo
from functional_optimodules.wire.paths import leaf_paths

LRATE, SERVER_LRATE = 0.1, 0.8
SIZE = 6
CLIENTS = ("ann", "bob", "cat", "dan")
# Who takes part in each round, with how many local steps: any subset, unequal steps, and dan joins late.
SCHEDULE: list[dict[str, int]] = [
    {"ann": 3, "bob": 1},
    {"ann": 2, "cat": 5},
    {"bob": 4},
    {"ann": 1, "bob": 2, "cat": 3, "dan": 6},
    {"dan": 2, "cat": 1},
    {"ann": 4, "bob": 4, "dan": 1},
    {"ann": 2, "bob": 3, "cat": 4, "dan": 5},
]


class Affine(NamedTuple):
    kernel: Any
    bias: Any


def as_dict(vector: Any) -> Any:
    return {"layer": {"kernel": jnp.asarray(vector[:4]).reshape(2, 2), "bias": jnp.asarray(vector[4:])}}


def as_named_tuple(vector: Any) -> Any:
    return {"layer": Affine(**as_dict(vector)["layer"])}


def as_nnx_state(vector: Any) -> Any:
    return nnx.State({"layer": {name: nnx.Param(leaf) for name, leaf in as_dict(vector)["layer"].items()}})


def as_vector(tree: Any) -> np.ndarray:
    leaves = dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))
    return np.concatenate([np.ravel(leaves["layer/kernel"]), np.ravel(leaves["layer/bias"])])


def problem(client: str) -> tuple[np.ndarray, np.ndarray]:
    """The client's quadratic loss, of gradient `hessian @ y - target`."""
    rng = np.random.default_rng(CLIENTS.index(client))
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    return basis @ np.diag(rng.uniform(0.3, 2.0, SIZE)) @ basis.T, rng.normal(size=SIZE)


def gradient(client: str, y: np.ndarray) -> np.ndarray:
    hessian, target = problem(client)
    return hessian @ y - target


START = np.linspace(-1, 1, SIZE)


def algorithm_1(schedule: list[dict[str, int]], num_clients: int | None, lost: Any = ()) -> dict[str, np.ndarray]:
    """Karimireddy et al. 2020, algorithm 1, option II; without N, over the clients heard of."""
    x, c = START.copy(), np.zeros(SIZE)
    c_i = {client: np.zeros(SIZE) for client in CLIENTS}
    heard: set[str] = set()
    for number, participants in enumerate(schedule):
        arrived = [client for client in participants if (number, client) not in lost]
        delta_x, delta_c = np.zeros(SIZE), np.zeros(SIZE)
        for client in arrived:
            y, steps = x.copy(), participants[client]
            for _ in range(steps):
                y -= LRATE * (gradient(client, y) - c_i[client] + c)
            new = c_i[client] - c + (x - y) / (steps * LRATE)
            delta_x += (y - x) / len(arrived)
            delta_c += new - c_i[client]
            c_i[client] = new
        previously = len(heard)
        heard |= set(arrived)
        x = x + SERVER_LRATE * delta_x
        c = (c * previously + delta_c) / len(heard) if num_clients is None else c + delta_c / num_clients
    return {"x": x, "c": c, **c_i}


def wire(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


class Whole:
    """Both sides are `Optimizer`s."""

    @staticmethod
    def client() -> fo.Optimizer:
        return fo.Optimizer.from_config(wire(fo.Optimizer(LRATE, modules=["scaffold-client"]).get_config()))

    @staticmethod
    def server(num_clients: int | None) -> fo.Optimizer:
        optimizer = fo.Optimizer(SERVER_LRATE, modules=[("scaffold-server", {"num_clients": num_clients})])
        return fo.Optimizer.from_config(wire(optimizer.get_config()))

    @staticmethod
    def step(brick: Any, params: Any, gradients: Any, lrate: float) -> Any:
        return brick.apply_gradients(params, gradients)

    @staticmethod
    def hand(server: Any, uploads: dict[str, Any]) -> None:
        names = {name for message in uploads.values() for name in message}
        server.process_aux_var({name: {who: message[name] for who, message in uploads.items()} for name in names})

    @staticmethod
    def local(client: Any) -> Any:
        return client.state.modules["scaffold-client"].local


class Bare:
    """Both sides are modules, and the rates are applied by hand."""

    @staticmethod
    def client() -> fo.ScaffoldClientModule:
        return fo.ScaffoldClientModule.from_config(wire(fo.ScaffoldClientModule().get_config()))

    @staticmethod
    def server(num_clients: int | None) -> fo.ScaffoldServerModule:
        return fo.ScaffoldServerModule.from_config(wire(fo.ScaffoldServerModule(num_clients).get_config()))

    @staticmethod
    def step(brick: Any, params: Any, gradients: Any, lrate: float) -> Any:
        return jax.tree.map(lambda p, g: p - lrate * g, params, brick.run(gradients))

    @staticmethod
    def hand(server: Any, uploads: dict[str, Any]) -> None:
        server.process_aux_var(uploads)

    @staticmethod
    def local(client: Any) -> Any:
        return client.state.local


def restarted(make: Callable[[], Any], old: Any) -> Any:
    new = make()
    new.set_state(wire(old.get_state()))
    return new


def over_the_wire(
    kind: Any = Whole,
    num_clients: int | None = len(CLIENTS),
    containers: tuple[Any, ...] = (as_dict,),
    restart: str = "",
    lost: Any = (),
    schedule: list[dict[str, int]] = SCHEDULE,
) -> dict[str, np.ndarray]:
    """Run the rounds, each client in its own container; return the model and all variates."""
    server, clients = kind.server(num_clients), {}
    form = {client: containers[index % len(containers)] for index, client in enumerate(CLIENTS)}
    model = as_dict(START.astype(np.float32))
    for number, participants in enumerate(schedule):
        broadcast = json.dumps(server.collect_aux_var(), allow_nan=False)
        uploads, moves = {}, []
        for name, steps in participants.items():
            client = clients.setdefault(name, kind.client())
            client.on_round_start()
            if received := json.loads(broadcast):
                client.process_aux_var(received)
            params = form[name](as_vector(model))
            for step in range(steps):
                if restart == "client in mid-round" and step == steps // 2:
                    clients[name] = client = restarted(kind.client, client)
                gradients = form[name](gradient(name, as_vector(params).astype(np.float64)).astype(np.float32))
                params = kind.step(client, params, gradients, LRATE)
            upload = json.dumps(client.collect_aux_var(), allow_nan=False)
            if restart == "client before delivery":
                clients[name] = client = restarted(kind.client, client)
            if (number, name) in lost:
                client.retract_aux_var()
                continue
            uploads[name] = json.loads(upload)
            moves.append(as_vector(model) - as_vector(params))
        if uploads:
            kind.hand(server, uploads)
            model = kind.step(server, model, as_dict(np.mean(moves, axis=0)), SERVER_LRATE)
        if restart == "server":
            server = restarted(lambda: kind.server(num_clients), server)
    for client in clients.values():
        client.on_round_start()
    sent = server.collect_aux_var()
    probe = kind.client()
    probe.setup(model)
    probe.process_aux_var(sent)
    correction = probe.state.modules["scaffold-client"].correction if kind is Whole else probe.state.correction
    locals_ = {name: as_vector(kind.local(client)) for name, client in clients.items()}
    return {"x": as_vector(model), "c": -as_vector(correction), **locals_}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("kind", [Whole, Bare])
@pytest.mark.parametrize("num_clients", [len(CLIENTS), None])
def test_rounds_over_json_equal_algorithm_1_of_the_paper(kind: Any, num_clients: int | None) -> None:
    assert_equal(over_the_wire(kind, num_clients), algorithm_1(SCHEDULE, num_clients), atol=1e-6)


def test_the_schedule_is_long_enough_and_n_matters() -> None:
    with_n, without = algorithm_1(SCHEDULE[:5], len(CLIENTS)), algorithm_1(SCHEDULE[:5], None)
    plain = algorithm_1([dict.fromkeys(CLIENTS, 3)] * 5, len(CLIENTS))
    assert len(SCHEDULE) >= 5
    assert np.abs(with_n["x"] - without["x"]).max() > 1e-3
    assert np.abs(with_n["x"] - plain["x"]).max() > 1e-3


@pytest.mark.parametrize("kind", [Whole, Bare])
@pytest.mark.parametrize("restart", ["server", "client in mid-round", "client before delivery"])
def test_a_restart_from_json_changes_no_bit(kind: Any, restart: str) -> None:
    assert_equal(over_the_wire(kind, None, restart=restart), over_the_wire(kind, None), atol=0)


def test_server_and_clients_may_keep_the_model_in_different_containers() -> None:
    mixed = over_the_wire(containers=(as_named_tuple, as_nnx_state, as_dict))
    assert_equal(mixed, over_the_wire(), atol=0)


def test_a_restarted_client_may_come_back_with_another_container() -> None:
    client, other = Whole.client(), Whole.client()
    vector = np.arange(SIZE, dtype=np.float32)
    for _ in range(2):
        client.apply_gradients(as_dict(vector), as_dict(vector))
    other.set_state(wire(client.get_state()))
    after = client.apply_gradients(as_dict(vector), as_dict(vector))
    np.testing.assert_array_equal(
        as_vector(other.apply_gradients(as_nnx_state(vector), as_nnx_state(vector))), as_vector(after)
    )
    assert other.collect_aux_var() == client.collect_aux_var()


@pytest.mark.slow
@pytest.mark.parametrize("restart", ["", "client before delivery", "client in mid-round"])
@pytest.mark.parametrize("num_clients", [len(CLIENTS), None])
def test_lost_uploads_that_are_retracted_leave_the_servers_variate_the_mean_of_the_clients(
    num_clients: int | None, restart: str
) -> None:
    lost = {(0, "bob"), (1, "ann"), (3, "dan"), (5, "ann")}
    found = over_the_wire(num_clients=num_clients, lost=lost, restart=restart)
    np.testing.assert_allclose(found["c"], np.mean([found[client] for client in CLIENTS], axis=0), rtol=0, atol=1e-6)
    assert_equal(found, algorithm_1(SCHEDULE, num_clients, lost), atol=1e-6)


def test_a_round_whose_uploads_are_all_lost_changes_nothing_on_the_server() -> None:
    lost = {(2, "bob")}
    without = [participants for number, participants in enumerate(SCHEDULE) if number != 2]
    assert_equal(over_the_wire(lost=lost), over_the_wire(schedule=without), atol=0)


def test_local_variates_reach_the_gradients_at_the_common_optimum() -> None:
    hessian, target = (sum(part) for part in zip(*map(problem, CLIENTS), strict=True))
    optimum = np.linalg.solve(hessian, target)
    found = over_the_wire(schedule=[dict(zip(CLIENTS, (1, 2, 3, 4), strict=True))] * 60)
    np.testing.assert_allclose(found["x"], optimum, atol=1e-5)
    for client in CLIENTS:
        np.testing.assert_allclose(found[client], gradient(client, optimum), atol=1e-5)
