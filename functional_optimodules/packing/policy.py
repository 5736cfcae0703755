"""Where packed trees come from, and how bricks act on them.

Which leaves are small depends on the platform. On CPU it is measured, by
`benchmarks/step/packing_threshold.py`: below some size a leaf costs more by itself than
what it takes to move its bytes into a buffer and out again. For TPUs it is what their
compiler estimates, in `benchmarks/step/tpu.py`. A GPU has not been measured: it is
taken for a CPU.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from functional_optimodules.packing.tree import Group, Packed, Packing, Small, is_absent, is_packed, unpack
from functional_optimodules.types import PyTree


class _Found(NamedTuple):
    """What is small on a platform: where parameters stay packed, and where a step has trees in and out."""

    kept: Small
    inside: Small


_ON_CPU = _Found(kept=Small(2**15, 2**15), inside=Small(2**15, 2**15))
# Matrices are tiled on a TPU, and cut out of a buffer they are laid out anew.
_ON_TPU = _Found(kept=Small(2**15, 2**12), inside=Small(2**14, 0))
_FOUND = {"tpu": _ON_TPU}
_FEWEST = 4
_chosen: dict[str, int] = {}


def platform_of(tree: PyTree) -> str:
    """Return the platform, such as `"cpu"`, that a program which is given a tree is compiled for.

    It is that of the devices that a leaf is committed to, or described for by its
    `sharding`; where none is, as under a trace, that of JAX's default backend.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.committed):
            continue
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
            return next(iter(sharding.device_set)).platform
    return jax.default_backend()


def small_leaf(platform: str | None = None) -> int:
    """Return the most bytes of a leaf that is packed on a platform.

    Matrices may have to be smaller yet, and so may all leaves where a step has trees in
    and out.

    Args:
      platform: `"cpu"`, `"gpu"` or `"tpu"`; by default that of JAX's default backend.

    Raises:
      ValueError: if it is none of these.
    """
    return _small(_named(platform, "small_leaf"), inside=False).vector


def set_small_leaf(size: int | None, platform: str | None = None) -> None:
    """Set the most bytes of a leaf, of any rank, that is packed on a platform, from now on.

    Optimizers and federations that have packed already stay as they are.

    Args:
      size: bytes, >= 0, where 0 packs nothing; `None` for what the library found best.
      platform: `"cpu"`, `"gpu"` or `"tpu"`; by default that of JAX's default backend.

    Raises:
      ValueError: if it is anything else.
    """
    platform = _named(platform, "set_small_leaf")
    if size is None:
        _chosen.pop(platform, None)
    elif type(size) is not int or size < 0:
        raise ValueError(f"set_small_leaf: {size!r} should be a number of bytes of at least 0, or None")
    else:
        _chosen[platform] = size


def _named(platform: str | None, owner: str) -> str:
    if platform is None:
        return jax.default_backend()
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"{owner}: platform={platform!r} should be 'cpu', 'gpu' or 'tpu', as JAX's devices name it")
    return platform


def _small(platform: str, inside: bool) -> Small:
    if platform in _chosen:
        return Small(_chosen[platform], _chosen[platform])
    found = _FOUND.get(platform, _ON_CPU)
    return found.inside if inside else found.kept


def pack(tree: PyTree, *, like: PyTree = None, small: int | None = None) -> Packed:
    """Pack a tree: its small leaves into one buffer for each dtype and sharding.

    The large leaves of the result are those of the tree, and not copies.

    Args:
      tree: arrays: parameters, or what is shaped like them.
      like: a packed tree to pack as, such as the parameters for their gradients.
      small: the most bytes of a leaf that is packed; what is best on the platform of the tree if `None`.

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
    if small is not None and (type(small) is not int or small < 0):
        raise ValueError(f"pack: small={small!r} should be a number of bytes of at least 0")
    return Packing.of(tree, _small(platform_of(tree), inside=False) if small is None else small).pack(tree)


def worthwhile(
    tree: PyTree,
    labels: Sequence[Hashable] | None = None,
    *,
    inside: bool = False,
    platform: str | None = None,
) -> Packing | None:
    """Return how to pack a tree, or `None` if it is not worth it.

    Args:
      tree: arrays, or their shapes and dtypes.
      labels: as `Packing.of` takes them.
      inside: whether each step is given a tree and gives one, and packs in between.
      platform: what the step is compiled for; that of the tree if `None`.
    """
    small = _small(platform or platform_of(tree), inside)
    packing = Packing.of(tree, small, _FEWEST, labels)
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
