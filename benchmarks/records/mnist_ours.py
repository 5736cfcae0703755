"""FLUTE's MNIST by this library, in a process of its own; a second argument is where compiled programs are kept."""

import sys

import numpy as np

from benchmarks.records.mnist import BATCH, CLASSES, INPUTS, PARTICIPANTS, RATE, ROUNDS, Parts, load

parts = Parts()
parts.end("Python and NumPy")
train, test, split = load(sys.argv[1])
parts.end("reading the data")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

parts.end("import of JAX")

from functional_optimodules import Optimizer  # noqa: E402
from functional_optimodules.federated import FederatedData, Federation  # noqa: E402

parts.end("import of ours")

if len(sys.argv) > 2:
    jax.config.update("jax_compilation_cache_dir", sys.argv[2])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def logits(params, images):
    return images @ params["w"] + params["b"]


def losses(params, batch):
    log_probabilities = jax.nn.log_softmax(logits(params, batch["x"].astype(jnp.float32) / 255))
    return -jnp.sum(log_probabilities * jax.nn.one_hot(batch["y"], CLASSES), axis=-1)


def run(state, data, images, labels):
    # What a function closes over is a constant of the program: 10,000 images would be compiled with it.
    def evaluate(params):
        return {"accuracy": jnp.mean(jnp.argmax(logits(params, images), -1) == labels)}

    return federation.run(state, data, ROUNDS, participants=PARTICIPANTS, evaluate=evaluate)


federation = Federation(losses, Optimizer(RATE), batch_size=BATCH, weighting="examples")
data = FederatedData.from_indices(dict(zip("xy", train, strict=True)), split)
given = data, *jax.device_put((test[0].astype(np.float32) / 255, test[1]))
start = {"w": np.zeros((INPUTS, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
state = jax.block_until_ready(federation.init(start, data))
parts.end("clients and state")
traced = jax.jit(run).trace(state, *given)
parts.end("trace")
lowered = traced.lower()
parts.end("lower")
compiled = lowered.compile()
parts.end("compile")
_, history = jax.block_until_ready(compiled(state, *given))
federation.check(history)
parts.end("100 rounds")
jax.block_until_ready(compiled(state, *given))
parts.end("100 more")
parts.tell(history["accuracy"])
