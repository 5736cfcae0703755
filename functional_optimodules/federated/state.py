"""The state of a federation: how it is made, what it was made for, and what of a client's state it keeps.

A part of a client's state is kept if what the client sends, or how it steps, in
some later round can depend on it. This follows from the bricks' own programs:
SCAFFOLD's accumulators are started anew when the server's variate arrives, a
FedProx reference is set as the round begins, and a constant rate reads no clock.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import AuxVar, FromServer
from functional_optimodules.config.fields import differences
from functional_optimodules.dependence import sources
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.checks import require_clients
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.placement import SPLIT, mesh_of, mesh_size, replicate, sharding
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.packing.adapter import Adapter, adapted
from functional_optimodules.packing.policy import worthwhile
from functional_optimodules.packing.tree import Packing
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs, keystr

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeFor:
    """Which optimizers a state was made for, by the names of their bricks; a pytree without leaves."""

    client: str
    server: str


class FederationState(NamedTuple):
    """State of a federation.

    Attributes:
      params: the parameters.
      server: state of the server's optimizer.
      bank: what each client's optimizer keeps between rounds: a list of arrays
        with a leading axis of slots, empty for clients that keep nothing.
      slots: int32[N], the slot of each client; empty as the bank is.
      num_clients: int32 scalar, N.
      round: int32 scalar, how many rounds were run.
      key: typed PRNG key that every draw comes from, by round and client.
      packing: how clients pack the parameters, and the bank is packed; no array.
      made_for: the optimizers that it was made for; no array.
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


Side = Adapter[OptimizerState]


class Sides(NamedTuple):
    """Both sides of a federation as they act on some parameters, and what a client keeps.

    Attributes:
      client: the clients' optimizer.
      server: the server's.
      layout: the parts of a client's state.
      kept: the shapes of each part that outlives a round, by name.
    """

    client: Side
    server: Side
    layout: Layout
    kept: dict[str, PyTree]

    def broadcast(self, state: OptimizerState) -> dict[str, FromServer]:
        """Return what the server sends in a round, by name, in the form that clients hold."""
        sent = cast(dict[str, FromServer], self.server.collect(state))
        return {name: aux.map_shaped(self.client.hold) for name, aux in sent.items()}

    def row(self, state: OptimizerState) -> Rows:
        """Return what is kept of a client's state: its row of the bank."""
        return jax.tree.leaves([value for name, _, value in self.layout.split(state) if name in self.kept])

    def parts(self, row: Iterable[PyTree]) -> dict[str, PyTree]:
        """Return the parts that a row holds, by name."""
        leaves = iter(row)
        return {name: jax.tree.map(lambda _: next(leaves), part) for name, part in self.kept.items()}

    def restored(self, row: Rows, fresh: OptimizerState) -> OptimizerState:
        """Return a client's new state, with what was kept in its places."""
        kept = self.parts(row)
        parts = [kept.get(name, value) for name, _, value in self.layout.split(fresh)]
        return jax.tree.unflatten(self.layout.treedef, parts)


def sides_of(federation: "Federation", params: Params, packing: Packing | None) -> Sides:
    """Return both sides, as they act on parameters, which clients pack in some way."""
    client, server = adapted(federation.client, packing), adapted(federation.server)
    with shapes_only():
        sides = Sides(client, server, Layout(jax.eval_shape(federation.client.init, Specs.of(params).by_path)), {})
        held, state = jax.eval_shape(client.hold, params), jax.eval_shape(client.init, params)
        broadcast = jax.eval_shape(lambda params: sides.broadcast(server.init(params)), params)
    return sides._replace(kept=_kept(sides, state, held, broadcast))


def _kept(sides: Sides, state: OptimizerState, params: Params, broadcast: dict[str, FromServer]) -> dict[str, PyTree]:
    """Return the parts of a client's state that must outlive a round, from the shapes of all that there is."""
    client = sides.client
    parts = [(name, value) for name, _, value in sides.layout.split(state)]
    part_of = [index for index, (_, value) in enumerate(parts) for _ in jax.tree.leaves(value)]

    def read(function: Callable[..., PyTree], *args: PyTree) -> tuple[list[set[int]], set[int]]:
        """Return what each part of the state that a function makes is read from, and what all else is."""
        made, rest = [set[int]() for _ in parts], set[int]()
        for leaf, found in enumerate(sources(function, state, *args)):
            (made[part_of[leaf]] if leaf < len(part_of) else rest).update(part_of[source] for source in found)
        return made, rest

    def begin(state: OptimizerState, params: Params, broadcast: dict[str, FromServer]) -> OptimizerState:
        own: dict[str, AuxVar] = {name: aux.narrow(0) for name, aux in broadcast.items()}
        return client.process(own, client.begin_round(state, params))

    starts, _ = read(begin, params, broadcast)
    steps, stepped = read(lambda state, params: client.update(params, state, params)[::-1], params)
    ends, sent = read(lambda state: (client.commit(state), client.collect(state)))
    kept: set[int] = set()
    while True:
        # Backwards through a round: what is read at its end, in any step, at its start.
        live = sent.union(stepped, *(ends[part] for part in kept))
        while not (more := set().union(*(steps[part] for part in live))) <= live:
            live |= more
        before = kept.union(*(starts[part] for part in live))
        if before == kept:
            return {name: value for index, (name, value) in enumerate(parts) if index in kept}
        kept = before


def make_state(federation: "Federation", params: Params, clients: int | FederatedData, seed: int) -> FederationState:
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
    mesh = mesh_of(federation.mapping)
    # By the shapes alone: clients' work is laid out by the mesh, wherever the parameters come from.
    packing = worthwhile(jax.eval_shape(lambda tree: tree, params))
    sides = sides_of(federation, params, packing)
    client = sides.client
    state = FederationState(
        params=params,
        server=sides.server.init(params),
        bank=[],
        slots=slots if sides.kept else slots[:0],
        num_clients=jnp.int32(total),
        round=jnp.int32(0),
        key=jax.random.key(seed),
        packing=packing,
        made_for=_made_for(federation),
    )
    state, first = replicate((state, client.init(client.hold(params))), mesh)
    rows = jax.vmap(lambda first, identity: sides.row(client.fold_in(first, identity)), (None, 0))
    ids = jnp.pad(ids, (0, -ids.shape[0] % mesh_size(mesh)), constant_values=ids.shape[0])
    return state._replace(bank=jax.jit(rows, out_shardings=sharding(mesh, SPLIT))(first, ids))


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
    return MadeFor(federation.client.state_name(), federation.server.state_name())


def own_sides(federation: "Federation", state: FederationState) -> Sides:
    """Return both sides, as they act on the parameters of a state.

    Raises:
      ValueError: if the state was made for another federation, naming what differs.
    """
    sides = sides_of(federation, state.params, state.packing)
    with shapes_only():
        server = jax.eval_shape(sides.server.init, state.params)
    kept = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in state.bank]
    try:
        for side, was, now in differences(vars(state.made_for), vars(_made_for(federation))):
            raise ValueError(f"{side} was {was!r}, and is {now!r} here")
        Specs.of(server).require_tree(state.server, "the server's state")
        Specs.of(jax.tree.leaves(list(sides.kept.values()))).require_same(Specs.of(kept), "what a client keeps")
    except ValueError as error:
        raise ValueError(f"Federation: the state is of another federation: {error}: make one with `init`") from None
    return sides
