"""The demo, shortened: that it writes its files and that its checks can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from functional_optimodules import Optimizer
from functional_optimodules.demo import digits, run_demo, training
from functional_optimodules.demo.federated import Client, Server, new_weights


@pytest.fixture(scope="module")
def images():
    return digits.load()


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, steps=20, rounds=2)


def test_short_demo_keeps_the_promise_of_resuming_and_no_accuracy(short_demo):
    _, promises = short_demo
    assert [promise.kept for promise in promises] == [False, False, True, False, False]
    assert "bit-identical" in promises[2].what


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


def test_every_image_is_on_one_side_and_with_one_client(images):
    train, test = images
    assert len(train.labels) + len(test.labels) == 1797
    shares = digits.two_digits_each(train)
    assert sum(len(share.labels) for share in shares.values()) == len(train.labels)
    assert all(set(share.labels) == {i, (i + 1) % 10} for i, share in enumerate(shares.values()))
    seen = sorted(share.pixels[i].tobytes() for share in shares.values() for i in range(len(share.labels)))
    assert seen == sorted(pixels.tobytes() for pixels in train.pixels)


def test_batches_of_an_epoch_differ_cover_it_and_depend_on_the_step_alone(images):
    few = images[0].take(slice(0, 12))
    epoch = [few.batch(step, 4) for step in range(3, 6)]
    pixels = np.concatenate([batch.pixels for batch in epoch])
    assert sorted(row.tobytes() for row in pixels) == sorted(row.tobytes() for row in few.pixels)
    assert np.array_equal(few.batch(4, 4).pixels, epoch[1].pixels)
    assert not np.array_equal(few.batch(1, 4).pixels, epoch[1].pixels)


def test_server_of_scaffold_learns_from_messages_that_are_text(images):
    config = training.read_config("federated.toml")["SCAFFOLD"]
    weights = new_weights()
    server = Server(json.dumps(config["server"]), weights)
    share = digits.two_digits_each(images[0])["client-3"]
    client = Client(json.dumps(config["client"]), share, seed=1)
    before = json.loads(server.message())
    reply = client.train(weights, server.message())
    assert all(isinstance(message, str) for message in (server.message(), reply[1]))
    server.aggregate({"client-3": reply})
    assert json.loads(server.message()) != before
    # With a learning rate of 1, the server takes the mean of the clients' weights.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server.weights, reply[0])
