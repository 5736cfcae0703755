"""Where packed trees come from, and how bricks act on them.

Which leaves are small is measured, by `benchmarks/step/packing_threshold.py`: below some
size a leaf costs more by itself than what it takes to move its bytes into a
buffer and out again.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from functional_optimodules.packing.tree import Group, Packed, Packing, is_absent, is_packed, unpack
from functional_optimodules.types import PyTree

# Bytes, on CPU; for lack of a measurement, other backends take it too.
_MEASURED = 2**15
_FEWEST = 4
_chosen: dict[str, int] = {}


def small_leaf() -> int:
    """Return the most bytes of a leaf that is packed on the backend in use."""
    return _chosen.get(jax.default_backend(), _MEASURED)


def set_small_leaf(size: int | None) -> None:
    """Set the most bytes of a leaf that is packed on the backend in use, from now on.

    Optimizers and federations that have packed already stay as they are.

    Args:
      size: bytes, >= 0, where 0 packs nothing; `None` for what was measured.

    Raises:
      ValueError: if it is anything else.
    """
    if size is None:
        _chosen.pop(jax.default_backend(), None)
    elif type(size) is not int or size < 0:
        raise ValueError(f"set_small_leaf: {size!r} should be a number of bytes of at least 0, or None")
    else:
        _chosen[jax.default_backend()] = size


def pack(tree: PyTree, *, like: PyTree = None, small: int | None = None) -> Packed:
    """Pack a tree: its small leaves into one buffer for each dtype and sharding.

    The large leaves of the result are those of the tree, and not copies.

    Args:
      tree: arrays: parameters, or what is shaped like them.
      like: a packed tree to pack as, such as the parameters for their gradients.
      small: the most bytes of a leaf that is packed; `small_leaf()` if `None`.

    Raises:
      TypeError: if `like` is not packed.
      ValueError: if the tree does not have the structure and shapes of `like`, or
        `small` is no number of bytes.
    """
    if is_packed(like):
        return packed_as(tree, like.packing)
    if like is not None:
        raise TypeError(f"pack: like={type(like).__name__} should be a packed tree")
    if is_packed(tree):
        return tree
    small = small_leaf() if small is None else small
    if type(small) is not int or small < 0:
        raise ValueError(f"pack: small={small!r} should be a number of bytes of at least 0")
    return Packing.of(tree, small).pack(tree)


def worthwhile(tree: PyTree) -> Packing | None:
    """Return how to pack a tree, or `None` if it is not worth it."""
    packing = Packing.of(tree, small_leaf(), _FEWEST)
    return packing if packing.groups else None


def packed_as(tree: PyTree, packing: Packing) -> Packed:
    """Return parameters, or what is shaped like them, packed in one way."""
    return tree if is_packed(tree) and tree.packing == packing else packing.pack(unpack(tree))


def map_parameters(function: Callable[..., jax.Array], *trees: PyTree) -> PyTree:
    """Map a function over the parameters of trees, also where these are packed.

    It means what `jax.tree.map` does: the function sees each parameter as the model
    has it. Where they are packed, parameters of one shape are mapped together.

    Args:
      function: of one array of each tree; it returns one of the same shape.
      *trees: trees of one structure, all packed alike or none.

    Raises:
      ValueError: if they are not packed alike.
    """

    def of_node(first: PyTree, *others: PyTree) -> PyTree:
        return of_packed(first, *others) if is_packed(first) else function(first, *others)

    def of_packed(*nodes: PyTree) -> Packed:
        packing = nodes[0].packing
        if not all(is_packed(node) and node.packing == packing for node in nodes):
            raise ValueError(f"map_parameters: one is packed as {packing!r}: expected all to be, by `pack(like=...)`")
        buffers = (of_group(packing, *each) for each in zip(packing.groups, *(n.buffers for n in nodes), strict=True))
        large = jax.tree.map(function, *(node.large for node in nodes))
        return Packed(packing, (*buffers, *large))

    def of_group(packing: Packing, group: Group, *buffers: jax.Array) -> jax.Array:
        if is_absent(buffers[0]):
            return buffers[0]
        pieces = []
        for offset, count, shape in packing.rows(group):
            size = count * math.prod(shape)
            rows = [buffer[offset : offset + size].reshape(count, *shape) for buffer in buffers]
            pieces.append(jax.vmap(function)(*rows).reshape(size))
        return jnp.concatenate(pieces)

    return jax.tree.map(of_node, *trees, is_leaf=is_packed)
