"""The library at work on real images, from one command: `functional-optimodules demo`.

`training` trains in Flax, `federated` between clients; here is the story that
is told of both, and the promises that are checked.
"""

import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from functional_optimodules.demo import digits
from functional_optimodules.demo.federated import LOCAL_EPOCHS, PARTICIPANTS, Curve, run_federated
from functional_optimodules.demo.plot import draw
from functional_optimodules.demo.training import read_config, run_linen, run_nnx

FLAX_ACCURACY = 0.97
SCAFFOLD_ACCURACY = 0.96
SCAFFOLD_LEAD = 0.05
LAST_ROUNDS = 10


class Promise(NamedTuple):
    """Something that the demo promises.

    Attributes:
      what: the promise, with what was reached.
      kept: whether it was.
    """

    what: str
    kept: bool


def run_demo(output: Path, *, steps: int = 440, rounds: int = 40) -> list[Promise]:
    """Run the demo and tell about it.

    Args:
      output: the folder, which exists, for the files that are written.
      steps: of each Flax training.
      rounds: of each federated algorithm.

    Returns:
      What was promised, and whether it was kept.
    """
    start = time.perf_counter()
    train, test = digits.load()
    _say(f"The data: {len(train.labels):,} images of handwritten digits to train on, {len(test.labels)} to test on.")
    promises = [*_flax(train, test, steps, output), *_federated(train, test, rounds, output)]
    print(f"\nWhat was promised ({time.perf_counter() - start:.0f} s in all)")
    for promise in promises:
        print(f"  {'kept  ' if promise.kept else 'BROKEN'}  {promise.what}")
    return promises


def _flax(train: digits.Images, test: digits.Images, steps: int, output: Path) -> list[Promise]:
    _say(
        "\n1. In Flax",
        f"""An optimizer is read from `optimizer.toml`: clip the gradients, adapt them by Adam, scale them by a rate
        that warms up and then follows a cosine, decay the weights. It trains a small convolutional network for {steps}
        steps.""",
    )
    nnx = run_nnx(train, test, steps, output)
    linen = run_linen(train, test, steps)
    _say(
        f"""The nnx model recognizes {nnx.accuracy:.1%} of the test images; its linen twin, trained by a `TrainState`,
        {linen:.1%}. Half-way, the nnx run was saved:"""
    )
    for path in nnx.files:
        print(f"  {path}  ({path.stat().st_size / 1000:,.0f} kB)")
    _say(
        f"""A new model and a new optimizer were made from these files, and trained on. They ended with
        {"the very same" if nnx.identical else "OTHER"} bits, of weights and of optimizer state, as the run that was
        never interrupted."""
    )
    return [
        Promise(f"nnx: {nnx.accuracy:.1%} test accuracy, at least {FLAX_ACCURACY:.0%}", nnx.accuracy >= FLAX_ACCURACY),
        Promise(f"linen: {linen:.1%} test accuracy, at least {FLAX_ACCURACY:.0%}", linen >= FLAX_ACCURACY),
        Promise("a run resumed from its saved files is bit-identical to one never interrupted", nnx.identical),
    ]


def _federated(train: digits.Images, test: digits.Images, rounds: int, output: Path) -> list[Promise]:
    shares = digits.two_digits_each(train)
    _say(
        "\n2. Between clients",
        f"""The images are dealt to {len(shares)} clients, of whom each sees two digits only. In each of {rounds}
        rounds, {PARTICIPANTS} of them train on their own for {LOCAL_EPOCHS} epochs, and a server averages. Meanwhile
        each client drifts away, towards a model of its own two digits: this is what SCAFFOLD corrects. The three
        algorithms differ in `federated.toml` only; what their optimizers tell each other is JSON text.""",
    )
    curves = {
        algorithm: run_federated(algorithm, config, shares, test, rounds)
        for algorithm, config in read_config("federated.toml").items()
    }
    path = output / "federated.png"
    draw(path, shares, {algorithm: curve.accuracies for algorithm, curve in curves.items()}, PARTICIPANTS)
    print(f"\nTest accuracy after each round\n\n{_table(curves)}\n")
    for algorithm, curve in curves.items():
        said = f"{curve.message_bytes / 1000:,.0f} kB of JSON" if curve.message_bytes else "nothing"
        level = f"{_level(curve):.1%} over the last {LAST_ROUNDS} rounds"
        print(f"  {algorithm:9} {level}. Beside weights, each client sends {said}.")
    print(f"\nThe curves are drawn in {path}")
    scaffold, best_other = _level(curves["SCAFFOLD"]), max(_level(curves["FedAvg"]), _level(curves["FedProx"]))
    lead = scaffold - best_other
    return [
        Promise(
            f"SCAFFOLD: {scaffold:.1%} over the last {LAST_ROUNDS} rounds, at least {SCAFFOLD_ACCURACY:.0%}",
            scaffold >= SCAFFOLD_ACCURACY,
        ),
        Promise(
            f"SCAFFOLD leads the others by {100 * lead:.1f} points, at least {100 * SCAFFOLD_LEAD:.0f}",
            lead >= SCAFFOLD_LEAD,
        ),
    ]


def _say(*paragraphs: str) -> None:
    for paragraph in paragraphs:
        break_before = "\n" * (len(paragraph) - len(paragraph.lstrip("\n")))
        print(break_before + textwrap.fill(" ".join(paragraph.split()), width=100))
    sys.stdout.flush()


def _level(curve: Curve) -> float:
    return float(np.mean(curve.accuracies[-LAST_ROUNDS:]))


def _table(curves: Mapping[str, Curve]) -> str:
    """Write a line per round, in two blocks side by side."""
    header = "".join(f"{name:>9}" for name in ("round", *curves))
    accuracies = zip(*(curve.accuracies for curve in curves.values()), strict=True)
    lines = [
        f"{round_:>9}" + "".join(f"{value:>9.1%}" for value in values) for round_, values in enumerate(accuracies, 1)
    ]
    half = -(-len(lines) // 2)
    lines += [""] * (2 * half - len(lines))
    rows = zip([header, *lines[:half]], [header, *lines[half:]], strict=True)
    return "\n".join(f"{left}   {right}".rstrip() for left, right in rows)
