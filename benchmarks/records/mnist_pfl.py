"""FLUTE's MNIST by pfl-research on PyTorch, in a process of its own."""

import sys

from benchmarks.records.mnist import BATCH, CLASSES, INPUTS, PARTICIPANTS, RATE, ROUNDS, Parts, load

parts = Parts()
train, test, split = load(sys.argv[1])
parts.end("Python and the data")

import logging  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.central_evaluation import CentralEvaluationCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.sampling import get_user_sampler  # noqa: E402
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # noqa: E402
from pfl.metrics import Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402

logging.disable(logging.CRITICAL)
# Its steps are too small for more than one thread: with two they take longer.
torch.set_num_threads(1)
parts.end("import")


def tensors(images, labels):
    return torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


class Logistic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(INPUTS, CLASSES)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def loss(self, images, labels):
        return torch.nn.functional.cross_entropy(self.linear(images), labels)

    @torch.no_grad()
    def metrics(self, images, labels):
        right = (self.linear(images).argmax(1) == labels).sum().item()
        return {"accuracy": Weighted(right, len(labels))}


class Kept(CentralEvaluationCallback):
    """Evaluates after each iteration, and keeps what it finds."""

    def after_central_iteration(self, metrics, model, *, central_iteration):
        stop, found = super().after_central_iteration(metrics, model, central_iteration=central_iteration)
        # It leaves out the first iteration, and evaluates before it.
        self.found += [value for name, value in found.to_simple_dict().items() if "accuracy" in name.lower()]
        return stop, found


users = [tensors(train[0][rows], train[1][rows]) for rows in split]
data = FederatedDataset(lambda user: Dataset(users[user]), get_user_sampler("random", range(len(users))))
held_out = Dataset(tensors(*test))


def run():
    model = Logistic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    callback = Kept(held_out, NNEvalHyperParams(local_batch_size=None))
    callback.found = []
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=ROUNDS,
            evaluation_frequency=10**9,
            train_cohort_size=PARTICIPANTS,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data),
        PyTorchModel(model, torch.optim.SGD, optimizer),
        NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE),
        callbacks=[callback],
        send_metrics_to_platform=False,
    )
    return callback.found


found = run()
parts.end("100 rounds")
run()
parts.end("100 more")
parts.tell(found)
