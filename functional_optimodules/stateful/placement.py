"""Parameters that are laid out over a mesh of devices: the state and what comes out lie as they do."""

import functools
from typing import NamedTuple, Self

import jax
from jax.sharding import NamedSharding, PartitionSpec

from functional_optimodules.packing.buffers import home_of, homed
from functional_optimodules.packing.tree import is_packed, unpack
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs


class Homes(NamedTuple):
    """How parameters lie on a mesh, and a state beside them; `None` for a leaf that does not. Hashable.

    Attributes:
      params: for each parameter.
      state: for each leaf of the state, in the form that the brick holds.
    """

    params: tuple[NamedSharding | None, ...]
    state: tuple[NamedSharding | None, ...]

    @classmethod
    def of(cls, params: Params, state: PyTree) -> Self:
        """Return where parameters lie, packed or not, and a state that was put beside them."""

        def home(leaf: jax.Array) -> NamedSharding | None:
            return home_of(leaf.sharding) if is_sharded(leaf) else None

        return cls(*(tuple(map(home, jax.tree.leaves(tree))) for tree in (unpack(params), state)))

    def beside_params(self, tree: PyTree) -> PyTree:
        """Have parameters, or what is shaped like them, lie where these do."""
        return tree.homed(self.params) if is_packed(tree) else _homed(tree, self.params)

    def beside_state(self, state: PyTree) -> PyTree:
        """Have a new state lie where the last one does."""
        return _homed(state, self.state)


def _homed(tree: PyTree, homes: tuple[NamedSharding | None, ...]) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(homed, leaves, homes))


def is_sharded(leaf: object) -> bool:
    """Whether an array is laid out over a mesh of devices."""
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


def put_beside(params: Params, specs: Specs, layout: Layout, state: PyTree) -> PyTree:
    """Put a state where sharded parameters are.

    Arrays of the shape of their parameter go beside it, and the rest on all of the devices.
    """
    homes = specs.leaves_of(params)
    everywhere = NamedSharding(next(filter(is_sharded, homes)).sharding.mesh, PartitionSpec())

    def beside(leaf: jax.Array, home: jax.Array) -> jax.Array:
        like = is_sharded(home) and leaf.shape == home.shape
        return jax.device_put(leaf, home.sharding if like else everywhere)

    def part(tree: PyTree) -> PyTree:
        leaves = zip(specs.leaves_of(tree), homes, strict=True)
        placed = [jax.tree.map(functools.partial(beside, home=home), leaf) for leaf, home in leaves]
        return jax.tree.unflatten(specs.treedef, placed)

    shaped = layout.map_shaped(part, state)
    return jax.tree.map(lambda leaf: leaf if is_sharded(leaf) else jax.device_put(leaf, everywhere), shaped)
