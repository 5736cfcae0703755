"""What the tests run over Flower: SCAFFOLD with FedProx and a server's Adam, of which clients can be made to hang."""

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flwr.serverapp import ServerApp

import functional_optimodules as fo
from functional_optimodules.federated import Client, Federation, Server
from functional_optimodules.integrations.flower import ProtocolStrategy, client_app

NAMES = ["0", "1", "2"]
RNG = np.random.default_rng(0)
DATA = {
    name: {"x": RNG.normal(size=(size, 3)).astype(np.float32), "y": RNG.normal(size=(size, 2)).astype(np.float32)}
    for name, size in zip(NAMES, (12, 8, 10), strict=True)
}
FAULTY_ROUND_SECONDS = 25


def loss(params, batch):
    return ((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2).sum(-1)


def params():
    return {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}


FEDERATION = Federation(
    loss,
    client=fo.Optimizer(0.05, regularizers=[("fedprox", {"alpha": 0.1})], modules=["scaffold-client"]),
    server=fo.Optimizer(0.1, modules=[("scaffold-server", {"num_clients": 3}), "fedadam"]),
    batch_size=4,
    weighting="examples",
)


def make(context):
    name = str(context.node_config["partition-id"])
    return Client(FEDERATION, name, DATA[name])


def folder(context):
    return f"client-{context.node_config['partition-id']}"


def work(client, context):
    hang = Path(f"hang-{client.name}")
    if hang.exists():
        hang.rename(f"hangs-{client.name}")
        time.sleep(600)
    return client.report()


client = client_app(make, folder, work)
server_app = ServerApp()


@server_app.main()
def main(grid, context):
    try:
        run(grid, context.run_config)
    finally:
        Path("ended").touch()


def run(grid, config):
    server = Server(FEDERATION, params(), NAMES, seed=1)
    strategy = ProtocolStrategy(server, folder="server", min_available_nodes=3)
    if config["faults"]:
        before = set(grid.get_node_ids())
        strategy.start(grid, num_rounds=server.round + 1, timeout=FAULTY_ROUND_SECONDS)
        while len(set(grid.get_node_ids()) - before) < 2:
            time.sleep(0.2)
    strategy.start(grid, num_rounds=config["num-rounds"], timeout=300)
    with open("joined.json", "a") as file:
        file.writelines(json.dumps(history["joined"].tolist()) + "\n" for history in strategy.history)
