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
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from functional_optimodules.config.fields import differences, require_keys
from functional_optimodules.federated import checks, sampling, saving
from functional_optimodules.federated.data import FederatedData, Integers
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.federation import Evaluate, Federation, check_rounds, drive, run_piece
from functional_optimodules.federated.options import History
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.state import FederationState, fresh_row, own_sides, start
from functional_optimodules.random.keys import is_key
from functional_optimodules.types import HostArray, Json, Params, PyTree
from functional_optimodules.wire.arrays import decode_like, encode_array
from functional_optimodules.wire.paths import Spec, keystr

Bytes = NDArray[np.uint8]

# How many buffers POSIX lets a call fill, at most.
_MOST_BUFFERS = 1024
# What XLA asks of memory that it takes over.
_ALIGNMENT = 64


class StagedData:
    """The examples of N clients on the host or in files, client after client.

    Attributes:
      examples: pytree of arrays and of files, of M rows each.
      sizes: int64[N], how many rows each client has.
      offsets: int64[N], where they begin.
    """

    def __init__(self, examples: PyTree, sizes: ArrayLike | str | Path) -> None:
        """Take arrays and files as they are: nothing is read but their headers, and the sizes.

        Args:
          examples: a pytree of arrays, or paths of `.npy` files, with one example a row:
            those of client 0 first, then those of client 1, and so on. Files are read as
            they are needed; memory that is mapped (`np.load(mmap_mode="r")`) is too, but
            counts as this process's once it was.
          sizes: int[N], how many rows each client has; or the path of a `.npy` file.

        Raises:
          ValueError: if a file is no `.npy` file of C order, or shorter than it says; if there is
            no client, one has no examples, or the arrays are not of as many rows as all have.
        """
        self.examples = jax.tree.map(
            lambda leaf: _File(leaf) if isinstance(leaf, str | Path) else _Array(leaf), examples
        )
        counts = _load(sizes) if isinstance(sizes, str | Path) else np.asarray(sizes)
        if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu":
            raise ValueError(f"StagedData: sizes of {counts.dtype}{list(counts.shape)}: expected an integer a client")
        if (empty := np.flatnonzero(counts < 1)).size:
            raise ValueError(f"StagedData: client {empty[0]} has no examples: its size is {counts[empty[0]]}")
        self.sizes = counts.astype(np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        rows = int(self.sizes.sum())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.examples):
            if leaf.shape[:1] != (rows,):
                raise ValueError(
                    f"StagedData: {keystr(path)!r} of shape {list(leaf.shape)}: expected {rows} rows in front, as many "
                    f"as the {len(counts)} clients have"
                )

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return len(self.sizes)

    def most_rows(self, clients: int) -> int:
        """Return how many rows so many clients have together at most."""
        return int(np.partition(self.sizes, -clients)[-clients:].sum())

    def read(self, clients: Integers, rows: int) -> tuple[PyTree, Integers]:
        """Read the examples of some clients.

        Args:
          clients: their numbers, in rising order.
          rows: how many rows the arrays are to have, at least as many as the clients'.

        Returns:
          The examples in arrays of so many rows, and where in these each client's begin.

        Raises:
          ValueError: if a file ends before it should.
        """
        sizes = self.sizes[clients]
        places = np.cumsum(sizes) - sizes
        plan = list(zip(self.offsets[clients].tolist(), places.tolist(), sizes.tolist(), strict=True))
        return jax.tree.map(lambda leaf: leaf.read(plan, rows), self.examples), places


Plan = Sequence[tuple[int, int, int]]
"""Of each run of rows: where it begins, where it is put, and how many there are."""


class _Array:
    """An array of examples in memory, or mapped into it."""

    def __init__(self, array: ArrayLike) -> None:
        self.array = array if isinstance(array, np.ndarray) else np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, plan: Plan, rows: int) -> HostArray:
        found = _memory((rows, *self.shape[1:]), self.dtype, aligned=True)
        for begin, place, count in plan:
            found[place : place + count] = self.array[begin : begin + count]
        return found


class _File:
    """An array of examples in a `.npy` file."""

    def __init__(self, path: str | Path) -> None:
        mapped = _load(path, "r")
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.begin = int(getattr(mapped, "offset", 0))
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def read(self, plan: Plan, rows: int) -> HostArray:
        found = _memory((rows, *self.shape[1:]), self.dtype, aligned=True)
        raw, width = _bytes(found), found.dtype.itemsize * math.prod(self.shape[1:])
        for begin, place, count in plan:
            try:
                _transfer(os.preadv, self.file, [raw[place : place + count].reshape(-1)], self.begin + begin * width)
            except EOFError as error:
                raise ValueError(f"StagedData: {self.path} was cut short: {error}") from None
        return found


def _memory(shape: tuple[int, ...], dtype: np.dtype[Any], aligned: bool) -> HostArray:
    """Return an array without values: on the CPU, JAX takes one that is aligned over, and copies one that is not."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + 2 * _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT + (0 if aligned else _ALIGNMENT // 2)
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _load(path: str | Path, mode: Any = None) -> HostArray:
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"StagedData: {path} is no .npy file, or was cut short: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"StagedData: {path} should be a .npy file of one array, not an archive")
    if not array.flags.c_contiguous:
        raise ValueError(f"StagedData: {path} is in Fortran's order: save it with `np.ascontiguousarray`")
    return array


def _bytes(array: HostArray) -> Bytes:
    """Return an array as uint8[rows, bytes of a row]."""
    width = array.dtype.itemsize * math.prod(array.shape[1:])
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8).reshape(len(array), width)


def _transfer(call: Callable[..., int], file: int, buffers: list[Bytes], at: int) -> None:
    """Read or write all of some buffers, one after the other in the file.

    Raises:
      EOFError: if the file ends before that.
    """
    while buffers:
        moved = call(file, buffers[:_MOST_BUFFERS], at)
        if not moved and any(len(buffer) for buffer in buffers):
            raise EOFError(f"it ends at byte {at}")
        at += moved
        # All at once, but where a signal or a limit of the system comes in between.
        while buffers and moved >= len(buffers[0]):
            moved -= len(buffers.pop(0))
        if moved:
            buffers[0] = buffers[0][moved:]


class Bank:
    """What each client keeps between rounds, in a file, of which no more than what was written takes room.

    Of a folder, a client has room for two rows: one counts, the other is written. Each has a
    stamp, the number of rounds after which it was, 0 for a row that was not.

    Attributes:
      kept: what a client's row is at first, but for its keys.
      folder: where it is; `None` for one that goes as the process does.
      round: the number of rounds after which its rows are.
      writing: what is being written, if anything.
    """

    def __init__(self, kept: Sequence[HostArray], num_clients: int, folder: Path | None, number: int) -> None:
        """Open the bank as it was after some number of rounds.

        Args:
          kept: what a client's row is at first, but for its keys.
          num_clients: N.
          folder: its folder; `None` for none.
          number: how many rounds; what was written after a later one does not count.

        Raises:
          ValueError: if a file of the folder is of another size.
        """
        self.kept, self.folder, self.round = kept, folder, number
        self.writing: Future[None] | None = None
        self.width = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in kept)
        self.copies = 1 if folder is None else 2
        shape = num_clients, self.copies
        if folder is None or not self.width:
            self.stamps: NDArray[np.int32] = np.zeros(shape, np.int32)
        else:
            path = _room(folder / "stamps", 4 * math.prod(shape), new=not number, full=True)
            self.stamps = np.memmap(path, np.int32, "r+", shape=shape)
            self.stamps[self.stamps > number] = 0
        size = self.width * math.prod(shape)
        if folder is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                self.file = os.dup(file.fileno())
        else:
            self.file = os.open(_room(folder / "rows", size, new=not number), os.O_RDWR)
        weakref.finalize(self, os.close, self.file)

    def settle(self) -> None:
        """Wait until all is written."""
        if self.writing is not None:
            self.writing.result()

    def read(self, clients: Integers, wanted: NDArray[np.bool_], rows: Sequence[HostArray]) -> Integers:
        """Read the rows of those clients that are wanted into arrays.

        Returns:
          Which of the clients wanted have no row as yet: indices.
        """
        stamps, raw = self.stamps[clients], [_bytes(leaf) for leaf in rows]
        places = (clients * self.copies + stamps.argmax(axis=1)) * self.width
        there = stamps.max(axis=1) > 0
        for index in np.flatnonzero(there & wanted).tolist():
            _transfer(os.preadv, self.file, [leaf[index] for leaf in raw], int(places[index]))
        return np.flatnonzero(~there & wanted)

    def write(self, clients: Integers, rows: Sequence[HostArray], number: int) -> None:
        """Write the rows that clients have after some number of rounds, beside those that count.

        Raises:
          OSError: if the disk is full, or fails.
        """
        stamps, raw = self.stamps[clients], [_bytes(leaf) for leaf in rows]
        chosen = np.where(stamps.any(axis=1), stamps.argmax(axis=1) + 1, 0) % self.copies
        places = ((clients * self.copies + chosen) * self.width).tolist()
        for index, place in enumerate(places):
            _transfer(os.pwritev, self.file, [leaf[index] for leaf in raw], place)
        self.stamps[clients, chosen] = number


def _room(path: Path, size: int, new: bool, full: bool = False) -> Path:
    """Make a file of zeros, if it is new and not there; without holes, if it is to be full."""
    if new and not path.exists():
        draft = path.with_suffix(".partial")
        with draft.open("wb") as file:
            if full:  # where memory is mapped to a hole, a full disk ends the process
                file.write(bytes(size))
            file.truncate(size)
        os.replace(draft, path)
    if not path.exists():
        raise ValueError(f"StagedFederation: {path} is missing, without which the run cannot go on")
    if path.stat().st_size != size:
        raise ValueError(f"StagedFederation: {path} has {path.stat().st_size} bytes: expected {size}")
    return path


class StagedState(NamedTuple):
    """State of a `StagedFederation`.

    Attributes:
      federation: the federation's state, without its bank.
      first: what every client starts from, but for its keys.
      bank: what those who took part have kept since.
    """

    federation: FederationState
    first: Own
    bank: Bank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block(FederatedData):
    """The examples of those clients that take part in a piece of rounds.

    Attributes:
      ids: int32[R], the client of each slot, in rising order; N in slots without one.
      slots: int32[0].
      drawn: int32[every, S], the participants of each round of the piece.
      begin: int32 scalar, the number of its first round.
      total: N.
    """

    drawn: jax.Array
    begin: jax.Array
    total: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        return self.total

    def slots_of(self, clients: jax.Array) -> jax.Array:
        return jnp.searchsorted(self.ids, clients).astype(jnp.int32)

    def sample(self, key: jax.Array, number: jax.Array, size: int, by_shard: bool) -> jax.Array:
        return self.drawn[number - self.begin]


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
            return StagedState(state, first, Bank(_raw_row(row), data.num_clients, None, 0))
        folder = Path(self.folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"StagedFederation: folder={str(self.folder)!r} is a file: expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            state, first = self._saved(folder, data, (state, first))
            bank = Bank(_raw_row(sides.row(first)), data.num_clients, folder, int(state.round))
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
        with _Stage(self.federation, state, data, size, every) as stage:
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
            fresh = _Fresh(self.federation, state, 1)
            rows = fresh.read(state.bank, clients, fresh.keys(state, clients), np.array([True]))
            bank = [_as_keys(raw, like) for raw, like in zip(rows, held.bank, strict=True)]
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
            bank.write(clients, [np.asarray(_raw(leaf))[: len(clients)] for leaf in rows], number)
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


class _Piece(NamedTuple):
    """What a piece of rounds is run on.

    Attributes:
      clients: int[U], those that take part.
      block: their data.
      bank: their rows.
    """

    clients: Integers
    block: Block
    bank: Rows


class _Stage:
    """What gets ready the next piece of rounds while the last one runs.

    Attributes:
      worker: the thread that reads and writes, one thing after the other.
    """

    def __init__(self, federation: Federation, state: StagedState, data: StagedData, size: int, every: int) -> None:
        self.data, self.size, self.every = data, size, every
        self.slots = min(size * every, data.num_clients)
        self.fresh = _Fresh(federation, state, self.slots)
        self.rows = data.most_rows(self.slots)
        self.worker = ThreadPoolExecutor(1)
        self.next: Future[_Piece] | None = None
        self.left: Rows = []
        self.running: Integers = np.zeros(0, np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.worker.shutdown(wait=True)

    def prepare(self, state: StagedState, number: int, num_rounds: int) -> None:
        """Begin to read what the rounds after some number of them need."""
        begin = jnp.int32(number)
        drawn = _draw(self.data.num_clients, self.size, self.every, state.federation.key, begin)
        clients = np.unique(np.asarray(drawn)[:num_rounds])
        wanted = ~np.isin(clients, self.running, assume_unique=True)
        read = functools.partial(self._read, state.bank, state.federation.bank, self.fresh.keys(state, clients))
        self.next = self.worker.submit(read, clients, wanted, drawn, begin)

    def take(self) -> _Piece:
        """Return what the next piece needs, with the rows that the last one left."""
        assert self.next is not None
        piece, last = self.next.result(), self.running
        self.running = piece.clients
        if not self.left:
            return piece
        _, source, target = np.intersect1d(last, piece.clients, assume_unique=True, return_indices=True)
        pairs = np.zeros((2, self.slots), np.int32)
        pairs[:, : len(source)] = source, target
        return piece._replace(bank=_carry(piece.bank, self.left, pairs, np.int32(len(source))))

    def _read(
        self,
        bank: Bank,
        like: Rows,
        keys: list[HostArray | None],
        clients: Integers,
        wanted: NDArray[np.bool_],
        drawn: jax.Array,
        begin: jax.Array,
    ) -> _Piece:
        """Read what clients need, but for the rows that are handed on."""
        examples, places = self.data.read(clients, self.rows)
        table = np.zeros((3, self.slots), np.int32)
        table[2] = self.data.num_clients
        table[:, : len(clients)] = places, self.data.sizes[clients], clients
        offsets, sizes, ids = jax.device_put(tuple(table))
        block = Block(
            examples=jax.device_put(examples),
            offsets=offsets,
            sizes=sizes,
            ids=ids,
            slots=jnp.zeros(0, jnp.int32),
            num_shards=1,
            smallest=int(self.data.sizes.min()),
            largest=int(self.data.sizes.max()),
            drawn=drawn,
            begin=begin,
            total=self.data.num_clients,
        )
        rows = jax.device_put(self.fresh.read(bank, clients, keys, wanted))
        piece = _Piece(clients, block, [_as_keys(raw, leaf) for raw, leaf in zip(rows, like, strict=True)])
        jax.block_until_ready((piece.block, piece.bank))
        return piece


class _Fresh:
    """The rows of clients, some of which have none as yet: of these, what they start from.

    Attributes:
      rows: what all start from, without their keys.
      slots: how many rows there is room for.
      room: the room, which is filled anew for each piece.
    """

    def __init__(self, federation: Federation, state: StagedState, slots: int) -> None:
        self.federation, self.slots = federation, slots
        self.rows = state.bank.kept
        # In memory that JAX copies, of its own to donate, and leaves for the next piece.
        self.room = [_memory((slots, *raw.shape), raw.dtype, aligned=False) for raw in self.rows]

    def keys(self, state: StagedState, clients: Integers) -> list[HostArray | None]:
        """Return the keys that clients start from, for each array of a row that has such."""
        if not any(map(is_key, state.federation.bank)):
            return [None] * len(self.rows)
        padded = np.zeros(self.slots, np.int32)
        padded[: len(clients)] = clients
        made = _first_keys(self.federation, state.federation, state.first, jnp.asarray(padded))
        return [None if keys is None else np.asarray(keys) for keys in made]

    def read(
        self, bank: Bank, clients: Integers, keys: list[HostArray | None], wanted: NDArray[np.bool_]
    ) -> list[HostArray]:
        """Return the rows of those clients that are wanted, given the keys that they start from."""
        new = bank.read(clients, wanted, self.room)
        for row, common, own in zip(self.room, self.rows, keys, strict=True):
            row[new] = common if own is None else own[new]
        return self.room


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(total: int, size: int, every: int, key: jax.Array, number: jax.Array) -> jax.Array:
    """Draw the participants of the rounds of a piece: int32[every, size]."""

    def draw(number: jax.Array) -> jax.Array:
        return sampling.draw(sampling.round_key(key, number, total), total, size)

    return jax.lax.map(draw, number + jnp.arange(every, dtype=jnp.int32))


@functools.partial(jax.jit, donate_argnums=0)
def _carry(bank: Rows, left: Rows, pairs: jax.Array, count: jax.Array) -> Rows:
    """Put some rows of one bank in the place of some of another."""

    def put(index: jax.Array, bank: Rows) -> Rows:
        source, target = pairs[0, index], pairs[1, index]
        rows = [jax.lax.dynamic_index_in_dim(leaf, source, keepdims=False) for leaf in left]
        put_row = jax.lax.dynamic_update_index_in_dim
        return [put_row(leaf, row, target, 0) for leaf, row in zip(bank, rows, strict=True)]

    return jax.lax.fori_loop(0, count, put, bank)


@functools.partial(jax.jit, static_argnums=0)
def _first_keys(
    federation: Federation, state: FederationState, first: Own, clients: jax.Array
) -> list[jax.Array | None]:
    """Return the keys that clients start from, for each array of a row that has such: raw, with a leading axis."""
    sides = own_sides(federation, state)

    def keys(client: jax.Array) -> list[jax.Array | None]:
        return [jax.random.key_data(leaf) if is_key(leaf) else None for leaf in fresh_row(sides, first, client)]

    return jax.vmap(keys)(clients)


def _raw_row(row: Rows) -> list[HostArray]:
    return [np.asarray(_raw(leaf)) for leaf in row]


def _raw(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _as_keys(raw: ArrayLike, like: jax.Array) -> jax.Array:
    array = jnp.asarray(raw)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if is_key(like) else array


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
