"""What runs on each node."""

from functional_optimodules.federated import Client
from functional_optimodules.integrations.flower import client_app

from . import task


def make(context):
    """Return the client of a node, with its examples."""
    number, total = context.node_config["partition-id"], context.run_config["num-clients"]
    return Client(task.federation(total), str(number), task.share(number, total))


def folder(context):
    """Return where it is kept between messages."""
    return f"digits-client-{context.node_config['partition-id']}"


app = client_app(make, folder)
