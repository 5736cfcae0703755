"""The library at work on real images, from one command: `functional-optimodules demo`.

`training` trains in Flax. The TOML files beside it are experiments, which
`functional-optimodules run` takes too, and `peers` plays some of their rounds by
messages. Here is the story that is told of them, and the promises that are checked.
"""

import functools
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from functional_optimodules.demo.peers import exchange
from functional_optimodules.demo.plot import draw
from functional_optimodules.demo.training import run_linen, run_nnx
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.data import Examples, digits
from functional_optimodules.experiments.grouping import simulation_of
from functional_optimodules.experiments.simulation import Simulation

ALGORITHMS = {"FedAvg": "fedavg.toml", "FedProx": "fedprox.toml", "SCAFFOLD": "scaffold.toml"}
FLAX_ACCURACY = 0.97
SCAFFOLD_ACCURACY = 0.96
SCAFFOLD_LEAD = 0.05
LAST_ROUNDS = 10
EXCHANGE_TOLERANCE = 1e-4


class Promise(NamedTuple):
    """Something that the demo promises.

    Attributes:
      what: the promise, with what was reached.
      kept: whether it was.
    """

    what: str
    kept: bool


def run_demo(output: Path, *, steps: int = 440, rounds: int | None = None) -> list[Promise]:
    """Run the demo and tell about it.

    Args:
      output: the folder, which exists, for the files that are written.
      steps: of each Flax training.
      rounds: of each federated algorithm; those of its file if `None`.

    Returns:
      What was promised, and whether it was kept.
    """
    start = time.perf_counter()
    train, test = digits()
    _say(f"The data: {len(train.y):,} images of handwritten digits to train on, {len(test.y)} to test on.")
    promises = [*_flax(train, test, steps, output), *_federated(rounds, output)]
    print(f"\nWhat was promised ({time.perf_counter() - start:.0f} s in all)")
    for promise in promises:
        print(f"  {'kept  ' if promise.kept else 'BROKEN'}  {promise.what}")
    return promises


def _flax(train: Examples, test: Examples, steps: int, output: Path) -> list[Promise]:
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


def _federated(rounds: int | None, output: Path) -> list[Promise]:
    folder = Path(__file__).parent
    simulations = {
        algorithm: simulation_of(Experiment.read(folder / file), folder) for algorithm, file in ALGORITHMS.items()
    }
    shares = cast(list[Examples], simulations["SCAFFOLD"].problem.data)
    setting = simulations["SCAFFOLD"].experiment.rounds
    rounds = setting.count if rounds is None else rounds
    _say(
        "\n2. Between clients",
        f"""The images are dealt to {len(shares)} clients, of whom each sees two digits only. In each of {rounds}
        rounds, {setting.participants} of them train on their own for {setting.epochs} epochs, and a server averages.
        Meanwhile each client drifts away, towards a model of its own two digits: this is what SCAFFOLD corrects. The
        three experiments, {", ".join(f"`{file}`" for file in ALGORITHMS.values())}, differ in their optimizers only.
        Each is simulated as one compiled program, and some of its rounds once more between a server and clients that
        share nothing: what their optimizers tell each other there is JSON text.""",
    )
    curves = {name: _accuracies(each, rounds) for name, each in simulations.items()}
    path = output / "federated.png"
    draw(path, shares, curves, setting.participants or len(shares))
    print(f"\nTest accuracy after each round\n\n{_table(curves)}\n")
    exchanges = {algorithm: exchange(simulation) for algorithm, simulation in simulations.items()}
    for algorithm, accuracies in curves.items():
        bytes_ = exchanges[algorithm].message_bytes
        said = f"{bytes_ / 1000:,.0f} kB of JSON" if bytes_ else "nothing"
        level = f"{_level(accuracies):.1%} over the last {LAST_ROUNDS} rounds"
        print(f"  {algorithm:9} {level}. Beside weights, each client sends {said}.")
    print(f"\nThe curves are drawn in {path}")
    farthest = max(each.distance for each in exchanges.values())
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
        Promise(
            f"peers who exchange text have the simulation's weights: {farthest:.0e} apart, at most "
            f"{EXCHANGE_TOLERANCE:.0e}",
            farthest <= EXCHANGE_TOLERANCE,
        ),
    ]


def _accuracies(simulation: Simulation, rounds: int) -> list[float]:
    """Run rounds, and return the accuracy after each."""
    evaluate = functools.partial(cast(Callable[..., Any], simulation.problem.evaluate), test=simulation.arrays.test)
    participants = simulation.experiment.rounds.participants
    _, history = simulation.federation.fit(
        simulation.init(), simulation.data, rounds, participants=participants, evaluate=evaluate, progress=True
    )
    return history["accuracy"].tolist()


def _say(*paragraphs: str) -> None:
    for paragraph in paragraphs:
        break_before = "\n" * (len(paragraph) - len(paragraph.lstrip("\n")))
        print(break_before + textwrap.fill(" ".join(paragraph.split()), width=100))
    sys.stdout.flush()


def _level(accuracies: list[float]) -> float:
    return float(np.mean(accuracies[-LAST_ROUNDS:]))


def _table(curves: Mapping[str, list[float]]) -> str:
    """Write a line per round, in two blocks side by side."""
    header = "".join(f"{name:>9}" for name in ("round", *curves))
    rows_ = enumerate(zip(*curves.values(), strict=True))
    lines = [f"{round_:>9}" + "".join(f"{value:>9.1%}" for value in values) for round_, values in rows_]
    half = -(-len(lines) // 2)
    lines += [""] * (2 * half - len(lines))
    rows = zip([header, *lines[:half]], [header, *lines[half:]], strict=True)
    return "\n".join(f"{left}   {right}".rstrip() for left, right in rows)
