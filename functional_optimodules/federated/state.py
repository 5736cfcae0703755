"""The state of a federation, and how it is made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.core.packed import automatic, packed_as
from functional_optimodules.core.packing import Packing, unpack
from functional_optimodules.federated.batches import check_batches
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.liveness import kept_leaves
from functional_optimodules.federated.mapping import mesh_of
from functional_optimodules.federated.participant import keep_leaves
from functional_optimodules.federated.placement import make_bank, replicate


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
    """

    params: Any
    server: Any
    bank: list[jax.Array]
    slots: jax.Array
    num_clients: jax.Array
    round: jax.Array
    key: jax.Array
    packing: Packing | None


def make_state(federation: Any, params: Any, clients: int | FederatedData, seed: int) -> FederationState:
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
    params = unpack(params)
    # By the shapes alone: clients' work is laid out by the mesh, wherever the parameters come from.
    packing = automatic(jax.eval_shape(lambda tree: tree, params))
    packed = packed_as(params, packing)
    kept = kept_leaves(federation.client, federation.server, packed)
    client_state = replicate(federation.client.init(packed), mesh)

    def row(client_state: Any, identity: jax.Array) -> list[jax.Array]:
        return keep_leaves(federation.client.fold_in(client_state, identity), kept)

    state = FederationState(
        params=params,
        server=federation.server.init(params),
        bank=[],
        slots=slots if any(kept) else slots[:0],
        num_clients=jnp.int32(total),
        round=jnp.int32(0),
        key=jax.random.key(seed),
        packing=packing,
    )
    bank = make_bank(row, client_state, ids, mesh) if any(kept) else []
    return replicate(state, mesh)._replace(bank=bank)
