"""A worker of the record of CIFAR-10: pfl-research on PyTorch, in its own environment."""

import logging

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.records.cifar import BATCH, RATE, load
from benchmarks.worker import serve, timed


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(14 * 14 * 64, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def loss(self, images, labels):
        return torch.nn.functional.cross_entropy(self.layers(images), labels)

    @torch.no_grad()
    def metrics(self, images, labels):
        return {"loss": Weighted(self.loss(images, labels).item() * len(labels), len(labels))}


class Rounds:
    def make(self, path, clients, participants):
        images, labels = load(path, clients)
        images = torch.from_numpy(images.transpose(0, 1, 4, 2, 3).astype(np.float32) / 255).contiguous()
        labels = torch.from_numpy(labels.astype(np.int64))
        users = FederatedDataset(
            lambda user: Dataset((images[user], labels[user])), get_user_sampler("random", range(clients))
        )
        self.participants, self.backend = participants, SimulatedBackend(users, users)
        network = Network()
        self.model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
        return sum(parameter.numel() for parameter in network.parameters())

    def round(self):
        """Return the wall-clock and the CPU seconds of a round, with nothing evaluated."""
        settings = NNAlgorithmParams(
            central_num_iterations=2,
            evaluation_frequency=10**9,
            train_cohort_size=self.participants,
            val_cohort_size=None,
        )
        train = NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE)
        # It evaluates in the first iteration, whatever is asked for: the second is timed.
        algorithm = FederatedAveraging()
        contexts, self.model, _ = algorithm.get_next_central_contexts(self.model, 1, settings, train)

        def work():
            total, metrics = self.backend.gather_results(
                self.model, training_algorithm=algorithm, central_context=contexts[0]
            )
            self.model, _ = algorithm.process_aggregated_statistics(contexts[0], metrics, self.model, total)

        return timed(work)[:2]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # With two threads, which wait for each other by spinning, a busy machine takes five times as long.
    torch.set_num_threads(1)
    serve(Rounds())
