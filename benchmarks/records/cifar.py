"""What every side of pfl-research's CIFAR-10 task solves: the data and the numbers of the task, and its model in JAX.

Two convolutions of 3 x 3 (32 and 64 channels, each with a ReLU), a maximum over 2 x 2, then 128 and 10 units: 1.63 M
parameters. JAX is only needed by who calls what uses it, because pfl has an environment of its own.
"""

import numpy as np

CLIENTS, PARTICIPANTS, EXAMPLES, BATCH, ROUNDS, RATE = 1000, 50, 50, 10, 1500, 0.1
SHAPES = {"conv1": (27, 32), "conv2": (288, 64), "dense1": (14 * 14 * 64, 128), "dense2": (128, 10)}
# Multiplications and additions for an example: a product forwards, and two backwards, but for the first's input.
PRODUCTS = {"conv1": (30 * 30, 2), "conv2": (28 * 28, 3), "dense1": (1, 3), "dense2": (1, 3)}
# Of the weights, in each step: read forwards, read backwards, and read and written as the gradient is added to them.
PASSES = 4


def limit():
    """Return what the whole task costs: floating-point operations, and bytes of weights moved."""
    each = sum(2 * np.prod(SHAPES[name]) * places * times for name, (places, times) in PRODUCTS.items())
    size = sum(np.prod(shape) + shape[1] for shape in SHAPES.values())
    steps = ROUNDS * PARTICIPANTS * EXAMPLES // BATCH
    return float(each * steps * BATCH), float(size * 4 * PASSES * steps)


def load(path, clients=CLIENTS):
    """Return images uint8[clients, 50, 32, 32, 3] and labels; drawn at random where there is no archive."""
    rng = np.random.default_rng(0)
    count = clients * EXAMPLES
    if path:
        with np.load(path) as archive:
            rows = rng.permutation(len(archive["y_train"]))[:count]
            images, labels = archive["x_train"][rows], archive["y_train"][rows].reshape(-1)
    else:
        images, labels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count)
    return images.reshape(-1, EXAMPLES, 32, 32, 3), labels.astype(np.int32).reshape(-1, EXAMPLES)


def make_params():
    """Draw weights and biases, uniform within 1 / sqrt(inputs)."""
    rng, params = np.random.default_rng(1), {}
    for name, (inputs, outputs) in SHAPES.items():
        bound = inputs**-0.5
        params[f"{name}.w"] = rng.uniform(-bound, bound, (inputs, outputs)).astype(np.float32)
        params[f"{name}.b"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    return params


def make_losses(form):
    """Return the loss of each example, with convolutions by XLA, `"lax"`, or as slices and one product, `"product"`."""
    import jax
    import jax.numpy as jnp

    def convolve(x, weights, bias):
        height, channels = x.shape[1] - 2, x.shape[3]
        if form == "lax":
            kernel = weights.reshape(3, 3, channels, -1)
            return (
                jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                + bias
            )
        slices = [x[:, i : i + height, j : j + height] for i in range(3) for j in range(3)]
        return jnp.concatenate(slices, axis=3) @ weights + bias

    def losses(params, batch):
        x = batch["x"].astype(jnp.float32) / 255
        for name in ("conv1", "conv2"):
            x = jax.nn.relu(convolve(x, params[f"{name}.w"], params[f"{name}.b"]))
        x = x.reshape(-1, 14, 2, 14, 2, 64).max((2, 4)).reshape(x.shape[0], -1)
        x = jax.nn.relu(x @ params["dense1.w"] + params["dense1.b"])
        log_probabilities = jax.nn.log_softmax(x @ params["dense2.w"] + params["dense2.b"])
        return -jnp.take_along_axis(log_probabilities, batch["y"][:, None], axis=1)[:, 0]

    return losses
