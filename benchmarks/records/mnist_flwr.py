"""FLUTE's MNIST by Flower's simulation on Ray, in a process of its own. Its clients' steps are NumPy's.

A second argument is how many rounds, each of which takes seconds.
"""

import sys

from benchmarks.records.mnist import BATCH, CLASSES, INPUTS, PARTICIPANTS, RATE, Parts, load

DATA, ROUNDS = sys.argv[1], int(sys.argv[2])
held = {}


def learn(weights, bias, images, labels, rng):
    """Take an epoch of gradient descent."""
    images = images.astype(np.float32) / 255
    order = rng.permutation(len(labels))
    for start in range(0, len(order), BATCH):
        x, y = images[order[start : start + BATCH]], labels[order[start : start + BATCH]]
        scores = x @ weights + bias
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        scores[np.arange(len(y)), y] -= 1
        weights = weights - np.float32(RATE / len(y)) * (x.T @ scores)
        bias = bias - np.float32(RATE) * scores.mean(0)
    return weights, bias


def train_client(message, context):
    if not held:  # each of Ray's processes reads the data once
        held["data"] = load(DATA)
    (images, labels), _, split = held["data"]
    rows = split[context.node_config["partition-id"]]
    arrays = message.content["arrays"]
    rng = np.random.default_rng([context.node_config["partition-id"], message.content["config"]["server-round"]])
    weights, bias = learn(arrays["w"].numpy(), arrays["b"].numpy(), images[rows], labels[rows], rng)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights), "b": Array(bias)}),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
    )
    return Message(content=content, reply_to=message)


def serve(grid, context):
    images, labels = test[0].astype(np.float32) / 255, test[1]

    def evaluate(number, arrays):
        right = np.argmax(images @ arrays["w"].numpy() + arrays["b"].numpy(), 1) == labels
        found.append(float(right.mean()))
        times.append(time.time())
        return MetricRecord({"accuracy": found[-1]})

    start = {"w": Array(np.zeros((INPUTS, CLASSES), np.float32)), "b": Array(np.zeros(CLASSES, np.float32))}
    strategy = FedAvg(PARTICIPANTS / len(split), 0.0, PARTICIPANTS, 0, len(split))
    strategy.start(grid, ArrayRecord(start), ROUNDS, evaluate_fn=evaluate)


if __name__ == "__main__":
    parts = Parts()
    _, test, split = load(DATA)
    parts.end("Python and the data")

import logging  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

if __name__ == "__main__":
    parts.end("import")
    logging.disable(logging.CRITICAL)
    found, times = [], []
    server, client = ServerApp(), ClientApp()
    server.main()(serve)
    client.train()(train_client)
    run_simulation(server, client, len(split), backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    parts.end("the simulation")
    parts.taken["a round"] = float(np.median(np.diff(times)))
    parts.tell(found[1:])
