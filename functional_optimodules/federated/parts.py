"""What of a model all clients share, and what each keeps for itself.

Parts of the parameters, or of the model's state, that are a client's own are found by
patterns over their paths. They are neither sent nor averaged: FedPer keeps a head,
FedBN the scales, offsets and statistics of batch normalization.

Fragments are shared by turns: in round r that of r mod P is sent and averaged, while
each client goes on with its own copy of the others, as streaming DiLoCo does.

References:
  Arivazhagan et al., "Federated learning with personalization layers", arXiv:1912.00818.
  Li et al., "FedBN: federated learning on non-IID features via local batch
  normalization", ICLR 2021, arXiv:2102.07623.
  Douillard et al., "Streaming DiLoCo with overlapping communication: towards a
  distributed free lunch", arXiv:2501.18512.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import AuxVar
from functional_optimodules.brick import OptiModule
from functional_optimodules.contract import KNOWN, Asked, Contract
from functional_optimodules.numerics import wide
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.paths import PathTree, Specs, matching


@dataclasses.dataclass(frozen=True)
class Split:
    """How a tree is parted. Where no leaf is a client's own, what is shared is the tree itself.

    Attributes:
      specs: the whole tree's container, paths and shapes.
      own: the paths of the leaves that each client keeps for itself.
    """

    specs: Specs
    own: frozenset[str]

    @classmethod
    def of(cls, tree: PyTree, own: frozenset[str]) -> Self:
        """Return how a tree is parted whose leaves of such paths are a client's own."""
        specs = Specs.of(tree)
        return cls(specs, own.intersection(specs.paths))

    def shared(self, tree: PyTree) -> PyTree:
        """Return what is shared of a tree: the tree, or its leaves by path."""
        return self._leaves(tree, mine=False) if self.own else tree

    def kept(self, tree: PyTree) -> PathTree:
        """Return the leaves of a tree that are a client's own, by path."""
        return self._leaves(tree, mine=True) if self.own else PathTree()

    def whole(self, shared: PyTree, kept: Mapping[str, PyTree]) -> PyTree:
        """Put both parts together; of what is kept, what is no client's own is passed over."""
        return self.specs.tree({**shared, **{path: kept[path] for path in self.own}}) if self.own else shared

    def _leaves(self, tree: PyTree, mine: bool) -> PathTree:
        leaves = zip(self.specs.paths, self.specs.leaves_of(tree), strict=True)
        return PathTree({path: leaf for path, leaf in leaves if (path in self.own) is mine})


@dataclasses.dataclass(frozen=True)
class Turns:
    """Which parameters are shared in which rounds.

    Attributes:
      specs: the parameters' container, paths and shapes.
      turns: for each leaf the number of its fragment; `None` for what is shared in every round.
      count: how many fragments there are.
      mixing: how much of its own copy a client keeps where a fragment has come back.
    """

    specs: Specs
    turns: tuple[int | None, ...]
    count: int
    mixing: float

    @classmethod
    def of(cls, params: Params, fragments: tuple[tuple[str, ...], ...], mixing: float) -> Self:
        """Return the turns of parameters.

        Raises:
          ValueError: if a pattern matches no path, or two fragments share one.
        """
        specs = Specs.of(params)
        found = [matching(patterns, specs.paths, "Federation: fragments") for patterns in fragments]
        turn = {path: number for number, paths in enumerate(found) for path in paths}
        if sum(map(len, found)) > len(turn):
            path = next(path for path in turn if sum(path in paths for paths in found) > 1)
            raise ValueError(f"Federation: {path!r} is in more than one of the fragments {list(map(list, fragments))}")
        return cls(specs, tuple(turn.get(path) for path in specs.paths), len(found), mixing)

    def kept(self, params: Params) -> PathTree:
        """Return the leaves that have turns, by path: each client's own copies."""
        leaves = zip(self.specs.paths, self.turns, self.specs.leaves_of(params), strict=True)
        return PathTree({path: leaf for path, turn, leaf in leaves if turn is not None})

    def merged(self, shared: Params, own: Mapping[str, PyTree], now: jax.Array, last: jax.Array) -> Params:
        """Return what a client begins a round with.

        Args:
          shared: the parameters as they were sent.
          own: its own copies, by path.
          now: the number of the round.
          last: the number of the last one that it took part in; 0 before the first.
        """

        def merge(path: str, turn: int | None, leaf: jax.Array) -> jax.Array:
            if turn is None:
                return leaf
            # What came back since then, it has not got yet.
            shared_in = now - 1 - (now - 1 - turn) % self.count
            new = (self.mixing * wide(own[path]) + (1 - self.mixing) * wide(leaf)).astype(leaf.dtype)
            return jnp.where(shared_in >= last, new, own[path])

        leaves = zip(self.specs.paths, self.turns, self.specs.leaves_of(shared), strict=True)
        return jax.tree.unflatten(self.specs.treedef, [merge(*each) for each in leaves])

    def due(self, yes: PyTree, no: PyTree, now: jax.Array) -> PyTree:
        """Return one tree where it is a leaf's turn, and another where it is not."""
        both = zip(self.turns, self.specs.leaves_of(yes), self.specs.leaves_of(no), strict=True)
        leaves = [a if turn is None else jnp.where(now % self.count == turn, a, b) for turn, a, b in both]
        return jax.tree.unflatten(self.specs.treedef, leaves)


def own_paths(patterns: tuple[str, ...], params: Params, stats: PyTree) -> frozenset[str]:
    """Return the paths, of parameters and of a model's state, that some patterns match.

    Raises:
      ValueError: if a pattern matches no path, or no parameter is left to share.
    """
    if not patterns:
        return frozenset()
    trained = Specs.of(params).paths
    found = matching(patterns, (*trained, *Specs.of(stats).paths), "Federation: local")
    if found.issuperset(trained):
        raise ValueError(f"Federation: local={list(patterns)} leaves no parameter for clients to share")
    return found


def on_shared(client: Optimizer, own: frozenset[str]) -> Optimizer:
    """Return a clients' optimizer of which the modules that reckon with a server act on what is shared alone."""
    if not own:
        return client
    paths = tuple(sorted(own))
    reckon = [
        bool(each.channels() or each.asks().end or "mean_gradient" in each.asks().step) for each in client.modules
    ]
    modules = zip(client.modules, reckon, strict=True)
    return dataclasses.replace(client, modules=tuple(_OnShared(m, paths) if with_it else m for m, with_it in modules))


class _OnShared(OptiModule[Any], register=False):
    """A module that acts on what all clients share, and leaves alone what each keeps for itself.

    Attributes:
      module: the module.
      own: the paths of what it leaves alone.
    """

    _around: ClassVar[str] = "module"
    module: OptiModule
    own: tuple[str, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The module's."""
        return self.module.name

    @property
    def _adapter(self) -> Adapter[Any]:
        return adapted(self.module)

    def _shared(self, tree: PyTree) -> PyTree:
        return tree if tree is None else Split.of(tree, frozenset(self.own)).shared(tree)

    def _known(self, known: dict[str, PyTree]) -> dict[str, PyTree]:
        return {name: self._shared(value) if KNOWN.get(name) else value for name, value in known.items()}

    def init(self, params: Params) -> Any:
        return self._adapter.init(self._shared(params))

    def update(self, updates: Updates, state: Any, params: Params = None, **extra_args: PyTree) -> tuple[Updates, Any]:
        split = Split.of(updates, frozenset(self.own))
        known = self._known(extra_args)
        shared, state = self._adapter.update(split.shared(updates), state, self._shared(params), **known)
        return split.whole(shared, split.kept(updates)), state

    def begin_round(self, state: Any, params: Params = None) -> Any:
        return self._adapter.begin_round(state, self._shared(params))

    def end_round(self, state: Any, **known: PyTree) -> Any:
        return self._adapter.end_round(state, **self._known(known))

    def asks(self) -> Asked:
        return self.module.asks()

    def collect(self, state: Any) -> dict[str, AuxVar]:
        return self._adapter.collect(state)

    def commit(self, state: Any) -> Any:
        return self._adapter.commit(state)

    def process(self, aux: dict[str, AuxVar], state: Any) -> Any:
        return self._adapter.process(aux, state)

    def metrics(self, state: Any) -> Mapping[str, jax.Array]:
        return self.module.metrics(state)

    def measure(self, before: Updates, after: Updates, state: Any, params: Params = None) -> Mapping[str, jax.Array]:
        return self._adapter.measure(self._shared(before), self._shared(after), state, self._shared(params))

    def channels(self) -> Mapping[str, Contract]:
        return self.module.channels()
