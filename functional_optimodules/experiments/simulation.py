"""Runs that differ in numbers alone, as one compiled program.

    start(values, seed, arrays) -> state
    advance(values, arrays, state, count) -> state, metrics of `count` rounds

are mapped over runs by `vmap`. The swept numbers are arguments of the program, so
that others need no other one.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from functional_optimodules.config.fields import FrozenConfig
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.drift import Drift, norm
from functional_optimodules.experiments.problem import Arrays, Code, Problem
from functional_optimodules.experiments.sweep import Trial, set_at
from functional_optimodules.federated import Federation, FederationState, clients_mesh
from functional_optimodules.federated.driver import repeated
from functional_optimodules.federated.loss import Metrics, averaged
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.options import History
from functional_optimodules.numerics import wide
from functional_optimodules.types import Json, PyTree

_FEDERATION = tuple(field.name for field in dataclasses.fields(Federation))


def federation_of(experiment: Experiment, code: Code) -> Federation:
    """Return the federation that a file describes, which also tells how far its participants go."""
    rounds = experiment.rounds
    options = {name: getattr(rounds, name) for name in _FEDERATION if hasattr(rounds, name)}
    options |= {"mapping": mesh_of(experiment) or rounds.mapping, "uplink": (Drift(), *rounds.uplink)}
    return Federation(code.loss_fn, experiment.client, experiment.server, eval_fn=code.eval_fn, **options)


def mesh_of(experiment: Experiment) -> Mesh | None:
    """Return the devices that clients are spread over; `None` for one."""
    return clients_mesh() if experiment.rounds.mapping == "mesh" else None


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs that are compiled together have in common.

    Attributes:
      config: the experiment; the fields that are traced, and the seed, have any value.
      traced: the paths of these fields.
      code: the problem's functions.
    """

    config: FrozenConfig
    traced: tuple[str, ...]
    code: Code

    def build(self, values: Mapping[str, Any]) -> tuple[Experiment, Federation]:
        """Return the experiment and the federation with values of the traced fields."""
        config: Json = dict(self.config)
        for path in self.traced:
            config = set_at(config, path, values[path])
        experiment = Experiment.from_config(config)
        return experiment, federation_of(experiment, self.code)

    def start(self, values: Mapping[str, Any], seed: Any, arrays: Arrays) -> FederationState:
        """Return the state of a run before its first round."""
        _, federation = self.build(values)
        if isinstance(self.code.loss_fn, ModelLoss):
            return federation.init(self.code.loss_fn.put_together(arrays.params, arrays.stats), arrays.data, seed)
        return federation.init(arrays.params, arrays.data, seed, stats=arrays.stats)

    def advance(
        self, values: Mapping[str, Any], arrays: Arrays, state: FederationState, count: jax.Array
    ) -> tuple[FederationState, Metrics]:
        """Run `count` rounds, at most `save_every`: return the state, and the metrics of each."""
        experiment, federation = self.build(values)
        rounds = experiment.rounds
        step = federation.rounds(arrays.data, rounds.participants, None, rounds.drop_rate, None)

        def one(state: FederationState) -> tuple[FederationState, Metrics]:
            new, metrics = step(state)
            moved = jax.tree.map(lambda a, b: wide(a) - wide(b), new.params, state.params)
            found = {"update_norm": norm(moved), **self.evaluate(federation, new, arrays.test)}
            for name in sorted(metrics.keys() & found.keys()):
                raise ValueError(f"[problem]: `evaluate` returns a metric {name!r}, which a round has too: rename it")
            return new, metrics | found

        return repeated(one, state, rounds.save_every, count)

    def evaluate(self, federation: Federation, state: FederationState, test: PyTree) -> Metrics:
        """Return what is measured after a round."""
        if self.code.evaluate is not None:
            given = (federation.evaluated(state),) if test is None else (federation.evaluated(state), test)
            found = self.code.evaluate(*given)
            wrong = not isinstance(found, Mapping) or any(jnp.shape(value) for value in found.values())
            if wrong:
                raise TypeError(f"[problem]: `evaluate` returned {found!r}: expected numbers by name")
            return {name: jnp.asarray(value) for name, value in found.items()}
        if test is None:
            return {}
        loss = averaged(federation.eval_fn or federation.loss_fn, None, jax.tree.leaves(test)[0].shape[0])
        _, (metrics, _) = loss(state.params, state.stats, test, jax.random.key(0))
        return {f"test_{name}": value for name, value in metrics.items()}

    def by_client(self, values: Mapping[str, Any], arrays: Arrays, state: FederationState) -> Metrics:
        """Return the loss and its metrics on each client's examples, by the model as the client has it."""
        _, federation = self.build(values)
        return federation.evaluate(state, arrays.data)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mapped(program: Program, method: str, axes: Any, *args: PyTree) -> PyTree:
    return _call(program, method, axes, *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def advanced(
    program: Program, method: str, axes: Any, values: PyTree, arrays: Arrays, state: FederationState, count: jax.Array
) -> tuple[FederationState, Metrics]:
    """Run rounds of one run or, mapped over these axes, of several; the state is donated."""
    return _call(program, method, axes, values, arrays, state, count)


def _call(program: Program, method: str, axes: tuple[int | None, ...] | None, *args: PyTree) -> Any:
    function = getattr(program, method)
    return function(*args) if axes is None else jax.vmap(function, axes)(*args)


class Simulation(NamedTuple):
    """Runs that are one program.

    Attributes:
      trials: the runs.
      problem: the problem of the first.
      program: what they have in common.
      values: the traced values of each field, with a leading axis of runs.
      arrays: the arrays of the problem; with such an axis where the runs differ in them.
      shared: whether they do not.
      folder: the experiment's, for what does not fit in its state; `None` for none.
    """

    trials: Sequence[Trial]
    problem: Problem
    program: Program
    values: dict[str, jax.Array]
    arrays: Arrays
    shared: bool
    folder: Path | None = None

    @property
    def experiment(self) -> Experiment:
        """The experiment of the first run."""
        return self.trials[0].experiment

    @property
    def federation(self) -> Federation:
        """The federation of the first run."""
        return federation_of(self.experiment, self.program.code)

    @property
    def data(self) -> Any:
        """The clients' examples of the first run."""
        return self.arrays.data if self.shared else self.one(self.arrays.data)

    def one(self, tree: PyTree, index: int = 0) -> Any:
        """Return one run's part of what has an axis of runs, or is of the only one."""
        return tree if len(self.trials) == 1 else jax.tree.map(lambda leaf: leaf[index], tree)

    def stack(self, trees: Sequence[PyTree]) -> Any:
        """Return what `one` takes apart."""
        return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def init(self) -> FederationState:
        """Return the state before the first round, with a leading axis of runs where there are several."""
        seeds = [trial.experiment.seed for trial in self.trials]
        if len(seeds) == 1:
            return self.program.start({}, seeds[0], self.arrays)
        axes = 0, 0, self._axis
        return _mapped(self.program, "start", axes, self.values, jnp.array(seeds, jnp.uint32), self.arrays)

    def advance(self, state: FederationState, count: int) -> tuple[FederationState, list[History]]:
        """Run rounds, at most `save_every`: return the state, whose old one is used up, and each run's metrics."""
        args = self.values, self.arrays, state, np.int32(count)
        axes = None if len(self.trials) == 1 else (0, self._axis, 0, None)
        state, metrics = advanced(self.program, "advance", axes, *args)
        found = jax.tree.map(np.asarray, metrics)
        return state, [{k: v[:count] for k, v in self.one(found, i).items()} for i in range(len(self.trials))]

    def by_client(self, state: FederationState) -> list[History]:
        """Return each run's loss and metrics by client."""
        axes = None if len(self.trials) == 1 else (0, self._axis, 0)
        found = jax.tree.map(np.asarray, _mapped(self.program, "by_client", axes, self.values, self.arrays, state))
        return [self.one(found, index) for index in range(len(self.trials))]

    def encode(self, state: FederationState) -> list[dict[str, Json]]:
        """Write each run's state as its own federation does."""
        federations = [federation_of(trial.experiment, self.program.code) for trial in self.trials]
        return [each.encode(self.one(state, index)) for index, each in enumerate(federations)]

    def decode(self, payloads: Sequence[Json], changed: Iterable[str] = ()) -> FederationState:
        """Read what `encode` wrote; see `Federation.decode`."""
        like, states = self.init(), []
        for index, (trial, payload) in enumerate(zip(self.trials, payloads, strict=True)):
            federation = federation_of(trial.experiment, self.program.code)
            states.append(federation.decode(payload, self.one(like, index), changed=tuple(changed)))
        return self.stack(states)

    def state_shapes(self) -> FederationState:
        """Return the shapes of one run's state."""
        return jax.eval_shape(lambda: self.one(self.init()))

    def shapes(self) -> tuple[FederationState, Metrics]:
        """Return the shapes of a state and of `save_every` rounds' metrics, from tracing the program alone."""
        axes = None if len(self.trials) == 1 else (0, self._axis, 0, None)
        args = self.values, self.arrays, jax.eval_shape(self.init), np.int32(1)
        return advanced.eval_shape(self.program, "advance", axes, *args)

    @property
    def _axis(self) -> int | None:
        return None if self.shared else 0
