"""What every side of the benchmark of rounds solves: the same data, models and losses.

Runs on NumPy and on any JAX since 0.4, because the peers have environments of their own.
"""

import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.worker import timed

EXAMPLES, INPUTS, HIDDEN, CLASSES = 100, 784, 64, 10
BATCH, RATE = 20, 0.1


def make_clients(count, dtype="float32"):
    rng = np.random.default_rng(0)
    if dtype == "uint8":
        images = rng.integers(0, 256, (count, EXAMPLES, INPUTS), np.uint8)
    else:
        images = rng.normal(size=(count, EXAMPLES, INPUTS)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (count, EXAMPLES)).astype(np.int32)
    return [{"x": x, "y": y} for x, y in zip(images, labels)]  # noqa: B905


def make_params(model):
    rng = np.random.default_rng(1)
    if model == "logistic":
        return {"w": np.zeros((INPUTS, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
    return {
        "w1": (0.03 * rng.normal(size=(INPUTS, HIDDEN))).astype(np.float32),
        "b1": np.zeros(HIDDEN, np.float32),
        "w": (0.1 * rng.normal(size=(HIDDEN, CLASSES))).astype(np.float32),
        "b": np.zeros(CLASSES, np.float32),
    }


def losses(params, batch):
    """Return one value per example."""
    hidden = batch["x"]
    if hidden.dtype == jnp.uint8:
        hidden = hidden.astype(jnp.float32) / 255
    if "w1" in params:
        hidden = jax.nn.relu(hidden @ params["w1"] + params["b1"])
    log_probabilities = jax.nn.log_softmax(hidden @ params["w"] + params["b"])
    return -jnp.sum(log_probabilities * jax.nn.one_hot(batch["y"], CLASSES), axis=-1)


class Rounds:
    """The rounds of one side.

    Args:
      make: a function of a case that returns a function of no argument, kept for the next
        time, which runs one round and waits for its result.
      package: what the side is made with.
    """

    def __init__(self, make, package):
        self.make, self.package, self.cases = make, package, {}

    def about(self):
        devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
        versions = ", ".join(f"{name} {version(name)}" for name in (self.package, "jax"))
        return f"Python {sys.version.split()[0]}, {versions}, {devices}"

    def round(self, *case):
        """Return the wall-clock and the CPU seconds of a round, and what it returns.

        A round is run before the timed one, so that no side pays for what another left in the caches.
        """
        if case not in self.cases:
            self.cases[case] = self.make(*case)
            self.cases[case]()
        self.cases[case]()
        return timed(self.cases[case])
