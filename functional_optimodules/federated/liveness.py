"""Which part of a client's state must be kept from one round to the next.

A leaf is kept if what the client sends, or how it steps, in some later round
can depend on it. This follows from the bricks' own programs: SCAFFOLD's
accumulators are started anew when the server's variate arrives, a FedProx
reference is set as the round begins, and a constant rate reads no clock.
"""

from collections.abc import Callable
from typing import Any

import jax

from functional_optimodules.core.entropy import shapes_only


def kept_leaves(client: Any, server: Any, params: Any) -> tuple[bool, ...]:
    """Say of each leaf of a client's state whether it must outlive a round.

    Args:
      client: the clients' `Optimizer`.
      server: the server's.
      params: the parameters, or their shapes.
    """
    with shapes_only():
        state = jax.eval_shape(client.init, params)
        broadcast = jax.eval_shape(lambda p: server.collect_channels(server.init(p)), params)

        def begin(state: Any, params: Any, broadcast: Any) -> Any:
            broadcast = {name: aux.narrow(0) for name, aux in broadcast.items()}
            return client.process_channels(broadcast, client.begin_round(state, params))

        starts = _sources(begin, state, params, broadcast)
        steps = _sources(lambda s, p: client.update(p, s, p)[::-1], state, params)
        sends = _sources(lambda s: (client.commit(s), client.collect_channels(s)), state)
    count = len(jax.tree.leaves(state))
    kept: set[int] = set()
    while True:
        # Backwards through a round: what is read at its end, in any step, at its start.
        live = set().union(*sends[count:], *(sends[leaf] for leaf in kept), *steps[count:])
        while not (more := set().union(*(steps[leaf] for leaf in live))) <= live:
            live |= more
        before = kept | set().union(*(starts[leaf] for leaf in live))
        if before == kept:
            return tuple(leaf in kept for leaf in range(count))
        kept = before


def _sources(function: Callable[..., Any], state: Any, *args: Any) -> list[set[int]]:
    """Return, for each leaf of a function's output, the leaves of the state that it may depend on."""
    closed = jax.make_jaxpr(function)(state, *args)
    count = len(jax.tree.leaves(state))
    inputs = [{index} if index < count else set() for index in range(len(closed.jaxpr.invars))]
    return _flow(closed.jaxpr, inputs)


def _flow(jaxpr: Any, inputs: list[set[int]]) -> list[set[int]]:
    sources = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> set[int]:
        return set() if hasattr(atom, "val") else sources.get(atom, set())

    for eqn in jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call") and inner is not None:
            made = _flow(inner, given)
        else:
            made = [set().union(*given)] * len(eqn.outvars)
        sources.update(zip(eqn.outvars, made, strict=True))
    return [of(atom) for atom in jaxpr.outvars]
