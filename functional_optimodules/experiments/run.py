"""Run an experiment, from its file to its curves, and resume one that was cut off."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.problem import Examples, accuracy, cross_entropy, init_params, load
from functional_optimodules.experiments.saved import History, draw, read_state, write_history, write_state
from functional_optimodules.federated import Federation, FederationState, clients_mesh
from functional_optimodules.optimizer import Optimizer


def run_experiment(path: Path, output: Path, say: Callable[[str], None] = print, progress: bool = True) -> History:
    """Run an experiment, or the rest of one that was cut off.

    Args:
      path: the experiment's TOML file.
      output: the folder for its results. One that holds a part of the same
        experiment is resumed, with the results that it would have had.
      say: prints a line.
      progress: whether to show a progress bar over rounds.

    Returns:
      The history: `round`, `loss`, `accuracy` and `participants` by name.

    Raises:
      FileExistsError: if the folder holds a finished run, or anything else.
      FloatingPointError: if a client sent values that are not finite.
      ValueError: if the folder holds another experiment's state.
    """
    experiment = Experiment.read(path)
    rounds = experiment.rounds
    mapping = clients_mesh() if rounds.mapping == "mesh" else rounds.mapping
    problem = load(experiment.data, experiment.seed, path.parent, mapping if isinstance(mapping, Mesh) else None)
    federation = Federation(
        cross_entropy,
        client=Optimizer.from_config(experiment.client),
        server=Optimizer.from_config(experiment.server),
        batch_size=rounds.batch_size,
        epochs=rounds.epochs,
        weighting=rounds.weighting,
        mapping=mapping,
        on_nonfinite=rounds.on_nonfinite,
    )
    params = init_params(experiment.model, problem.test.x.shape[1], problem.classes, experiment.seed)
    state = federation.init(params, problem.data, seed=experiment.seed)
    config = json.loads(json.dumps(experiment.to_json()))
    history: History = {"round": [], "loss": [], "accuracy": [], "participants": []}
    if (output / "state.json").exists():
        history, payload = read_state(output, config)
        state = federation.decode(payload, state)
        if len(history["round"]) >= rounds.count:
            raise FileExistsError(f"{output} holds the finished run of this experiment: choose another folder")
        say(f"Resuming after round {len(history['round'])} of {rounds.count}, from {output / 'state.json'}.")
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty, and holds no experiment to resume: choose another folder")

    def keep(state: FederationState, piece: dict[str, Any]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        _append(history, piece)
        write_state(output, config, history, federation.encode(state))
        write_history(output, history)

    federation.fit(
        state,
        problem.data,
        rounds.count - len(history["round"]),
        participants=rounds.participants,
        evaluate=functools.partial(_evaluate, problem.test),
        every=rounds.save_every,
        callback=keep,
        progress=progress,
    )
    picture = draw(output, history, f"{path.stem}: {problem.data.num_clients} clients")
    say(f"Test accuracy {history['accuracy'][-1]:.4f} after {rounds.count} rounds.")
    say(f"History: {output / 'history.csv'}\nCurves: {picture}\nState: {output / 'state.json'}")
    return history


def _evaluate(test: Examples, params: Any) -> dict[str, Any]:
    return {"accuracy": accuracy(params, test)}


def _append(history: History, piece: dict[str, Any]) -> None:
    """Add a piece's rounds; the loss is that of the participants who stayed, by their examples."""
    for index, joined in enumerate(piece["joined"]):
        weights = piece["examples"][index] * joined
        loss = np.average(np.where(joined, piece["loss"][index], 0), weights=weights) if joined.any() else np.nan
        history["round"].append(int(piece["round"][index]) + 1)
        history["loss"].append(float(loss))
        history["accuracy"].append(float(piece["accuracy"][index]))
        history["participants"].append(int(joined.sum()))
