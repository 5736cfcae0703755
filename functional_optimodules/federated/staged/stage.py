"""What a piece of rounds needs of its participants, made ready while the last piece runs."""

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from functional_optimodules.federated import sampling
from functional_optimodules.federated.data import FederatedData, Integers
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.staged.bank import Bank
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.files import memory
from functional_optimodules.federated.state import FederationState, fresh_row, own_sides
from functional_optimodules.random.keys import from_words, is_key
from functional_optimodules.types import HostArray


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


class Piece(NamedTuple):
    """What a piece of rounds is run on.

    Attributes:
      clients: int[U], those that take part.
      block: their data.
      bank: their rows.
    """

    clients: Integers
    block: Block
    bank: Rows


class Stage:
    """What gets ready the next piece of rounds while the last one runs.

    Attributes:
      worker: the thread that reads and writes, one thing after the other.
    """

    def __init__(self, federation: Federation, state: StagedState, data: StagedData, size: int, every: int) -> None:
        self.data, self.size, self.every = data, size, every
        self.slots = min(size * every, data.num_clients)
        self.fresh = Fresh(federation, state, self.slots)
        self.rows = data.most_rows(self.slots)
        self.worker = ThreadPoolExecutor(1)
        self.next: Future[Piece] | None = None
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

    def take(self) -> Piece:
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
    ) -> Piece:
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
        piece = Piece(clients, block, [from_words(raw, leaf) for raw, leaf in zip(rows, like, strict=True)])
        jax.block_until_ready((piece.block, piece.bank))
        return piece


class Fresh:
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
        self.room = [memory((slots, *raw.shape), raw.dtype, aligned=False) for raw in self.rows]

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
