"""The data of all clients, given once: flat rows, and where each client's begin.

Unequal clients cost their own examples and nothing more: there is no padding to
the largest. Over several devices the rows lie in one block a device, of as many
clients each to within one, and never move.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from functional_optimodules.federated.blocks import balance, count_examples, find_slots, join_rows, make_table
from functional_optimodules.federated.placement import SPLIT, WHOLE, automatic, mesh_size, replicate, split


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

    examples: Any
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

    def specs(self) -> Any:
        """Say of each array whether it is split over a mesh or whole on every device, as `shard_map` asks."""
        return dataclasses.replace(jax.tree.map(lambda _: SPLIT, self), slots=WHOLE)

    @classmethod
    def from_clients(cls, clients: Sequence[Any], mesh: Mesh | None = None) -> Self:
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
        total = len(clients)
        trees = [jax.tree.map(np.asarray, client) for client in clients]
        sizes = count_examples(trees, range(total))
        shards = 1 if mesh is None else mesh_size(mesh)
        blocks = balance(sizes, shards)
        table = make_table(blocks, sizes, np.arange(total), -(-total // shards), total)
        rows = max(int(sizes[block].sum()) for block in blocks)
        return cls(
            examples=jax.tree.map(lambda flat: split(flat, mesh), join_rows(trees, blocks, rows)),
            offsets=split(table.offsets, mesh),
            sizes=split(table.sizes, mesh),
            ids=split(table.ids, mesh),
            slots=replicate(find_slots(table.ids, total), mesh),
            num_shards=shards,
            smallest=int(sizes.min()),
            largest=int(sizes.max()),
        )

    @classmethod
    def from_ids(cls, examples: Any, ids: Any, mesh: Mesh | None = None) -> Self:
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
        order = np.argsort(ids, kind="stable")
        _, starts = np.unique(ids[order], return_index=True)
        groups = np.split(order, starts[1:])
        return cls.from_indices(examples, groups, mesh)

    @classmethod
    def from_indices(cls, examples: Any, parts: Sequence[Any], mesh: Mesh | None = None) -> Self:
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
    def from_local(cls, clients: Mapping[int, Any], mesh: Mesh) -> Self:
        """Gather the examples of each client, where every process gives its own clients' only.

        A client's examples stay on the devices of the process that gave them; the
        processes tell each other the clients' numbers and sizes. All call it at
        the same time.

        Args:
          clients: by its number, each client of this process, as for `from_clients`.
          mesh: devices of all processes, along the axis `clients`.

        Raises:
          ValueError: in every process, as for `from_clients`, or if the clients of
            all processes are not numbered from 0 to N - 1, each once.
        """
        mesh_size(mesh)
        names = sorted(clients)
        trees = [jax.tree.map(np.asarray, clients[name]) for name in names]
        try:
            if not trees:
                raise ValueError(f"FederatedData: process {jax.process_index()} has no client")
            sizes, fault = count_examples(trees, names), None
        except ValueError as error:
            sizes, fault = np.zeros(len(names), np.int64), error
        own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
        all_ids, all_sizes, per_shard = _agree(names, sizes, trees, sum(own), fault)
        blocks = balance(sizes, sum(own))
        rows = _gather(np.int32(max(int(sizes[block].sum()) for block in blocks))).max()
        table = make_table(blocks, sizes, np.array(names), per_shard, len(all_ids))

        def spread(local: np.ndarray[Any, Any]) -> jax.Array:
            return jax.make_array_from_process_local_data(NamedSharding(automatic(mesh), SPLIT), local)

        ids = spread(table.ids)
        slots = find_slots(np.asarray(multihost_utils.process_allgather(ids, tiled=True)), len(all_ids))
        return cls(
            examples=jax.tree.map(spread, join_rows(trees, blocks, int(rows))),
            offsets=spread(table.offsets),
            sizes=spread(table.sizes),
            ids=ids,
            slots=replicate(slots, mesh),
            num_shards=len(own),
            smallest=int(all_sizes.min()),
            largest=int(all_sizes.max()),
        )


def _gather(value: Any) -> np.ndarray[Any, Any]:
    gathered = multihost_utils.process_allgather(np.asarray(value))
    return np.asarray(gathered).reshape(jax.process_count(), *np.shape(value))


def _agree(
    names: list[int], sizes: Any, trees: list[Any], num_shards: int, fault: ValueError | None
) -> tuple[Any, Any, int]:
    """Tell all processes about all clients; what is wrong in one is an error in each, so that none waits."""
    like = [jax.tree.map(lambda a: (a.dtype.name, a.shape[1:]), tree) for tree in trees[:1]]
    about = np.array([fault is not None, zlib.crc32(repr(like).encode()), len(names), num_shards], np.uint32)
    faults, kinds, counts, shards = _gather(about).T.astype(np.int64)
    if fault is not None:
        raise fault
    if faults.any():
        raise ValueError(
            f"FederatedData: the clients of processes {np.flatnonzero(faults).tolist()} were refused there"
        )
    if len(set(kinds)) > 1:
        raise ValueError(
            "FederatedData: the clients of different processes have examples of different shapes or dtypes"
        )
    table = np.zeros((2, counts.max()), np.int32)
    table[:, : len(names)] = names, sizes
    each = [rows[:, :count] for rows, count in zip(_gather(table), counts, strict=True)]
    ids, all_sizes = np.concatenate(each, axis=1)
    if sorted(ids.tolist()) != list(range(len(ids))):
        raise ValueError(
            f"FederatedData: the clients of all processes should be numbered from 0 to {len(ids) - 1}, each once; "
            f"this one has {names}"
        )
    return ids, all_sizes, int((-(-counts // shards)).max())
