"""Train by both files, and by the same in raw optax: `python -m examples.gpt.compare` draws `curves.png`."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from functional_optimodules import Optimizer

from . import in_optax
from .model import GPT
from .plot import draw
from .train import History, train

HERE = Path(__file__).parent
RUNS = {"AdamW": ("adamw.json", in_optax.adamw), "Muon and AdamW": ("muon.json", in_optax.muon)}
BOUND = 1e-5


def compare(name: str, steps: int, folder: Path, **sizes: int) -> tuple[History, list[float], float]:
    """Return the history of a run, the losses of the same in optax, and the largest difference between them.

    Args:
      name: of `RUNS`.
      steps: how many batches.
      folder: where checkpoints of the former are.
      **sizes: those of the model.
    """
    file, make = RUNS[name]
    optimizer = Optimizer.from_config(json.loads((HERE / file).read_text()))
    history = train(GPT(nnx.Rngs(0), **sizes), optimizer, steps, folder)
    losses = in_optax.train(GPT(nnx.Rngs(0), **sizes), make(), steps)
    return history, losses, float(np.abs(np.subtract([row["loss"] for row in history], losses)).max())


def main() -> None:
    """Run both, say how far they are from optax, and draw."""
    parser = argparse.ArgumentParser(prog="python -m examples.gpt.compare", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("demo-output/gpt-compare"), help="where checkpoints are: %(default)s"
    )
    parser.add_argument("--picture", type=Path, default=HERE / "curves.png", help="where it is drawn: %(default)s")
    parser.add_argument("--steps", type=int, default=800, help="how many batches: %(default)s")
    arguments = parser.parse_args()
    found = {name: compare(name, arguments.steps, arguments.folder / RUNS[name][0]) for name in RUNS}
    for name, (_, _, difference) in found.items():
        print(f"{name}: over {arguments.steps} batches, the loss is nowhere further from optax's than {difference:.1e}")
    histories = {name: history for name, (history, _, _) in found.items()}
    draw(arguments.picture, histories, {name: losses for name, (_, losses, _) in found.items()}, BOUND)
    if not found["AdamW"][2] < BOUND:
        sys.exit(f"AdamW: expected less than {BOUND:g}")


if __name__ == "__main__":
    main()
