"""What every side of the benchmark of rounds solves: the same data, models and losses.

Runs on NumPy and on any JAX since 0.4, because the peers have environments of their own.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

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


def answer(make):
    """Serve rounds over standard input and output until it is closed.

    A line asks for a case, which `make(*case)` turns into a function of no argument that
    runs one round and waits for its result, kept for the next time. A round is run before
    the timed one, so that no side pays for what another left in the caches.
    """
    replies, sys.stdout = sys.stdout, sys.stderr
    rounds = {}
    for line in sys.stdin:
        case = tuple(json.loads(line))
        if case == ("about",):
            devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
            reply = f"Python {sys.version.split()[0]}, JAX {jax.__version__}, {devices}"
        else:
            if case not in rounds:
                rounds[case] = make(*case)
                rounds[case]()
            rounds[case]()
            start, worked = time.perf_counter(), time.process_time()
            extra = rounds[case]()
            reply = [time.perf_counter() - start, time.process_time() - worked, extra]
        print(json.dumps(reply), file=replies, flush=True)
