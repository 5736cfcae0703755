"""What the folder of a staged run says of it, beside the bank: whose it is, and the state after its last piece."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from functional_optimodules.config.fields import differences, require_keys
from functional_optimodules.federated import saving
from functional_optimodules.federated.sides import Own
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.shards import Shards
from functional_optimodules.federated.state import FederationState
from functional_optimodules.types import Json
from functional_optimodules.wire.arrays import decode_like, encode_array
from functional_optimodules.wire.paths import Spec, keystr

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation

Held = tuple[FederationState, Own]
"""A federation's state without its bank, and what every client starts from."""


def describe(federation: "Federation", shards: Shards, data: StagedData, held: Held) -> dict[str, Json]:
    """Write a state, with what must not change of the run, as JSON values."""
    values = {keystr(path): encode_array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(held)}
    return {**_about(federation, shards, data), "values": values}


def saved(federation: "Federation", folder: Path, shards: Shards, data: StagedData, like: Held) -> Held:
    """Return the state that a folder has, or what is like it if it has none.

    Raises:
      ValueError: if it is of another run, or damaged.
    """
    path = folder / "state.json"
    if not path.exists():
        return like
    what = f"StagedFederation: {path}"
    try:
        payload = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    mine = _about(federation, shards, data)
    if not isinstance(payload, Mapping):
        raise ValueError(f"{what} should be a mapping, not {type(payload).__name__}")
    require_keys(payload, (*mine, "values"), what)
    for name, now in mine.items():
        for field, was, here in differences(payload[name], json.loads(json.dumps(now))):
            raise ValueError(f"{what} is of another run: {name} {field} was {was!r}, and is {here!r} here")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    named = [(keystr(at), leaf) for at, leaf in leaves]
    values = payload["values"]
    if not isinstance(values, Mapping) or set(values) != {name for name, _ in named}:
        raise ValueError(f"{what} has other parameters than these, or another state")
    read = [decode_like(values[name], Spec(leaf.shape, leaf.dtype), f"{what}, {name!r}") for name, leaf in named]
    return jax.tree.unflatten(treedef, read)


def _about(federation: "Federation", shards: Shards, data: StagedData) -> dict[str, Json]:
    """Return what must not change of a federation, of its data, and of which process has which clients."""
    about = {
        "num_clients": data.num_clients,
        "examples": int(data.sizes.sum()),
        "processes": list(shards.processes) if shards.several else [],
        "sizes": data.digest(),
    }
    return {"federation": saving.describe(federation), "data": about}


def lock_file(path: Path) -> int:
    """Take a file, and with it its folder, for this run alone, until what is returned is closed.

    Raises:
      ValueError: if another run has it.
    """
    import fcntl  # not on Windows

    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"StagedFederation: another run is at work in {path.parent}, or a state of it is still referred to here"
        ) from None
    return lock
