"""The methods of a brick, compiled, with the checks of the caller's trees that belong in the trace.

Equal bricks share one entry, which holds a brick without facade: no state is
kept alive by it. What is checked while tracing costs nothing in later calls.
"""

import functools
import math
from typing import Any, Generic

import jax
import jax.numpy as jnp

from functional_optimodules.contract import Contract
from functional_optimodules.dependence import reads_values
from functional_optimodules.numerics import is_finite, where
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.packing.tree import shapes
from functional_optimodules.stateful.placement import Homes
from functional_optimodules.types import Params, PyTree, State, Updates
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Specs


# The programs of a brick take a megabyte or two: those of bricks that are no longer about are let go of.
@functools.lru_cache(maxsize=128)
def compiled(adapter: Adapter[State], homes: Homes | None) -> "Compiled[State]":
    """Return the compiled methods of a brick as it acts on some parameters, the same for equal ones."""
    return Compiled(adapter, homes)


@functools.lru_cache(maxsize=512)
def layout_of(brick: Contract, specs: Specs) -> Layout:
    """Return which parts of a brick's state are shaped like its parameters."""
    return Layout(adapted(brick).model(specs.by_path))


@functools.lru_cache(maxsize=512)
def starts_from_values(brick: Contract, specs: Specs) -> bool:
    """Whether a new state depends on the parameters' values, and not on their shapes alone."""
    return reads_values(adapted(brick).init, specs.by_path)


class Compiled(Generic[State]):
    """The compiled methods of a brick. Only `step` and `apply` donate, and only what they name.

    Args:
      adapter: the brick, as it acts on the parameters.
      homes: where these lie, if over a mesh of devices.
    """

    def __init__(self, adapter: Adapter[State], homes: Homes | None) -> None:
        self.adapter, self.homes = adapter, homes
        self.owner = type(adapter.brick).__name__
        self.step = jax.jit(self._step, static_argnums=0, donate_argnums=1)
        self.apply = jax.jit(self._apply, static_argnums=0, donate_argnums=1)
        self.apply_donated = jax.jit(self._apply, static_argnums=0, donate_argnums=(1, 2))
        self.begin_round = jax.jit(lambda state, params: self._homed(adapter.begin_round(state, params)))
        self.end_round = jax.jit(lambda state, known: self._homed(adapter.end_round(state, **known)))
        self.share = jax.jit(adapter.share)
        self.commit = jax.jit(self._commit)
        self.collect = jax.jit(adapter.collect)
        self.process = jax.jit(lambda auxes, state: self._homed(adapter.process(auxes, state)))

    # Of what is donated, the state comes first, and so it does in what is returned: JAX pairs
    # donated buffers with outputs of their shape in order, and XLA copies where pairs cross.

    def _step(
        self, specs: Specs, state: State, gradients: Updates, params: Params, extra_args: dict[str, PyTree]
    ) -> tuple[State, Updates]:
        self._require(specs, gradients, params)
        output, new = self.adapter.update(gradients, state, params, **extra_args)
        return self._homed(new), output if self.homes is None else self.homes.beside_params(output)

    def _apply(
        self, specs: Specs, state: State, params: Params, gradients: Updates, extra_args: dict[str, PyTree]
    ) -> tuple[State, Params]:
        self._require(specs, gradients, params)
        applied, new = self.adapter.apply(gradients, state, params, **extra_args)
        return self._homed(new), applied if self.homes is None else self.homes.beside_params(applied)

    def _commit(self, state: State) -> State:
        # What is not finite was refused where it arrived: it counts as lost.
        sent, new = is_finite(self.collect(state)), self.adapter.commit(state)
        return self._homed(where(sent, new, state) if self.adapter.brick.channels() else new)

    def _homed(self, state: State) -> State:
        return state if self.homes is None else self.homes.beside_state(state)

    def _require(self, specs: Specs, gradients: Updates, params: Params) -> None:
        specs.require_tree(shapes(gradients), f"{self.owner}: the tree of gradients")
        if params is not None:
            specs.require_tree(shapes(params), f"{self.owner}: the tree of parameters")

    def init(self, specs: Specs, params: Params, identity: int | None = None) -> State:
        """Make the state, of buffers that are nobody else's, so that it can be donated."""
        adapter, brick = self.adapter, self.adapter.brick
        state = adapter.init(adapter.hold(params) if starts_from_values(brick, specs) else adapter.blank(params))
        if identity is not None:
            state = adapter.fold_in(state, identity)
        taken = {id(leaf) for leaf in jax.tree.leaves(params)}

        def own(leaf: Any) -> jax.Array:
            leaf = jnp.array(leaf) if id(leaf) in taken or not isinstance(leaf, jax.Array) else leaf
            taken.add(id(leaf))
            return leaf

        return jax.tree.map(own, state)

    def init_from_specs(self, specs: Specs) -> State:
        """Make the state before the parameters are known.

        Raises:
          ValueError: if the state depends on the parameters' values.
        """
        if starts_from_values(self.adapter.brick, specs):
            raise ValueError(
                f"the state of {self.owner} starts from the parameters' values: call `setup(params)` first"
            )
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in specs.leaves)
        if size > limits().bytes:
            raise ValueError(
                f"{self.owner}: the parameters would take {size} bytes: call `setup(params)` first; at most "
                f"{limits().bytes} are taken on the word of a message: see `Limits`"
            )
        zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in specs.by_path.items()}
        return self.init(specs, specs.tree(zeros))
