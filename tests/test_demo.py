"""The demo, shortened: that it writes its files and that its checks can fail."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from functional_optimodules import Optimizer
from functional_optimodules.config.fields import differences
from functional_optimodules.demo import ALGORITHMS, run_demo, training
from functional_optimodules.demo.peers import Client, Server, exchange
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.data import digits
from functional_optimodules.experiments.grouping import simulation_of

FOLDER = Path(training.__file__).parent


@pytest.fixture(scope="module")
def images():
    return digits()


@pytest.fixture(scope="module")
def scaffold():
    return simulation_of(Experiment.read(FOLDER / "scaffold.toml"), FOLDER)


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, steps=20, rounds=2)


@pytest.mark.slow
def test_short_demo_keeps_the_promise_of_resuming_and_no_accuracy(short_demo):
    _, promises = short_demo
    assert [promise.kept for promise in promises] == [False, False, True, False, False, True]
    assert "bit-identical" in promises[2].what
    assert "exchange text" in promises[5].what


@pytest.mark.slow
def test_short_demo_writes_a_picture_and_readable_files(short_demo):
    folder, _ = short_demo
    picture = (folder / "federated.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    config = json.loads((folder / "optimizer-config.json").read_text())
    assert [name for name, _ in config["modules"]] == ["l2-global-clipping", "adam"]
    state = json.loads((folder / "optimizer-state.json").read_text())
    assert Optimizer.from_config(config).state_name() == state["name"]
    with np.load(folder / "weights.npz") as weights:
        assert sorted(array.shape for array in weights.values()) == [(3, 3, 1, 32), (10,), (32,), (512, 10)]


@pytest.mark.slow
def test_a_resumed_run_without_the_optimizers_state_is_noticed(images, tmp_path, monkeypatch):
    def load_without_state(paths):
        model, optimizer = load(paths)
        optimizer.reset()
        return model, optimizer

    load = training.load
    monkeypatch.setattr(training, "load", load_without_state)
    assert not training.run_nnx(*images, 4, tmp_path).identical


def test_one_bit_of_difference_is_noticed():
    tree = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    assert training.same_bits(tree, jax.tree.map(jnp.copy, tree))
    assert not training.same_bits(tree, {**tree, "a": -jnp.zeros(3)})


def test_linen_twin_has_the_shapes_of_the_nnx_model():
    twin = training.LinenNetwork().init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    model = nnx.state(training.NnxNetwork(nnx.Rngs(0)), nnx.Param)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(twin)) == sorted(leaf.shape for leaf in jax.tree.leaves(model))


def test_every_image_is_on_one_side_and_with_one_client_who_has_two_digits(images, scaffold):
    train, test = images
    assert len(train.y) + len(test.y) == 1797
    clients = scaffold.problem.data
    assert [set(client.y) for client in clients] == [{i, (i + 1) % 10} for i in range(10)]
    seen = sorted(x.tobytes() for client in clients for x in client.x)
    assert seen == sorted(x.tobytes() for x in train.x)


def test_batches_of_an_epoch_differ_cover_it_and_depend_on_the_step_alone(images):
    few = images[0].take(slice(0, 12))
    epoch = [few.batch(step, 4) for step in range(3, 6)]
    pixels = np.concatenate([batch.x for batch in epoch])
    assert sorted(row.tobytes() for row in pixels) == sorted(row.tobytes() for row in few.x)
    assert np.array_equal(few.batch(4, 4).x, epoch[1].x)
    assert not np.array_equal(few.batch(1, 4).x, epoch[1].x)


def test_the_experiments_of_the_demo_differ_in_their_optimizers_only():
    fedavg, *others = (Experiment.read(FOLDER / file).get_config() for file in ALGORITHMS.values())
    for other in others:
        keys = {key for key, _, _ in differences(fedavg, other)}
        assert keys
        assert keys <= {"client.regularizers", "client.modules", "server.modules"}


@pytest.mark.slow
def test_server_of_scaffold_learns_from_messages_that_are_text(scaffold):
    experiment, weights = scaffold.experiment, scaffold.init().params
    server = Server(json.dumps(experiment.server.get_config()), weights)
    client = Client(json.dumps(experiment.client.get_config()), scaffold.problem.data[3], 20, seed=1)
    before = json.loads(server.message())
    reply = client.train(weights, server.message())
    assert all(isinstance(message, str) for message in (server.message(), reply[1]))
    server.aggregate({"client-3": reply})
    assert json.loads(server.message()) != before
    # With a learning rate of 1, the server takes the mean of the clients' weights.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server.weights, reply[0])


@pytest.mark.slow
def test_a_message_that_is_lost_takes_the_peers_away_from_the_simulation(scaffold, monkeypatch):
    monkeypatch.setattr(Server, "message", lambda self: "{}")
    assert exchange(scaffold, rounds=2).distance > 1e-3
