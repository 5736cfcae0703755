"""Data and states of more clients than fit a device: of each piece of rounds only the participants are there.

    Init(params, data):
        server's state; the bank: a file of each process, as yet without a row
    Fit: of each piece of rounds
        draw the participants of the next piece
        run this piece on a block of its participants: their examples, their rows of the bank
        meanwhile, in the background:
            write the rows that the last piece changed, then the rest of the state
            read examples and rows of the next piece's participants, and put them on the device

The draws are those of `Federation.fit`, a participant's work is the same program on the
same key, and clients are counted by the same numbers: so is what comes out. A client that
takes part in two rounds of a piece, or in two pieces in a row, hands its row on where it lies,
on the device. Over a mesh, clients are dealt out to the devices once for all, and each
process reads and writes those of its own devices.

A row that is written goes beside the one that counts, and counts once the state of its
round is there, which one rename brings about; of several processes the first does it, once the
rows of all are written. So a run that is killed, at any point, goes on from a whole piece.
"""

import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from functional_optimodules.federated import checks
from functional_optimodules.federated.driver import Evaluate, check_rounds, drive, run_piece
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.options import History
from functional_optimodules.federated.placement import mesh_of, replicate
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.staged.bank import Bank
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.evaluation import evaluate_staged
from functional_optimodules.federated.staged.folder import describe, lock_file, saved
from functional_optimodules.federated.staged.peers import require_alike, together
from functional_optimodules.federated.staged.shards import Shards
from functional_optimodules.federated.staged.stage import Block, Fresh, Piece, Stage, StagedState, host_row, local
from functional_optimodules.federated.state import FederationState, start
from functional_optimodules.types import Params, PyTree


@dataclasses.dataclass(frozen=True)
class StagedFederation:
    """A federation whose clients need not fit the device, nor the memory of its host.

    What `fit` takes grows with the participants of a piece, all that take part in one of its rounds: on
    the device three copies of their rows and two of their examples, and about as much on the host, if that
    is not the device; and with some 50 bytes for each client that there is. Over a mesh each device has its
    part of these.

    With several processes, all call the same methods in the same order, with data of the same sizes. Each
    reads the rows of its own clients alone, and keeps files of its own in its folder: `rows-1` is that of
    process 1, and process 0 has the state. The folder may be the same for all, or one on each machine.

    Attributes:
      federation: the server and its clients, on one device or over a mesh.
      folder: where the run is kept, and goes on from after it was killed; made if it is
        missing. `None` for a run that is not kept, and whose bank is in a temporary file.
    """

    federation: Federation
    folder: str | Path | None = None

    def init(self, params: Params, data: StagedData, seed: int = 0, *, stats: PyTree = None) -> StagedState:
        """Make the state before any round; or, where the folder has a run, as that was after its last piece.

        The folder is this state's alone until nothing refers to it any more.

        Args:
          params: as for `Federation.init`; of a run that goes on, only their shapes count.
          data: the clients' data.
          seed: as for `Federation.init`.
          stats: likewise.

        Raises:
          RuntimeError: if another process failed.
          ValueError: as `Federation.init` does; if the folder has a run of another federation, other data or other
            processes, or a file of it is damaged; if another run is at work there; or if processes have data of
            other sizes.
        """
        _require_staged(data)
        federation, mesh = self.federation, mesh_of(self.federation.mapping)
        shards = Shards.deal(mesh, data)
        require_alike(shards.several, data.digest(), "the data")
        state, first, sides = start(federation, params, data.num_clients, seed, stats)
        started, template = (state, first), [leaf[None][:0] for leaf in sides.row(first)]
        if self.folder is None:
            bank = Bank(host_row(sides.row(first)), data.num_clients, None, 0)
            return StagedState(state._replace(bank=template), first, bank, shards)
        folder, whose = Path(self.folder), f"-{jax.process_index()}" if shards.several else ""
        lock: int | None = None
        try:
            with together(shards.several):
                if folder.exists() and not folder.is_dir():
                    raise ValueError(f"StagedFederation: folder={str(self.folder)!r} is a file: expected a folder")
                folder.mkdir(parents=True, exist_ok=True)
                lock = lock_file(folder / ("lock" if shards.first else f"lock{whose}"))
            with together(shards.several):
                if shards.first:
                    state, first = saved(self.federation, folder, shards, data, (state, first))
            state, first = replicate((state, first), mesh, started)
            with together(shards.several):
                bank = Bank(host_row(sides.row(first)), data.num_clients, folder, int(state.round), whose)
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise
        weakref.finalize(bank, os.close, lock)
        return StagedState(state._replace(bank=template), first, bank, shards)

    def fit(
        self,
        state: StagedState,
        data: StagedData,
        num_rounds: int,
        *,
        participants: int | None = None,
        weights: ArrayLike | None = None,
        drop_rate: ArrayLike | None = None,
        evaluate: Evaluate | None = None,
        every: int = 10,
        callback: Callable[[StagedState, History], object] | None = None,
        progress: bool = False,
    ) -> tuple[StagedState, History]:
        """Run rounds, as `Federation.fit` does. The state is donated: it can no longer be used.

        With a folder, each piece is kept there as it is done: of what a killed process did, at most
        two pieces are done again, which give the same. Nothing is forced to the disk, so that this
        does not hold for a machine that loses its power.

        Args:
          state: the state.
          data: the clients' data.
          num_rounds: how many more rounds.
          participants: as for `Federation.fit`.
          weights: likewise.
          drop_rate: likewise.
          evaluate: likewise.
          every: rounds of a piece, whose participants are on the device at the same time.
          callback: as for `Federation.fit`.
          progress: likewise.

        Returns:
          The new state, and the history, of NumPy arrays with a leading axis of rounds.

        Raises:
          FloatingPointError: as `Federation.fit` does; the folder keeps what was before that piece.
          OSError: if the folder's disk is full, or fails; it keeps what it has.
          RuntimeError: if another process failed, or was lost.
          ValueError: as `Federation.fit` does, if the state is not the last one, or if a file of the data was cut
            short.
        """
        check_rounds(num_rounds, every, callback)
        _require_staged(data)
        size, counts = checks.check_size(data.num_clients, participants, weights)
        checks.check_rate(drop_rate)
        number, bank = int(state.federation.round), state.bank
        _require_clients(data, state)
        self._settle(bank, state.shards)
        if bank.round != number:
            raise ValueError(f"StagedFederation: a state after {number} rounds, and its bank is after {bank.round}")
        drops = None if drop_rate is None else jnp.float32(drop_rate)
        with Stage(self.federation, state, data, size, every) as stage:
            stage.prepare(state, number, num_rounds)

            def advance(state: StagedState, count: int) -> tuple[StagedState, History]:
                nonlocal number, num_rounds
                number, num_rounds = number + count, num_rounds - count

                def run(held: FederationState, block: Block) -> tuple[FederationState, Metrics]:
                    chosen = self.federation, participants, evaluate, every
                    return run_piece(*chosen, held, block, counts, drops, np.int32(count))

                state, rows, piece = stage.step(run, state, number, num_rounds)
                history = jax.tree.map(lambda values: np.asarray(values)[:count], rows)
                self._settle(bank, state.shards)
                self.federation.check(history)
                if count:
                    held = state.federation._replace(bank=[]), state.first
                    copy = None if self.folder is None else jax.tree.map(jnp.copy, held)
                    write = functools.partial(self._write, stage, state, piece, data, copy)
                    bank.writing = stage.worker.submit(write, number)
                return state, history

            found = drive(advance, state, num_rounds, every, callback, progress)
        self._settle(bank, found[0].shards)
        return found

    def evaluate(
        self,
        model: Params | StagedState,
        data: StagedData,
        *,
        batch_size: int | None = None,
        key: jax.Array | None = None,
        steps: int = 0,
        train: StagedData | None = None,
        at_once: int = 1000,
    ) -> History:
        """Evaluate a model on each client's data, as `Federation.evaluate` does, some clients at a time.

        Args:
          model: parameters, or a Flax model, the same for all clients; or the state.
          data: the clients' data.
          batch_size: as for `Federation.evaluate`.
          key: likewise.
          steps: likewise.
          train: the data to take these steps on; `data` if `None`.
          at_once: how many clients' examples and rows are on the devices at the same time; while these are
            evaluated, the next as many are read.

        Returns:
          `loss` and the loss's metrics by name, each float32[N], on the host.

        Raises:
          ValueError: as `Federation.evaluate` does, if data is of another number of clients than the state, or if a
            file of it was cut short.
        """
        _require_staged(data)
        if type(at_once) is not int or at_once < 1:
            raise ValueError(f"StagedFederation: at_once={at_once!r} should be an integer of at least 1")
        if isinstance(self.federation.loss_fn, ModelLoss) and not isinstance(model, StagedState):
            model = dataclasses.replace(self, folder=None).init(model, data)
        if isinstance(model, StagedState):
            for each in (data, *([] if train is None else [train])):
                _require_staged(each)
                _require_clients(each, model)
            self._settle(model.bank, model.shards)
        key = jax.random.key(0) if key is None else key
        return evaluate_staged(self.federation, model, data, batch_size, key, steps, train, at_once)

    def model(self, state: StagedState, client: int | None = None) -> Any:
        """Return the model of a state: the shared one, or a client's; see `Federation.model`.

        With several processes, each has the models of its own clients.

        Raises:
          ValueError: as `Federation.model` does, or for a client of another process.
        """
        held, total = state.federation, int(state.federation.num_clients)
        if isinstance(client, int | np.integer) and 0 <= client < total:
            shard = int(state.shards.shard[client])
            if shard not in state.shards.own:
                owner = state.shards.processes[shard]
                raise ValueError(f"StagedFederation: client {client} is of process {owner}: ask there for its model")
            state.bank.settle()
            rows = Fresh(self.federation, state, 1).row(state, shard, client)
            held = held._replace(bank=rows, slots=jnp.zeros(total, jnp.int32))
            if state.shards.several:
                held = jax.tree.map(local, held._replace(bank=[]))._replace(bank=rows)
        return self.federation.model(held, client)

    def _settle(self, bank: Bank, shards: Shards) -> None:
        """Wait until the rows of all processes are written, and then let them count."""
        with together(shards.several):
            bank.settle()
        if shards.several:
            with together(True):
                bank.count()

    def _write(
        self,
        stage: Stage,
        state: StagedState,
        piece: Piece,
        data: StagedData,
        copy: tuple[FederationState, Own] | None,
        number: int,
    ) -> None:
        """Write the rows that clients have after some number of rounds, and then the rest of the state."""
        try:
            stage.write(state.bank, piece, number)
            if copy is not None and self.folder is not None and state.shards.first:
                draft = Path(self.folder) / "state.partial"
                draft.write_text(json.dumps(describe(self.federation, state.shards, data, copy)))
                state.bank.draft = draft
                if not state.shards.several:
                    state.bank.count()
        except OSError as error:
            what = f"round {number - 1} was not written to {self.folder}, which has what it had before"
            text = f"StagedFederation: {error.strerror}: {what}"
            raise OSError(error.errno, text) from error
        state.bank.round = number


def _require_clients(data: StagedData, state: StagedState) -> None:
    if data.num_clients != (total := len(state.shards.shard)):
        raise ValueError(f"StagedFederation: data of {data.num_clients} clients, and a state made for {total}")


def _require_staged(data: StagedData) -> None:
    if not isinstance(data, StagedData):
        raise TypeError(f"StagedFederation: data should be StagedData, not {type(data).__name__}")
