"""A server and clients who exchange weights and text, and never an image.

A round: some clients take the server's weights and message, train on their own
images, and answer with their weights and a message. The server takes the mean
way back from the clients' weights to its own for a gradient, and steps along it.
What makes this FedAvg, FedProx or SCAFFOLD is the configuration alone.
"""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import jax
import numpy as np

from functional_optimodules import Optimizer
from functional_optimodules.experiments.data import Examples
from functional_optimodules.experiments.model import Layers, perceptron_loss
from functional_optimodules.experiments.simulation import Simulation

LOCAL_STEPS = 10


def stack(parts: Iterable[Examples]) -> Examples:
    """Stack examples along a new leading axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


compiled_gradients = jax.jit(jax.grad(lambda weights, batch: perceptron_loss(weights, batch).mean()))


class Client:
    """A participant. Its images and its optimizer's state stay here.

    Args:
      config: the optimizer's configuration, as JSON text from the server.
      images: its own.
      batch_size: of its local steps; all of its images if `None`.
      seed: what its batches are shuffled by.
    """

    def __init__(self, config: str, images: Examples, batch_size: int | None, seed: int) -> None:
        self.optimizer = Optimizer.from_config(json.loads(config))
        self.images = images
        self.batch_size = batch_size or len(images.y)
        self.seed = seed
        self.steps = 0

    def upcoming(self) -> Examples:
        """Return the batches of the next round that it takes part in, steps x examples."""
        steps = range(self.steps, self.steps + LOCAL_STEPS)
        return stack(self.images.batch(step, self.batch_size, self.seed) for step in steps)

    def train(self, weights: Layers, message: str) -> tuple[Layers, str]:
        """Return the weights after a round of local steps, and a message for the server."""
        self.optimizer.start_round()
        self.optimizer.process_aux_var(json.loads(message))
        batches = self.upcoming()
        for step in range(LOCAL_STEPS):
            batch = batches.take(step)
            weights = self.optimizer.apply_gradients(weights, compiled_gradients(weights, batch))
        self.steps += LOCAL_STEPS
        return weights, json.dumps(self.optimizer.collect_aux_var())


class Server:
    """What holds the weights, and never sees an image."""

    def __init__(self, config: str, weights: Layers) -> None:
        self.optimizer = Optimizer.from_config(json.loads(config))
        self.optimizer.setup(weights)
        self.weights = weights

    def message(self) -> str:
        """Return what every client of the round is sent, beside the weights."""
        return json.dumps(self.optimizer.collect_aux_var())

    def aggregate(self, replies: Mapping[str, tuple[Layers, str]]) -> None:
        """Take the clients' weights and messages."""
        self.optimizer.process_aux_var({client: json.loads(message) for client, (_, message) in replies.items()})
        ends = [weights for weights, _ in replies.values()]
        way_back = jax.tree.map(lambda x, *ys: x - sum(ys) / len(ys), self.weights, *ends)
        self.weights = self.optimizer.apply_gradients(self.weights, way_back)


class Exchange(NamedTuple):
    """What came out of rounds between peers.

    Attributes:
      message_bytes: length of a client's message to the server's optimizer; 0 if it has nothing to say.
      distance: the largest difference between a weight here and in the simulation of the same rounds.
    """

    message_bytes: int
    distance: float


def exchange(simulation: Simulation, rounds: int = 3) -> Exchange:
    """Run some rounds of an experiment between peers, and the same, of the same batches, simulated.

    A client always takes `LOCAL_STEPS` steps here, and drops what fills no batch.
    """
    experiment, state = simulation.experiment, simulation.init()
    server = Server(json.dumps(experiment.server.get_config()), state.params)
    config, batch_size = json.dumps(experiment.client.get_config()), experiment.rounds.batch_size
    clients = [
        Client(config, images, batch_size, seed)
        for seed, images in enumerate(cast(list[Examples], simulation.problem.data))
    ]
    simulate = jax.jit(simulation.federation.round)
    lottery, longest = np.random.default_rng(experiment.seed), "{}"
    for _ in range(rounds):
        chosen = lottery.choice(len(clients), experiment.rounds.participants, replace=False)
        state, _ = simulate(state, stack(clients[number].upcoming() for number in chosen), chosen)
        message = server.message()
        replies = {f"client-{number}": clients[number].train(server.weights, message) for number in chosen}
        server.aggregate(replies)
        longest = max((message for _, message in replies.values()), key=len)
    apart = jax.tree.map(lambda a, b: abs(a - b).max(), server.weights, state.params)
    return Exchange(len(longest) if json.loads(longest) else 0, float(max(jax.tree.leaves(apart))))
