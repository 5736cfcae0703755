"""The data of all clients, given once: flat rows, and where each client's begin.

Unequal clients cost their own examples and nothing more: there is no padding to
the largest. Over several devices the rows lie in one block a device, of as many
clients each to within one, and never move.
"""

import dataclasses
import functools
import heapq
import zlib
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from functional_optimodules.federated import partition, sampling
from functional_optimodules.federated.placement import SPLIT, WHOLE, has_whole_models, mesh_size, replicate, sharding
from functional_optimodules.types import PyTree

Integers = NDArray[np.integer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FederatedData:
    """The examples of N clients, in `num_shards` blocks of R slots each.

    Build one with `from_clients`, `from_ids` or, with several processes, `from_local`.

    Attributes:
      examples: pytree of arrays whose leading axis is the examples', client after
        client, block after block.
      offsets: int32[num_shards * R], where the examples of a slot begin in its block.
      sizes: int32[num_shards * R], how many they are; 0 in slots without a client.
      ids: int32[num_shards * R], the client of each slot; N in slots without one.
      slots: int32[N], the slot of each client.
      num_shards: the number of blocks.
      smallest: the number of examples of the smallest client.
      largest: the number of examples of the largest client.
    """

    examples: PyTree
    offsets: jax.Array
    sizes: jax.Array
    ids: jax.Array
    slots: jax.Array
    num_shards: int = dataclasses.field(metadata={"static": True})
    smallest: int = dataclasses.field(metadata={"static": True})
    largest: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return self.slots.shape[0]

    @property
    def per_shard(self) -> int:
        """R, the number of slots of a block."""
        return self.ids.shape[0] // self.num_shards

    def slots_of(self, clients: jax.Array) -> jax.Array:
        """Return the slots of some clients."""
        return self.slots[clients]

    def sample(self, key: jax.Array, number: jax.Array, size: int, by_shard: bool) -> jax.Array:
        """Draw the participants of the round of that number: int32[size]; as many from each shard, if that is asked."""
        key = sampling.round_key(key, number, self.num_clients)
        if not by_shard or self.num_shards == 1:
            return sampling.draw(key, self.num_clients, size)
        return sampling.draw_by_shard(key, self.slots, self.per_shard, self.num_shards, size)

    def by_client(self, values: jax.Array) -> jax.Array:
        """Put values of a device's slots in the order of clients, with zeros for those of other devices."""
        return jnp.zeros(self.num_clients).at[self.ids].set(values, mode="drop")

    def partition_specs(self) -> Self:
        """Say of each array whether it is split over a mesh or whole on every device, as `shard_map` asks."""
        return dataclasses.replace(jax.tree.map(lambda _: SPLIT, self), slots=WHOLE)

    @classmethod
    def from_clients(cls, clients: Sequence[PyTree], mesh: Mesh | None = None) -> Self:
        """Gather the examples of each client.

        Args:
          clients: for each client a pytree of arrays, all with the same number of
            examples in front.
          mesh: devices to spread the clients over, along the axis `clients`.

        Raises:
          ValueError: if there is no client, one has no examples, its arrays
            differ in their number, or clients differ in anything else; or if the
            mesh has no axis `clients`.
        """
        if not len(clients):
            raise ValueError("FederatedData: there is no client")
        total, shards = len(clients), mesh_size(mesh)
        trees = [jax.tree.map(np.asarray, client) for client in clients]
        sizes = _count_examples(trees, range(total))
        blocks = balance(sizes, shards)
        rows = max(int(sizes[block].sum()) for block in blocks)
        laid = _lay_out(blocks, trees, sizes, np.arange(total), rows, -(-total // shards), total)
        examples, offsets, counts, ids = jax.device_put(laid, sharding(mesh, SPLIT))
        slots = replicate(_find_slots(laid[-1], total), mesh)
        return cls(examples, offsets, counts, ids, slots, shards, int(sizes.min()), int(sizes.max()))

    @classmethod
    def from_ids(cls, examples: PyTree, ids: ArrayLike, mesh: Mesh | None = None) -> Self:
        """Gather examples by the client that each belongs to.

        Args:
          examples: a pytree of arrays with one example a row.
          ids: for each row, its client: any values that sort. Clients are
            numbered in their order.
          mesh: as for `from_clients`.

        Raises:
          ValueError: as for `from_clients`, or if `ids` is not one value a row.
        """
        ids = np.asarray(ids)
        rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
        if rows != {ids.shape} or ids.ndim != 1:
            raise ValueError(f"FederatedData: ids of shape {ids.shape} for arrays of {sorted(rows)} rows")
        return cls.from_indices(examples, partition.by_id(ids), mesh)

    @classmethod
    def from_indices(cls, examples: PyTree, parts: Sequence[ArrayLike], mesh: Mesh | None = None) -> Self:
        """Gather the rows of each client, as the partitioners of `partition` return them.

        Args:
          examples: a pytree of arrays with one example a row.
          parts: for each client, the indices of its rows.
          mesh: as for `from_clients`.

        Raises:
          ValueError: as for `from_clients`.
        """
        arrays = jax.tree.map(np.asarray, examples)
        return cls.from_clients([jax.tree.map(lambda a, p=part: a[np.asarray(p)], arrays) for part in parts], mesh)

    @classmethod
    def from_local(cls, clients: Mapping[int, PyTree], mesh: Mesh) -> Self:
        """Gather the examples of each client, where every process gives its own clients' only.

        A client's examples stay on the devices of the process that gave them; the
        processes tell each other the clients' numbers and sizes. All call it at
        the same time.

        Args:
          clients: by its number, each client of this process, as for `from_clients`.
          mesh: devices of all processes, along the axis `clients`.

        Raises:
          ValueError: in every process, as for `from_clients`, or if the clients of
            all processes are not numbered from 0 to N - 1, each once; or if the mesh
            has another axis than `clients`.
        """
        mesh_size(mesh)
        if not has_whole_models(mesh):
            raise ValueError(f"FederatedData: over processes a mesh has one axis, 'clients', and not {mesh.axis_names}")
        names = sorted(clients)
        trees = [jax.tree.map(np.asarray, clients[name]) for name in names]
        fault: ValueError | None = None
        try:
            if not trees:
                raise ValueError(f"FederatedData: process {jax.process_index()} has no client")
            sizes = _count_examples(trees, names)
        except ValueError as error:
            fault, sizes = error, np.zeros(len(names), np.int64)
        own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
        all_sizes, per_shard = _agree(names, sizes, trees, sum(own), fault)
        total = len(all_sizes)
        blocks = balance(sizes, sum(own))
        rows = _gather(np.int32(max(int(sizes[block].sum()) for block in blocks))).max()
        laid = _lay_out(blocks, trees, sizes, np.array(names), int(rows), per_shard, total)
        put = functools.partial(jax.make_array_from_process_local_data, sharding(mesh, SPLIT))
        examples, offsets, counts, ids = jax.tree.map(put, laid)
        slots = replicate(_find_slots(np.asarray(multihost_utils.process_allgather(ids, tiled=True)), total), mesh)
        return cls(examples, offsets, counts, ids, slots, len(own), int(all_sizes.min()), int(all_sizes.max()))


def balance(sizes: ArrayLike, num_shards: int) -> list[Integers]:
    """Deal clients out to shards: as many to each, to within one, and about as many examples.

    The largest first, each to the shard that has the fewest examples among those
    with a free slot.

    Returns:
      The clients of each shard, in rising order.
    """
    sizes = np.asarray(sizes)
    least, longer = divmod(len(sizes), num_shards)
    loads = [(0, shard) for shard in range(num_shards)]
    members: list[list[int]] = [[] for _ in range(num_shards)]
    for client in np.argsort(-sizes, kind="stable").tolist():
        load, shard = loads[0]
        while len(members[shard]) >= least + (longer > 0):  # full, and it stays so
            heapq.heappop(loads)
            load, shard = loads[0]
        members[shard].append(client)
        heapq.heapreplace(loads, (load + int(sizes[client]), shard))
        longer -= len(members[shard]) > least
    return [np.sort(np.array(block, np.int64)) for block in members]


def _lay_out(
    blocks: list[Integers], trees: list[PyTree], sizes: Integers, ids: Integers, rows: int, slots: int, num_clients: int
) -> tuple[PyTree, Integers, Integers, Integers]:
    """Lay out the examples of each block's clients one after the other, in blocks of so many rows and slots.

    Returns:
      The first attributes of `FederatedData`: `examples`, `offsets`, `sizes` and `ids`.
    """
    leaves, treedef = jax.tree.flatten(trees[0])
    flats = [np.zeros((len(blocks), rows, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    table = np.zeros((3, len(blocks), slots), np.int32)
    table[2] = num_clients
    for shard, block in enumerate(blocks):
        offsets = np.cumsum(sizes[block]) - sizes[block]
        table[:, shard, : len(block)] = offsets, sizes[block], ids[block]
        for client, at in zip(block, offsets, strict=True):
            for flat, part in zip(flats, jax.tree.leaves(trees[client]), strict=True):
                flat[shard, at : at + len(part)] = part
    examples = jax.tree.unflatten(treedef, [flat.reshape(-1, *flat.shape[2:]) for flat in flats])
    return examples, *table.reshape(3, -1)


def _find_slots(ids: Integers, num_clients: int) -> Integers:
    slots = np.zeros(num_clients, np.int32)
    taken = np.flatnonzero(ids < num_clients)
    slots[ids[taken]] = taken
    return slots


def _count_examples(trees: Sequence[PyTree], names: Sequence[int]) -> Integers:
    """Check the clients' examples, and return how many each has."""
    return np.array([_size(tree, name, trees[0], names[0]) for tree, name in zip(trees, names, strict=True)], np.int64)


def _size(tree: PyTree, name: int, like: PyTree, other_name: int) -> int:
    leaves = jax.tree.leaves(tree)
    structure, expected = str(jax.tree.structure(tree)), str(jax.tree.structure(like))
    if structure != expected:
        raise ValueError(f"FederatedData: client {name} has {structure}, and client {other_name} {expected}")
    counts = {leaf.shape[:1] for leaf in leaves}
    if len(counts) != 1 or counts == {()}:
        shapes = [list(leaf.shape) for leaf in leaves]
        raise ValueError(f"FederatedData: client {name} has arrays of different numbers of examples: shapes {shapes}")
    if counts == {(0,)}:
        raise ValueError(f"FederatedData: client {name} has no examples")
    for leaf, other in zip(leaves, jax.tree.leaves(like), strict=True):
        if leaf.shape[1:] != other.shape[1:] or leaf.dtype != other.dtype:
            raise ValueError(
                f"FederatedData: client {name} has examples of {leaf.dtype}{list(leaf.shape[1:])}, "
                f"and client {other_name} of {other.dtype}{list(other.shape[1:])}"
            )
    return int(leaves[0].shape[0])


def _gather(value: ArrayLike) -> Integers:
    gathered = multihost_utils.process_allgather(np.asarray(value))
    return np.asarray(gathered).reshape(jax.process_count(), *np.shape(value))


def _agree(
    names: list[int], sizes: Integers, trees: list[PyTree], num_shards: int, fault: ValueError | None
) -> tuple[Integers, int]:
    """Tell all processes about all clients; what is wrong in one is an error in each, so that none waits.

    Returns:
      The sizes of all clients, and how many slots a shard needs.
    """
    like = [jax.tree.map(lambda a: (a.dtype.name, a.shape[1:]), tree) for tree in trees[:1]]
    about = np.array([fault is not None, zlib.crc32(repr(like).encode()), len(names), num_shards], np.uint32)
    faults, kinds, counts, shards = _gather(about).T.astype(np.int64)
    if fault is not None:
        raise fault
    if faults.any():
        raise ValueError(f"FederatedData: clients of processes {np.flatnonzero(faults).tolist()} were refused there")
    if len(set(kinds)) > 1:
        raise ValueError("FederatedData: clients of different processes have examples of different shapes or dtypes")
    table = np.zeros((2, counts.max()), np.int32)
    table[:, : len(names)] = names, sizes
    each = [rows[:, :count] for rows, count in zip(_gather(table), counts, strict=True)]
    ids, all_sizes = np.concatenate(each, axis=1)
    if sorted(ids.tolist()) != list(range(len(ids))):
        raise ValueError(
            f"FederatedData: the clients of all processes should be numbered from 0 to {len(ids) - 1}, each once; "
            f"this one has {names}"
        )
    return all_sizes, int((-(-counts // shards)).max())
