"""The state of a federation: how it is made, what it was made for, and what of a client's state it keeps.

A part of a client's state is kept if what the client sends, or how it steps, in
some later round can depend on it. This follows from the bricks' own programs:
SCAFFOLD's accumulators are started anew when the server's variate arrives, a
FedProx reference is set as the round begins, and a constant rate reads no clock.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import AuxVar, FromServer
from functional_optimodules.config.fields import differences
from functional_optimodules.contract import KNOWN
from functional_optimodules.dependence import sources
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.checks import require_clients
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.parts import Split, Turns, on_shared, own_paths
from functional_optimodules.federated.placement import SPLIT, mesh_of, mesh_size, replicate, sharding
from functional_optimodules.optimizer import Optimizer, OptimizerState
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.packing.policy import worthwhile
from functional_optimodules.packing.tree import Packing
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import PathTree, Specs, keystr

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeFor:
    """Which optimizers a state was made for, by the names of their bricks; a pytree without leaves."""

    client: str
    server: str
    uplink: str
    aggregation: str
    local: tuple[str, ...]
    fragments: tuple[tuple[str, ...], ...]


class FederationState(NamedTuple):
    """State of a federation.

    Attributes:
      params: the parameters; of those that each client keeps for itself, what a client
        starts from.
      server: state of the server's optimizer.
      bank: what each client keeps between rounds: a list of arrays with a leading axis
        of slots, empty for clients that keep nothing.
      slots: int32[N], the slot of each client; empty as the bank is.
      num_clients: int32 scalar, N.
      round: int32 scalar, how many rounds were run.
      key: typed PRNG key that every draw comes from, by round and client.
      packing: how clients pack the parameters, and the bank is packed; no array.
      made_for: what it was made for; no array.
      stats: the model's state that no gradient trains, such as statistics of batches;
        `None` for a model without.
      aggregation: what the aggregation keeps between rounds.
    """

    params: Params
    server: OptimizerState
    bank: list[jax.Array]
    slots: jax.Array
    num_clients: jax.Array
    round: jax.Array
    key: jax.Array
    packing: Packing | None
    made_for: MadeFor
    stats: PyTree = None
    aggregation: PyTree = ()


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
    """

    client: Side
    uplink: Side
    server: Side
    params: Split
    stats: Split
    turns: Turns | None
    layouts: tuple[Layout, Layout]
    kept: dict[str, PyTree]

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
        return {f"{side}/{name}": jnp.asarray(value) for side, found in sides for name, value in found.items()}

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
        return jax.tree.leaves([part for name, part in self._parts(own) if name in self.kept])

    def parts(self, row: Iterable[PyTree]) -> dict[str, PyTree]:
        """Return the parts that a row holds, by name."""
        leaves = iter(row)
        return {name: jax.tree.map(lambda _: next(leaves), part) for name, part in self.kept.items()}

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
        )
        shapes = jax.eval_shape(sides.fresh, params, stats)
        held = jax.eval_shape(sides.client.hold, params)
        broadcast = jax.eval_shape(lambda params: sides.broadcast(sides.server.init(split.shared(params))), params)
        numbers = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in KNOWN}
        numbers["num_steps"] = jax.ShapeDtypeStruct((), jnp.int32)
        known = numbers | {name: held for name, shaped in KNOWN.items() if shaped}
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


def make_state(
    federation: "Federation", params: Params, clients: int | FederatedData, seed: int, stats: PyTree
) -> FederationState:
    """Make the state before any round; see `Federation.init`."""
    if isinstance(clients, FederatedData):
        check_batches(clients, federation.batch_size, federation.remainder)
        ids, slots, total = clients.ids, clients.slots, clients.num_clients
    elif type(clients) is int and clients >= 1:
        ids = slots = jnp.arange(clients, dtype=jnp.int32)
        total = clients
    else:
        raise ValueError(f"Federation: clients={clients!r} should be their data, or their number of at least 1")
    require_clients(federation.server, total)
    _require_trained(params)
    _require_averaged(federation, params, stats)
    mesh = mesh_of(federation.mapping)
    # By the shapes alone: clients' work is laid out by the mesh, wherever the parameters come from.
    packing = worthwhile(jax.eval_shape(lambda tree: tree, params))
    if federation.local or federation.fragments:  # the tree is taken apart by its leaves
        packing = None
    sides = sides_of(federation, params, stats, packing)
    shared = sides.params.shared(params)
    state = FederationState(
        params=params,
        server=sides.server.init(shared),
        bank=[],
        slots=slots if sides.kept else slots[:0],
        num_clients=jnp.int32(total),
        round=jnp.int32(0),
        key=jax.random.key(seed),
        packing=packing,
        made_for=_made_for(federation),
        stats=stats,
        aggregation=federation.aggregation.init(sides.client.hold(shared)),
    )
    state, first = replicate((state, sides.fresh(params, stats)), mesh)

    def row(first: Own, identity: jax.Array) -> Rows:
        folded = sides.client.fold_in(first.client, identity), sides.uplink.fold_in(first.uplink, identity)
        return sides.row(first._replace(client=folded[0], uplink=folded[1]))

    ids = jnp.pad(ids, (0, -ids.shape[0] % mesh_size(mesh)), constant_values=ids.shape[0])
    return state._replace(bank=jax.jit(jax.vmap(row, (None, 0)), out_shardings=sharding(mesh, SPLIT))(first, ids))


def _require_averaged(federation: "Federation", params: Params, stats: PyTree) -> None:
    """Raise a `ValueError` for what stands in a model's state, is shared, and has no mean."""
    own = own_paths(federation.local, params, stats)
    specs = Specs.of(stats)
    for path, leaf in specs.by_path.items():
        if path not in own and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"Federation: in the model's state, {path!r} is of {leaf.dtype}, which has no mean: leave it out, or "
                f"let each client keep its own by local=[{path!r}]"
            )


def _require_trained(params: Params) -> None:
    """Raise a `ValueError` for what stands among the parameters, and is not trained."""
    nnx = sys.modules.get("flax.nnx")
    kinds = () if nnx is None else (nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.RngState)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, kinds)):
        kind = f"nnx.{type(leaf).__name__}" if isinstance(leaf, kinds) else getattr(leaf, "dtype", type(leaf))
        if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.inexact):
            raise ValueError(
                f"Federation: among the parameters, {keystr(path)!r} is of {kind}, which no gradient trains, and a "
                "federation keeps nothing but what is trained: pass that alone, of an nnx module "
                "`nnx.state(model, nnx.Param)`, and let the loss have the rest"
            )


def _made_for(federation: "Federation") -> MadeFor:
    uplink = " ".join(module.state_name() for module in federation.uplink)
    return MadeFor(
        federation.client.state_name(),
        federation.server.state_name(),
        uplink,
        federation.aggregation.name,
        federation.local,
        federation.fragments,
    )


def own_sides(federation: "Federation", state: FederationState) -> Sides:
    """Return both sides, as they act on the parameters of a state.

    Raises:
      ValueError: if the state was made for another federation, naming what differs.
    """
    kept = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in state.bank]
    try:
        for side, was, now in differences(vars(state.made_for), vars(_made_for(federation))):
            raise ValueError(f"{side} was {was!r}, and is {now!r} here")
        sides = sides_of(federation, state.params, state.stats, state.packing)
        with shapes_only():
            server = jax.eval_shape(lambda params: sides.server.init(sides.params.shared(params)), state.params)
        Specs.of(server).require_tree(state.server, "the server's state")
        Specs.of(jax.tree.leaves(list(sides.kept.values()))).require_same(Specs.of(kept), "what a client keeps")
    except ValueError as error:
        raise ValueError(f"Federation: the state is of another federation: {error}: make one with `init`") from None
    return sides


def client_model(federation: "Federation", state: FederationState, client: int | None) -> tuple[Params, PyTree]:
    """Return the parameters and the model's state, the server's or a client's."""
    if client is None:
        return state.params, state.stats
    total = int(state.num_clients)
    if type(client) is not int or not 0 <= client < total:
        raise ValueError(f"Federation: client={client!r} should be one of the {total} clients, from 0")
    sides = own_sides(federation, state)
    row = sides.parts(leaf[state.slots[client]] for leaf in state.bank)
    trees = (state.params, "local/params"), (state.stats, "local/stats")
    params, stats = (_with_leaves(tree, row.get(name, {})) for tree, name in trees)
    return params, stats


def _with_leaves(tree: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
    specs = Specs.of(tree)
    return specs.tree({**dict(zip(specs.paths, specs.leaves_of(tree), strict=True)), **leaves})
