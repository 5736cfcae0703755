"""The data and the model of an experiment."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from functional_optimodules.experiments.config import DataConfig, ModelConfig
from functional_optimodules.federated import FederatedData, partition


class Examples(NamedTuple):
    """Images and labels.

    Attributes:
      x: float32[n, features].
      y: int32[n].
    """

    x: Any
    y: Any


class Problem(NamedTuple):
    """What there is to learn, and from what.

    Attributes:
      data: the clients' training examples.
      test: the examples that accuracy is measured on.
      classes: the number of labels.
    """

    data: FederatedData
    test: Examples
    classes: int


def load(config: DataConfig, seed: int, folder: Path, mesh: Mesh | None) -> Problem:
    """Read the data and deal it out to clients.

    Args:
      config: the table `[data]`.
      seed: where the split comes from.
      folder: what the archive's path is relative to.
      mesh: devices to spread the clients over.

    Raises:
      FileNotFoundError: if the archive is not there.
      KeyError: if it lacks an array.
      ValueError: if a client would be left without examples.
    """
    train, test, ids = _digits(seed) if config.source == "digits" else _archive(config, folder)
    groups = _split(config, train.y, ids, seed)
    data = FederatedData.from_clients([Examples(train.x[group], train.y[group]) for group in groups], mesh)
    return Problem(data, jax.tree.map(jnp.asarray, test), int(max(train.y.max(), test.y.max())) + 1)


def _digits(seed: int) -> tuple[Examples, Examples, None]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    held_out = len(y) // 5
    return Examples(x[held_out:], y[held_out:]), Examples(x[:held_out], y[:held_out]), None


def _archive(config: DataConfig, folder: Path) -> tuple[Examples, Examples, Any]:
    path = folder / str(config.path)
    if not path.exists():
        raise FileNotFoundError(f"[data]: there is no file {path}")
    with np.load(path) as archive:
        names = ["x_train", "y_train", "x_test", "y_test", *([config.by] if config.by else [])]
        for name in names:
            if name not in archive:
                raise KeyError(f"[data]: {path.name} has no array {name!r}: there is {archive.files}")
        arrays = {name: archive[name] for name in names}

    def examples(part: str) -> Examples:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        scale = np.iinfo(x.dtype).max if np.issubdtype(x.dtype, np.integer) else 1
        return Examples((x.reshape(len(x), -1) / scale).astype(np.float32), y.astype(np.int32))

    return examples("train"), examples("test"), arrays.get(str(config.by))


def _split(config: DataConfig, labels: Any, ids: Any, seed: int) -> Any:
    if config.split == "iid":
        return partition.iid(len(labels), config.num_clients, seed=seed)
    if config.split == "dirichlet":
        return partition.dirichlet(labels, config.num_clients, alpha=config.alpha, seed=seed)
    if config.split == "sorted":
        return partition.sorted_shards(labels, config.num_clients, similarity=config.similarity, seed=seed)
    return partition.by_id(ids)


def init_params(config: ModelConfig, features: int, classes: int, seed: int) -> list[dict[str, jax.Array]]:
    """Return a perceptron's layers: He-normal kernels and biases of 0; zeros without a hidden layer."""
    widths = [features, *config.hidden, classes]
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    layers = []
    for key, (inputs, outputs) in zip(keys, itertools.pairwise(widths), strict=True):
        scale = jnp.sqrt(2 / inputs) if config.hidden else 0
        layers.append({"kernel": scale * jax.random.normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)})
    return layers


def logits(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Return float32[n, classes] for float32[n, features]."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def cross_entropy(params: Any, batch: Examples) -> jax.Array:
    """Return the loss of each example."""
    outputs = jax.nn.log_softmax(logits(params, batch.x))
    return -jnp.sum(outputs * jax.nn.one_hot(batch.y, outputs.shape[-1]), axis=-1)


def accuracy(params: Any, examples: Examples) -> jax.Array:
    """Return the share of examples whose label has the largest logit."""
    return jnp.mean(jnp.argmax(logits(params, examples.x), axis=-1) == examples.y)
