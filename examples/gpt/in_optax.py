"""The same two optimizers in raw optax, and the same loop around them."""

import jax
import optax
from flax import nnx

from . import text
from .model import GPT
from .train import BATCH_SIZE, loss_fn

schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=50, decay_steps=400, end_value=1e-4)


def adamw() -> optax.GradientTransformation:
    """Return what `adamw.json` describes."""
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    return optax.MultiSteps(chain, every_k_schedule=2).gradient_transformation()


def muon() -> optax.GradientTransformation:
    """Return what `muon.json` describes: `optax.contrib.muon` alone would add Nesterov's momentum to AdamW."""

    def labels(params: nnx.State) -> nnx.State:
        def label(path: tuple, _: jax.Array) -> str:
            name = jax.tree_util.keystr(path)
            return "matrices" if "blocks" in name and "kernel" in name else "rest"

        return jax.tree.map_with_path(label, params)

    rules = {
        "matrices": optax.contrib.muon(lambda step: 3 * schedule(step), consistent_rms=0.2, weight_decay=0.1),
        "rest": optax.adamw(schedule, b2=0.95, weight_decay=0.1),
    }
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, labels))
    return optax.MultiSteps(chain, every_k_schedule=2).gradient_transformation()


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    """Train on a batch, in place, and return its loss."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, gradients)
    return loss


def train(model: GPT, tx: optax.GradientTransformation, steps: int) -> list[float]:
    """Train a new model in place, and return the loss of each step."""
    train_text, _ = text.read()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batches = (text.batch(train_text, model.context, BATCH_SIZE, step) for step in range(steps))
    return [float(train_step(model, optimizer, batch)) for batch in batches]
