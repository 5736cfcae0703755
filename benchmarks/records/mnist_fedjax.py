"""FLUTE's MNIST by FedJAX, in a process of its own."""

import sys

from benchmarks.records.mnist import BATCH, CLASSES, INPUTS, PARTICIPANTS, RATE, ROUNDS, Parts, load

parts = Parts()
train, test, split = load(sys.argv[1])
parts.end("Python and the data")

import fedjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

parts.end("import")


def logits(params, images):
    return images @ params["w"] + params["b"]


def loss(params, batch, key):
    log_probabilities = jax.nn.log_softmax(logits(params, batch["x"].astype(jnp.float32) / 255))
    return -jnp.mean(jnp.sum(log_probabilities * jax.nn.one_hot(batch["y"], CLASSES), axis=-1))


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(jnp.argmax(logits(params, images), -1) == labels)


algorithm = fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(RATE),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1),
)
clients = [fedjax.ClientDataset({"x": train[0][rows], "y": train[1][rows]}) for rows in split]
images, labels = jnp.asarray(test[0].astype(np.float32) / 255), jnp.asarray(test[1])
rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)


def run():
    state = algorithm.init({"w": jnp.zeros((INPUTS, CLASSES)), "b": jnp.zeros(CLASSES)})
    found = []
    for number in range(ROUNDS):
        chosen = rng.choice(len(clients), PARTICIPANTS, replace=False)
        keys = jax.random.split(jax.random.fold_in(key, number), PARTICIPANTS)
        state, _ = algorithm.apply(state, [(str(i), clients[i], k) for i, k in zip(chosen, keys)])  # noqa: B905
        found.append(accuracy(state.params, images, labels))
    return [float(each) for each in found]


found = run()
parts.end("100 rounds")
run()
parts.end("100 more")
parts.tell(found)
