"""The state of a federation as plain arrays, by client: for whatever saves arrays, onto any devices.

{"num_clients": N, "round": ..., "key": words, "params": tree, "server": state,
 "bank": {variable: tree with a leading axis of the N clients}}

and, where there is such, "stats" and "aggregation". Which client has which slot of the bank depends on the
devices, and how clients pack parameters on what they run on: here each row has its client's number.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from functional_optimodules.federated.placement import AXIS, mesh_of, replicate
from functional_optimodules.federated.saving import extras
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.packing import portable
from functional_optimodules.random.keys import from_words, words
from functional_optimodules.types import PyTree
from functional_optimodules.wire.paths import Specs, by_path

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

_WHAT = "Federation: what was saved"


def to_arrays(federation: "Federation", state: FederationState) -> dict[str, PyTree]:
    """Return a state as plain arrays; see `Federation.to_arrays`."""
    sides = own_sides(federation, state)
    places = [_by_client(leaf, state.slots.shape[0]) for leaf in state.bank]
    rows = jax.jit(_rows, out_shardings=places)(state.bank, state.slots)
    parts = sides.parts(map(from_words, rows, state.bank))
    return {
        **portable.to_arrays({name: getattr(state, name) for name in ("num_clients", "round", "key", "params")}),
        "server": portable.to_arrays(state.server),
        "bank": portable.to_arrays({name: sides.client.portable(part) for name, part in parts.items()}),
        **portable.to_arrays(extras(sides, state)),
    }


def from_arrays(federation: "Federation", arrays: PyTree, like: FederationState) -> FederationState:
    """Return the state of what `to_arrays` gave; see `Federation.from_arrays`."""
    sides = own_sides(federation, like)
    plain = jax.eval_shape(lambda state: to_arrays(federation, state), like)
    Specs.of(plain).require_all_same(Specs.of(arrays), _WHAT)
    saved = Specs.of(plain).tree(by_path(arrays))
    if int(saved["num_clients"]) != int(like.num_clients):
        raise ValueError(f"{_WHAT} is of {saved['num_clients']} clients: expected {like.num_clients}")
    others = {name: saved[name] for name in ("params", "num_clients", "round", "stats") if name in saved}
    if "aggregation" in saved:
        others["aggregation"] = sides.client.adopt(saved["aggregation"], like.aggregation)
    new = like._replace(
        **jax.tree.map(jnp.asarray, others),
        server=portable.from_arrays(saved["server"], like.server),
        key=from_words(saved["key"], like.key),
        bank=[],
    )
    parts = [sides.client.adopt(saved["bank"][name], kept) for name, kept in sides.kept.items()]
    bank = [
        _with_rows(old, like.slots, words(rows)) for old, rows in zip(like.bank, jax.tree.leaves(parts), strict=True)
    ]
    return replicate(new, mesh_of(federation.mapping), like._replace(bank=[]))._replace(bank=bank)


def _by_client(leaf: jax.Array, num_clients: int) -> jax.sharding.Sharding | None:
    """Return how the rows of all clients lie, in their order: over the devices, where these share them evenly."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    place = words(leaf).sharding
    if not isinstance(place, NamedSharding):
        return place
    split = AXIS if num_clients % place.mesh.shape[AXIS] == 0 else None
    return NamedSharding(place.mesh, PartitionSpec(split, *place.spec[1:]))


def _rows(bank: list[jax.Array], slots: jax.Array) -> list[jax.Array]:
    return [words(leaf)[slots] for leaf in bank]


def _with_rows(old: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Return an array of the bank with other rows, on the same devices."""
    raw = words(old)
    placed = jax.device_put(rows.reshape(-1, *raw.shape[1:]), _by_client(old, slots.shape[0]))
    return from_words(jax.jit(_put, out_shardings=raw.sharding)(raw, slots, placed), old)


def _put(bank: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    return bank.at[slots].set(rows)
