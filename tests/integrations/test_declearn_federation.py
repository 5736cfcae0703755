"""A declearn server and its clients over websockets, with bricks in the place of declearn's own modules."""

import socket
import threading

import numpy as np
import pytest

pytest.importorskip("declearn", reason="the reference has no release for this Python", exc_type=ImportError)
pytest.importorskip("websockets")

from declearn.dataset import InMemoryDataset
from declearn.main import FederatedClient, FederatedServer
from declearn.main.config import FLOptimConfig, FLRunConfig
from declearn.model.sklearn import SklearnSGDModel

from functional_optimodules.integrations.declearn.plugins import ModuleAdapter

CLIENTS, ROUNDS = 3, 3


def dataset(client):
    """Return examples of which each client has another number, and another truth."""
    rng = np.random.default_rng(client)
    x = rng.normal(size=(24 + 8 * client, 3))
    return InMemoryDataset(x, x @ np.array([1.0, -2.0, 0.5]) * (1 + client) + rng.normal(size=len(x)), seed=client)


def federate(prefix):
    """Run a federation with SCAFFOLD, and return the model's weights and the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    network = {"protocol": "websockets", "host": "127.0.0.1", "port": port, "heartbeat": 0.05}
    model = SklearnSGDModel.from_parameters("regressor", penalty="none")
    optim = FLOptimConfig.from_params(
        client_opt={"lrate": 0.02, "regularizers": [f"{prefix}fedprox"], "modules": [f"{prefix}scaffold-client"]},
        server_opt={"lrate": 1.0, "modules": [f"{prefix}scaffold-server", (f"{prefix}momentum", {"beta": 0.5})]},
    )
    server = FederatedServer(model, network, optim)

    def participate(client):
        network = {"protocol": "websockets", "server_uri": f"ws://127.0.0.1:{port}", "name": f"client-{client}"}
        FederatedClient(network, dataset(client), verbose=False).run()

    clients = [threading.Thread(target=participate, args=(client,), daemon=True) for client in range(CLIENTS)]
    for client in clients:
        client.start()
    server.run(FLRunConfig.from_params(rounds=ROUNDS, register=CLIENTS, training={"batch_size": 8, "n_epoch": 1}))
    for client in clients:
        client.join(timeout=30)
    assert not any(client.is_alive() for client in clients)
    return model.get_weights().coefs, server


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Argument 'logger':DeprecationWarning")  # declearn's own, of itself
def test_three_clients_over_websockets_get_the_weights_of_declearns_own_scaffold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected, _ = federate("")
    weights, server = federate("fo-")
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(values).max() > 0.05
        np.testing.assert_allclose(weights[name], values, rtol=0, atol=1e-6)
    variate, _ = server.optim.modules
    assert isinstance(variate, ModuleAdapter)
    assert len(variate.get_state()["clients"]) == CLIENTS
    assert any(np.abs(array).max() > 0 for array in variate.collect_aux_var().variate.coefs.values())
