"""What is learned, by whom and how: the server and its clients build it alike."""

import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import functional_optimodules as fo
from functional_optimodules.federated import Federation, partition


def digits():
    """Return the images and labels to train on, and those to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    examples = {"x": (images[order] / 16).astype(np.float32), "y": labels[order].astype(np.int32)}
    return [{name: array[part] for name, array in examples.items()} for part in (slice(300, None), slice(300))]


def share(client, num_clients):
    """Return the examples of one of some clients."""
    train, _ = digits()
    mine = partition.dirichlet(train["y"], num_clients, alpha=0.3)[client]
    return {name: array[mine] for name, array in train.items()}


def params():
    """Return the parameters from which all begin."""
    return {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def loss(params, batch):
    """Return the cross entropy of each example, and whether it is recognized."""
    logits = batch["x"] @ params["w"] + params["b"]
    right = (logits.argmax(-1) == batch["y"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]), {"accuracy": right}


def federation(num_clients):
    """Return SCAFFOLD with FedProx at the clients and Adam at the server."""
    return Federation(
        loss,
        client=fo.Optimizer(0.3, regularizers=[("fedprox", {"alpha": 0.01})], modules=["scaffold-client"]),
        server=fo.Optimizer(0.1, modules=[("scaffold-server", {"num_clients": num_clients}), "fedadam"]),
        batch_size=16,
    )
