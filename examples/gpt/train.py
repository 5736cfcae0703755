"""Training: one compiled step, a loop around it, and checkpoints from which the loop goes on bit by bit."""

from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx

from functional_optimodules import Optimizer

from . import text
from .model import GPT

BATCH_SIZE = 8
EVERY = 50  # batches, from one look at held-out text and one checkpoint to the next
History = list[dict[str, float]]


def loss_fn(model: GPT, batch: jax.Array) -> jax.Array:
    """Return the mean cross entropy of each next byte, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:]).mean()


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, batch: jax.Array) -> dict[str, jax.Array]:
    """Train on a batch, in place, and return its loss with what the optimizer tells of its last step."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, gradients)
    return {"loss": loss, **optimizer.tx.metrics(optimizer.opt_state)}


@nnx.jit
def eval_step(model: GPT, optimizer: nnx.Optimizer, batch: jax.Array) -> dict[str, jax.Array]:
    """Return the loss with the parameters as they are, and with those that the optimizer has for this."""
    averaged = nnx.clone(model)
    nnx.update(averaged, optimizer.tx.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    return {"held_out": loss_fn(model, batch), "held_out_averaged": loss_fn(averaged, batch)}


def train(model: GPT, tx: Optimizer, steps: int, folder: Path) -> History:
    """Train a new model in place, from the last checkpoint on if there is one.

    Args:
      model: the model.
      tx: the optimizer.
      steps: how many batches there are in all.
      folder: where checkpoints are.

    Returns:
      What was measured in each step from the first on.

    Raises:
      ValueError: if the checkpoints are of another optimizer.
    """
    train_text, held_out_text = text.read()
    held_out = text.batch(held_out_text, model.context, 8 * BATCH_SIZE, step=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as checkpoints:
        history = resume(checkpoints, model, optimizer)
        for step in range(len(history), steps):
            told = train_step(model, optimizer, text.batch(train_text, model.context, BATCH_SIZE, step))
            pause = (step + 1) % EVERY == 0 or step + 1 == steps
            if pause:
                told |= eval_step(model, optimizer, held_out)
            history.append({name: float(value) for name, value in told.items()})
            if pause:
                print(f"{step + 1:6}", *(f"{name} {value:.3g}" for name, value in history[-1].items()), sep="  ")
                save(checkpoints, model, optimizer, history)
    return history


def save(checkpoints: ocp.CheckpointManager, model: GPT, optimizer: nnx.Optimizer, history: History) -> None:
    """Save all that the rest of the run depends on; Orbax writes it while training goes on."""
    run = ocp.args.JsonSave({"optimizer": optimizer.tx.get_config(), "history": history})
    state = ocp.args.StandardSave(nnx.state((model, optimizer)))
    checkpoints.save(len(history), args=ocp.args.Composite(run=run, state=state))


def resume(checkpoints: ocp.CheckpointManager, model: GPT, optimizer: nnx.Optimizer) -> History:
    """Put the last checkpoint into a model and its optimizer, and return the history up to it."""
    if checkpoints.latest_step() is None:
        return []
    run = checkpoints.restore(None, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    if run["optimizer"] != optimizer.tx.get_config():
        raise ValueError(f"{checkpoints.directory} has checkpoints of another optimizer: choose a new folder")
    state = ocp.args.StandardRestore(nnx.state((model, optimizer)))
    nnx.update((model, optimizer), checkpoints.restore(None, args=ocp.args.Composite(state=state)).state)
    return run["history"]
