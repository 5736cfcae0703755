"""The data of all clients, given once: flat rows, and where each client's begin.

Unequal clients cost their own examples and nothing more: there is no padding to
the largest. Over several devices the rows lie in one block a device, each of the
same number of clients, and never move.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FederatedData:
    """The examples of N clients, in `num_shards` blocks of R slots each.

    Build one with `from_clients` or `from_ids`.

    Attributes:
      examples: pytree of arrays whose leading axis is the examples', client after
        client, block after block.
      offsets: int32[num_shards * R], where the examples of a slot begin in its block.
      sizes: int32[num_shards * R], how many they are; 0 in slots without a client.
      ids: int32[num_shards * R], the client of each slot; N in slots without one.
      slots: int32[N], the slot of each client.
      num_shards: the number of blocks.
      largest: the number of examples of the largest client.
    """

    examples: Any
    offsets: jax.Array
    sizes: jax.Array
    ids: jax.Array
    slots: jax.Array
    num_shards: int = dataclasses.field(metadata={"static": True})
    largest: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return self.slots.shape[0]

    @property
    def client_sizes(self) -> jax.Array:
        """int32[N], the number of examples of each client."""
        return self.sizes[self.slots]

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
        if not clients:
            raise ValueError("FederatedData: there is no client")
        trees = [jax.tree.map(np.asarray, client) for client in clients]
        sizes = np.array([_size(tree, index, trees[0]) for index, tree in enumerate(trees)], np.int64)
        shards = 1 if mesh is None else _axis(mesh)
        order, per_shard = balance(sizes, shards)
        blocks = [[trees[client] for client in block] for block in order]
        rows = max(sum(sizes[client] for client in block) for block in order)
        leaves, treedef = jax.tree.flatten(trees[0])
        examples = []
        for position, like in enumerate(leaves):
            flat = np.zeros((shards, rows, *like.shape[1:]), like.dtype)
            for shard, block in enumerate(blocks):
                parts = [jax.tree.leaves(tree)[position] for tree in block]
                if parts:
                    joined = np.concatenate(parts)
                    flat[shard, : len(joined)] = joined
            examples.append(flat.reshape(-1, *like.shape[1:]))
        table = np.zeros((3, shards, per_shard), np.int32)
        table[2] = len(trees)
        for shard, block in enumerate(order):
            counts = sizes[block]
            table[0, shard, : len(block)] = np.cumsum(counts) - counts
            table[1, shard, : len(block)] = counts
            table[2, shard, : len(block)] = block
        offsets, lengths, ids = table.reshape(3, -1)
        slots = np.zeros(len(trees), np.int32)
        slots[ids[ids < len(trees)]] = np.flatnonzero(ids < len(trees))
        split, whole = _placements(mesh)
        put = lambda values, place: jax.tree.map(lambda v: jax.device_put(v, place), values)  # noqa: E731
        return cls(
            examples=put(jax.tree.unflatten(treedef, examples), split),
            offsets=put(offsets, split),
            sizes=put(lengths, split),
            ids=put(ids, split),
            slots=put(slots, whole),
            num_shards=shards,
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
        return cls.from_clients([jax.tree.map(lambda a, g=group: np.asarray(a)[g], examples) for group in groups], mesh)


def balance(sizes: Any, num_shards: int) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Deal clients out to shards: as many to each, and about as many examples.

    The largest first, each to the shard that has the fewest examples among those
    with a free slot.

    Returns:
      The clients of each shard, in rising order, and the slots of a shard.
    """
    sizes = np.asarray(sizes)
    per_shard = -(-len(sizes) // num_shards)
    if num_shards == 1:
        return [np.arange(len(sizes))], per_shard
    loads, members = np.zeros(num_shards), [[] for _ in range(num_shards)]  # type: ignore[var-annotated]
    for client in np.argsort(-sizes, kind="stable"):
        free = [shard for shard in range(num_shards) if len(members[shard]) < per_shard]
        shard = min(free, key=lambda s: loads[s])
        members[shard].append(client)
        loads[shard] += sizes[client]
    return [np.sort(np.array(block, np.int64)) for block in members], per_shard


def _size(tree: Any, index: int, like: Any) -> int:
    leaves = jax.tree.leaves(tree)
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"FederatedData: client {index} has {jax.tree.structure(tree)}, and client 0 another structure"
        )
    counts = {leaf.shape[:1] for leaf in leaves}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"FederatedData: client {index} has arrays of different numbers of examples: {counts}")
    if counts == {(0,)}:
        raise ValueError(f"FederatedData: client {index} has no examples")
    for leaf, other in zip(leaves, jax.tree.leaves(like), strict=True):
        if leaf.shape[1:] != other.shape[1:] or leaf.dtype != other.dtype:
            raise ValueError(
                f"FederatedData: client {index} has examples of {leaf.dtype}{list(leaf.shape[1:])}, "
                f"and client 0 of {other.dtype}{list(other.shape[1:])}"
            )
    return int(leaves[0].shape[0])


def _axis(mesh: Mesh) -> int:
    if "clients" not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, and none named 'clients'")
    return int(mesh.shape["clients"])


def _placements(mesh: Mesh | None) -> tuple[Any, Any]:
    if mesh is None:
        return None, None
    return NamedSharding(mesh, PartitionSpec("clients")), NamedSharding(mesh, PartitionSpec())


def shuffle(key: jax.Array, size: jax.Array, largest: int) -> jax.Array:
    """Return a random order of `range(size)`, followed by what is not in it.

    The order depends on the key and the size alone, and not on how many indices
    follow.

    Returns:
      int32[largest].
    """
    indices = jnp.arange(largest, dtype=jnp.int32)
    # The bits of an index do not depend on how many are drawn; of equal bits, the
    # last index of all is padding's.
    bits = jnp.where(indices < size, jax.random.bits(key, (largest,), jnp.uint32), jnp.uint32(2**32 - 1))
    return jax.lax.sort((bits, indices), num_keys=1, is_stable=True)[1]
