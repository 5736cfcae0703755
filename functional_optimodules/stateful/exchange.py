"""Messages of a session: out of the brick's auxiliary variables, and into them; and what a saved session says of both.

A server takes the messages of a round as they arrive, `{client: {aux_name: message}}`,
or sorted, `{aux_name: {client: message}}`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from functional_optimodules.aux_var import AuxVar, FromClients, FromServer
from functional_optimodules.config.fields import nearest, require_keys
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.contract import Contract
from functional_optimodules.numerics import all_finite
from functional_optimodules.types import Json, PyTree
from functional_optimodules.wire.messages import Envelope, decode_message, encode_message, open_envelopes
from functional_optimodules.wire.paths import Specs, require_name, specs_from_json

# Rounds begun before the first step are replayed at it: a number read from a file must not hang it.
MOST_ROUNDS = 1000
_STATE_KEYS = ("name", "params", "variables", "rounds_begun", "message_out", "clients")


def outgoing(auxes: Mapping[str, AuxVar], specs: Specs, clients: tuple[str, ...]) -> dict[str, Json]:
    """Write what is sent, by `aux_name`; what differs by client once for each."""

    def write(aux: AuxVar, name: str) -> Json:
        if not (isinstance(aux, FromServer) and aux.is_per_client()):
            return encode_message(aux, name, specs)
        own = {client: aux.narrow(index) for index, client in enumerate(clients)}
        return {"per_client": {client: encode_message(mine, name, specs) for client, mine in own.items()}}

    return {name: write(aux, name) for name, aux in auxes.items()}


class Received(NamedTuple):
    """What messages came to.

    Attributes:
      specs: the parameters that they are about.
      auxes: the auxiliary variables by name; on a server reduced over clients.
      clients: on a server, the clients heard of, those of these messages among them.
      senders: those who sent them.
    """

    specs: Specs
    auxes: dict[str, AuxVar]
    clients: tuple[str, ...]
    senders: list[str]


def incoming(brick: Contract, messages: Json, specs: Specs | None, clients: tuple[str, ...]) -> Received | None:
    """Read messages; `None` if there are none. Raises as `process_aux_var` does."""
    owner, channels, known = type(brick).__name__, brick.channels(), frozenset(clients)
    require_shallow(messages, f"{owner}: what was received")
    if not isinstance(messages, Mapping):
        raise TypeError(
            f"{owner}: auxiliary variables are a mapping by name, as `collect_aux_var` gives, "
            f"not {type(messages).__name__}"
        )
    if brick.serves():
        messages = _sorted(messages, channels)
    elif not channels and not any(messages.values()):
        return None  # clients that have nothing to say, to a server that has nothing to hear
    for name in messages:
        if name not in channels:
            raise KeyError(
                f"{owner}: no module takes auxiliary variables named {quote(name)}: {nearest(name, channels)}"
            )
    if not messages:
        return None
    opened = {
        name: open_envelopes(each, name, channels[name].receives, owner, specs) for name, each in messages.items()
    }
    envelopes = [envelope for each in opened.values() for envelope in each]
    specs = specs or envelopes[0].specs
    for envelope in envelopes:
        specs.require_same(envelope.specs, envelope.what)
    auxes = {}
    for name, each in opened.items():
        with jax.ensure_compile_time_eval():  # under a trace, what is refused is the call, and not its arrays
            decoded = {e.client: _decoded(e, specs, known) for e in each}
            clients += tuple(who for who in decoded if who is not None and who not in clients)
            auxes[name] = _reduced(decoded, clients, channels[name], owner)
    return Received(specs, auxes, clients, sorted({e.client for e in envelopes if e.client is not None}))


def _sorted(messages: Mapping[str, Json], channels: Mapping[str, Any]) -> Mapping[str, Json]:
    """Sort messages that are keyed by client by the name of their auxiliary variables."""
    by_client = any(name not in channels for name in messages) and all(
        isinstance(each, Mapping) and each.keys() <= channels.keys() for each in messages.values()
    )
    if not by_client or not any(messages.values()):
        return messages
    return {
        name: {client: each[name] for client, each in messages.items() if name in each}
        for name in channels
        if any(name in each for each in messages.values())
    }


def _decoded(envelope: Envelope, specs: Specs, known: frozenset[str]) -> AuxVar:
    aux = decode_message(envelope, specs)
    return aux.newcomers(envelope.client not in known) if isinstance(aux, FromClients) else aux


def _reduced(decoded: Mapping[str | None, Any], clients: tuple[str, ...], module: Contract, owner: str) -> AuxVar:
    if None in decoded:
        return decoded[None]
    wide, total = module.receives is not None and module.receives.is_per_client(), module.clients()
    if wide and total is None:
        raise ValueError(f"{owner}: {type(module).__name__} needs `num_clients` for what it keeps per client")
    if total is not None and len(clients) > total:
        raise ValueError(
            f"{owner}: num_clients={total} is less than the {len(clients)} clients heard of: "
            f"{quote(clients[total])} is one more than {quote(clients[:total])}"
        )
    each = [aux.widen(clients.index(client), total) if wide else aux for client, aux in decoded.items()]
    reduced = functools.reduce(_merge, each)
    for variable in reduced.variables():
        if not all_finite(getattr(reduced, variable)):
            raise ValueError(f"{owner}: variable {variable!r}, reduced over clients, is not finite any more")
    return reduced


@jax.jit
def _merge(left: PyTree, right: PyTree) -> Any:
    return left.merge(right)


def read_life(saved: Json, brick: Contract, owner: str, known: Specs | None) -> tuple[Specs | None, dict[str, Any]]:
    """Read what a session saved, all but its variables: the specs, and other attributes of its memory by name.

    Args:
      saved: what was saved.
      brick: what it is restored to.
      owner: how errors name the brick.
      known: the specs of the parameters, where there are any.

    Raises as `set_state` does.
    """
    require_shallow(saved, f"{owner}: the state")
    if not isinstance(saved, Mapping):
        raise TypeError(f"{owner}: a state is a mapping, not {type(saved).__name__}")
    require_keys({key: saved[key] for key in saved if key != "round"}, _STATE_KEYS, f"{owner}: the state")
    if saved["name"] != brick.state_name():
        raise ValueError(f"{owner}: the state is that of {quote(saved['name'])}, not of {brick.state_name()!r}")
    rounds, out, clients, begun = saved["rounds_begun"], saved["message_out"], saved["clients"], saved.get("round")
    if type(rounds) is not int or not 0 <= rounds <= MOST_ROUNDS:
        raise ValueError(f"{owner}: 'rounds_begun' should be from 0 to {MOST_ROUNDS}, not {quote(rounds)}")
    if type(out) is not bool:
        raise ValueError(f"{owner}: 'message_out' should be true or false, not {quote(out)}")
    stages = [*(("begun", "sent") if brick.serves() else ()), *(("open",) if brick.asks().end else ())]
    if begun not in (None, *stages):
        expected = " or ".join([*map(repr, stages), "absent"])
        raise ValueError(f"{owner}: 'round' should be {expected}, not {quote(begun)}")
    if not isinstance(clients, list) or not all(isinstance(client, str) for client in clients):
        raise ValueError(f"{owner}: 'clients' should be a list of names, not {quote(clients)}")
    for client in clients:
        require_name(client, f"{owner}: each of 'clients'")
    if len(set(clients)) < len(clients):
        raise ValueError(f"{owner}: 'clients' names one twice: {quote(clients)}")
    totals = [each.clients() for each in brick.channels().values()] if brick.serves() else [0]
    for total in totals:
        if total is not None and len(clients) > total:
            raise ValueError(f"{owner}: 'clients' should name at most {total}, not {quote(clients)}")
    if (saved["params"] is None) != (saved["variables"] is None):
        raise ValueError(f"{owner}: 'params' and 'variables' should both be there, or neither")
    specs = None if saved["params"] is None else specs_from_json(saved["params"], f"{owner}: the state", known)
    return specs, {"rounds_begun": rounds, "message_out": out, "clients": tuple(clients), "round": begun}
