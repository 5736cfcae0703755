"""What a piece of rounds needs of its participants, made ready while the last piece runs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from functional_optimodules.federated import sampling
from functional_optimodules.federated.data import FederatedData, Integers
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.placement import AXIS, SPLIT, WHOLE, device_of, rows_sharding
from functional_optimodules.federated.processes import naming_lost_peers
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.staged.bank import Bank
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.files import memory
from functional_optimodules.federated.staged.peers import together
from functional_optimodules.federated.staged.shards import Shards
from functional_optimodules.federated.state import FederationState, fresh_row, own_sides
from functional_optimodules.random.keys import from_words, is_of_keys, words
from functional_optimodules.types import HostArray, PyTree


class StagedState(NamedTuple):
    """State of a `StagedFederation`.

    Attributes:
      federation: the federation's state, without its bank.
      first: what every client starts from, but for its keys.
      bank: what those who took part have kept since.
      shards: which device has which clients.
    """

    federation: FederationState
    first: Own
    bank: Bank
    shards: Shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block(FederatedData):
    """The examples of some of the clients, such as those that take part in a piece of rounds.

    Attributes:
      ids: int32[num_shards * R], the client of each slot, in each shard in rising order; N in slots without one.
      slots: int32[0].
      clients: int32[num_shards * R], the clients, in rising order; N behind the last.
      places: int32[num_shards * R], the slot of each of these.
      drawn: int32[every, S], the participants of each round of a piece.
      begin: int32 scalar, the number of its first round.
      total: N.
    """

    clients: jax.Array
    places: jax.Array
    drawn: jax.Array
    begin: jax.Array
    total: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        return self.total

    def slots_of(self, clients: jax.Array) -> jax.Array:
        return self.places[jnp.searchsorted(self.clients, clients)]

    def sample(self, key: jax.Array, number: jax.Array, size: int, by_shard: bool) -> jax.Array:
        return self.drawn[number - self.begin]

    def by_client(self, values: jax.Array) -> jax.Array:
        """Put values of this device's slots in the order of `clients`, with zeros for those of other devices."""
        count = self.clients.shape[0]
        at = jnp.where(self.ids < self.total, jnp.searchsorted(self.clients, self.ids), count)
        return jnp.zeros(count).at[at].set(values, mode="drop")

    def partition_specs(self) -> Self:
        specs: Any = super().partition_specs()
        return dataclasses.replace(specs, clients=WHOLE, places=WHOLE, drawn=WHOLE, begin=WHOLE)  # type: ignore[no-any-return]


def read_block(
    data: StagedData,
    shards: Shards,
    split: Sequence[Integers],
    slots: int,
    room: "Rooms",
    drawn: Integers,
    begin: int,
) -> Block:
    """Read the examples of some clients, and put them on the devices.

    Args:
      data: the data of all.
      shards: which device has which clients.
      split: of each shard, the clients, in rising order.
      slots: how many clients a shard has room for.
      room: of each shard of this process, the arrays to read examples into: a CPU takes them over.
      drawn: see `Block`.
      begin: likewise.
    """
    parts, tables = [], []
    for shard in shards.own:
        begins = data.read(split[shard], room[shard])
        table = np.zeros((3, slots), np.int32)
        table[2] = data.num_clients
        table[:, : len(begins)] = begins, data.sizes[split[shard]], split[shard]
        parts.append(room[shard])
        tables.append(table)

    def put(*blocks: HostArray) -> jax.Array:
        return shards.put(dict(zip(shards.own, blocks, strict=True)))

    clients = np.concatenate(split)
    order = np.argsort(clients)
    where = np.concatenate([shard * slots + np.arange(len(each)) for shard, each in enumerate(split)])
    index = np.zeros((2, len(split) * slots), np.int32)
    index[0] = data.num_clients
    index[:, : len(clients)] = clients[order], where[order]
    offsets, sizes, ids = (put(*(table[row] for table in tables)) for row in range(3))
    names, places = map(shards.put_whole, index)
    return Block(
        examples=jax.tree.map(put, *parts),
        offsets=offsets,
        sizes=sizes,
        ids=ids,
        slots=shards.put_whole(np.zeros(0, np.int32)),
        num_shards=len(split),
        smallest=data.smallest,
        largest=data.largest,
        clients=names,
        places=places,
        drawn=shards.put_whole(drawn),
        begin=shards.put_whole(np.array(begin, np.int32)),
        total=data.num_clients,
    )


class Piece(NamedTuple):
    """What a piece of rounds is run on.

    Attributes:
      clients: of each shard of this process, those that take part.
      block: their data.
      bank: their rows.
    """

    clients: dict[int, Integers]
    block: Block
    bank: Rows


Rooms = Mapping[int, PyTree]
"""Of each shard of this process, arrays of examples."""

Program = Callable[[FederationState, Block], tuple[FederationState, Metrics]]
"""What runs a piece of rounds."""


class Stage:
    """What gets ready the next piece of rounds while the last one runs.

    Attributes:
      worker: the thread that reads and writes, one thing after the other.
    """

    def __init__(self, federation: Federation, state: StagedState, data: StagedData, size: int, every: int) -> None:
        """Make room for the participants of a piece.

        Args:
          federation: the federation.
          state: its state.
          data: the clients' data.
          size: how many take part in a round.
          every: rounds of a piece.
        """
        self.federation, self.data, self.shards, self.every = federation, data, state.shards, every
        self.worker = ThreadPoolExecutor(1)
        self.next: Future[Piece] | None = None
        self.left: Rows = []
        self.running: dict[int, Integers] = {shard: np.zeros(0, np.int64) for shard in self.shards.own}
        count = len(self.shards.members)
        slots = jnp.asarray(self.shards.slots) if federation.sampling == "by-device" and count > 1 else None
        key = jnp.copy(local(state.federation.key))  # the state's is donated
        self.draw = functools.partial(_draw, data.num_clients, size, every, count, key, slots)
        self.most = min(size * every, max(map(len, self.shards.members)))
        self._make_room(state, min(self.most, _usual(size * every, count)))

    def _make_room(self, state: StagedState, slots: int) -> None:
        self.slots = slots
        rows = max(self.data.most_rows(each, slots) for each in self.shards.members)
        # One is read into while the other is in use: memory that is new each time takes as long as the reading.
        self.rooms = [{shard: self.data.room(rows) for shard in self.shards.own} for _ in range(2)]
        self.fresh = Fresh(self.federation, state, slots, recycled=_on_host(self.shards.mesh))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.worker.shutdown(wait=True)

    def prepare(self, state: StagedState, number: int, num_rounds: int) -> None:
        """Begin to read what the rounds after some number of them need."""
        drawn = np.asarray(self.draw(np.int32(number)))
        split = self.shards.split(np.unique(drawn[:num_rounds]))
        if (needed := max(map(len, split))) > self.slots:
            self._make_room(state, min(self.most, max(needed, 2 * self.slots)))
        own = {shard: split[shard] for shard in self.shards.own}
        wanted = {shard: ~np.isin(each, self.running[shard], assume_unique=True) for shard, each in own.items()}
        keys = self.fresh.keys(state, own)
        used = self.left  # and written by then, as the worker does one thing after the other

        self.rooms.reverse()

        def read(slots: int = self.slots, room: Rooms = self.rooms[0], fresh: Fresh = self.fresh) -> Piece:
            block = read_block(self.data, self.shards, split, slots, room, drawn, number)
            bank = fresh.read(state.bank, own, keys, wanted, used)
            jax.block_until_ready((block, bank))
            return Piece(own, block, bank)

        self.next = self.worker.submit(read)

    def step(self, program: Program, state: StagedState, number: int, left: int) -> tuple[StagedState, Metrics, Piece]:
        """Run the piece that was made ready, while the next one is.

        Args:
          program: what runs it.
          state: the state, which is donated.
          number: how many rounds there are after it.
          left: how many more there will be.

        Returns:
          The state, the metrics, and the piece, with the rows that it left.
        """
        with together(self.shards.several):
            piece = self._take()
        # On some devices, what is asked for while a piece runs waits for its end.
        if left:
            self.prepare(state, number, left)
        held = state.federation._replace(bank=piece.bank)
        with naming_lost_peers():
            after, metrics = jax.block_until_ready(program(held, piece.block))
        self.left = after.bank
        state = state._replace(federation=after._replace(bank=state.federation.bank))
        return state, metrics, piece._replace(bank=self.left)

    def _take(self) -> Piece:
        """Return what the next piece needs, with the rows that the last one left."""
        assert self.next is not None
        piece, last = self.next.result(), self.running
        self.running = piece.clients
        if not self.left:
            return piece
        pairs = {}
        for shard, clients in piece.clients.items():
            _, *both = np.intersect1d(last[shard], clients, assume_unique=True, return_indices=True)
            pairs[shard] = np.array(both, np.int32)
        return piece._replace(bank=_carry(self.shards, piece.bank, self.left, pairs, piece.block.per_shard))

    def write(self, bank: Bank, piece: Piece, number: int) -> None:
        """Write the rows that a piece left after some number of rounds."""
        blocks = [self.shards.take(leaf) for leaf in piece.bank]
        for shard, clients in piece.clients.items():
            bank.write(clients, [each[shard][: len(clients)] for each in blocks], number)


def _usual(drawn: int, shards: int) -> int:
    """Return how many of so many draws a shard hardly ever exceeds."""
    mean = drawn / shards
    return drawn if shards == 1 else math.ceil(mean + 6 * math.sqrt(mean))


class Fresh:
    """The rows of clients, some of which have none as yet: of these, what they start from.

    Attributes:
      rows: what all start from, without their keys.
      slots: how many rows there is room for in a shard.
      room: the room, which is filled anew for each piece.
    """

    def __init__(self, federation: Federation, state: StagedState, slots: int, recycled: bool = False) -> None:
        """Make room.

        Args:
          federation: the federation.
          state: its state.
          slots: how many rows there is room for in a shard.
          recycled: whether rows are put into the arrays of rows that were used up, rather than new ones.
        """
        self.recycled = recycled
        self.federation, self.slots, self.shards = federation, slots, state.shards
        self.rows, self.like = state.bank.kept, state.federation.bank
        self.placed: list[NamedSharding | None] = [None] * len(self.rows)
        if (mesh := self.shards.mesh) is not None:
            row = own_sides(federation, state.federation).row(state.first)
            self.placed = [rows_sharding(mesh, leaf) for leaf in row]
        # In memory that JAX copies, of its own to donate, and leaves for the next piece; or takes over, to copy rows.
        self.room = {
            shard: [memory((slots, *raw.shape), raw.dtype, aligned=recycled) for raw in self.rows]
            for shard in self.shards.own
        }

    def keys(self, state: StagedState, clients: Mapping[int, Integers]) -> dict[int, list[HostArray | None]]:
        """Return the keys that clients start from, for each array of a row that has such."""
        if not any(map(is_of_keys, self.like)):
            return {shard: [None] * len(self.rows) for shard in clients}
        held = state.federation, state.first
        if self.shards.several:
            held = jax.tree.map(local, held)
        found = {}
        for shard, each in clients.items():
            padded = np.zeros(self.slots, np.int32)
            padded[: len(each)] = each
            made = _first_keys(self.federation, *held, padded)
            found[shard] = [None if keys is None else np.asarray(keys) for keys in made]
        return found

    def read(
        self,
        bank: Bank,
        clients: Mapping[int, Integers],
        keys: Mapping[int, list[HostArray | None]],
        wanted: Mapping[int, NDArray[np.bool_]],
        used: Sequence[jax.Array] = (),
    ) -> Rows:
        """Put the rows of those clients that are wanted on the devices, given the keys that they start from.

        Rows that were used up are gone where they are recycled.
        """
        for shard, room in self.room.items():
            self._fill(bank, clients[shard], keys[shard], wanted[shard], room)
        rows = []
        for index, (like, place) in enumerate(zip(self.like, self.placed, strict=True)):
            raw = self.shards.put({shard: room[index] for shard, room in self.room.items()}, place)
            rows.append(from_words(raw, like))
        if self.recycled:
            # On the CPU, a new array is memory that the system has to clear first, page by page.
            if [leaf.shape for leaf in used] != [leaf.shape for leaf in rows]:
                used = jax.tree.map(jnp.zeros_like, rows)
            pairs = {shard: np.tile(np.flatnonzero(each).astype(np.int32), (2, 1)) for shard, each in wanted.items()}
            rows = _carry(self.shards, list(used), rows, pairs, self.slots)
        # The room is free again.
        return jax.block_until_ready(rows)

    def row(self, state: StagedState, shard: int, client: int) -> Rows:
        """Return the row of one client of a shard, along a leading axis of one."""
        clients, room = np.array([client]), self.room[shard]
        (own,) = self.keys(state, {shard: clients}).values()
        self._fill(state.bank, clients, own, np.array([True]), room)
        return [jnp.asarray(from_words(raw, like)) for raw, like in zip(room, self.like, strict=True)]

    def _fill(
        self,
        bank: Bank,
        clients: Integers,
        keys: list[HostArray | None],
        wanted: NDArray[np.bool_],
        room: list[HostArray],
    ) -> None:
        new = bank.read(clients, wanted, room)
        for row, common, own in zip(room, self.rows, keys, strict=True):
            row[new] = common if own is None else own[new]


def host_row(row: Rows) -> list[HostArray]:
    """Return a row as the bank's file has it."""
    return [np.asarray(words(leaf)) for leaf in row]


def local(leaf: jax.Array) -> jax.Array:
    """Return this process's copy of an array that each device has."""
    return from_words(words(leaf).addressable_data(0), leaf)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    total: int, size: int, every: int, shards: int, key: jax.Array, slots: jax.Array | None, number: jax.Array
) -> jax.Array:
    """Draw the participants of the rounds of a piece: int32[every, size]; with slots as many from each shard."""

    def draw(number: jax.Array) -> jax.Array:
        own = sampling.round_key(key, number, total)
        if slots is None:
            return sampling.draw(own, total, size)
        return sampling.draw_by_shard(own, slots, -(-total // shards), shards, size)

    return jax.lax.map(draw, number + jnp.arange(every, dtype=jnp.int32))


def _on_host(mesh: Mesh | None) -> bool:
    """Whether the devices' memory is the host's."""
    return device_of(mesh).platform == "cpu"


def _carry(shards: Shards, bank: Rows, left: Rows, pairs: Mapping[int, Integers], slots: int) -> Rows:
    """Put some rows of one bank in the place of some of another, which is used up.

    Args:
      shards: which device has which clients.
      bank: where rows are put.
      left: where they come from.
      pairs: for each shard, int32[2, count]: from where, and to where.
      slots: how many there are at most.
    """
    tables = {}
    for shard, each in pairs.items():
        tables[shard] = np.zeros((1, 2, slots + 1), np.int32)
        tables[shard][0, :, : each.shape[1]] = each
        tables[shard][0, :, -1] = each.shape[1]
    return _carried(shards.mesh, bank, left, shards.put(tables))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _carried(mesh: Mesh | None, bank: Rows, left: Rows, pairs: jax.Array) -> Rows:

    def carry(bank: Rows, left: Rows, pairs: jax.Array) -> Rows:
        def put(index: jax.Array, bank: Rows) -> Rows:
            source, target = pairs[0, 0, index], pairs[0, 1, index]
            rows = [jax.lax.dynamic_index_in_dim(leaf, source, keepdims=False) for leaf in left]
            put_row = jax.lax.dynamic_update_index_in_dim
            return [put_row(leaf, row, target, 0) for leaf, row in zip(bank, rows, strict=True)]

        return jax.lax.fori_loop(0, pairs[0, 0, -1], put, bank)

    if mesh is None:
        return carry(bank, left, pairs)
    run = jax.shard_map(carry, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, axis_names={AXIS}, check_vma=False)
    return run(bank, left, pairs)


@functools.partial(jax.jit, static_argnums=0)
def _first_keys(
    federation: Federation, state: FederationState, first: Own, clients: jax.Array
) -> list[jax.Array | None]:
    """Return the keys that clients start from, for each array of a row that has such: raw, with a leading axis."""
    sides = own_sides(federation, state)

    def keys(client: jax.Array) -> list[jax.Array | None]:
        return [words(leaf) if is_of_keys(leaf) else None for leaf in fresh_row(sides, first, client)]

    return jax.vmap(keys)(clients)
