"""Run an experiment, from its file to its curves, and resume one that was cut off."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.data import Examples, Problem, load
from functional_optimodules.experiments.extras import missing
from functional_optimodules.experiments.model import Layers, accuracy, init_params, perceptron, perceptron_loss
from functional_optimodules.experiments.saved import Curves, draw, read_state, write_history, write_state
from functional_optimodules.federated import FederatedData, Federation, FederationState, clients_mesh
from functional_optimodules.federated.options import History


class Simulation(NamedTuple):
    """An experiment that is ready to be run.

    Attributes:
      experiment: what its file says.
      problem: its data, dealt out to clients.
      federation: its clients and server.
      data: the clients' examples, as the federation takes them.
    """

    experiment: Experiment
    problem: Problem
    federation: Federation
    data: FederatedData

    @classmethod
    def of(cls, experiment: Experiment, folder: Path) -> "Simulation":
        """Make an experiment ready; paths in it are relative to the folder."""
        rounds = experiment.rounds
        mapping = clients_mesh() if rounds.mapping == "mesh" else rounds.mapping
        problem = load(experiment.data, experiment.seed, folder)
        federation = Federation(
            perceptron_loss,
            client=experiment.client,
            server=experiment.server,
            batch_size=rounds.batch_size,
            epochs=rounds.epochs,
            weighting=rounds.weighting,
            mapping=mapping,
            on_nonfinite=rounds.on_nonfinite,
        )
        data = FederatedData.from_clients(problem.clients, mapping if isinstance(mapping, Mesh) else None)
        return cls(experiment, problem, federation, data)

    def init(self) -> FederationState:
        """Return the state before the first round."""
        experiment, features = self.experiment, self.problem.test.x.shape[1]
        params = init_params(experiment.model, features, self.problem.classes, experiment.seed)
        return self.federation.init(params, self.data, seed=experiment.seed)

    def fit(
        self,
        state: FederationState,
        num_rounds: int,
        callback: Callable[[FederationState, History], None] | None = None,
        progress: bool = True,
    ) -> History:
        """Run rounds, as `Federation.fit` does, and return their history, with the test accuracy."""
        rounds, test = self.experiment.rounds, jax.tree.map(jnp.asarray, self.problem.test)
        _, history = self.federation.fit(
            state,
            self.data,
            num_rounds,
            participants=rounds.participants,
            evaluate=functools.partial(_evaluate, test),
            every=rounds.save_every,
            callback=callback,
            progress=progress and not missing("tqdm"),
        )
        return history


def run_experiment(path: Path, output: Path, say: Callable[[str], None] = print, progress: bool = True) -> Curves:
    """Run an experiment, or the rest of one that was cut off.

    Args:
      path: the experiment's TOML file.
      output: the folder for its results. One that holds a part of the same
        experiment is resumed, with the results that it would have had.
      say: prints a line.
      progress: whether to show a progress bar over rounds, if `tqdm` is there.

    Returns:
      The history: `round`, from 0, `loss`, `accuracy` and `participants` by name.

    Raises:
      FileExistsError: if the folder holds a finished run, or anything else.
      FloatingPointError: if a client sent values that are not finite.
      ModuleNotFoundError: if the data are scikit-learn's, and it is not there.
      ValueError: if the folder holds another experiment's state.
    """
    experiment = Experiment.read(path)
    simulation = Simulation.of(experiment, path.parent)
    state, federation, count = simulation.init(), simulation.federation, experiment.rounds.count
    config = experiment.get_config()
    history: Curves = {"round": [], "loss": [], "accuracy": [], "participants": []}
    if (output / "state.json").exists():
        history, payload = read_state(output, config)
        state = federation.decode(payload, state)
        if len(history["round"]) >= count:
            raise FileExistsError(f"{output} holds the finished run of this experiment: choose another folder")
        say(f"Resuming after {len(history['round'])} of {count} rounds, from {output / 'state.json'}.")
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty, and holds no experiment to resume: choose another folder")

    def keep(state: FederationState, piece: History) -> None:
        output.mkdir(parents=True, exist_ok=True)
        _append(history, piece)
        write_state(output, config, history, federation.encode(state))
        write_history(output, history)

    simulation.fit(state, count - len(history["round"]), keep, progress)
    say(f"Test accuracy {history['accuracy'][-1]:.4f} after {count} rounds.")
    say(f"History: {output / 'history.csv'}\nState: {output / 'state.json'}")
    if lacking := missing("matplotlib"):
        say(f"No curves were drawn: they need {lacking}")
    else:
        say(f"Curves: {draw(output, history, f'{path.stem}: {simulation.data.num_clients} clients')}")
    return history


def _evaluate(test: Examples, params: Layers) -> dict[str, jax.Array]:
    return {"accuracy": accuracy(perceptron(params, test.x), test.y)}


def _append(history: Curves, piece: History) -> None:
    """Add a piece's rounds; the loss is that of the participants who stayed, by their examples."""
    for index, joined in enumerate(piece["joined"]):
        weights = piece["examples"][index] * joined
        loss = np.average(np.where(joined, piece["loss"][index], 0), weights=weights) if joined.any() else np.nan
        history["round"].append(int(piece["round"][index]))
        history["loss"].append(float(loss))
        history["accuracy"].append(float(piece["accuracy"][index]))
        history["participants"].append(int(joined.sum()))
