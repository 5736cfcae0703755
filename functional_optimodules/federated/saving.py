"""The state of a federation as JSON values.

{"federation": {field: ...}, "num_clients": N, "round": ..., "key": array,
 "params": {path: {"dtype": ..., "shape": [...]}}, "values": {path: array},
 "server": {variable: array or {path: array}},
 "clients": [...], "bank": {variable: array with a leading axis of these clients}}

Clients' rows are written by client, so that a state may be restored on another
number of devices. Of several processes each writes its own clients' rows, and
reads them again.
"""

from collections.abc import Callable, Mapping
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
from functional_optimodules.core.packed import packed_as
from functional_optimodules.core.packing import is_packed, unpack
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
    named = _leaves(unpack(_client_state(federation, state, rows)))
    return {
        "federation": describe(federation),
        "num_clients": int(state.num_clients),
        "round": int(state.round),
        "key": encode_array(state.key),
        "params": specs.to_json(),
        "values": encode_tree(state.params, specs),
        "server": server.encode(state.server, specs),
        "clients": clients,
        "bank": {name: encode_array(leaf) for name, leaf in named.items()},
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
    clients, bank = payload["clients"], payload["bank"]
    if not isinstance(clients, list) or not all(type(client) is int for client in clients):
        raise ValueError("Federation: the saved state's 'clients' should be a list of numbers")
    model = _client_state(federation, like, [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in like.bank])
    row = jax.tree.map(lambda node: node.shapes() if is_packed(node) else node, model, is_leaf=is_packed)
    names = list(_leaves(row))
    if not isinstance(bank, Mapping) or set(bank) != set(names):
        raise ValueError(f"Federation: the saved state's 'bank' should hold {names}")
    places = {client: place for place, client in enumerate(clients)}
    own = _own_clients(like)
    missing = [client for client in own if client not in places]
    if missing:
        raise ValueError(f"Federation: the saved state lacks the rows of the clients {missing}")
    order = np.array([places[client] for client in own], int)

    def read(name: str, spec: Any) -> Any:
        found = jax.ShapeDtypeStruct((len(clients), *spec.shape), spec.dtype)
        return decode_like(bank[name], found, f"Federation: the clients' {name}")[order]

    read_rows = jax.tree.unflatten(jax.tree.structure(row), [read(name, spec) for name, spec in _leaves(row).items()])
    rows = jax.tree.map(
        lambda node, part: node.packing.pack(part) if is_packed(node) else part, model, read_rows, is_leaf=is_packed
    )
    slots = np.asarray(like.slots)[own]
    return [_with_rows(old, slots, leaf) for old, leaf in zip(like.bank, jax.tree.leaves(rows), strict=True)]


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


def _client_state(federation: Any, state: Any, bank: list[Any]) -> Any:
    """Return a client's state made of leaves of a bank, with `None` for what is not kept."""
    with shapes_only():
        packed = jax.eval_shape(lambda params: packed_as(params, state.packing), state.params)
        leaves, treedef = jax.tree.flatten(jax.eval_shape(federation.client.init, packed))
    kept, stored = kept_leaves(federation.client, federation.server, packed), iter(bank)
    full = jax.tree.unflatten(treedef, [next(stored) if keep else None for _, keep in zip(leaves, kept, strict=True)])
    empty: Callable[[Any], Any] = lambda node: None if is_packed(node) and not jax.tree.leaves(node) else node  # noqa: E731
    return jax.tree.map(empty, full, is_leaf=is_packed)


def _leaves(tree: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
