"""Rounds of a model with many small parameters are those of the same model unpacked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.federated import FederatedData, Federation, clients_mesh

pytestmark = pytest.mark.slow

LAYERS = 10
PARAMS = {f"{index:02d}": {"b": jnp.zeros(3), "w": jnp.eye(3) * 0.9} for index in range(LAYERS)}
PARAMS["head"] = {"w": jnp.ones((3, 2)) / 3}


def loss(params, batch):
    x, target = batch
    for index in range(LAYERS):
        layer = params[f"{index:02d}"]
        x = jnp.tanh(x @ layer["w"] + layer["b"]) + x
    return jnp.sum((x @ params["head"]["w"] - target) ** 2, axis=-1)


def make(mapping):
    client = fo.Optimizer(0.01, regularizers=["fedprox"], modules=["scaffold-client", "l2-clipping", "momentum"])
    # A large eps: what rounding makes of a gradient near zero, Adam would blow up to a whole step.
    server = fo.Optimizer(0.05, modules=[("scaffold-server", {"num_clients": 5}), ("adam", {"eps": 0.1})])
    return Federation(loss, client, server, batch_size=4, epochs=2, mapping=mapping)


def clients():
    rng = np.random.default_rng(0)
    sizes = (9, 4, 12, 5, 7)
    return [tuple(rng.normal(size=(size, width)).astype(np.float32) for width in (3, 2)) for size in sizes]


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.fixture(scope="module")
def plain():
    """The same rounds with nothing packed."""
    fo.set_small_leaf(0)
    try:
        federation, data = make("scan"), FederatedData.from_clients(clients())
        state, history = federation.fit(federation.init(PARAMS, data), data, 4, participants=3)
    finally:
        fo.set_small_leaf(None)
    assert state.packing is None
    return federation, state, history


def test_clients_are_packed_as_is_best_on_the_devices_that_they_run_on(monkeypatch):
    wide = {f"{index}": {"b": np.zeros(64), "w": np.eye(64)} for index in range(5)}
    placed = jax.device_put(wide, jax.devices()[0])
    fo.set_small_leaf(4 * 64, "tpu")
    try:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        found = [
            len(make(mapping).init(params, 5).packing.large)
            for mapping, params in (("scan", wide), ("scan", placed), (clients_mesh(jax.devices()[:1]), wide))
        ]
    finally:
        fo.set_small_leaf(None, "tpu")
    # Matrices are left alone where nothing says that it is a CPU which they are on.
    assert found == [5, 0, 0]


@pytest.mark.parametrize("mapping", ["scan", "vmap", 2])
def test_rounds_of_packed_clients_are_those_of_plain_ones(plain, mapping):
    federation, data = make(mapping), FederatedData.from_clients(clients())
    state = federation.init(PARAMS, data)
    assert len(state.bank) < len(plain[1].bank) / 5
    state, history = federation.fit(state, data, 4, participants=3)
    close(state.params, plain[1].params)
    close(state.server, plain[1].server)
    close(history, plain[2])
    evaluated = federation.evaluate(fo.pack(state.params), data)
    close(evaluated, federation.evaluate(state.params, data))


def test_a_packed_federation_is_saved_as_a_plain_one_and_either_goes_on_from_it(plain):
    federation, data = make("scan"), FederatedData.from_clients(clients())
    state, _ = federation.fit(federation.init(PARAMS, data), data, 4, participants=3)
    saved, other = (json.loads(json.dumps(federation.encode(each))) for each in (state, plain[1]))
    names = lambda payload: {name: rows["shape"] for name, rows in payload["bank"].items()}  # noqa: E731
    assert names(saved) == names(other)
    assert names(saved)["modules/scaffold-client/local/00/b"] == [5, 3]
    expected = federation.fit(state, data, 2, participants=3)[0].params
    fresh = federation.init(PARAMS, data)
    for payload in (saved, other):
        restored = federation.decode(payload, fresh)
        assert federation.encode(restored) == payload
        close(federation.fit(restored, data, 2, participants=3)[0].params, expected)
    restored = federation.decode(saved, plain[1])
    assert restored.packing is None
    close(federation.fit(restored, data, 2, participants=3)[0].params, expected)


def test_packed_parameters_begin_a_federation_as_their_tree_does():
    federation, data = make("scan"), FederatedData.from_clients(clients())
    states = [federation.init(params, data) for params in (PARAMS, fo.pack(PARAMS))]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_packed_rounds_over_a_mesh_are_those_of_one_device():
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    federation, data = make(mesh), FederatedData.from_clients(clients(), mesh)
    state = federation.init(PARAMS, data)
    chosen = jnp.array([1, 3])
    packed, _ = jax.jit(federation.round)(state, data, chosen)
    plain = make("scan")
    data = FederatedData.from_clients(clients())
    close(packed.params, jax.jit(plain.round)(plain.init(PARAMS, data), data, chosen)[0].params)
