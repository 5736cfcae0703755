"""The model of an experiment: a perceptron, its loss and its accuracy."""

import itertools

import jax
import jax.numpy as jnp

from functional_optimodules.experiments.config import ModelConfig
from functional_optimodules.experiments.data import Array, Examples

Layers = list[dict[str, jax.Array]]


def init_params(config: ModelConfig, features: int, classes: int, seed: int) -> Layers:
    """Return a perceptron's layers: He-normal kernels and biases of 0; zeros without a hidden layer."""
    widths = [features, *config.hidden, classes]
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = []
    for key, (inputs, outputs) in zip(keys, itertools.pairwise(widths), strict=True):
        scale = jnp.sqrt(2 / inputs) if config.hidden else 0
        layers.append({"kernel": scale * jax.random.normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)})
    return layers


def perceptron(params: Layers, x: Array) -> jax.Array:
    """Return float32[n, classes], the logits, for float32[n, features]."""
    *hidden, last = params
    features = jnp.asarray(x)
    for layer in hidden:
        features = jax.nn.relu(features @ layer["kernel"] + layer["bias"])
    return features @ last["kernel"] + last["bias"]


def perceptron_loss(params: Layers, batch: Examples) -> jax.Array:
    """Return the perceptron's loss on each example."""
    return cross_entropy(perceptron(params, batch.x), batch.y)


def cross_entropy(logits: jax.Array, labels: Array) -> jax.Array:
    """Return the loss of each example: float32[n], for float32[n, classes] and int32[n]."""
    outputs = jax.nn.log_softmax(logits)
    return -jnp.sum(outputs * jax.nn.one_hot(labels, outputs.shape[-1]), axis=-1)


def accuracy(logits: jax.Array, labels: Array) -> jax.Array:
    """Return the share of examples whose label has the largest logit."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)
