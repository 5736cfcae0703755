"""Auxiliary variables: what a module's counterpart would send it, and checks of what it sends."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from functional_optimodules.aux_var import AuxVar, FromClients
from functional_optimodules.brick import Brick, OptiModule
from functional_optimodules.contract import Contract
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.adapter import adapted
from functional_optimodules.testing.check import check
from functional_optimodules.testing.configs import through_json
from functional_optimodules.testing.instances import instances
from functional_optimodules.testing.trees import (
    assert_same,
    assert_untouched,
    collected,
    end_round,
    finish,
    parameters,
    ran,
    randoms,
    stepped,
)
from functional_optimodules.types import Json, PyTree
from functional_optimodules.wire.messages import decode_message, encode_message, open_envelopes
from functional_optimodules.wire.paths import Specs

Peer = OptiModule | Optimizer

_CLIENTS = ("client-a", "client-b")


def messages_for(brick: Brick, params: PyTree) -> dict[str, Json]:
    """Return what a brick's `process_aux_var` would get by `aux_name`, from counterparts that have taken steps.

    Raises:
      AssertionError: if a module receives something that no class sends.
    """
    return {
        name: _from_clients(module, params) if module.serves() else _from_server(module, params)
        for name, module in brick.channels().items()
        if isinstance(module, OptiModule) and module.receives is not None
    }


def deliver(brick: Brick, messages: dict[str, Json]) -> None:
    """Hand messages by `aux_name` to a brick's facade."""
    if messages and isinstance(brick, Peer):
        brick.process_aux_var(next(iter(messages.values())) if isinstance(brick, OptiModule) else messages)


def received(brick: Brick, params: PyTree, new: bool = True) -> dict[str, AuxVar]:
    """Return what a brick's pure `process` would get by `aux_name`: decoded, and reduced over clients, new or known."""
    specs = Specs.of(params)
    auxes = {}
    for name, payload in messages_for(brick, params).items():
        module = brick.channels()[name]
        each = _read(payload, name, module.receives, specs)
        if _is_wide(module.receives):
            each = [aux.widen(index, module.clients()) for index, aux in enumerate(each)]
        auxes[name] = functools.reduce(
            lambda a, b: a.merge(b), [aux.newcomers(new) if isinstance(aux, FromClients) else aux for aux in each]
        )
    return auxes


def _read(payload: Json, name: str, kind: Any, specs: Specs) -> list[PyTree]:
    return [decode_message(each, specs) for each in open_envelopes(payload, name, kind, "the contract")]


def _from_clients(server: OptiModule, params: PyTree) -> dict[str, Json]:
    return {name: _collected(_counterpart(server), params, seed) for seed, name in enumerate(_CLIENTS)}


def _from_server(client: OptiModule, params: PyTree) -> Json:
    server = _counterpart(client)
    server.setup(params)
    if server.receives is not None:
        server.process_aux_var({name: _collected(client.bare(), params, seed) for seed, name in enumerate(_CLIENTS)})
    message = server.collect_aux_var()
    return message["per_client"][_CLIENTS[0]] if "per_client" in message else message


def _collected(client: OptiModule, params: PyTree, seed: int) -> Json:
    client.setup(params)
    ran(client, randoms(params, seed), params)
    finish(client, params)
    return client.collect_aux_var()


def _counterpart(module: Contract) -> PyTree:
    for cls in (*OptiModule._registry.values(), *_subclasses(OptiModule)):
        if cls.sends is module.receives and cls.receives in (module.sends, None):
            peer = next(iter(instances(cls).values()))
            wide = cls.receives is not None and _is_wide(cls.receives)
            return dataclasses.replace(peer, num_clients=len(_CLIENTS)) if wide else peer.bare()
    what = module.receives and module.receives.__name__
    raise AssertionError(f"no module sends {what}, which it receives: declare its counterpart in the same place")


def _is_wide(kind: Any) -> bool:
    return issubclass(kind, FromClients) and kind.is_per_client()


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


@check(Brick)
def check_collect_reads_only(brick: Brick) -> None:
    """Asking twice gives the same, of the declared type, and what follows is as if nobody had asked."""
    params = parameters()
    _, state = stepped(brick, brick.init(params), params, (1, 2))
    before = jax.tree.flatten(state)
    adapter = adapted(brick)
    first, second = adapter.collect(state), adapter.collect(state)
    assert_same(second, first, "`collect` gives something else when it is asked again")
    assert_untouched(state, before, "`collect` changes the state: return something new")
    for name, module in brick.channels().items():
        assert (name in first) == (module.sends is not None), (
            f"`collect` returns {first.get(name)!r} and `sends` declares {module.sends}: a sender always sends, others "
            "never do"
        )


@check(Brick)
def check_exchange_is_as_simulated(brick: Peer) -> None:
    """Rounds of the stateful side, with its messages, are those of the pure methods that a simulation calls."""
    if not brick.channels():
        return
    params, adapter = parameters(), adapted(brick.bare())
    messages = messages_for(brick, params)
    peer, begin = brick.bare(), jax.jit(adapter.begin_round)
    peer.setup(params)
    state = peer.state
    for number in range(3):
        auxes = received(brick, params, new=number == 0)
        state = adapter.process(auxes, begin(state, params))
        outputs, state = stepped(brick, state, params, (2 * number, 2 * number + 1))
        peer.on_round_start()
        deliver(peer, messages)
        found = [ran(peer, randoms(params, seed), params) for seed in (2 * number, 2 * number + 1)]
        broken = (
            f"in round {number} the exchange of messages differs from the simulation: `begin_round(state)` and "
            "`begin_round(state, params)` must come to the same by the next step"
        )
        assert_same(found, outputs, broken, close=True)
        assert_same(peer.state, state, broken, close=True)
        collected(peer, params)
        state = adapter.commit(end_round(adapter, state, params))


@check(Brick)
def check_facade_collects_the_same_again(brick: Peer) -> None:
    """A message asked for twice is the same, and committed once by what comes next, unless retracted."""
    if not any(module.sends for module in brick.channels().values()):
        return
    params = parameters()
    asked, told = brick.bare(), brick.bare()
    asked.setup(params)
    told.set_state(asked.get_state())
    for each in (asked, told):
        ran(each, randoms(params, 1), params)
        finish(each, params)
        if each.serves():  # its broadcast would begin the round
            each.on_round_start()
    saved = asked.get_state()
    messages = [asked.collect_aux_var(), asked.collect_aux_var()]
    assert messages[0] == messages[1], "`collect_aux_var` gives another message when it is asked again"
    asked.retract_aux_var()
    assert asked.get_state() == saved, "a message that was retracted has changed the state"
    asked.collect_aux_var()
    asked.collect_aux_var()
    told.collect_aux_var()
    outputs = [ran(each, randoms(params, 2), params) for each in (asked, told)]
    assert_same(outputs[0], outputs[1], "a message collected twice was committed twice")
    assert asked.get_state() == told.get_state(), "a message collected twice was committed twice"


@check(Brick)
def check_messages_survive_json(brick: Brick) -> None:
    """Messages are strict JSON, and reading one gives back its arrays, bit by bit."""
    params = parameters()
    specs = Specs.of(params)
    sender = brick.bare()
    sender.setup(params)
    deliver(sender, messages_for(brick, params))
    ran(sender, randoms(params, 1), params)
    sent = collected(sender, params)
    for name, message in sent.items():
        sends = brick.channels()[name].sends
        assert sends is not None
        for each in message["per_client"].values() if "per_client" in message else (message,):
            sent_as = through_json(each, "a message")
            (read,) = _read({"me": sent_as} if issubclass(sends, FromClients) else sent_as, name, sends, specs)
            assert encode_message(read, name, specs) == each, f"the message for {name!r} changes when it is read"


@check(Brick)
def check_received_messages_survive_json(brick: Peer) -> None:
    """A message that went through JSON does what the same message does, also before the first `run`."""
    params = parameters()
    messages = messages_for(brick, params)
    if not messages:
        return
    early, late = brick.bare(), brick.bare()
    late.setup(params)
    early.set_state(late.get_state())
    deliver(early, through_json(messages, "what is received"))
    deliver(late, messages)
    outputs = [ran(each, randoms(params, 1), params) for each in (early, late)]
    assert_same(outputs[0], outputs[1], "a message that went through JSON has another effect")
    assert early.get_state() == late.get_state(), "a message that went through JSON has another effect"


@check(Brick, scope="class")
def check_unwanted_messages_are_refused(brick: Brick) -> None:
    """Where nothing is received, `process` says so."""
    if any(module.receives for module in brick.channels().values()) or not isinstance(brick, OptiModule):
        return
    try:
        brick.process(None, brick.init(parameters()))
    except NotImplementedError:
        return
    raise AssertionError("`process` takes something, and `receives` declares nothing: declare its type")
