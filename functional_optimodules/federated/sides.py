"""Both sides of a federation, as they act on some parameters, and what of a client's outlives a round.

A part of a client's state is kept if what the client sends, or how it steps, in
some later round can depend on it. This follows from the bricks' own programs:
SCAFFOLD's accumulators are started anew when the server's variate arrives, a
FedProx reference is set as the round begins, and a constant rate reads no clock.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from functional_optimodules.aux_var import AuxVar, FromServer
from functional_optimodules.contract import KNOWN
from functional_optimodules.dependence import sources
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.parts import Split, Turns, on_shared, own_paths
from functional_optimodules.federated.placement import has_whole_models, mesh_of
from functional_optimodules.numerics import wide
from functional_optimodules.optimizer import Optimizer, OptimizerState
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.packing.tree import Packing
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import PathTree, Specs

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


Side = Adapter[OptimizerState]


class Own(NamedTuple):
    """What one client has in a round.

    Attributes:
      client: the state of its optimizer.
      uplink: the state of the uplink's.
      params: its own parameters, by path; empty where all are shared.
      stats: its own part of the model's state, by path.
      last: int32 scalar, the last round that it took part in, where parameters are
        shared by turns; otherwise `None`.
    """

    client: OptimizerState
    uplink: OptimizerState
    params: PathTree
    stats: PathTree
    last: jax.Array | None


class Sides(NamedTuple):
    """Both sides of a federation as they act on some parameters, and what a client keeps.

    Attributes:
      client: the clients' optimizer.
      uplink: what becomes of a client's delta.
      server: the server's optimizer.
      params: which parameters are shared.
      stats: which parts of the model's state are.
      turns: which parameters are shared by turns; `None` if none is.
      layouts: the parts of the states of client and uplink.
      kept: the shapes of each part that outlives a round, by name.
      flat: whether the arrays of a row are vectors.
    """

    client: Side
    uplink: Side
    server: Side
    params: Split
    stats: Split
    turns: Turns | None
    layouts: tuple[Layout, Layout]
    kept: dict[str, PyTree]
    flat: bool

    def broadcast(self, state: OptimizerState) -> dict[str, FromServer]:
        """Return what the server sends in a round, by name, in the form that clients hold."""
        sent = cast(dict[str, FromServer], self.server.collect(state))
        return {name: aux.map_shaped(self.client.hold) for name, aux in sent.items()}

    def hear(self, broadcast: Mapping[str, FromServer], who: int | jax.Array, own: Own, params: Params) -> Own:
        """Begin the round of a client, with what the server sends."""
        sent: dict[str, AuxVar] = {name: aux.narrow(who) for name, aux in broadcast.items()}
        states = []
        for side, state, held in ((self.client, own.client, params), (self.uplink, own.uplink, self.shared(params))):
            mine = {name: aux for name, aux in sent.items() if name in side.brick.channels()}
            states.append(side.process(mine, side.begin_round(state, held)))
        return own._replace(client=states[0], uplink=states[1])

    def report(self, own: Own) -> dict[str, AuxVar]:
        """Return what a client sends at the end of its round, by name."""
        return self.client.collect(own.client) | self.uplink.collect(own.uplink)

    def commit(self, own: Own) -> Own:
        """Return what a client has once that has arrived."""
        return own._replace(client=self.client.commit(own.client), uplink=self.uplink.commit(own.uplink))

    def metrics(self, own: Own) -> dict[str, jax.Array]:
        """Return what the bricks of a client say of its round."""
        sides = ("client", self.client.brick.metrics(own.client)), ("uplink", self.uplink.brick.metrics(own.uplink))
        return {f"{side}/{name}": _number(value) for side, found in sides for name, value in found.items()}

    def shared(self, tree: PyTree) -> PyTree:
        """Return what is shared of a tree that clients hold."""
        return self.params.shared(tree) if self.params.own else tree

    def whole(self, shared: PyTree, own: Own, now: jax.Array) -> PyTree:
        """Return the parameters of a client, as it holds them, from those shared and its own."""
        whole = self.params.whole(shared, own.params)
        return whole if self.turns is None else self.turns.merged(whole, own.params, now, cast(jax.Array, own.last))

    def mine(self, params: Params) -> PathTree:
        """Return a client's own parameters, by path, of those that it holds."""
        params = self.client.free(params)
        return PathTree(self.params.kept(params) | (self.turns.kept(params) if self.turns else {}))

    def fresh(self, params: Params, stats: PyTree) -> Own:
        """Return what a client has before its first round."""
        held = self.client.hold(params)
        states = self.client.init(held), self.uplink.init(self.shared(held))
        last = None if self.turns is None else jnp.zeros((), jnp.int32)
        return Own(*states, self.mine(held), self.stats.kept(stats), last)

    def row(self, own: Own) -> Rows:
        """Return what is kept of what a client has: its row of the bank."""
        return self.as_row([part for name, part in self._parts(own) if name in self.kept])

    def as_row(self, parts: Sequence[PyTree]) -> Rows:
        """Return parts that are kept in the form of a row."""
        # Of small matrices a TPU puts the clients last: to read them by client, it copies the whole bank.
        return [leaf.reshape(-1) if self.flat and leaf.ndim > 1 else leaf for leaf in jax.tree.leaves(parts)]

    def parts(self, row: Iterable[PyTree]) -> dict[str, PyTree]:
        """Return the parts that a row holds, by name; or those of many rows, along a leading axis."""
        leaves = iter(row)

        def shaped(spec: PyTree) -> PyTree:
            leaf = next(leaves)
            return leaf.reshape(*leaf.shape[:-1], *spec.shape) if self.flat and len(spec.shape) > 1 else leaf

        return {name: jax.tree.map(shaped, part) for name, part in self.kept.items()}

    def restored(self, row: Rows, shared: Params) -> Own:
        """Return what a client has as its round begins: all is new but what was kept."""
        kept = self.parts(row)
        params, stats = kept.get("local/params", PathTree()), kept.get("local/stats", PathTree())
        with shapes_only():
            states = self.client.init(self.params.whole(shared, params)), self.uplink.init(shared)
            fresh = Own(*states, params, stats, kept.get("local/last"))
        parts = [kept.get(name, value) for name, value in self._parts(fresh)]
        client, uplink = self.layouts
        count = len(client.parts)
        return fresh._replace(
            client=jax.tree.unflatten(client.treedef, parts[:count]),
            uplink=jax.tree.unflatten(uplink.treedef, parts[count : count + len(uplink.parts)]),
        )

    def _parts(self, own: Own) -> list[tuple[str, PyTree]]:
        client, uplink = self.layouts
        return [
            *((name, value) for name, _, value in client.split(own.client)),
            *((f"uplink/{name}", value) for name, _, value in uplink.split(own.uplink)),
            ("local/params", own.params),
            ("local/stats", own.stats),
            ("local/last", own.last),
        ]


def _number(value: ArrayLike) -> jax.Array:
    """Return what a brick says of itself as a number that can be added to 0: a truth is 0 or 1."""
    array = jnp.asarray(value)
    return array.astype(jnp.float32) if array.dtype == bool else array


def sides_of(federation: "Federation", params: Params, stats: PyTree, packing: Packing | None) -> Sides:
    """Return both sides, as they act on parameters, which clients pack in some way."""
    own = own_paths(federation.local, params, stats)
    brick, uplink = on_shared(federation.client, own), Optimizer(1.0, modules=federation.uplink)
    split, by_path = Split.of(params, own), Specs.of(params).by_path
    with shapes_only():
        layouts = (
            Layout(jax.eval_shape(brick.init, by_path)),
            Layout(jax.eval_shape(uplink.init, Specs.of(split.shared(params)).by_path)),
        )
        sides = Sides(
            client=adapted(brick, packing),
            uplink=adapted(uplink, packing),
            server=adapted(federation.server),
            params=split,
            stats=Split.of(stats, own),
            turns=Turns.of(params, federation.fragments, federation.mixing) if federation.fragments else None,
            layouts=layouts,
            kept={},
            flat=has_whole_models(mesh_of(federation.mapping)),  # a matrix may be split along another axis
        )
        shapes = jax.eval_shape(sides.fresh, params, stats)
        held = jax.eval_shape(sides.client.hold, params)
        broadcast = jax.eval_shape(lambda params: sides.broadcast(sides.server.init(split.shared(params))), params)
        numbers = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in KNOWN}
        numbers["num_steps"] = jax.ShapeDtypeStruct((), jnp.int32)
        broad = jax.eval_shape(lambda held: jax.tree.map(wide, held), held)
        known = numbers | dict.fromkeys(filter(KNOWN.get, KNOWN), broad) | {"anchor_gradient": held}
    return sides._replace(kept=_kept(sides, shapes, held, broadcast, known))


def _kept(
    sides: Sides, own: Own, params: Params, broadcast: dict[str, FromServer], known: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Return the parts of what a client has that must outlive a round, from the shapes of all that there is."""
    parts = sides._parts(own)
    part_of = [index for index, (_, value) in enumerate(parts) for _ in jax.tree.leaves(value)]

    def read(function: Callable[..., PyTree], *args: PyTree) -> tuple[list[set[int]], set[int]]:
        """Return what each part of what a function makes is read from, and what all else is."""
        made, rest = [set[int]() for _ in parts], set[int]()
        for leaf, found in enumerate(sources(function, own, *args)):
            (made[part_of[leaf]] if leaf < len(part_of) else rest).update(part_of[source] for source in found)
        return made, rest

    def begin(own: Own, params: Params, broadcast: dict[str, FromServer]) -> Own:
        return sides.hear(broadcast, 0, own, params)

    def step(own: Own, params: Params, known: dict[str, PyTree]) -> tuple[Own, PyTree]:
        asked = {name: known[name] for name in sides.client.brick.asks().step - {"lrate"}}
        updates, state = sides.client.update(params, own.client, params, **asked)
        return own._replace(client=state), updates

    def finish(own: Own, params: Params, known: dict[str, PyTree]) -> tuple[Own, PyTree]:
        updates, own = end_round(sides, own, sides.shared(params), sides.shared(params), known.get)
        return sides.commit(own), (updates, sides.report(own), sides.metrics(own))

    starts, _ = read(begin, params, broadcast)
    steps, stepped = read(step, params, known)
    ends, sent = read(finish, params, known)
    mine = {index for index, (name, _) in enumerate(parts) if name.startswith("local/")}
    kept = {index for index in mine if jax.tree.leaves(parts[index][1])}
    while True:
        # Backwards through a round: what is read at its end, in any step, at its start.
        live = sent.union(stepped, *(ends[part] for part in kept))
        while not (more := set().union(*(steps[part] for part in live))) <= live:
            live |= more
        before = kept.union(*(starts[part] for part in live))
        if before == kept:
            return {name: value for index, (name, value) in enumerate(parts) if index in kept}
        kept = before


def end_round(
    sides: Sides, own: Own, updates: Updates, params: Params, known: Callable[[str], PyTree]
) -> tuple[Updates, Own]:
    """End a client's round: tell its bricks what they ask for, and take its updates through the uplink.

    Args:
      sides: both sides.
      own: what it has after its last step.
      updates: where the shared parameters were before the round less where they are.
      params: these as they were before it.
      known: `(name) -> value`, what is known of the round.
    """
    asked = {name: known(name) for name in sides.client.brick.asks().end}
    client = sides.client.end_round(own.client, **asked)
    if not cast(Optimizer, sides.uplink.brick).modules:
        return updates, own._replace(client=client)
    asked = {
        name: sides.shared(known(name)) if KNOWN[name] else known(name)
        for name in sides.uplink.brick.asks().step - {"lrate"}
    }
    sent, uplink = sides.uplink.update(updates, own.uplink, params, **asked)
    # An optimizer's updates are minus what its modules make of the gradients.
    return jax.tree.map(jnp.negative, sent), own._replace(client=client, uplink=uplink)
