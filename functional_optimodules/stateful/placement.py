"""Parameters that are laid out over a mesh of devices: the state and what comes out lie as they do."""

import dataclasses
import functools
from typing import Any, Self

import jax
from jax.sharding import NamedSharding, PartitionSpec

from functional_optimodules.aux_var import Params
from functional_optimodules.packing.adapter import Adapter
from functional_optimodules.packing.buffers import home_of, homed
from functional_optimodules.packing.tree import is_packed, unpack
from functional_optimodules.types import PyTree, State, Updates
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs

Homes = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Placed(Adapter[State]):
    """A brick whose results lie where its parameters and its state do.

    Attributes:
      inner: how the brick acts on the parameters wherever they lie.
      params_homes: for each parameter, how it lies on the mesh, or `None` if it does not.
      state_homes: the same for each leaf of the state.
    """

    inner: Adapter[State]
    params_homes: Homes
    state_homes: Homes

    @classmethod
    def of(cls, inner: Adapter[State], params: Params, state: State) -> Self:
        """Return a brick that follows these parameters, and a state that was put beside them."""
        homes = (tuple(map(_home, jax.tree.leaves(tree))) for tree in (unpack(params), state))
        return cls(inner.brick, inner, *homes)

    def fits(self, tree: PyTree) -> bool:
        return self.inner.fits(tree)

    def hold(self, tree: PyTree) -> PyTree:
        return self.inner.hold(tree)

    def free(self, made: PyTree, *given: PyTree) -> PyTree:
        return self.inner.free(made, *given)

    def portable(self, state: State) -> State:
        return self.inner.portable(state)

    def adopt(self, state: State, like: State) -> State:
        return self.inner.adopt(state, like)

    def update(
        self, updates: Updates, state: State, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        output, new = self.inner.update(updates, state, params, **extra_args)
        return self._beside_params(output), self._home(new)

    def apply(self, gradients: Updates, state: State, params: Params, **extra_args: PyTree) -> tuple[Params, State]:
        applied, new = self.inner.apply(gradients, state, params, **extra_args)
        return self._beside_params(applied), self._home(new)

    def _kept(self, method: str, old: State, new: State) -> State:
        return self._home(super()._kept(method, old, new))

    def _home(self, state: State) -> State:
        leaves, treedef = jax.tree.flatten(state)
        return jax.tree.unflatten(treedef, map(homed, leaves, self.state_homes))

    def _beside_params(self, tree: PyTree) -> PyTree:
        if is_packed(tree):
            return tree.homed(self.params_homes)
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, map(homed, leaves, self.params_homes))


def is_sharded(leaf: object) -> bool:
    """Whether an array is laid out over a mesh of devices."""
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


def any_sharded(tree: PyTree) -> bool:
    """Whether a leaf of a tree is laid out over a mesh of devices."""
    return any(map(is_sharded, jax.tree.leaves(tree)))


def put_beside(params: Params, specs: Specs, layout: Layout, state: PyTree) -> PyTree:
    """Put a state where sharded parameters are.

    Arrays of the shape of their parameter go beside it, and the rest on all of the devices.
    """
    homes = specs.leaves_of(params)
    mesh = next(home.sharding.mesh for home in homes if is_sharded(home))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def beside(leaf: jax.Array, home: jax.Array) -> jax.Array:
        like = is_sharded(home) and leaf.shape == home.shape
        return jax.device_put(leaf, home.sharding if like else everywhere)

    def part(tree: PyTree) -> PyTree:
        leaves = zip(specs.leaves_of(tree), homes, strict=True)
        placed = [jax.tree.map(functools.partial(beside, home=home), leaf) for leaf, home in leaves]
        return jax.tree.unflatten(specs.treedef, placed)

    shaped = layout.map_shaped(part, state)
    return jax.tree.map(lambda leaf: leaf if is_sharded(leaf) else jax.device_put(leaf, everywhere), shaped)


def _home(leaf: Any) -> Any:
    return home_of(leaf.sharding) if is_sharded(leaf) else None
