"""A small federation of peers, for tests."""

import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from functional_optimodules.federated import Client, Federation, Server

NAMES = ["a", "b", "c"]
RNG = np.random.default_rng(0)
DATA = {
    name: {"x": RNG.normal(size=(12, 3)).astype(np.float32), "y": RNG.normal(size=(12, 2)).astype(np.float32)}
    for name in NAMES
}


def params():
    return {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}


def loss(params, batch):
    return ((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2).sum(-1)


def scaffold(**options):
    client = fo.Optimizer(0.05, modules=["scaffold-client"])
    server = fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": 3})])
    return Federation(loss, client, server, **{"batch_size": 4} | options)


def feddyn(**options):
    client = fo.Optimizer(0.05, modules=[("feddyn-client", {"alpha": 0.5})])
    server = fo.Optimizer(1.0, modules=[("feddyn-server", {"num_clients": 3})])
    return Federation(loss, client, server, **{"batch_size": 4} | options)


def peers(federation, **options):
    """Return a server and its clients by name."""
    server = Server(federation, params(), NAMES, **options)
    return server, {name: Client(federation, name, DATA[name]) for name in NAMES}


def run_round(server, clients, names=None):
    """Run a round in which nothing goes wrong."""
    found = None
    while found is None:
        for name, message in server.broadcast(names).items():
            clients[name].begin(message)
            server.receive(name, clients[name].report())
        found = server.finish_round()
    return found


def arrays(tree):
    return [np.asarray(leaf) for leaf in (tree.values() if isinstance(tree, dict) else tree)]
