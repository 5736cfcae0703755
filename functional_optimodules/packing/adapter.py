"""Packing as a wrapper: a brick that acts on buffers, for whoever holds trees.

`optax.flatten` does the same with one buffer. `adapted` and `fitted` say how a brick
acts on some parameters. What they return has a brick's methods, and whoever calls
these need not know whether anything is packed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic

import jax
import jax.numpy as jnp
import optax

from functional_optimodules.aux_var import AuxVar
from functional_optimodules.checked import name_of, require_arrays, require_like, require_pair
from functional_optimodules.contract import KNOWN, Contract
from functional_optimodules.packing.policy import packed_as, worthwhile
from functional_optimodules.packing.tree import Packing, is_packed, unpack
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree, State, Updates
from functional_optimodules.wire.paths import Specs


@dataclasses.dataclass(frozen=True)
class Adapter(Generic[State]):
    """A brick as the library calls it: what its methods return is checked. Hashable as the brick is.

    Subclasses give the brick other trees than the caller has: `hold` is what they
    make of these, and `free` how they give back what the brick made.

    Attributes:
      brick: the brick, without a facade's state.
    """

    brick: Contract[State]

    def fits(self, tree: PyTree) -> bool:
        """Whether the state keeps its form when such a tree is given."""
        return not is_packed(tree)

    def hold(self, tree: PyTree) -> PyTree:
        """Return parameters, or what is shaped like them, as the brick is given them; again unchanged."""
        return tree

    def free(self, made: PyTree, *given: PyTree) -> PyTree:
        """Return what the brick made, in the form of what it was given."""
        return made

    def portable(self, state: State) -> State:
        """Return a state, or a part of one, over the parameters' own container."""
        return unpack(state)

    def adopt(self, state: State, like: State) -> State:
        """Return what `portable` gave in the form of a state that `init` makes, or of a part of one."""
        return jax.tree.map(
            lambda model, part: packed_as(part, model.packing) if is_packed(model) else part,
            like,
            state,
            is_leaf=is_packed,
        )

    def blank(self, params: Params) -> Params:
        """Return parameters, as `hold` does, of no particular values: for states that start from none."""
        return self.hold(params)

    def model(self, params: Params) -> State:
        """Return the shapes of the state that `init` makes."""
        with shapes_only():
            return jax.eval_shape(self.init, params)

    def init(self, params: Params) -> State:
        """Make the state."""
        state = self.brick.init(self.hold(params))
        require_arrays(self.brick, state)
        return state

    def update(
        self, updates: Updates, state: State, params: Params = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        """Take a step; both results have the structure, shapes and dtypes of what was given."""
        given = self.hold(updates)
        made = self.brick.update(given, state, self.hold(params), **self._held(extra_args))
        output, new = require_pair(self.brick, made)
        require_like(self.brick, "update", "updates", output, given)
        require_like(self.brick, "update", "state", new, state)
        return self.free(output, updates, params), new

    def measure(self, before: Updates, after: Updates, state: State, params: Params) -> Mapping[str, jax.Array]:
        """Return what the brick says about a step."""
        return self.brick.measure(self.hold(before), self.hold(after), state, self.hold(params))

    def apply(self, gradients: Updates, state: State, params: Params, **extra_args: PyTree) -> tuple[Params, State]:
        """Take a step, and return the new parameters, in the form of those given."""
        held = self.hold(params)
        updates, new = self.update(gradients, state, held, **extra_args)
        return self.free(optax.apply_updates(held, self.hold(updates)), params), new

    def begin_round(self, state: State, params: Params = None) -> State:
        """Begin a round."""
        return self._kept("begin_round", state, self.brick.begin_round(state, self.hold(params)))

    def end_round(self, state: State, **known: PyTree) -> State:
        """Take in what is known of a round at its end."""
        return self._kept("end_round", state, self.brick.end_round(state, **self._held(known)))

    def share(self, params: Params, state: State) -> Params:
        """Return the parameters that clients are sent, in the form of those given."""
        held = self.hold(params)
        shared = self.brick.share(held, state)
        require_like(self.brick, "share", "updates", shared, held)
        return self.free(shared, params)

    def collect(self, state: State) -> dict[str, AuxVar]:
        """Return what the brick sends, by the name of its auxiliary variables, in the form that it holds."""
        sent, channels = self.brick.collect(state), self.brick.channels()
        if not isinstance(sent, Mapping):
            sent = {} if sent is None else {next(iter(channels), self.brick.name): sent}
        for name, aux in sent.items():
            sends = channels[name].sends if name in channels else None
            if type(aux) is not sends:
                declared = "nothing" if sends is None else sends.__name__
                raise TypeError(
                    f"{name_of(channels.get(name, self.brick))}.collect returned {type(aux).__name__}, and `sends` "
                    f"declares {declared}"
                )
        return dict(sent)

    def commit(self, state: State) -> State:
        """Return what follows once what was collected has arrived."""
        return self._kept("commit", state, self.brick.commit(state))

    def process(self, auxes: dict[str, AuxVar], state: State) -> State:
        """Take what was received, by the name of the auxiliary variables."""
        if not auxes:
            return state
        held: Any = {name: aux.map_shaped(self.hold) for name, aux in auxes.items()}
        if any(module is self.brick for module in self.brick.channels().values()):
            (held,) = held.values()
        return self._kept("process", state, self.brick.process(held, state))

    def forget(self, state: State, delta: PyTree, auxes: Mapping[str, AuxVar]) -> State:
        """Return a server's state without what a client has given: the sums of its deltas and auxiliary variables."""
        held: Any = {name: aux.map_shaped(self.hold) for name, aux in auxes.items()}
        if any(module is self.brick for module in self.brick.channels().values()):
            held = next(iter(held.values()), None)
        given = {"delta": self.hold(delta), "aux": held}
        recalled = {name: given[name] for name in self.brick.recalls()}
        return self._kept("forget", state, self.brick.forget(state, **recalled))

    def fold_in(self, state: State, integer: int | jax.Array) -> State:
        """Fold an integer into every PRNG key of a state."""
        return self._kept("fold_in", state, self.brick.fold_in(state, integer))

    def _held(self, known: dict[str, PyTree]) -> dict[str, PyTree]:
        return {name: self.hold(value) if KNOWN.get(name) else value for name, value in known.items()}

    def _kept(self, method: str, old: State, new: State) -> State:
        require_like(self.brick, method, "state", new, old)
        return new


@dataclasses.dataclass(frozen=True)
class Packs(Adapter[State]):
    """A brick that is given packed trees. What it makes of trees are trees, and of packed trees packed ones.

    Attributes:
      packing: how the trees are packed.
    """

    packing: Packing

    def fits(self, tree: PyTree) -> bool:
        return not is_packed(tree) or tree.packing.specs == self.packing.specs

    def hold(self, tree: PyTree) -> PyTree:
        return tree if tree is None else packed_as(tree, self.packing)

    def free(self, made: PyTree, *given: PyTree) -> PyTree:
        like = next(filter(is_packed, given), None)
        return unpack(made) if like is None else packed_as(made, like.packing)

    def blank(self, params: Params) -> Params:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.packing.model())


class Unpacks(Adapter[State]):
    """A brick that is given each parameter as the model has it, wherever parameters are packed."""

    def fits(self, tree: PyTree) -> bool:
        return True

    def hold(self, tree: PyTree) -> PyTree:
        return unpack(tree)

    def free(self, made: PyTree, *given: PyTree) -> PyTree:
        like = next(filter(is_packed, given), given[0] if given else made)
        repack: Any = lambda node, part: node.packing.pack(part) if is_packed(node) else part  # noqa: E731
        return jax.tree.map(repack, like, made, is_leaf=is_packed)


def adapted(brick: Contract[State], packing: Packing | None = None) -> Adapter[State]:
    """Return a brick as it acts on trees that are packed in one way, or on trees as they come for `None`."""
    if not brick.packable:
        return Unpacks(brick)
    return Adapter(brick) if packing is None else Packs(brick, packing)


def fitted(brick: Contract[State], params: Params) -> Adapter[State]:
    """Return a brick as it acts best on such parameters: packed as they are, or as is worth it."""
    return adapted(brick, params.packing if is_packed(params) else packing_for(brick, params, inside=True))


def packing_for(brick: Contract, params: Params, inside: bool = False) -> Packing | None:
    """Return how to pack parameters for a brick, or `None` if it is not worth it; `inside` as `worthwhile` takes it."""
    return worthwhile(params, brick.sharers(Specs.of(params)), inside=inside)


def packed_like(updates: Updates, params: Params) -> Updates:
    """Return updates packed as the parameters are, if these are."""
    return packed_as(updates, params.packing) if is_packed(params) else updates
