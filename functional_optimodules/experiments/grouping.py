"""How the runs of a file are put into as few programs as they need.

Runs that agree in shapes, code and structure share one. A number that differs is an
argument of it, where its brick takes the number while it is being traced: a rate does,
and how many values a brick keeps does not. This is found out by tracing.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.config.fields import FrozenConfig
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.problem import Arrays, Code, Problem, code_and_arrays, make_problem
from functional_optimodules.experiments.simulation import Program, Simulation, federation_of, mesh_of
from functional_optimodules.experiments.staged import StagedSimulation
from functional_optimodules.experiments.sweep import Trial, set_at
from functional_optimodules.federated import FederatedData, StagedData
from functional_optimodules.types import Json

Made = tuple[Trial, Problem, Code, Arrays]

_NEVER_TRACED = ("problem.", "data.", "model.", "rounds.mapping", "seed")
_NOT_TRACED = (TypeError, ValueError, IndexError, KeyError)


def simulation_of(experiment: Experiment, folder: Path) -> Simulation:
    """Make ready an experiment that is one run; paths in it are relative to the folder."""
    (simulation,) = simulations([Trial({}, experiment)], folder)
    return simulation


def simulations(trials: Sequence[Trial], folder: Path) -> list[Simulation]:
    """Put runs into as few programs as they need, in the order of their first ones.

    Args:
      trials: the runs of a file.
      folder: its folder.

    Raises:
      As `make_problem` and `Federation` do.
    """
    problems: dict[str, tuple[Problem, Code, Arrays]] = {}
    made = []
    for trial in trials:
        experiment = trial.experiment
        table = experiment.problem or {
            "factory": experiment.data.source,
            **experiment.data.get_config(),
            **experiment.model.get_config(),
        }
        key = json.dumps([dict(table), experiment.seed, experiment.rounds.mapping == "mesh"], sort_keys=True)
        if key not in problems:
            problem = make_problem(table, experiment.seed, folder)
            problems[key] = problem, *code_and_arrays(problem, mesh_of(experiment))
        federation_of(experiment, problems[key][1])  # what does not go together is said before anything runs
        made.append((trial, *problems[key]))
    numbers = [path for path in (trials[0].values if len(trials) > 1 else ()) if _may_be_traced(trials, path)]
    return [each for alike in _grouped(made, numbers) for each in _together(alike, numbers)]


def split(simulation: Simulation, rounds: Sequence[int]) -> list[Simulation]:
    """Put the runs of a program that have come to different rounds into programs of their own.

    Args:
      simulation: the runs, as one program.
      rounds: how many rounds each has behind it.
    """
    parts: dict[int, list[Made]] = {}
    for index, (trial, done) in enumerate(zip(simulation.trials, rounds, strict=True)):
        arrays = simulation.arrays if simulation.shared else simulation.one(simulation.arrays, index)
        parts.setdefault(done, []).append((trial, simulation.problem, simulation.program.code, arrays))
    if len(parts) == 1:
        return [simulation]
    return [each for alike in parts.values() for each in _together(alike, simulation.program.traced)]


def _may_be_traced(trials: Sequence[Trial], path: str) -> bool:
    values = [trial.values[path] for trial in trials]
    return not path.startswith(_NEVER_TRACED) and all(type(value) in (int, float) for value in values)


def _grouped(made: Sequence[Made], traced: Sequence[str]) -> list[list[Made]]:
    """Group runs that agree in all but the values of some fields and the seed."""
    groups: dict[Any, list[Made]] = {}
    for each in made:
        trial, _, code, arrays = each
        batch, data = trial.experiment.rounds.batch_size, arrays.data
        if isinstance(data, StagedData):
            groups[id(each)] = [each]
            continue
        if batch is not None and batch <= data.largest:  # no shape is that of the largest client
            data = _bounded(data, 0, 0)
        shapes = str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), arrays._replace(data=data)))
        own = id(each) if trial.experiment.rounds.mapping == "mesh" else None
        groups.setdefault((_common(trial, traced), code, shapes, own), []).append(each)
    return list(groups.values())


def _bounded(data: FederatedData, smallest: int, largest: int) -> FederatedData:
    return dataclasses.replace(data, smallest=smallest, largest=largest)


def _common(trial: Trial, traced: Sequence[str]) -> FrozenConfig:
    # Of the problem there are code and arrays.
    others = ("seed", "seeds", "sweep", "problem", "data", "model")
    config: Json = {name: value for name, value in trial.experiment.get_config().items() if name not in others}
    for path in traced:
        config = set_at(config, path, None)
    return FrozenConfig(config)  # type: ignore[arg-type]


def _together(alike: Sequence[Made], traced: Sequence[str]) -> list[Simulation]:
    """Put runs that agree in all but numbers into one program, or more where a number cannot be traced."""
    varying = [path for path in traced if len({repr(each[0].values[path]) for each in alike}) > 1]
    simulation = _simulation(alike, varying)
    if not varying or _works(simulation):
        return [simulation]
    fit = [path for path in varying if _works(_simulation(_only(alike, path), [path]))]
    fit = fit if len(fit) < len(varying) else []  # each works alone, and they do not together
    return [each for group in _grouped(alike, fit) for each in _together(group, fit)]


def _only(alike: Sequence[Made], path: str) -> list[Made]:
    """Return two of the runs, made alike in all but one field."""
    first, other = alike[0][0], next(each[0] for each in alike if each[0].values[path] != alike[0][0].values[path])
    config = set_at(first.experiment.get_config(), path, other.values[path])
    twin = Trial({**first.values, path: other.values[path]}, Experiment.from_config(config))  # type: ignore[arg-type]
    return [alike[0], (twin, *alike[0][1:])]


def _works(simulation: Simulation) -> bool:
    try:
        simulation.shapes()
    except _NOT_TRACED:
        return False
    return True


def _simulation(alike: Sequence[Made], varying: Sequence[str]) -> Simulation:
    trials = [each[0] for each in alike]
    _, problem, code, arrays = alike[0]
    program = Program(_common(trials[0], varying), tuple(varying), code)
    values = {path: jnp.array([trial.values[path] for trial in trials]) for path in varying}
    shared = all(each[3] is arrays for each in alike)
    if not shared:
        bounds = min(each[3].data.smallest for each in alike), max(each[3].data.largest for each in alike)
        each_own = [each[3]._replace(data=_bounded(each[3].data, *bounds)) for each in alike]
        arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each_own)
    kind = StagedSimulation if isinstance(arrays.data, StagedData) else Simulation
    return kind(trials, problem, program, values, arrays, shared)
