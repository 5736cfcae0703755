"""How clients are laid out: which lie on which device, and where the rows of each begin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Array = np.ndarray[Any, Any]


class Table(NamedTuple):
    """Where the clients of some shards lie; each array is int32[shards * per_shard].

    Attributes:
      offsets: where a slot's examples begin in its block.
      sizes: how many they are.
      ids: its client; N in slots without one.
    """

    offsets: Array
    sizes: Array
    ids: Array


def balance(sizes: Any, num_shards: int) -> list[Array]:
    """Deal clients out to shards: as many to each, to within one, and about as many examples.

    The largest first, each to the shard that has the fewest examples among those
    with a free slot.

    Returns:
      The clients of each shard, in rising order.
    """
    sizes = np.asarray(sizes)
    least, longer = divmod(len(sizes), num_shards)
    loads = np.zeros(num_shards)
    members: list[list[int]] = [[] for _ in range(num_shards)]
    for client in np.argsort(-sizes, kind="stable"):
        free = [s for s in range(num_shards) if len(members[s]) < least + (longer > 0)]
        shard = min(free, key=lambda s: loads[s])
        members[shard].append(int(client))
        loads[shard] += sizes[client]
        longer -= len(members[shard]) > least
    return [np.sort(np.array(block, np.int64)) for block in members]


def make_table(blocks: Sequence[Array], sizes: Array, ids: Array, per_shard: int, num_clients: int) -> Table:
    """Write down where the clients of each block lie.

    Args:
      blocks: for each shard, the positions of its clients in `sizes` and `ids`.
      sizes: the number of examples of each client.
      ids: the number of each client.
      per_shard: slots of a shard.
      num_clients: N, which stands for no client.
    """
    table = np.zeros((3, len(blocks), per_shard), np.int32)
    table[2] = num_clients
    for shard, block in enumerate(blocks):
        counts = sizes[block]
        table[0, shard, : len(block)] = np.cumsum(counts) - counts
        table[1, shard, : len(block)] = counts
        table[2, shard, : len(block)] = ids[block]
    return Table(*table.reshape(3, -1))


def find_slots(ids: Array, num_clients: int) -> Array:
    """Return the slot of each client: int32[N]."""
    slots = np.zeros(num_clients, np.int32)
    taken = np.flatnonzero(ids < num_clients)
    slots[ids[taken]] = taken
    return slots


def join_rows(trees: Sequence[Any], blocks: Sequence[Array], rows: int) -> Any:
    """Lay out the examples of each block's clients one after the other, in blocks of as many rows."""
    leaves, treedef = jax.tree.flatten(trees[0])
    flats = [np.zeros((len(blocks), rows, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    for shard, block in enumerate(blocks):
        at = 0
        for client in block:
            parts = jax.tree.leaves(trees[client])
            for flat, part in zip(flats, parts, strict=True):
                flat[shard, at : at + len(part)] = part
            at += len(parts[0])
    return jax.tree.unflatten(treedef, [flat.reshape(-1, *flat.shape[2:]) for flat in flats])


def count_examples(trees: Sequence[Any], names: Sequence[Any]) -> Array:
    """Check the clients' examples, and return how many each has.

    Raises:
      ValueError: if one has none, its arrays differ in their number, or clients
        differ in anything else; each names the client.
    """
    return np.array([_size(tree, name, trees[0], names[0]) for tree, name in zip(trees, names, strict=True)], np.int64)


def _size(tree: Any, name: Any, like: Any, other_name: Any) -> int:
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
