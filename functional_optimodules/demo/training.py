"""A small convolutional network in Flax, trained by an `Optimizer` that a file configures.

Twice: in nnx through the optimizer's facade, which keeps the state, saves it as
JSON and resumes from it; in linen with the same optimizer as the `tx` of a
`TrainState`, where it is a pair of pure functions.
"""

import json
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.training.train_state import TrainState
from tqdm import tqdm

from functional_optimodules import Optimizer
from functional_optimodules.experiments import Problem
from functional_optimodules.experiments.data import Examples, digits
from functional_optimodules.experiments.model import accuracy, cross_entropy
from functional_optimodules.federated import partition
from functional_optimodules.types import Json, PyTree

BATCH_SIZE = 64


def read_config() -> dict[str, Json]:
    """Read the optimizer's configuration, which ships with the demo."""
    return tomllib.loads(Path(__file__).with_name("optimizer.toml").read_text(encoding="utf-8"))


class NnxNetwork(nnx.Module):
    """A convolution, then a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        features = nnx.relu(self.convolution(pixels.reshape(-1, 8, 8, 1)))
        return self.linear(nnx.max_pool(features, (2, 2), (2, 2)).reshape(-1, 4 * 4 * 32))


def nnx_loss(model: NnxNetwork, batch: Examples) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of each example, and whether it is recognized."""
    logits = model(jnp.asarray(batch.x))
    right = (logits.argmax(-1) == batch.y).astype(jnp.float32)
    return cross_entropy(logits, batch.y), {"accuracy": right}


def federated(seed: int, num_clients: int = 10, alpha: float = 0.5) -> Problem:
    """Return the nnx network as the problem of an experiment, with labels that are skewed between clients.

    Args:
      seed: where the split and the initial parameters come from.
      num_clients: the number of clients.
      alpha: concentration of the Dirichlet distribution of labels.
    """
    train, test = digits(seed)
    shares = partition.dirichlet(train.y, num_clients, alpha=alpha, seed=seed)
    return Problem(NnxNetwork(nnx.Rngs(seed)), nnx_loss, [train.take(rows) for rows in shares], test)


@nnx.jit
def nnx_gradients(model: NnxNetwork, batch: Examples) -> PyTree:
    """Return the gradient of the loss with respect to the model's parameters."""
    return nnx.grad(lambda model: cross_entropy(model(batch.x), batch.y).mean())(model)


def train_nnx(model: NnxNetwork, optimizer: Optimizer, images: Examples, steps: range, what: str) -> None:
    """Train a model in place. The optimizer's compiled step keeps its own state."""
    for step in tqdm(steps, desc=what, unit=" steps"):
        gradients = nnx_gradients(model, images.batch(step, BATCH_SIZE))
        nnx.update(model, optimizer.apply_gradients(nnx.state(model, nnx.Param), gradients))


def save(folder: Path, model: NnxNetwork, optimizer: Optimizer) -> list[Path]:
    """Write the optimizer's configuration and state as JSON, the weights as NumPy arrays."""
    paths = [folder / name for name in ("optimizer-config.json", "optimizer-state.json", "weights.npz")]
    paths[0].write_text(json.dumps(optimizer.get_config(), indent=2), encoding="utf-8")
    paths[1].write_text(json.dumps(optimizer.get_state(), indent=2), encoding="utf-8")
    np.savez(paths[2], *jax.tree.leaves(nnx.state(model, nnx.Param)))
    return paths


def load(paths: list[Path]) -> tuple[NnxNetwork, Optimizer]:
    """Make a new model and a new optimizer from what `save` wrote."""
    optimizer = Optimizer.from_config(json.loads(paths[0].read_text(encoding="utf-8")))
    optimizer.set_state(json.loads(paths[1].read_text(encoding="utf-8")))
    model = NnxNetwork(nnx.Rngs(1))
    with np.load(paths[2]) as arrays:
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.state(model, nnx.Param)), list(arrays.values())))
    return model, optimizer


class NnxResult(NamedTuple):
    """What came out of the nnx runs.

    Attributes:
      accuracy: of the run that was never interrupted.
      files: what was saved in the middle of it.
      identical: whether the resumed run ended in the same bits, of weights and of optimizer.
    """

    accuracy: float
    files: list[Path]
    identical: bool


def run_nnx(train: Examples, test: Examples, steps: int, folder: Path) -> NnxResult:
    """Train, save half-way, train on; then resume from the files and compare the ends."""
    optimizer = Optimizer.from_config(read_config())
    model = NnxNetwork(nnx.Rngs(0))
    train_nnx(model, optimizer, train, range(steps // 2), "nnx, first half")
    files = save(folder, model, optimizer)
    train_nnx(model, optimizer, train, range(steps // 2, steps), "nnx, second half")

    resumed, resumed_optimizer = load(files)
    train_nnx(resumed, resumed_optimizer, train, range(steps // 2, steps), "nnx, resumed from files")
    identical = (
        same_bits(nnx.state(model), nnx.state(resumed)) and optimizer.get_state() == resumed_optimizer.get_state()
    )
    return NnxResult(float(accuracy(model(jnp.asarray(test.x)), test.y)), files, identical)


def same_bits(one: PyTree, other: PyTree) -> bool:
    """Whether two trees hold the same arrays, bit by bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


class LinenNetwork(linen.Module):
    """The same network in linen."""

    @linen.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        features = linen.relu(linen.Conv(32, (3, 3))(pixels.reshape(-1, 8, 8, 1)))
        return linen.Dense(10)(linen.max_pool(features, (2, 2), (2, 2)).reshape(-1, 4 * 4 * 32))


@jax.jit
def linen_step(state: TrainState, batch: Examples) -> TrainState:
    """Take a step: the gradient and the optimizer in one compiled program."""

    def loss(params: PyTree) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, batch.x), batch.y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def run_linen(train: Examples, test: Examples, steps: int) -> float:
    """Train with a `TrainState`, and return the accuracy."""
    network = LinenNetwork()
    params = network.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    optimizer = Optimizer.from_config(read_config())
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    for step in tqdm(range(steps), desc="linen", unit=" steps"):
        state = linen_step(state, train.batch(step, BATCH_SIZE))
    return float(accuracy(network.apply({"params": state.params}, test.x), test.y))  # type: ignore[arg-type]
