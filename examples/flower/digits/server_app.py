"""What runs at the server."""

import jax
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp

from functional_optimodules.federated import Server
from functional_optimodules.integrations.flower import ProtocolStrategy

from . import task

app = ServerApp()


@app.main()
def main(grid, context):
    """Run the rounds that are still to be run."""
    config = context.run_config
    names = [str(number) for number in range(config["num-clients"])]
    server = Server(task.federation(len(names)), task.params(), names, seed=1)
    strategy = ProtocolStrategy(server, folder=config["folder"], min_available_nodes=len(names))
    strategy.start(grid, num_rounds=config["num-rounds"], timeout=config["timeout"], evaluate_fn=evaluate)


def evaluate(number, arrays):
    """Return how well images are recognized that nobody trained on."""
    _, test = task.digits()
    losses, metrics = jax.jit(task.loss)({name: array.numpy() for name, array in arrays.items()}, test)
    return MetricRecord({"loss": float(losses.mean()), "accuracy": float(metrics["accuracy"].mean())})
