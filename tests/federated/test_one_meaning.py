"""The same experiment gives the same numbers, wherever and however it is run."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData
from functional_optimodules.federated.batches import shuffle

from . import problem

pytestmark = pytest.mark.slow

GRADIENT = jax.jit(jax.grad(lambda params, batch: jnp.mean(problem.loss(params, batch))))


def close(left: Any, right: Any) -> None:
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=1e-5, err_msg=name)


@functools.cache
def data() -> FederatedData:
    return FederatedData.from_clients(problem.clients())


@functools.cache
def one_by_one() -> Any:
    return problem.run(problem.federation(mapping="scan"), data())


def wire(message: Any) -> Any:
    return json.loads(json.dumps(message, allow_nan=False))


def local_batches(client: int, round_key: jax.Array) -> Any:
    """The client's batches in a round, as an engine that runs it alone would make them."""
    examples = problem.clients()[client]
    size = len(examples["y"])
    key = jax.random.fold_in(round_key, client)
    for epoch in range(problem.EPOCHS):
        order = np.asarray(shuffle(jax.random.fold_in(jax.random.fold_in(key, epoch), 0), jnp.int32(size), size))
        for start in range(0, size, problem.BATCH):
            yield {name: values[order[start : start + problem.BATCH]] for name, values in examples.items()}


def test_stateful_optimizers_that_exchange_json_reach_the_same_parameters() -> None:
    final, history = one_by_one()
    client, server = problem.optimizers()
    server = fo.Optimizer.from_config(wire(server.get_config()))
    clients = [fo.Optimizer.from_config(wire(client.get_config())) for _ in range(problem.NUM_CLIENTS)]
    params = problem.params()
    server.setup(params)
    for number, participants in enumerate(np.asarray(history["participants"])):
        server.start_round()
        message = wire(server.collect_aux_var())
        uploads, deltas, examples = {}, [], []
        for index in participants.tolist():
            local, weights = clients[index], params
            local.start_round()
            local.process_aux_var(message)
            for batch in local_batches(index, jax.random.fold_in(jax.random.key(3), number)):
                weights = local.apply_gradients(weights, GRADIENT(weights, batch))
            uploads[str(index)] = wire(local.collect_aux_var()["scaffold"])
            deltas.append(jax.tree.map(lambda new, old: np.asarray(old - new), weights, params))
            examples.append(problem.SIZES[index])
        server.process_aux_var({"scaffold": uploads})
        mean = jax.tree.map(lambda *each, n=examples: jnp.asarray(np.average(each, axis=0, weights=n)), *deltas)
        params = server.apply_gradients(params, mean)
    close(params, final.params)


@pytest.mark.parametrize("mapping", ["vmap", 2])
def test_participants_together_or_in_chunks_give_the_same_parameters_and_metrics(mapping: Any) -> None:
    state, history = problem.run(problem.federation(mapping=mapping), data())
    close(state.params, one_by_one()[0].params)
    close(history, one_by_one()[1])


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_mesh_of_one_device_gives_the_same_parameters_whatever_its_axes(kind: Any) -> None:
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(kind,), devices=jax.devices()[:1])
    state, history = problem.run(
        problem.federation(mapping=mesh), FederatedData.from_clients(problem.clients(), mesh), rounds=2
    )
    expected = one_by_one()[1]
    close(history, {name: value[:2] for name, value in expected.items()})
    assert state.round == 2


@pytest.fixture(scope="module")
def two_processes(peers: Any) -> Path:
    """Where two processes of two devices left what they found."""
    peers.finish("experiment", count=2, devices=2)
    return peers.folder


def test_two_processes_of_two_devices_give_the_same_parameters_and_metrics(two_processes: Path) -> None:
    final, history = one_by_one()
    with np.load(two_processes / "out.npz") as found:
        close({**final.params, **history}, found)
        each = problem.federation().evaluate(final.params, data())["loss"]
        np.testing.assert_allclose(found["each"], each, atol=1e-5)


def test_each_process_saves_its_own_clients_rows_and_together_they_are_all(two_processes: Path) -> None:
    final, _ = one_by_one()
    whole = problem.federation().encode(final)
    parts = [json.loads((two_processes / f"state-{i}.json").read_text()) for i in range(2)]
    assert [len(part["clients"]) for part in parts] == [4, 3]
    assert sorted(parts[0]["clients"] + parts[1]["clients"]) == whole["clients"] == list(range(problem.NUM_CLIENTS))
    assert parts[0]["values"] == parts[1]["values"]
