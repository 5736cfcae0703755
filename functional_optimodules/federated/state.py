"""The state of a federation: how it is made, and what it was made for."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.config.fields import differences
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.checks import require_clients
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.models import ModelLoss
from functional_optimodules.federated.parts import own_paths
from functional_optimodules.federated.placement import (
    device_of,
    has_whole_models,
    mesh_of,
    mesh_size,
    replicate,
    rows_sharding,
)
from functional_optimodules.federated.sides import Own, Sides, sides_of
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.packing.policy import platform_of, worthwhile
from functional_optimodules.packing.tree import Packing, unpack
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.paths import Specs, keystr

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
    mesh = mesh_of(federation.mapping)
    state, first, sides = start(federation, params, total, seed, stats)
    if not sides.kept:
        return state
    state = state._replace(slots=replicate(slots, mesh))
    ids = jnp.pad(ids, (0, -ids.shape[0] % mesh_size(mesh)), constant_values=ids.shape[0])
    # Each lies as it did before it was flat; to reshape it here would be a program to compile.
    places = [rows_sharding(mesh, leaf) for leaf in sides._replace(flat=False).row(first)]
    rows = jax.jit(jax.vmap(functools.partial(fresh_row, sides), (None, 0)), out_shardings=places)
    return state._replace(bank=rows(first, ids))


def start(
    federation: "Federation", params: Params, total: int, seed: int, stats: PyTree
) -> tuple[FederationState, Own, Sides]:
    """Return the state of so many clients before any round, but for their rows; what each starts from; both sides.

    Raises:
      ValueError: as `Federation.init` does.
    """
    if isinstance(federation.loss_fn, ModelLoss):
        params, stats = federation.loss_fn.taken_apart(params)
    params = unpack(params)
    require_clients(federation.server, total)
    _require_trained(params)
    _require_averaged(federation, params, stats)
    mesh = mesh_of(federation.mapping)
    # By the shapes alone: clients' work is laid out by the mesh, wherever the parameters come from.
    platform = platform_of(params) if mesh is None else device_of(mesh).platform
    shapes = jax.eval_shape(lambda tree: tree, params)
    packing = worthwhile(shapes, federation.client.sharers(Specs.of(shapes)), platform=platform)
    # The tree is taken apart by its leaves, or these may be split along another axis of the mesh.
    if federation.local or federation.fragments or not has_whole_models(mesh):
        packing = None
    sides = sides_of(federation, params, stats, packing)
    shared = sides.params.shared(params)
    # NumPy's, which `replicate` puts on devices: each of `jnp` would be a program to compile.
    nobody: PyTree = np.zeros(0, np.int32)
    counts: PyTree = np.array([total, 0], np.int32)
    state = FederationState(
        params=params,
        server=sides.server.init(shared),
        bank=[],
        slots=nobody,
        num_clients=counts[0],
        round=counts[1],
        key=jax.random.key(seed),
        packing=packing,
        made_for=_made_for(federation),
        stats=stats,
        aggregation=federation.aggregation.init(sides.client.hold(shared)),
    )
    return *replicate((state, sides.fresh(params, stats)), mesh), sides


def fresh_row(sides: Sides, first: Own, client: jax.Array) -> Rows:
    """Return the row of a client before its first round, from what each starts from."""
    folded = sides.client.fold_in(first.client, client), sides.uplink.fold_in(first.uplink, client)
    return sides.row(first._replace(client=folded[0], uplink=folded[1]))


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
        row = jax.eval_shape(sides.as_row, list(sides.kept.values()))
        Specs.of(row).require_same(Specs.of(kept), "what a client keeps")
    except ValueError as error:
        raise ValueError(f"Federation: the state is of another federation: {error}: make one with `init`") from None
    return sides


def with_hyperparameters(
    federation: "Federation", state: FederationState, client: Mapping[str, Any], server: Mapping[str, Any]
) -> FederationState:
    """Return a state with other values of live hyper-parameters; see `Federation.with_hyperparameters`."""
    values = federation.client.checked_hyperparameters(client)
    new = federation.server.with_hyperparameters(state.server, server)
    kept = own_sides(federation, state).kept
    names = [name for name, part in kept.items() for _ in jax.tree.leaves(part)]
    bank = list(state.bank)
    for path, value in values.items():
        if f"live/{path}" not in names:  # it changes nothing of what a client does, and so it is not kept
            continue
        index = names.index(f"live/{path}")
        rows = jnp.full_like(bank[index], value)
        bank[index] = jax.device_put(rows, bank[index].sharding) if bank[index].committed else rows
    return state._replace(server=new, bank=bank)


def client_model(federation: "Federation", state: FederationState, client: int | None) -> tuple[Params, PyTree]:
    """Return the parameters and the model's state, the server's or a client's."""
    if client is None:
        return state.params, state.stats
    total = int(state.num_clients)
    if isinstance(client, bool) or not isinstance(client, int | np.integer) or not 0 <= client < total:
        raise ValueError(f"Federation: client={client!r} should be one of the {total} clients, from 0")
    sides = own_sides(federation, state)
    row = sides.parts(leaf[state.slots[client]] for leaf in state.bank)
    trees = (state.params, "local/params"), (state.stats, "local/stats")
    params, stats = (_with_leaves(tree, row.get(name, {})) for tree, name in trees)
    return params, stats


def _with_leaves(tree: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
    specs = Specs.of(tree)
    return specs.tree({**dict(zip(specs.paths, specs.leaves_of(tree), strict=True)), **leaves})
