"""Data and states of more clients than fit a device: of each piece of rounds only the participants are there.

    Init(params, data):
        server's state; the bank: a file, as yet without a row
    Fit: of each piece of rounds
        draw the participants of the next piece
        run this piece on a block of its participants: their examples, their rows of the bank
        meanwhile, in the background:
            write the rows that the last piece changed, then the rest of the state
            read examples and rows of the next piece's participants, and put them on the device

The draws are those of `Federation.fit`, a participant's work is the same program on the
same key, and clients are counted by the same numbers: so is what comes out. A client that
takes part in two rounds of a piece, or in two pieces in a row, hands its row on where it lies,
on the device.

A row that is written goes beside the one that counts, and counts once the state of its
round is there, which one rename brings about. So a run that is killed, at any point, goes on
from a whole piece.
"""

import dataclasses
import functools
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from functional_optimodules.config.fields import differences, require_keys
from functional_optimodules.federated import checks, saving
from functional_optimodules.federated.data import Integers
from functional_optimodules.federated.driver import Evaluate, check_rounds, drive, run_piece
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.options import History
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.staged.bank import Bank
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.stage import Fresh, Stage, StagedState
from functional_optimodules.federated.state import FederationState, start
from functional_optimodules.random.keys import from_words, words
from functional_optimodules.types import HostArray, Json, Params, PyTree
from functional_optimodules.wire.arrays import decode_like, encode_array
from functional_optimodules.wire.paths import Spec, keystr


@dataclasses.dataclass(frozen=True)
class StagedFederation:
    """A federation whose clients need not fit the device, nor the memory of its host.

    What `fit` takes grows with the participants of a piece, all that take part in one of its rounds: on
    the device three copies of their rows and two of their examples, and about as much on the host, if that
    is not the device; and with some 40 bytes for each client that there is.

    Attributes:
      federation: the server and its clients, on one device.
      folder: where the run is kept, and goes on from after it was killed; made if it is
        missing. `None` for a run that is not kept, and whose bank is in a temporary file.

    Raises:
      ValueError: for a mesh.
    """

    federation: Federation
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.federation.mapping, Mesh):
            raise ValueError("StagedFederation: a mesh, and data is staged for one device: take another `mapping`")

    def init(self, params: Params, data: StagedData, seed: int = 0, *, stats: PyTree = None) -> StagedState:
        """Make the state before any round; or, where the folder has a run, as that was after its last piece.

        The folder is this state's alone until nothing refers to it any more.

        Args:
          params: as for `Federation.init`; of a run that goes on, only their shapes count.
          data: the clients' data.
          seed: as for `Federation.init`.
          stats: likewise.

        Raises:
          ValueError: as `Federation.init` does; if the folder has a run of another federation or other
            data, or a file of it is damaged; or if another run is at work there.
        """
        _require_staged(data)
        federation = self.federation
        state, first, sides = start(federation, params, data.num_clients, seed, stats)
        row = sides.row(first)
        state = state._replace(bank=[leaf[None][:0] for leaf in row])
        if self.folder is None:
            return StagedState(state, first, Bank(_host_row(row), data.num_clients, None, 0))
        folder = Path(self.folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"StagedFederation: folder={str(self.folder)!r} is a file: expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            state, first = self._saved(folder, data, (state, first))
            bank = Bank(_host_row(sides.row(first)), data.num_clients, folder, int(state.round))
        except BaseException:
            os.close(lock)
            raise
        weakref.finalize(bank, os.close, lock)
        return StagedState(state, first, bank)

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
          ValueError: as `Federation.fit` does, if the state is not the last one, or if a file of the data was cut
            short.
        """
        check_rounds(num_rounds, every, callback)
        _require_staged(data)
        size, counts = checks.check_size(data.num_clients, participants, weights)
        checks.check_rate(drop_rate)
        total, number, bank = int(state.federation.num_clients), int(state.federation.round), state.bank
        if total != data.num_clients:
            raise ValueError(f"StagedFederation: data of {data.num_clients} clients, and a state made for {total}")
        bank.settle()
        if bank.round != number:
            raise ValueError(f"StagedFederation: a state after {number} rounds, and its bank is after {bank.round}")
        drops = None if drop_rate is None else jnp.float32(drop_rate)
        run = functools.partial(run_piece, self.federation, participants, evaluate, every)
        with Stage(self.federation, state, data, size, every) as stage:
            stage.prepare(state, number, num_rounds)

            def advance(state: StagedState, count: int) -> tuple[StagedState, History]:
                nonlocal number, num_rounds
                number, num_rounds = number + count, num_rounds - count
                piece = stage.take()
                # On some devices, what is asked for while a piece runs waits for its end.
                if num_rounds:
                    stage.prepare(state, number, num_rounds)
                held = state.federation._replace(bank=piece.bank)
                after, rows = run(held, piece.block, counts, drops, np.int32(count))
                history = jax.tree.map(lambda values: np.asarray(values)[:count], rows)
                self.federation.check(history)
                stage.left = after.bank
                state = state._replace(federation=after._replace(bank=state.federation.bank))
                state.bank.settle()
                if count:
                    copy = None if self.folder is None else jax.tree.map(jnp.copy, state[:2])
                    write = functools.partial(self._write, state.bank, piece.clients, after.bank, data, copy)
                    state.bank.writing = stage.worker.submit(write, number)
                return state, history

            found = drive(advance, state, num_rounds, every, callback, progress)
        bank.settle()
        return found

    def model(self, state: StagedState, client: int | None = None) -> Any:
        """Return the model of a state: the shared one, or a client's; see `Federation.model`."""
        held, total = state.federation, int(state.federation.num_clients)
        if isinstance(client, int | np.integer) and 0 <= client < total:
            state.bank.settle()
            clients = np.array([client])
            fresh = Fresh(self.federation, state, 1)
            rows = fresh.read(state.bank, clients, fresh.keys(state, clients), np.array([True]))
            bank = [jnp.asarray(from_words(raw, like)) for raw, like in zip(rows, held.bank, strict=True)]
            held = held._replace(bank=bank, slots=jnp.zeros(total, jnp.int32))
        return self.federation.model(held, client)

    def _write(
        self,
        bank: Bank,
        clients: Integers,
        rows: Rows,
        data: StagedData,
        copy: tuple[FederationState, Own] | None,
        number: int,
    ) -> None:
        """Write the rows that clients have after some number of rounds, and then the rest of the state."""
        try:
            bank.write(clients, [np.asarray(words(leaf))[: len(clients)] for leaf in rows], number)
            if copy is not None:
                folder = Path(self.folder or "")
                draft = folder / "state.partial"
                draft.write_text(json.dumps(self._payload(data, copy)))
                os.replace(draft, folder / "state.json")
        except OSError as error:
            what = f"round {number - 1} was not written to {self.folder}, which has what it had before"
            text = f"StagedFederation: {error.strerror}: {what}"
            raise OSError(error.errno, text) from error
        bank.round = number

    def _payload(self, data: StagedData, copy: tuple[FederationState, Own]) -> dict[str, Json]:
        values = {keystr(path): encode_array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(copy)}
        return {"federation": saving.describe(self.federation), "data": _about(data), "values": values}

    def _saved(self, folder: Path, data: StagedData, like: tuple[FederationState, Own]) -> tuple[FederationState, Own]:
        """Return what a folder has, or what is like it if it has nothing."""
        path = folder / "state.json"
        if not path.exists():
            return like
        what = f"StagedFederation: {path}"
        try:
            payload = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{what} is no JSON: {error}") from None
        mine = {"federation": saving.describe(self.federation), "data": _about(data)}
        if not isinstance(payload, Mapping):
            raise ValueError(f"{what} should be a mapping, not {type(payload).__name__}")
        require_keys(payload, (*mine, "values"), what)
        for name, now in mine.items():
            for field, was, here in differences(payload[name], json.loads(json.dumps(now))):
                raise ValueError(f"{what} is of another run: {name} {field} was {was!r}, and is {here!r} here")
        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        values = payload["values"]
        if not isinstance(values, Mapping) or set(values) != {keystr(path) for path, _ in leaves}:
            raise ValueError(f"{what} has other parameters than these, or another state")
        read = [decode_like(values[at], Spec(leaf.shape, leaf.dtype), f"{what}, {at!r}") for at, leaf in _named(leaves)]
        return jax.tree.unflatten(treedef, read)


def _host_row(row: Rows) -> list[HostArray]:
    return [np.asarray(words(leaf)) for leaf in row]


def _named(leaves: Sequence[tuple[Any, jax.Array]]) -> list[tuple[str, jax.Array]]:
    return [(keystr(path), leaf) for path, leaf in leaves]


def _about(data: StagedData) -> dict[str, Json]:
    """Return what must not change of the data."""
    return {"num_clients": data.num_clients, "examples": int(data.sizes.sum())}


def _require_staged(data: StagedData) -> None:
    if not isinstance(data, StagedData):
        raise TypeError(f"StagedFederation: data should be StagedData, not {type(data).__name__}")


def _lock(folder: Path) -> int:
    """Take a folder for this run alone, until the file that is returned is closed.

    Raises:
      ValueError: if another run has it.
    """
    import fcntl  # not on Windows

    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"StagedFederation: another run is at work in {folder}, or a state of it is still referred to here"
        ) from None
    return lock
