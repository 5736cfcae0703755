"""Which part of a client's state must be kept from one round to the next.

A leaf is kept if what the client sends, or how it steps, in some later round
can depend on it. This follows from the bricks' own programs: SCAFFOLD's
accumulators are started anew when the server's variate arrives, a FedProx
reference is set as the round begins, and a constant rate reads no clock.
"""

from typing import Any

import jax

from functional_optimodules.core.dependence import sources
from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.core.packed import pack_auxes
from functional_optimodules.core.packing import is_packed, packing_of


def kept_leaves(client: Any, server: Any, params: Any) -> tuple[bool, ...]:
    """Say of each leaf of a client's state whether it must outlive a round.

    Args:
      client: the clients' `Optimizer`.
      server: the server's.
      params: the parameters, or their shapes, packed or not.
    """
    with shapes_only():
        state = jax.eval_shape(client.init, params)
        collect = lambda p: pack_auxes(server.collect_channels(server.init(p)), packing_of(p))  # noqa: E731
        broadcast = jax.eval_shape(collect, params)

        def begin(state: Any, params: Any, broadcast: Any) -> Any:
            broadcast = {name: aux.narrow(0) for name, aux in broadcast.items()}
            return client.process_channels(broadcast, client.begin_round(state, params))

        starts = sources(begin, state, params, broadcast)
        steps = sources(lambda s, p: client.update(p, s, p)[::-1], state, params)
        sends = sources(lambda s: (client.commit(s), client.collect_channels(s)), state)
    count = len(jax.tree.leaves(state))
    # A packed tree is kept whole.
    numbered = jax.tree.unflatten(jax.tree.structure(state), range(count))
    parts = [set(node.parts) for node in jax.tree.leaves(numbered, is_leaf=is_packed) if is_packed(node)]
    kept: set[int] = set()
    while True:
        # Backwards through a round: what is read at its end, in any step, at its start.
        live = set().union(*sends[count:], *(sends[leaf] for leaf in kept), *steps[count:])
        while not (more := set().union(*(steps[leaf] for leaf in live))) <= live:
            live |= more
        before = kept | set().union(*(starts[leaf] for leaf in live))
        before |= set().union(*(part for part in parts if part & before))
        if before == kept:
            return tuple(leaf in kept for leaf in range(count))
        kept = before
