"""Ten clients and a server that exchange weights and text, and never an image.

A round: some clients take the server's weights and message, train on their own
images, and answer with their weights and a message. The server takes the mean
way back from the clients' weights to its own for a gradient, and steps along it.
What makes this FedAvg, FedProx or SCAFFOLD is the configuration alone.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from functional_optimodules import Optimizer
from functional_optimodules.demo.digits import Images
from functional_optimodules.demo.training import accuracy, cross_entropy

PARTICIPANTS = 5
LOCAL_EPOCHS = 5
BATCH_SIZE = 20
HIDDEN = 32


def new_weights(seed: int = 0) -> dict[str, jax.Array]:
    """Return the weights of a perceptron with one hidden layer, as a plain dictionary."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(keys[0], (64, HIDDEN)) * np.sqrt(2 / 64),
        "hidden bias": jnp.zeros(HIDDEN),
        "output": jax.random.normal(keys[1], (HIDDEN, 10)) * np.sqrt(1 / HIDDEN),
        "output bias": jnp.zeros(10),
    }


def logits(weights: Any, pixels: Any) -> jax.Array:
    """Apply the perceptron."""
    hidden = jax.nn.relu(pixels @ weights["hidden"] + weights["hidden bias"])
    return hidden @ weights["output"] + weights["output bias"]


compiled_logits = jax.jit(logits)
compiled_gradients = jax.jit(
    jax.grad(lambda weights, batch: cross_entropy(logits(weights, batch.pixels), batch.labels))
)


class Client:
    """A participant. Its images and its optimizer's state stay here.

    Args:
      config: the optimizer's configuration, as JSON text from the server.
      images: its own.
      seed: what its batches are shuffled by.
    """

    def __init__(self, config: str, images: Images, seed: int) -> None:
        self.optimizer = Optimizer.from_config(json.loads(config))
        self.images = images
        self.seed = seed
        self.steps = 0

    def train(self, weights: Any, message: str) -> tuple[Any, str]:
        """Return the weights after a round of local steps, and a message for the server."""
        self.optimizer.start_round()
        self.optimizer.process_aux_var(json.loads(message))
        for _ in range(LOCAL_EPOCHS * (len(self.images.labels) // BATCH_SIZE)):
            batch = self.images.batch(self.steps, BATCH_SIZE, self.seed)
            weights = self.optimizer.apply_gradients(weights, compiled_gradients(weights, batch))
            self.steps += 1
        return weights, json.dumps(self.optimizer.collect_aux_var())


class Server:
    """What holds the weights, and never sees an image."""

    def __init__(self, config: str, weights: Any) -> None:
        self.optimizer = Optimizer.from_config(json.loads(config))
        self.optimizer.setup(weights)
        self.weights = weights

    def message(self) -> str:
        """Return what every client of the round is sent, beside the weights."""
        return json.dumps(self.optimizer.collect_aux_var())

    def aggregate(self, replies: Mapping[str, tuple[Any, str]]) -> None:
        """Take the clients' weights and messages."""
        received: dict[str, dict[str, Any]] = {}
        for client, (_, message) in replies.items():
            for aux_name, aux in json.loads(message).items():
                received.setdefault(aux_name, {})[client] = aux
        self.optimizer.process_aux_var(received)
        clients_weights = [weights for weights, _ in replies.values()]
        way_back = jax.tree.map(lambda x, *ys: x - sum(ys) / len(ys), self.weights, *clients_weights)
        self.weights = self.optimizer.apply_gradients(self.weights, way_back)


class Curve(NamedTuple):
    """What came out of one algorithm.

    Attributes:
      accuracies: after each round, on the test images.
      message_bytes: length of a client's message to the server's optimizer; 0 if it has nothing to say.
    """

    accuracies: list[float]
    message_bytes: int


def run_federated(
    algorithm: str, config: Mapping[str, Any], shares: Mapping[str, Images], test: Images, rounds: int
) -> Curve:
    """Train for some rounds, in each of which a random half of the clients takes part.

    Args:
      algorithm: its name, for the progress bar.
      config: the configurations of the `client`'s and the `server`'s optimizer.
      shares: the images of each client.
      test: the images to test on.
      rounds: how many.
    """
    server = Server(json.dumps(config["server"]), new_weights())
    clients = {
        name: Client(json.dumps(config["client"]), images, seed)
        for seed, (name, images) in enumerate(shares.items(), start=1)
    }
    accuracies, replies = [], {}
    lottery = np.random.default_rng(0)
    for _ in tqdm(range(rounds), desc=algorithm, unit=" rounds"):
        chosen = lottery.choice(list(clients), PARTICIPANTS, replace=False)
        message = server.message()
        replies = {str(name): clients[name].train(server.weights, message) for name in chosen}
        server.aggregate(replies)
        accuracies.append(accuracy(compiled_logits(server.weights, test.pixels), test.labels))
    longest = max((message for _, message in replies.values()), key=len)
    return Curve(accuracies, len(longest) if json.loads(longest) else 0)
