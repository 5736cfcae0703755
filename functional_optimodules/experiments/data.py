"""The data of an experiment: the digits of scikit-learn or an archive, dealt out to clients."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from functional_optimodules.experiments.config import DataConfig
from functional_optimodules.experiments.extras import missing
from functional_optimodules.federated import partition

Array = np.ndarray[Any, np.dtype[Any]] | jax.Array


class Examples(NamedTuple):
    """Images and labels.

    Attributes:
      x: float32[n, features].
      y: int32[n], from 0.
    """

    x: Array
    y: Array

    def take(self, rows: Any) -> "Examples":
        """Return the examples of these rows."""
        return Examples(self.x[rows], self.y[rows])

    def batch(self, step: int, size: int, seed: int = 0) -> "Examples":
        """Return the batch of a step: each epoch is shuffled anew, by its number, and drops what fills no batch.

        It depends on the step alone, so that a run may be resumed at any.
        """
        epoch, position = divmod(step, len(self.y) // size)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.y))
        return self.take(order[position * size : (position + 1) * size])


class Dealt(NamedTuple):
    """Examples, dealt out to clients.

    Attributes:
      clients: the training examples of each client.
      test: the examples that accuracy is measured on.
      classes: the number of labels.
    """

    clients: list[Examples]
    test: Examples
    classes: int


def load(config: DataConfig, seed: int, folder: Path) -> Dealt:
    """Read the data and deal it out to clients.

    Args:
      config: the table `[data]`.
      seed: where the split comes from.
      folder: what the archive's path is relative to.

    Raises:
      FileNotFoundError: if the archive is not there.
      KeyError: if it lacks an array.
      ModuleNotFoundError: if the digits are asked for, and scikit-learn is not there.
      ValueError: if an array of the archive is malformed, or a client would be
        left without examples.
    """
    train, test, ids = (*digits(seed), None) if config.source == "digits" else _archive(config, folder)
    clients = [train.take(rows) for rows in _split(config, train.y, ids, seed)]
    return Dealt(clients, test, int(max(train.y.max(), test.y.max())) + 1)


def digits(seed: int = 0) -> tuple[Examples, Examples]:
    """Return the 1,797 images of handwritten digits that ship with scikit-learn, to train on and to test on.

    Args:
      seed: decides which fifth is to test on.

    Raises:
      ModuleNotFoundError: if scikit-learn is not there.
    """
    if lacking := missing("sklearn"):
        raise ModuleNotFoundError(f"the digits need {lacking}")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    examples = Examples((images[order] / 16).astype(np.float32), labels[order].astype(np.int32))
    held_out = len(labels) // 5
    return examples.take(slice(held_out, None)), examples.take(slice(held_out))


def _archive(config: DataConfig, folder: Path) -> tuple[Examples, Examples, Array | None]:
    path = folder / str(config.path)
    if not path.exists():
        raise FileNotFoundError(f"[data]: there is no file {path}")
    names = ["x_train", "y_train", "x_test", "y_test", *([config.by] if config.by else [])]
    try:
        with path.open("rb") as file, np.load(file) as archive:
            for name in names:
                if name not in archive:
                    raise KeyError(f"[data]: {path.name} has no array {name!r}: there is {archive.files}")
            arrays = {name: archive[name] for name in names}
    except (EOFError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        # What is cut short or altered sends the reader to places that are not there, or to features that it has not.
        raise ValueError(f"[data]: {path.name} is no archive of plain arrays, as `np.savez` writes: {error}") from None

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            array = arrays[name]
            raise ValueError(
                f"[data]: the array {name!r} of {path.name} is {array.dtype}{list(array.shape)}: expected {expected}"
            )

    def examples(part: str) -> Examples:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        require(f"x_{part}", x.dtype.kind in "buif" and x.ndim > 0 and x.size > 0, "numbers, one row an example")
        whole = y.dtype.kind in "bui" or (y.dtype.kind == "f" and bool((y == np.floor(y)).all()))
        require(
            f"y_{part}",
            whole and y.shape == x.shape[:1] and bool((y >= 0).all()),
            f"labels, {len(x)} integers from 0; `np.unique(labels, return_inverse=True)[1]` numbers any others",
        )
        scale = np.iinfo(x.dtype).max if np.issubdtype(x.dtype, np.integer) else 1
        return Examples((x.reshape(len(x), -1) / scale).astype(np.float32), y.astype(np.int32))

    train, test = examples("train"), examples("test")
    features = train.x.shape[1]
    require("x_test", test.x.shape[1] == features, f"{features} numbers an example, as 'x_train' has")
    if config.by is None:
        return train, test, None
    require(config.by, arrays[config.by].shape == train.y.shape, f"the clients of {len(train.y)} training examples")
    return train, test, arrays[config.by]


def _split(config: DataConfig, labels: Array, ids: Array | None, seed: int) -> list[partition.Indices]:
    if config.split == "iid":
        return partition.iid(len(labels), config.num_clients, seed=seed)
    if config.split == "dirichlet":
        return partition.dirichlet(labels, config.num_clients, alpha=config.alpha, seed=seed)
    if config.split == "sorted":
        return partition.sorted_shards(labels, config.num_clients, similarity=config.similarity, seed=seed)
    if config.split == "id" and ids is not None:
        return partition.by_id(ids)
    return _few_labels(labels, config.num_clients, config.labels)


def _few_labels(labels: Array, num_clients: int, each: int) -> list[partition.Indices]:
    """Give client i the labels i, i + 1, ..., and of each label an even share among the clients who have it."""
    values = np.unique(labels)
    if each > len(values):
        raise ValueError(f"[data]: labels={each} for each client, of {len(values)} that there are")
    parts: list[list[partition.Indices]] = [[] for _ in range(num_clients)]
    for place, value in enumerate(values):
        holders = [client for client in range(num_clients) if (place - client) % len(values) < each]
        if not holders:
            raise ValueError(f"[data]: split='labels' leaves no client the label {value}: take more clients, or labels")
        for client, rows in zip(holders, np.array_split(np.flatnonzero(labels == value), len(holders)), strict=True):
            parts[client].append(rows)
    return [np.concatenate(part) for part in parts]
