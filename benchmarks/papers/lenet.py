"""The small convolutional network of NIID-Bench, and of Flower's baseline of it, in plain JAX.

Two convolutions of 5 x 5 (6 and 16 channels), each with a ReLU and a 2 x 2 maximum, then 120, 84 and 10 units,
started as PyTorch starts them. The examples of a batch are the last axis inside, so that the slices that make a
convolution a product are long: on a CPU a step is 20 times faster than by XLA's own convolution.
"""

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
    "conv1": (1 * 25, 6),
    "conv2": (6 * 25, 16),
    "dense1": (16 * 16, 120),
    "dense2": (120, 84),
    "dense3": (84, 10),
}


def make_params(rng):
    """Draw weights and biases, uniform within 1 / sqrt(inputs)."""
    params = {}
    for name, (inputs, outputs) in SHAPES.items():
        bound = inputs**-0.5
        params[f"{name}.w"] = rng.uniform(-bound, bound, (inputs, outputs)).astype(np.float32)
        params[f"{name}.b"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    return params


def convolve(x, weights, bias):
    """Convolve channels x height x width x examples by 5 x 5, and take the maximum of squares of 2 x 2."""
    channels, height, _, examples = x.shape
    size = height - 4
    patches = jnp.stack([x[:, i : i + size, j : j + size] for i in range(5) for j in range(5)])
    out = weights.T @ patches.reshape(25 * channels, -1) + bias[:, None]
    # What follows is monotone: the maximum may go first.
    pooled = out.reshape(-1, size // 2, 2, size // 2, 2, examples).max((2, 4))
    return jax.nn.relu(pooled)


def logits(params, images):
    """Return examples x 10, of images of examples x 28 x 28, uint8."""
    layer = lambda x, name: x @ params[f"{name}.w"] + params[f"{name}.b"]  # noqa: E731
    x = images.transpose(1, 2, 0)[None].astype(jnp.float32) / 255
    for name in ("conv1", "conv2"):
        x = convolve(x, params[f"{name}.w"], params[f"{name}.b"])
    x = x.reshape(-1, images.shape[0]).T
    return layer(jax.nn.relu(layer(jax.nn.relu(layer(x, "dense1")), "dense2")), "dense3")


def losses(params, batch):
    """Return the cross-entropy of each example."""
    log_probabilities = jax.nn.log_softmax(logits(params, batch["x"]))
    return -jnp.sum(log_probabilities * jax.nn.one_hot(batch["y"], 10), axis=-1)


def accuracy(params, images, labels):
    """Return the share of images that are told right, of pieces x examples."""
    right = jax.lax.map(lambda piece: jnp.argmax(logits(params, piece[0]), -1) == piece[1], (images, labels))
    return jnp.mean(right)
