"""The pure methods of a brick, compiled, with the checks that belong in the trace.

Equal bricks share one entry, which holds a brick without facade: no state is
kept alive by it. What is checked while tracing costs nothing in later calls.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.core.buffers import home_of, homed
from functional_optimodules.core.dependence import reads_values
from functional_optimodules.core.encoding import Layout, is_sharded
from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.core.packed import pack_auxes, packed_as
from functional_optimodules.core.packing import Packed, Packing, is_packed, packing_of, unpack
from functional_optimodules.core.paths import Specs, show

# What is allocated on the word of a message, before there are parameters.
_MOST_BYTES = 2**32


class Form(NamedTuple):
    """What a step is compiled for. Hashable.

    Attributes:
      specs: the parameters' container, paths, shapes and dtypes.
      packing: how the state is packed, and the parameters are for the step, or `None`.
      homes: where parameters that are laid out over a mesh of devices lie, and the
        leaves of the state beside them; `None` for others.
    """

    specs: Specs
    packing: Packing | None = None
    homes: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, specs: Specs, packing: Packing | None, params: Any, state: Any) -> "Form":
        """Return the form of a state, and of parameters that may be laid out over a mesh."""
        homes = tuple(map(_home, jax.tree.leaves(params)))
        return cls(specs, packing, (homes, tuple(map(_home, jax.tree.leaves(state)))) if any(homes) else None)

    def repacked(self, packing: Packing | None, state: Any) -> "Form":
        """Return the form of the state once it is packed otherwise."""
        homes = self.homes and (self.homes[0], tuple(map(_home, jax.tree.leaves(state))))
        return self._replace(packing=packing, homes=homes)

    def homed(self, state: Any) -> Any:
        """Have a new state lie where the last one does."""
        if self.homes is None:
            return state
        leaves, treedef = jax.tree.flatten(state)
        return jax.tree.unflatten(treedef, map(homed, leaves, self.homes[1]))

    def homed_params(self, tree: Any) -> Any:
        """Have parameters, or what is shaped like them, lie where these do."""
        if self.homes is None:
            return tree
        homes = self.specs.treedef.unflatten(self.homes[0])
        if is_packed(tree):
            places = tree.packing.specs.treedef.flatten_up_to(homes)
            large = (homed(leaf, places[at]) for leaf, at in zip(tree.large, tree.packing.large, strict=True))
            return Packed(tree.packing, (*map(homed, tree.buffers, tree.packing.homes), *large))
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, map(homed, leaves, self.homes[0]))


@functools.lru_cache(maxsize=512)
def compiled(brick: Any) -> "Compiled":
    """Return the compiled methods of a bare brick, the same for equal bricks."""
    return Compiled(brick)


class Compiled:
    """The compiled methods of a brick. Only `step` and `apply` donate, and only what they name."""

    def __init__(self, brick: Any) -> None:
        self.brick = brick
        self.step = jax.jit(self._step, static_argnums=0, donate_argnums=1)
        self.apply = jax.jit(self._apply, static_argnums=0, donate_argnums=1)
        self.apply_donated = jax.jit(self._apply, static_argnums=0, donate_argnums=(1, 2))
        self.begin_round = jax.jit(self._begin_round)
        self.commit = jax.jit(self._commit)
        self.collect = jax.jit(brick.collect_channels)
        self.process = jax.jit(self._process)
        self.layout = functools.cache(self._layout)
        self.starts_from_values = functools.cache(self._starts_from_values)

    # Of what is donated, the state comes first, and so it does in what is returned: JAX pairs
    # donated buffers with outputs of their shape in order, and XLA copies where pairs cross.

    def _step(self, form: Form, state: Any, gradients: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        self._require(form.specs, gradients, params)
        new, output = self._update(form.packing, state, gradients, params, extra_args)
        return form.homed(new), form.homed_params(
            output if is_packed(gradients) or is_packed(params) else unpack(output)
        )

    def _apply(self, form: Form, state: Any, params: Any, gradients: Any, extra_args: dict[str, Any]) -> Any:
        self._require(form.specs, gradients, params)
        packed = packed_as(params, form.packing)
        new, updates = self._update(form.packing, state, gradients, packed, extra_args)
        applied = optax.apply_updates(packed, updates)
        return form.homed(new), form.homed_params(applied if is_packed(params) else unpack(applied))

    def _update(self, packing: Any, state: Any, gradients: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        output, new = self.brick.update(packed_as(gradients, packing), state, packed_as(params, packing), **extra_args)
        require_same_state(self.brick, "update", state, new)
        return new, output

    def _require(self, specs: Specs, gradients: Any, params: Any) -> None:
        for what, tree in (("gradients", gradients), ("parameters", params)):
            if tree is not None or what == "gradients":
                specs.require_tree(_shapes(tree), f"{type(self.brick).__name__}: the tree of {what}")

    def _begin_round(self, state: Any, params: Any) -> Any:
        new = self.brick.begin_round(state, None if params is None else packed_as(params, packing_of(state)))
        require_same_state(self.brick, "begin_round", state, new)
        return new

    def _commit(self, state: Any) -> Any:
        new = self.brick.commit(state)
        require_same_state(self.brick, "commit", state, new)
        return new

    def _process(self, auxes: dict[str, Any], state: Any) -> Any:
        new = self.brick.process_channels(pack_auxes(auxes, packing_of(state)), state)
        require_same_state(self.brick, "process", state, new)
        return new

    def _layout(self, specs: Specs) -> Layout:
        with shapes_only():
            return Layout(jax.eval_shape(self.brick.init, specs.by_path))

    def _starts_from_values(self, specs: Specs) -> bool:
        return reads_values(self.brick.init, specs.by_path)

    def pack(self, packing: Packing | None, state: Any) -> Any:
        """Pack a state in another way, or unpack it for `None`. Not compiled: large leaves are not to be copied."""
        if packing is None:
            return unpack(state)
        with shapes_only():
            like = jax.eval_shape(self.brick.init, packing.model())
        return jax.tree.map(
            lambda model, part: packed_as(part, packing) if is_packed(model) else part, like, state, is_leaf=is_packed
        )

    def init_packed(self, packing: Packing, params: Any, identity: int | None = None) -> Any:
        """Make the state of packed parameters, whose values are packed only if it starts from them."""
        if self.starts_from_values(packing.specs):
            return self.init(packed_as(params, packing), identity)
        return self.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), packing.model()), identity)

    def init(self, params: Any, identity: int | None = None) -> Any:
        """Make the state, of buffers that are nobody else's, so that it can be donated."""
        state = self.brick.init(params)
        if identity is not None:
            state = self.brick.fold_in(state, identity)
        taken = {id(leaf) for leaf in jax.tree.leaves(params)}

        def own(leaf: Any) -> jax.Array:
            leaf = jnp.array(leaf) if id(leaf) in taken or not isinstance(leaf, jax.Array) else leaf
            taken.add(id(leaf))
            return leaf

        return jax.tree.map(own, state)

    def init_from_specs(self, specs: Specs) -> Any:
        """Make the state before the parameters are known.

        Raises:
          ValueError: if the state depends on the parameters' values.
        """
        if self.starts_from_values(specs):
            raise ValueError(
                f"the state of {type(self.brick).__name__} starts from the parameters' values: "
                "call `setup(params)` first"
            )
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in specs.leaves)
        if size > _MOST_BYTES:
            raise ValueError(
                f"{type(self.brick).__name__}: the parameters would take {size} bytes: call `setup(params)` first"
            )
        return self.init(specs.tree({path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in specs.by_path.items()}))


def _home(leaf: Any) -> Any:
    return home_of(leaf.sharding) if is_sharded(leaf) else None


def _shapes(tree: Any) -> Any:
    return tree.shapes() if is_packed(tree) else tree


def require_same_state(brick: Any, method: str, old: Any, new: Any) -> None:
    """Raise a `TypeError` if a method changed the structure, a shape or a dtype of the state."""
    before, after = (dict(jax.tree_util.tree_flatten_with_path(state)[0]) for state in (old, new))
    at = jax.tree_util.keystr
    who = f"{type(brick).__name__}.{method}"
    for path in before.keys() & after.keys():
        was, now = before[path], jax.eval_shape(jnp.asarray, after[path])
        if was.shape != now.shape or was.dtype != now.dtype:
            raise TypeError(f"{who} changed the state at {at(path)} from {show(was)} to {show(now)}")
    structures: list[Any] = [jax.tree.structure(state) for state in (old, new)]
    if structures[0] != structures[1]:
        paths = sorted(at(path) for path in before.keys() ^ after.keys())
        raise TypeError(f"{who} changed the structure of the state" + f", at {', '.join(paths)}" * bool(paths))
