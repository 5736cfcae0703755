"""A small problem in a module of its own beside an experiment's file, as users write them."""

from collections.abc import Callable
from pathlib import Path

import pytest

MODULE = """
import jax.numpy as jnp
import numpy as np

from functional_optimodules.experiments import Problem


def loss(params, batch):
    apart = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return apart**2, {"error": jnp.abs(apart)}


def make(seed, width=3, clients=4, scale=1.0):
    rng = np.random.default_rng(seed)
    shares = [examples(rng, 4 + client, width, scale) for client in range(clients)]
    return Problem({"w": jnp.zeros(width), "b": jnp.zeros(())}, loss, shares, test=examples(rng, 5, width, scale))


def examples(rng, count, width, scale):
    x = rng.normal(size=(count, width), scale=scale).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) + 1}
"""

EXPERIMENT = """
seed = 3
[problem]
factory = "regression:make"
[client]
lrate = 0.05
modules = [["momentum", { beta = 0.5 }]]
[rounds]
count = 4
participants = 2
batch_size = 2
save_every = 2
"""


@pytest.fixture
def regression(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a file: with other values of some lines, and more tables at the end."""
    (tmp_path / "regression.py").write_text(MODULE)

    def write(*changes: tuple[str, str], more: str = "", name: str = "experiment.toml") -> Path:
        text = EXPERIMENT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text + more)
        return path

    return write
