"""The state of a federation as JSON values.

{"federation": {field: ...}, "num_clients": N, "round": ..., "key": array,
 "params": {path: {"dtype": ..., "shape": [...]}}, "values": {path: array},
 "server": {variable: array or {path: array}},
 "clients": [...], "bank": {variable: array with a leading axis of these clients}}

Clients' rows are written by client, so that a state may be restored on another
number of devices. Of several processes each writes its own clients' rows, and
reads them again.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.core.compiled import compiled
from functional_optimodules.core.encoding import (
    decode_like,
    decode_tree,
    encode_array,
    encode_tree,
    is_key,
)
from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.core.fields import require_keys
from functional_optimodules.core.paths import Specs, keystr, specs_from_json
from functional_optimodules.federated.liveness import kept_leaves
from functional_optimodules.federated.mapping import mesh_of
from functional_optimodules.federated.placement import replicate

_KEYS = ("federation", "num_clients", "round", "key", "params", "values", "server", "clients", "bank")
_FIELDS = ("batch_size", "epochs", "remainder", "weighting", "sampling", "on_nonfinite")


def describe(federation: Any) -> dict[str, Any]:
    """Return what must not change of a federation: all but how it is mapped."""

    def config(optimizer: Any) -> Any:
        try:
            return optimizer.get_config()
        except TypeError:  # a rate is a function, which no configuration can tell
            return optimizer.state_name()

    fields = {name: getattr(federation, name) for name in _FIELDS}
    loss = getattr(federation.loss_fn, "__name__", None)
    return {"loss_fn": loss, "client": config(federation.client), "server": config(federation.server), **fields}


def encode(federation: Any, state: Any) -> dict[str, Any]:
    """Write a state; see `Federation.encode`."""
    specs = Specs.of(state.params)
    server = compiled(federation.server.bare()).layout(specs.flat())
    clients = _own_clients(state)
    rows = [_rows(leaf, np.asarray(state.slots)[clients]) for leaf in state.bank]
    return {
        "federation": describe(federation),
        "num_clients": int(state.num_clients),
        "round": int(state.round),
        "key": encode_array(state.key),
        "params": specs.to_json(),
        "values": encode_tree(state.params, specs),
        "server": server.encode(state.server, specs),
        "clients": clients,
        "bank": dict(zip(_names(federation, state.params), map(encode_array, rows), strict=True)),
    }


def decode(federation: Any, payload: Any, like: Any) -> Any:
    """Read a state; see `Federation.decode`."""
    if not isinstance(payload, Mapping):
        raise ValueError(f"Federation: a saved state is a mapping, not {type(payload).__name__}")
    require_keys(payload, _KEYS, "Federation: the saved state")
    _require_same(payload["federation"], describe(federation), "")
    number = payload["round"]
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"Federation: the saved state's 'round' should be a count, not {number!r}")
    if payload["num_clients"] != int(like.num_clients):
        raise ValueError(
            f"Federation: num_clients={payload['num_clients']!r} was saved, and is {like.num_clients} here"
        )
    specs = Specs.of(like.params)
    specs.require_same(specs_from_json(payload["params"], "Federation: the saved state"), "Federation: the saved state")
    by_path = specs.by_path
    values = decode_tree(
        payload["values"],
        specs,
        lambda path, array, at: decode_like(array, by_path[path], at),
        "Federation: the parameters",
    )
    server = compiled(federation.server.bare()).layout(specs.flat())
    mesh = mesh_of(federation.mapping)
    new = like._replace(
        params=values,
        server=server.decode(payload["server"], specs, "Federation: the server's state"),
        round=jnp.int32(number),
        key=decode_like(payload["key"], like.key, "Federation: the key"),
        bank=[],
    )
    return replicate(new, mesh)._replace(bank=_decode_bank(federation, payload, like))


def _require_same(saved: Any, mine: Any, field: str) -> None:
    if isinstance(saved, Mapping) and isinstance(mine, Mapping):
        for name in sorted(saved.keys() | mine.keys()):
            _require_same(saved.get(name), mine.get(name), f"{field}.{name}" if field else name)
    elif saved != mine:
        raise ValueError(
            f"Federation: the saved state is of another federation: {field} was {saved!r}, and is {mine!r} here"
        )


def _decode_bank(federation: Any, payload: Mapping[str, Any], like: Any) -> list[jax.Array]:
    names = _names(federation, like.params)
    clients, bank = payload["clients"], payload["bank"]
    if not isinstance(clients, list) or not all(type(client) is int for client in clients):
        raise ValueError("Federation: the saved state's 'clients' should be a list of numbers")
    if not isinstance(bank, Mapping) or set(bank) != set(names):
        raise ValueError(f"Federation: the saved state's 'bank' should hold {names}")
    places = {client: place for place, client in enumerate(clients)}
    own = _own_clients(like)
    missing = [client for client in own if client not in places]
    if missing:
        raise ValueError(f"Federation: the saved state lacks the rows of the clients {missing}")
    order = [places[client] for client in own]
    slots = np.asarray(like.slots)[own]
    leaves = []
    for name, old in zip(names, like.bank, strict=True):
        spec = jax.ShapeDtypeStruct((len(clients), *old.shape[1:]), old.dtype)
        rows = decode_like(bank[name], spec, f"Federation: the clients' {name}")
        leaves.append(_with_rows(old, slots, rows[np.array(order, int)]))
    return leaves


def _own_clients(state: Any) -> list[int]:
    """Return the clients whose rows are on this process's devices."""
    if not state.bank:
        return []
    leaf = _raw(state.bank[0])
    here = np.zeros(leaf.shape[0], bool)
    for shard in leaf.addressable_shards:
        here[shard.index[0]] = True
    return np.flatnonzero(here[np.asarray(state.slots)]).tolist()


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _rows(leaf: Any, slots: np.ndarray[Any, Any]) -> Any:
    raw = _raw(leaf)
    host = np.zeros(raw.shape, raw.dtype)
    for shard in raw.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    rows = host[slots]
    return jax.random.wrap_key_data(jnp.array(rows), impl=jax.random.key_impl(leaf)) if is_key(leaf) else rows


def _with_rows(old: Any, slots: np.ndarray[Any, Any], rows: Any) -> Any:
    """Return a leaf of the bank with other rows in some slots, on the same devices."""
    raw = _raw(old)
    host = np.zeros(raw.shape, raw.dtype)
    for shard in raw.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    host[slots] = np.asarray(_raw(rows))
    new = jax.make_array_from_callback(raw.shape, raw.sharding, lambda index: host[index])
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if is_key(old) else new


def _names(federation: Any, params: Any) -> list[str]:
    with shapes_only():
        state = jax.eval_shape(federation.client.init, params)
    kept = kept_leaves(federation.client, federation.server, params)
    paths = [keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    return [path for path, keep in zip(paths, kept, strict=True) if keep]
