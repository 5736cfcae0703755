"""What every side of the record of MNIST solves: the data, its split, and the numbers of the task.

Needs nothing but NumPy, because the peers have environments of their own.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

CLIENTS, PARTICIPANTS, ROUNDS = 1000, 10, 100
BATCH, RATE = 10, 0.03
INPUTS, CLASSES = 784, 10


def split(labels, seed=0):
    """Return for each client the rows of its examples: of two digits, in numbers that are log-normal.

    That is how FedProx, whose split of MNIST FLUTE takes, deals it out: at least 10 examples a client, most of them
    few, and some hundreds.
    """
    rng = np.random.default_rng(seed)
    shares = rng.lognormal(0, 1, (CLIENTS, 2))
    parts = [[] for _ in range(CLIENTS)]
    for digit in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        # A client has two digits, one after the other.
        owners = [(client, k) for client in range(CLIENTS) for k in range(2) if (client + k) % CLASSES == digit]
        weights = np.array([shares[owner] for owner in owners])
        sizes = 5 + np.floor(weights / weights.sum() * (len(rows) - 5 * len(owners))).astype(int)
        for (client, _), piece in zip(owners, np.split(rows, np.cumsum(sizes))):  # noqa: B905
            parts[client].append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def load(path):
    """Return images and labels for training and testing: uint8[N, 784] and int32[N], and the split."""
    with np.load(path) as archive:
        train, test = ((archive[f"x_{part}"].reshape(-1, INPUTS), archive[f"y_{part}"]) for part in ("train", "test"))
    train, test = ((x, y.astype(np.int32)) for x, y in (train, test))
    return train, test, split(train[1])


class Parts:
    """The seconds that each part of a process took, from the process's own start."""

    def __init__(self):
        self.taken, self.last = {}, time.time() - _age()

    def end(self, name):
        """Say that a part ended."""
        now = time.time()
        self.taken[name], self.last = now - self.last, now

    def tell(self, accuracies):
        """Print how accurate the model was after each round, and the parts, as the last line of the output."""
        told = {"accuracy": float(np.asarray(accuracies)[-1]), "evaluations": len(accuracies), "parts": self.taken}
        print(json.dumps(told), flush=True)


def _age():
    """Return how many seconds ago this process began."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started
