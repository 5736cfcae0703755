"""A run whose clients need not fit the device: `StagedData` in the place of `FederatedData`.

What clients keep between rounds is in a folder of the experiment's, and counts as soon
as the experiment's state does, which is saved after it.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from functional_optimodules.experiments.simulation import Simulation, advanced
from functional_optimodules.federated import FederationState, StagedData, StagedFederation
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.options import History
from functional_optimodules.federated.placement import mesh_of
from functional_optimodules.federated.staged.bank import Bank
from functional_optimodules.federated.staged.shards import Shards
from functional_optimodules.federated.staged.stage import Block, Stage, StagedState, host_row, read_block
from functional_optimodules.federated.state import start
from functional_optimodules.types import Json


class Held(NamedTuple):
    """State of a run.

    Attributes:
      staged: the federation's.
      stage: what reads ahead; `None` before the first round.
    """

    staged: StagedState
    stage: Stage | None = None


class StagedSimulation(Simulation):
    """One run, of whose clients a piece's participants alone are on the device."""

    def init(self) -> Any:
        return Held(self._begin(None))

    def advance(self, state: Any, count: int) -> tuple[Any, list[History]]:
        held, rounds = state.staged, self.experiment.rounds
        number = int(held.federation.round)
        stage = state.stage
        if stage is None:
            size = rounds.participants or self._data.num_clients
            stage = Stage(self.federation, held, self._data, size, rounds.save_every)
            stage.prepare(held, number, count)

        def run(held: FederationState, block: Block) -> tuple[FederationState, Metrics]:
            arrays = self.arrays._replace(data=block)
            return advanced(self.program, "advance", None, self.values, arrays, held, np.int32(count))

        held, metrics, piece = stage.step(run, held, number + count, rounds.count - number - count)
        held.bank.writing = stage.worker.submit(stage.write, held.bank, piece, number + count)
        return Held(held, stage), [{name: np.asarray(values)[:count] for name, values in metrics.items()}]

    def by_client(self, state: Any) -> list[History]:
        return [StagedFederation(self.federation).evaluate(state.staged, self._data)]

    def encode(self, state: Any) -> list[dict[str, Json]]:
        state.staged.bank.settle()
        return [self.federation.encode(state.staged.federation)]

    def decode(self, payloads: Sequence[Json], changed: Iterable[str] = ()) -> Any:
        (payload,) = payloads
        return Held(self._begin(payload, tuple(changed)))

    def state_shapes(self) -> FederationState:
        return jax.eval_shape(lambda: self._start()[0])

    def shapes(self) -> tuple[FederationState, Metrics]:
        rounds, shards = self.experiment.rounds, Shards.deal(mesh_of(self.federation.mapping), self._data)
        size = rounds.participants or self._data.num_clients
        split = [each[:1] for each in shards.members]
        drawn = np.zeros((rounds.save_every, size), np.int32)
        room = {shard: self._data.room(self._data.largest) for shard in shards.own}
        block = read_block(self._data, shards, split, 1, room, drawn, 0)
        state: Any = self.state_shapes()
        rows = [jax.ShapeDtypeStruct((len(split), *leaf.shape[1:]), leaf.dtype) for leaf in state.bank]
        arrays = self.arrays._replace(data=block)
        return advanced.eval_shape(
            self.program, "advance", None, self.values, arrays, state._replace(bank=rows), np.int32(1)
        )

    @property
    def _data(self) -> StagedData:
        data: StagedData = self.arrays.data
        return data

    def _start(self) -> tuple[FederationState, Any, Any]:
        """Return the state before any round, with no row, what each client starts from, and both sides."""
        code, arrays, stats = self.program.code, self.arrays, self.arrays.stats
        params = arrays.params
        if isinstance(code.loss_fn, ModelLoss):
            params, stats = code.loss_fn.put_together(params, stats), None
        state, first, sides = start(self.federation, params, self._data.num_clients, self.experiment.seed, stats)
        return state._replace(bank=[leaf[None][:0] for leaf in sides.row(first)]), first, sides

    def _begin(self, payload: Json | None, changed: tuple[str, ...] = ()) -> StagedState:
        """Return the state of a payload, or that before any round, with the bank as it was then."""
        state, first, sides = self._start()
        if payload is not None:
            state = self.federation.decode(payload, state, changed=changed)
        folder = self.folder
        if folder is not None:  # each run of a file has its own
            folder = folder / "clients" / f"{zlib.crc32(self.trials[0].label.encode()):08x}"
            folder.mkdir(parents=True, exist_ok=True)
        bank = Bank(host_row(sides.row(first)), self._data.num_clients, folder, int(state.round))
        return StagedState(state, first, bank, Shards.deal(mesh_of(self.federation.mapping), self._data))
