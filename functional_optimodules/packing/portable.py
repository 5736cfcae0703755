"""States as plain arrays, for whatever saves arrays and knows neither packed trees nor PRNG keys.

    ToArrays(tree):             packed trees -> the trees that they stand for
                                typed PRNG keys -> their words
    FromArrays(arrays, like):   the arrays by path -> packed, and keys, as `like` is

How trees are packed depends on what they run on; the plain form does not. Orbax saves states as they are;
it is for `flax.serialization`, and where a state is restored on another platform, or unpacked.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from functional_optimodules.packing.tree import Packed, is_absent, is_packed
from functional_optimodules.random.keys import is_key, words
from functional_optimodules.types import PyTree
from functional_optimodules.wire.paths import Spec, Specs, by_path


def to_arrays(tree: PyTree) -> PyTree:
    """Return a state, or any tree, as plain arrays: of no `Packed`, and of no typed PRNG keys.

    Args:
      tree: arrays; or `jax.ShapeDtypeStruct`s, whose shardings are kept, for what restores straight into these.

    Returns:
      The tree, its containers as they were. Arrays that are plain already are not copied.
    """
    return jax.tree.map(_plain, tree, is_leaf=is_packed)


def from_arrays(arrays: PyTree, like: PyTree) -> PyTree:
    """Return what `to_arrays` was given, of what it gave.

    Args:
      arrays: what it gave, arrays of JAX or NumPy; the containers may be others, as where dicts
        were made of tuples and dataclasses on the way.
      like: a tree as the result should be, of arrays or of `jax.ShapeDtypeStruct`s: packed in the
        same way, or in another one. What is not on a device yet goes where its sharding says.

    Raises:
      ValueError: if a leaf is missing, unknown, or of another shape or dtype; it names the paths.
    """
    plain = to_arrays(like)
    specs, found = Specs.of(plain), by_path(arrays)
    specs.require_all_same(Specs.of(arrays), "from_arrays: what was saved")
    leaves = {path: _on_device(found[path], leaf) for path, leaf in by_path(plain).items()}
    return jax.tree.map(_as, like, specs.tree(leaves), is_leaf=is_packed)


def _plain(node: Any) -> PyTree:
    if is_packed(node):
        return _unpacked(node) if any(isinstance(part, Spec) for part in node.parts) else node.unpack()
    if not (hasattr(node, "dtype") and is_key(node)):
        return node
    return words(node) if isinstance(node, jax.Array) else _placed_as(jax.eval_shape(words, node), node, node.ndim)


def _unpacked(packed: Packed) -> PyTree:
    """Return the shapes of the tree that a packed tree of shapes stands for, with the shardings of the parts."""
    packing = packed.packing
    leaves = packing.specs.leaves_of(packed.shapes())
    for at, part in zip(packing.large, packed.large, strict=True):
        leaves[at] = part
    for buffer, group in zip(packed.buffers, packing.groups, strict=True):
        for at in () if is_absent(buffer) else group:
            leaves[at] = _placed_as(leaves[at], buffer, buffer.ndim - 1)
    return jax.tree.unflatten(packing.specs.treedef, leaves)


def _placed_as(spec: Spec, other: Any, axes: int) -> Spec:
    """Return a spec that lies as another does, which has its first axes; the rest is split nowhere."""
    place = other.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[:axes]), memory_kind=place.memory_kind)
    return Spec(spec.shape, spec.dtype, sharding=place)


def _on_device(array: Any, like: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jax.device_put(array, getattr(like, "sharding", None))


def _as(node: Any, plain: PyTree) -> PyTree:
    if is_packed(node):
        return node.packing.pack(plain)
    keyed = hasattr(node, "dtype") and is_key(node)
    return jax.random.wrap_key_data(plain, dtype=node.dtype) if keyed else plain
