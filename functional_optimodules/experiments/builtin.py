"""The built-in problems: a perceptron that learns scikit-learn's digits, or what an archive holds."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from functional_optimodules.experiments.config import DataConfig, ModelConfig
from functional_optimodules.experiments.data import Examples, load
from functional_optimodules.experiments.model import Layers, accuracy, init_params, perceptron, perceptron_loss
from functional_optimodules.experiments.problem import Problem


def make(*, seed: int, folder: Path, hidden: Sequence[int] = (), **data: Any) -> Problem:
    """Return a perceptron with its data.

    Args:
      seed: where the split and the initial parameters come from.
      folder: what the archive's path is relative to.
      hidden: widths of the hidden layers.
      **data: the fields of `DataConfig`.

    Raises:
      As `load` does, and for fields that are unknown or out of range.
    """
    model = ModelConfig.from_config({"hidden": list(hidden)})
    dealt = load(DataConfig.from_config(data), seed, folder)
    params = init_params(model, dealt.test.x.shape[1], dealt.classes, seed)
    return Problem(params, perceptron_loss, dealt.clients, dealt.test, evaluate)


def evaluate(params: Layers, test: Examples) -> dict[str, jax.Array]:
    """Return the share of the test examples that a perceptron gets right."""
    return {"accuracy": accuracy(perceptron(params, test.x), test.y)}


digits = functools.partial(make, source="digits")
npz = functools.partial(make, source="npz")
