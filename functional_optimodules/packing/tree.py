"""Packing: the many small leaves of a tree as few contiguous buffers.

    Pack(tree):     buffers = the small leaves end to end, one for each dtype and sharding
                    large leaves are left alone
    Unpack(packed): tree = slices of the buffers, and the large leaves

What a step costs for many small leaves it costs per leaf: an argument of the
call, a kernel, and the compilation of both. A `Packed` tree is a pytree of the
buffers and the large leaves, so that whatever treats elements alike, wherever
they lie, works on it as on any tree. Leaves of one shape are neighbours in a
buffer, for what is done to each parameter to be done to rows.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.tree_util import DictKey

from functional_optimodules.packing.buffers import Shape, cut, home_of, homed, join
from functional_optimodules.types import PyTree
from functional_optimodules.wire.paths import Spec, Specs, show

Group = tuple[int, ...]


class Small(NamedTuple):
    """The most bytes of a leaf that is packed.

    Attributes:
      vector: of one with at most one axis.
      matrix: of one with more.
    """

    vector: int
    matrix: int


@jax.tree_util.register_static
class Packing:
    """How a tree is packed. Hashable, and a pytree without leaves.

    Attributes:
      specs: the tree's container, and the path, shape and dtype of each leaf.
      groups: for each buffer, the indices of its leaves, in their order there.
      homes: for each buffer, how it lies on a mesh of devices, or `None` if it does not.
      large: the indices of the leaves in none.
      names: what the buffers and the large leaves are called in a path.
    """

    def __init__(self, specs: Specs, groups: tuple[Group, ...], homes: tuple[NamedSharding | None, ...]) -> None:
        self.specs = specs
        self.groups = groups
        self.homes = homes
        packed = set(itertools.chain.from_iterable(groups))
        self.large = tuple(index for index in range(len(specs.leaves)) if index not in packed)
        self.names = (*(f"buffer-{index}" for index in range(len(groups))), *(specs.paths[at] for at in self.large))
        self._key = (specs, groups, homes)
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Packing) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        counts = ", ".join(str(len(group)) for group in self.groups)
        return f"Packing({len(self.groups)} buffers of [{counts}] leaves, {len(self.large)} large leaves)"

    @classmethod
    def of(
        cls, tree: PyTree, small: int | Small, fewest: int = 1, labels: Sequence[Hashable] | None = None
    ) -> "Packing":
        """Choose how to pack a tree.

        Leaves that are split over devices, and those that are neither floating nor
        complex, are left alone.

        Args:
          tree: arrays, or their shapes and dtypes.
          small: the most bytes of a leaf that is packed, whatever its axes if it is one number.
          fewest: how many leaves are worth a buffer.
          labels: one for each leaf, where only leaves of one label may share a buffer.

        Raises:
          ValueError: if a part of the tree is packed already.
        """
        if packing_of(tree) is not None:
            raise ValueError("a tree with a packed tree inside: pack the whole, or unpack the part")
        specs = Specs.of(tree)
        small = small if isinstance(small, Small) else Small(small, small)
        homes: dict[Any, list[int]] = {}
        labels = [None] * len(specs.leaves) if labels is None else labels
        for index, (leaf, spec, label) in enumerate(zip(jax.tree.leaves(tree), specs.leaves, labels, strict=True)):
            sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
            size = math.prod(spec.shape) * spec.dtype.itemsize
            whole = sharding is None or sharding.is_fully_replicated
            most = small.matrix if len(spec.shape) > 1 else small.vector
            if size <= most and whole and jnp.issubdtype(spec.dtype, jnp.inexact):
                homes.setdefault((spec.dtype, sharding, label), []).append(index)
        chosen = {key: group for key, group in homes.items() if len(group) >= fewest}
        groups = tuple(tuple(sorted(group, key=lambda at: specs.leaves[at].shape)) for group in chosen.values())
        made = cls(specs, groups, tuple(home_of(home) for _, home, _ in chosen))
        return _known.setdefault(made._key, made)

    def shapes(self, group: Group) -> tuple[Shape, ...]:
        """Return the shape of each leaf of a group."""
        return tuple(self.specs.leaves[index].shape for index in group)

    def rows(self, group: Group) -> Iterator[tuple[int, int, Shape]]:
        """Yield where leaves of one shape lie side by side: the offset in elements, their number, and the shape."""
        offset = 0
        for shape, run in itertools.groupby(self.shapes(group)):
            count = len(list(run))
            yield offset, count, shape
            offset += count * math.prod(shape)

    def pack(self, tree: PyTree) -> "Packed":
        """Pack a tree of this structure: parameters, or what is shaped like them, in any dtypes.

        The large leaves of the result are those of the tree, and not copies.

        Raises:
          ValueError: if the structure or a shape differs, or leaves of one buffer
            are of different dtypes; it names the leaf.
        """
        try:
            found = self.specs.leaves_of(tree)
        except ValueError as error:
            raise ValueError(f"pack: the tree has another structure than what it is packed as: {error}") from None
        leaves = [leaf if isinstance(leaf, jax.Array) or is_absent(leaf) else jnp.asarray(leaf) for leaf in found]
        for path, leaf, spec in zip(self.specs.paths, leaves, self.specs.leaves, strict=True):
            if not is_absent(leaf) and leaf.shape[max(0, len(leaf.shape) - len(spec.shape)) :] != spec.shape:
                raise ValueError(f"pack: {show(leaf)} at {path!r}: expected the shape {list(spec.shape)}")
        buffers = [self._join([leaves[index] for index in group], group) for group in self.groups]
        return Packed(self, (*map(homed, buffers, self.homes), *(leaves[index] for index in self.large)))

    def _join(self, leaves: list[PyTree], group: Group) -> PyTree:
        # not bare: NumPy takes `None` for float64
        kinds = [() if is_absent(leaf) else (leaf.dtype,) for leaf in leaves]
        if other := next((place for place, kind in enumerate(kinds) if kind != kinds[0]), 0):
            named = [f"{_show(leaves[place])} at {self.specs.paths[group[place]]!r}" for place in (0, other)]
            raise ValueError(f"pack: {' and '.join(named)} would share a buffer: expected one dtype, or all masked")
        return join(leaves, self.shapes(group)) if kinds[0] else leaves[0]

    def model(self) -> "Packed":
        """Return the shapes and dtypes of the packed tree."""
        specs = self.specs.leaves
        buffers = [Spec((sum(map(math.prod, self.shapes(group))),), specs[group[0]].dtype) for group in self.groups]
        return Packed(self, (*buffers, *(specs[index] for index in self.large)))


# Equal ones are one object, as JAX compares those of all arguments at each call.
_known: weakref.WeakValueDictionary[object, Packing] = weakref.WeakValueDictionary()


class Packed:
    """A tree whose small leaves lie in few buffers: a pytree of the buffers and the large leaves.

    It stands for the tree wherever elements are treated alike: as parameters of
    a brick, an `Optimizer`, a `TrainState`, or `jax.grad`. A leaf is read by its path:
    `packed["encoder/0/kernel"]`.

    Attributes:
      packing: how the tree is packed.
      parts: the buffers, then the large leaves.
    """

    __slots__ = ("packing", "parts")
    __iter__: ClassVar[None] = None  # its leaves are named by paths, and not numbered

    def __init__(self, packing: Packing, parts: tuple[PyTree, ...]) -> None:
        self.packing = packing
        self.parts = parts

    @property
    def buffers(self) -> tuple[jax.Array, ...]:
        """The buffers alone."""
        return self.parts[: len(self.packing.groups)]

    @property
    def large(self) -> tuple[jax.Array, ...]:
        """The large leaves alone."""
        return self.parts[len(self.packing.groups) :]

    def unpack(self) -> PyTree:
        """Return the tree. The derivative is one concatenation for each buffer.

        Raises:
          ValueError: if a buffer does not hold its leaves.
        """
        buffers = (*map(homed, self.buffers, self.packing.homes), *self.large)
        return Packed(self.packing, buffers)._tree(cut)

    def shapes(self) -> PyTree:
        """Return the tree's shapes and dtypes."""
        return self._tree(lambda buffer, shapes: [Spec((*buffer.shape[:-1], *shape), buffer.dtype) for shape in shapes])

    def homed(self, homes: Sequence[NamedSharding | None]) -> "Packed":
        """Have the parts lie on a mesh as the leaves that they stand for, whose homes are given in the tree's order."""
        packing = self.packing
        parts = zip(self.parts, (*packing.homes, *(homes[at] for at in packing.large)), strict=True)
        return Packed(packing, tuple(homed(part, home) for part, home in parts))

    def _tree(self, leaves_of: Callable[[jax.Array, tuple[Shape, ...]], list[PyTree]]) -> PyTree:
        packing = self.packing
        leaves: dict[int, PyTree] = dict(zip(packing.large, self.large, strict=True))
        for buffer, group in zip(self.buffers, packing.groups, strict=True):
            pieces = [buffer] * len(group) if is_absent(buffer) else leaves_of(buffer, packing.shapes(group))
            leaves |= zip(group, pieces, strict=True)
        return jax.tree.unflatten(packing.specs.treedef, [leaves[index] for index in range(len(leaves))])

    def __contains__(self, path: object) -> bool:
        return path in self.packing.specs.paths

    def __getitem__(self, path: str) -> PyTree:
        """Return the leaf at a path.

        Raises:
          KeyError: if there is no such leaf.
        """
        packing = self.packing
        if path not in self:
            raise KeyError(f"no leaf has the path {path!r}: there are {', '.join(packing.specs.paths)}")
        at = packing.specs.paths.index(path)
        if at in packing.large:
            return self.large[packing.large.index(at)]
        index, group = next((index, group) for index, group in enumerate(packing.groups) if at in group)
        shapes, place = packing.shapes(group), group.index(at)
        start = sum(map(math.prod, shapes[:place]))
        piece = self.buffers[index][..., start : start + math.prod(shapes[place])]
        return piece.reshape((*piece.shape[:-1], *shapes[place]))

    def __repr__(self) -> str:
        return f"Packed({self.packing!r}, [{', '.join(map(_show, self.parts))}])"


jax.tree_util.register_pytree_with_keys(
    Packed,
    lambda packed: (list(zip(map(DictKey, packed.packing.names), packed.parts, strict=True)), packed.packing),
    lambda packing, parts: Packed(packing, tuple(parts)),
    flatten_func=lambda packed: (packed.parts, packed.packing),
)


def _show(node: PyTree) -> str:
    return show(node) if hasattr(node, "dtype") else repr(node)


def is_absent(node: PyTree) -> bool:
    """Whether a node stands for leaves that are not there, as `None` and optax's `MaskedNode` do."""
    return node is None or (not hasattr(node, "dtype") and not jax.tree.leaves(node))


def is_packed(node: PyTree) -> bool:
    """Whether a node is a `Packed`; an `is_leaf` for `jax.tree` functions."""
    return isinstance(node, Packed)


def unpack(tree: PyTree) -> PyTree:
    """Return a tree with each `Packed` in it, itself included, as the tree that it stands for."""
    return jax.tree.map(lambda node: node.unpack() if is_packed(node) else node, tree, is_leaf=is_packed)


def shapes(tree: PyTree) -> PyTree:
    """Return a tree in which each `Packed` is the shapes and dtypes of the tree that it stands for."""
    return jax.tree.map(lambda node: node.shapes() if is_packed(node) else node, tree, is_leaf=is_packed)


def packing_of(tree: PyTree) -> Packing | None:
    """Return how the first `Packed` of a tree is packed, or `None` if there is none."""
    nodes = jax.tree.leaves(tree, is_leaf=is_packed)
    return next((node.packing for node in nodes if is_packed(node)), None)
