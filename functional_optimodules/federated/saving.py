"""The state of a federation as JSON values.

{"federation": {field: ...}, "num_clients": N, "round": ..., "key": array,
 "params": {path: {"dtype": ..., "shape": [...]}}, "values": {path: array},
 "server": {variable: array or {path: array}},
 "clients": [...], "bank": {variable: array with a leading axis of these clients}}

and, where there is such, "stats" (the model's state) and "aggregation" (what the
aggregation keeps), each {path: array}.

Clients' rows are written by client, so that a state may be restored on another
number of devices. Of several processes each writes its own clients' rows, and
reads them again.
"""

import itertools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from functional_optimodules.config.fields import differences, require_keys, to_json
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.federated.placement import mesh_of, replicate
from functional_optimodules.federated.sides import Sides
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.random.keys import from_words, words
from functional_optimodules.stateful.compiled import layout_of
from functional_optimodules.types import Json, PyTree
from functional_optimodules.wire.arrays import decode_like, encode_array, with_words
from functional_optimodules.wire.layout import decode_tree, encode_tree
from functional_optimodules.wire.paths import Spec, Specs, keystr, specs_from_json

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

_KEYS = ("federation", "num_clients", "round", "key", "params", "values", "server", "clients", "bank")
_FIELDS = ("batch_size", "epochs", "remainder", "weighting", "sampling", "on_nonfinite")
# What federations have not always had is written where it is not as it always was.
_LATER: dict[str, Json] = {
    "steps": None,
    "coin": None,
    "local": [],
    "fragments": [],
    "mixing": 0.0,
    "uplink": [],
    "aggregation": ["mean", {}],
}
_SAVED = "Federation: the saved state"
_MOST_NAMED = 10


def describe(federation: "Federation") -> dict[str, Json]:
    """Return what must not change of a federation: all but how it is mapped."""

    def config(optimizer: Optimizer) -> Json:
        try:
            return optimizer.get_config()
        except TypeError:  # a rate is a function, which no configuration can tell
            return optimizer.state_name()

    fields = {name: getattr(federation, name) for name in _FIELDS}
    later = {name: to_json(getattr(federation, name)) for name in _LATER}
    fields |= {name: value for name, value in later.items() if value != _LATER[name]}
    loss = getattr(federation.loss_fn, "__name__", None)
    return {"loss_fn": loss, "client": config(federation.client), "server": config(federation.server), **fields}


def require_alike(saved: Json, federation: "Federation", changed: Collection[str], what: str) -> None:
    """Raise a `ValueError` that names the fields in which a federation differs from the one that was described."""
    found = [
        f"{field if len(field) < 100 else quote(field)} was {quote(was)}, and is {quote(mine)} here"
        for field, was, mine in differences(saved, describe(federation))
        if field not in changed
    ]
    if found:
        raise ValueError(f"{what} is of another federation: {'; '.join(found[:_MOST_NAMED])}")


def encode(federation: "Federation", state: FederationState) -> dict[str, Json]:
    """Write a state; see `Federation.encode`."""
    sides = own_sides(federation, state)
    specs, shared = Specs.of(state.params), Specs.of(sides.params.shared(state.params))
    clients = _own_clients(state)
    slots = np.asarray(state.slots)[clients]
    rows = sides.parts(from_words(_host(leaf)[slots], leaf) for leaf in state.bank)
    parts = {name: sides.client.portable(part) for name, part in rows.items()}
    return {
        "federation": describe(federation),
        "num_clients": int(state.num_clients),
        "round": int(state.round),
        "key": encode_array(state.key),
        "params": specs.to_json(),
        "values": encode_tree(state.params, specs),
        "server": layout_of(federation.server, shared.flat()).encode(state.server, shared),
        "clients": clients,
        "bank": {name: encode_array(leaf) for name, leaf in _leaves(parts).items()},
        **{name: encode_tree(tree, Specs.of(tree)) for name, tree in extras(sides, state).items()},
    }


def extras(sides: Sides, state: FederationState) -> dict[str, PyTree]:
    """Return what only some federations have, by name."""
    found = {"stats": state.stats, "aggregation": sides.client.portable(state.aggregation)}
    return {name: tree for name, tree in found.items() if jax.tree.leaves(tree)}


def decode(
    federation: "Federation", payload: Json, like: FederationState, changed: Collection[str] = ()
) -> FederationState:
    """Read a state; see `Federation.decode`."""
    if not isinstance(payload, Mapping):
        raise ValueError(f"Federation: a saved state is a mapping, not {type(payload).__name__}")
    require_shallow(payload, _SAVED)
    sides = own_sides(federation, like)
    more = extras(sides, like)
    require_keys(payload, (*_KEYS, *more), _SAVED)
    require_alike(payload["federation"], federation, changed, _SAVED)
    number, total = payload["round"], payload["num_clients"]
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"{_SAVED}'s 'round' should be a count, not {quote(number)}")
    if total != int(like.num_clients):
        raise ValueError(f"Federation: num_clients={quote(total)} was saved, and is {like.num_clients} here")
    specs = Specs.of(like.params)
    specs.require_same(specs_from_json(payload["params"], _SAVED), _SAVED)

    def read(key: str, specs: Specs, what: str) -> PyTree:
        by_path = specs.by_path
        leaf = lambda path, array, at: decode_like(array, by_path[path], at)  # noqa: E731
        return decode_tree(payload[key], specs, leaf, f"Federation: {what}")

    shared = Specs.of(sides.params.shared(like.params))
    others = {name: read(name, Specs.of(tree), f"the {name}") for name, tree in more.items()}
    if "aggregation" in others:
        others["aggregation"] = sides.client.adopt(others["aggregation"], like.aggregation)
    new = like._replace(
        params=read("values", specs, "the parameters"),
        server=layout_of(federation.server, shared.flat()).decode(
            payload["server"], shared, "Federation: the server's state"
        ),
        **others,
        round=jnp.int32(number),
        key=decode_like(payload["key"], Spec(like.key.shape, like.key.dtype), "Federation: the key"),
        bank=[],
    )
    bank = _decode_bank(sides, payload, like)
    return replicate(new, mesh_of(federation.mapping), like._replace(bank=[]))._replace(bank=bank)


def _decode_bank(sides: Sides, payload: Mapping[str, Json], like: FederationState) -> list[jax.Array]:
    clients, bank = payload["clients"], payload["bank"]
    if not isinstance(clients, list) or not all(type(client) is int for client in clients):
        raise ValueError(f"{_SAVED}'s 'clients' should be a list of numbers")
    models = {name: jax.eval_shape(sides.client.portable, part) for name, part in sides.kept.items()}
    specs = _leaves(models)
    bank = with_words(bank, specs) if isinstance(bank, Mapping) else bank
    if not isinstance(bank, Mapping) or set(bank) != set(specs):
        raise ValueError(f"{_SAVED}'s 'bank' should hold {list(specs)}")
    places = {client: place for place, client in enumerate(clients)}
    own = _own_clients(like)
    missing = [client for client in own if client not in places]
    if missing:
        raise ValueError(f"{_SAVED} lacks the rows of the clients {missing}")
    order, slots = np.array([places[client] for client in own], int), np.asarray(like.slots)[own]

    def read(name: str, spec: Spec) -> jax.Array:
        found = Spec((len(clients), *spec.shape), spec.dtype)
        return decode_like(bank[name], found, f"Federation: the clients' {name}")[order]

    arrays = itertools.starmap(read, specs.items())
    parts = {name: jax.tree.map(lambda _: next(arrays), model) for name, model in models.items()}
    rows = jax.tree.leaves([sides.client.adopt(part, sides.kept[name]) for name, part in parts.items()])
    return [_with_rows(old, slots, new) for old, new in zip(like.bank, rows, strict=True)]


def _own_clients(state: FederationState) -> list[int]:
    """Return the clients whose rows are on this process's devices."""
    if not state.bank:
        return []
    leaf = words(state.bank[0])
    here = np.zeros(leaf.shape[0], bool)
    for shard in leaf.addressable_shards:
        here[shard.index[0]] = True
    return np.flatnonzero(here[np.asarray(state.slots)]).tolist()


def _leaves(parts: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return the leaves of parts, each by the name of its part and its path within."""
    each = (jax.tree_util.tree_leaves_with_path({name: part}) for name, part in parts.items())
    return {keystr(path): leaf for path, leaf in itertools.chain.from_iterable(each)}


def _host(leaf: jax.Array) -> NDArray[np.generic]:
    """Return the raw values of a leaf of the bank that this process has, and zeros for others."""
    raw = words(leaf)
    host = np.zeros(raw.shape, raw.dtype)
    for shard in raw.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def _with_rows(old: jax.Array, slots: NDArray[np.integer], rows: jax.Array) -> jax.Array:
    """Return a leaf of the bank with other rows in some slots, on the same devices."""
    raw, host = words(old), _host(old)
    host[slots] = np.asarray(words(rows)).reshape(len(slots), *raw.shape[1:])
    return from_words(jax.make_array_from_callback(raw.shape, raw.sharding, lambda index: host[index]), old)
