"""Messages: auxiliary variables as JSON, with what the receiver needs to check them.

{"aux_name": ..., "sender": "client" or "server",
 "params": {path: {"dtype": ..., "shape": [...]}},
 "variables": {variable: array or {path: array}}}
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.aux_var import AuxVar, FromClients, Variable
from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote
from functional_optimodules.types import HostArray, Json, PyTree
from functional_optimodules.wire.arrays import decode_array, encode_array
from functional_optimodules.wire.layout import decode_tree, encode_tree
from functional_optimodules.wire.limits import limits
from functional_optimodules.wire.paths import Spec, Specs, require_name, specs_from_json


def encode_message(aux: AuxVar, aux_name: str, specs: Specs) -> dict[str, Json]:
    """Write auxiliary variables as a message."""
    variables = {
        name: encode_tree(getattr(aux, name), specs) if variable.shaped else encode_array(getattr(aux, name))
        for name, variable in aux.variables().items()
    }
    return {"aux_name": aux_name, "sender": aux.sender, "params": specs.to_json(), "variables": variables}


class Envelope(NamedTuple):
    """A message that is known to be of the right pair and side, but whose variables were not read.

    Attributes:
      what: how errors name it.
      client: who sent it, or `None` where it comes from the server.
      receives: the type of its variables.
      specs: the parameters that it is about.
      variables: the payload.
    """

    what: str
    client: str | None
    receives: type[AuxVar]
    specs: Specs
    variables: Json


def open_envelopes(
    payload: Json, aux_name: str, receives: type[AuxVar] | None, owner: str, known: Specs | None = None
) -> list[Envelope]:
    """Check what was received: one message from the server, or a dict of messages keyed by client.

    Args:
      payload: what was received.
      aux_name: the name of the pair.
      receives: the type of its variables.
      owner: how errors name who receives.
      known: the specs of the parameters, where there are any.

    Raises:
      KeyError: if a key of an envelope is missing or unknown.
      NotImplementedError: if nothing is received under that name.
      TypeError: if it is no message, or comes from the wrong side.
      ValueError: if it is another pair's, its specs are malformed, or there is no client.
    """
    if receives is None:
        raise NotImplementedError(f"{owner}: {aux_name!r} sends auxiliary variables, and receives none")
    if not issubclass(receives, FromClients):
        return [_open(payload, None, aux_name, receives, f"{owner}: what was received for {aux_name!r}", known)]
    if not isinstance(payload, Mapping) or "aux_name" in payload:
        raise TypeError(f"{owner}: messages for {aux_name!r} are keyed by client, not a bare {type(payload).__name__}")
    if not payload:
        raise ValueError(f"{owner}: there is no client's message for {aux_name!r}")
    for client in payload:
        if not isinstance(client, str):
            raise TypeError(f"{owner}: clients are named by strings, not {quote(client)}")
        require_name(client, f"{owner}: the name of a client")
    what = f"{owner}: the message for {aux_name!r} from client"
    return [_open(each, client, aux_name, receives, f"{what} {client!r}", known) for client, each in payload.items()]


def _open(
    message: Json, client: str | None, aux_name: str, receives: type[AuxVar], what: str, known: Specs | None
) -> Envelope:
    if not isinstance(message, Mapping):
        raise TypeError(f"{what} should be a message, as `collect_aux_var` gives, not {type(message).__name__}")
    if "per_client" in message:
        raise TypeError(f"{what} holds one message for each client: hand each its own, message['per_client'][client]")
    require_keys(message, ("aux_name", "sender", "params", "variables"), what)
    if message["aux_name"] != aux_name:
        raise ValueError(f"{what} is for {quote(message['aux_name'])}, not for {aux_name!r}")
    if message["sender"] != receives.sender:
        found = message["sender"] if message["sender"] in ("client", "server") else quote(message["sender"])
        raise TypeError(f"{what} comes from a {found}: expected one from a {receives.sender}")
    specs = specs_from_json(message["params"], what, known, limits().leaves)
    return Envelope(what, client, receives, specs, message["variables"])


def decode_message(envelope: Envelope, specs: Specs) -> AuxVar:
    """Read the variables of a message into the specs' container.

    Raises:
      KeyError: if a variable is missing or unknown.
      TypeError: if a variable is of the wrong kind.
      ValueError: if a variable has a wrong shape, or a value that is not finite, not of
        its range, or larger than what is taken from a client.
    """
    what, payload = envelope.what, envelope.variables
    if not isinstance(payload, Mapping):
        raise TypeError(f"{what}: 'variables' should be a mapping, not {type(payload).__name__}")
    fields = envelope.receives.variables()
    require_keys(payload, fields, what, "variable")
    most = limits().magnitude if issubclass(envelope.receives, FromClients) else math.inf
    values = {
        name: _decode(payload[name], each, specs, most, f"{what}, variable {name!r}") for name, each in fields.items()
    }
    return envelope.receives(**values)


def _decode(payload: Json, variable: Variable, specs: Specs, most: float, what: str) -> PyTree:
    if not isinstance(payload, Mapping):
        raise TypeError(f"{what} should be an array, not {type(payload).__name__}")
    if not variable.shaped:
        array = _decode_leaf(payload, Spec((), jnp.float32) if variable.scalar else None, most, what)
        if (variable.flag and array not in (0, 1)) or (variable.amount and array < 0):
            raise ValueError(f"{what} is {array}: expected {'0 or 1' if variable.flag else 'a number of at least 0'}")
        return array
    if set(payload) == {"dtype", "shape", "data"} and isinstance(payload["data"], str):
        raise TypeError(f"{what} should be shaped like the parameters, not be one array")
    by_path = specs.by_path
    return decode_tree(payload, specs, lambda path, array, at: _decode_leaf(array, by_path[path], most, at), what)


def _decode_leaf(payload: Json, like: Spec | None, most: float, what: str) -> jax.Array:
    if not isinstance(payload, Mapping) or "dtype" not in payload:
        raise TypeError(f"{what} should be an array, not {type(payload).__name__}")
    array = decode_array(payload, what, None if like is None else like.shape)
    if like is not None and not _fits(array, like):
        raise TypeError(f"{what} has dtype {array.dtype}: expected numbers, as {like.dtype}")
    if jnp.issubdtype(array.dtype, jnp.number):
        values = np.asarray(array)
        _require_bounded(values.astype(float) if jnp.issubdtype(array.dtype, jnp.integer) else values, most, what)
    return array


def _require_bounded(values: HostArray, most: float, what: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has values that are not finite")
    extremes = (
        [np.abs(values).max(initial=0)] if np.iscomplexobj(values) else [values.max(initial=0), values.min(initial=0)]
    )
    largest = max(abs(float(value)) for value in extremes)
    if largest > most:
        raise ValueError(f"{what} has a value of {largest:.3g}, where at most {most:.3g} is taken: see `Limits`")


def _fits(array: jax.Array, like: Spec) -> bool:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return jnp.issubdtype(like.dtype, jnp.complexfloating)
    counts = not like.shape or not jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.issubdtype(array.dtype, jnp.number if counts else jnp.inexact)
