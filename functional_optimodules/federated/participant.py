"""What one participant adds to a round."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from functional_optimodules.core.entropy import shapes_only
from functional_optimodules.core.numerics import is_finite
from functional_optimodules.federated.batches import given, walk
from functional_optimodules.federated.client import work
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.reduction import Totals, choose, fill


class Shared(NamedTuple):
    """What the participants of a round share; `None` for what was not given."""

    params: Any
    participants: jax.Array
    broadcast: dict[str, Any]
    key: jax.Array
    num_steps: Any
    mask: Any
    weights: Any
    dropped: Any


def participate(
    federation: Any,
    kept: tuple[bool, ...],
    shared: Shared,
    data: Any,
    index: jax.Array,
    slot: jax.Array,
    row: list[jax.Array],
) -> tuple[Totals, list[jax.Array]]:
    """Take one participant's round, from its row of the bank to what it adds and its new row.

    Args:
      federation: the `Federation`.
      kept: of each leaf of a client's state, whether it outlives a round.
      shared: what all participants share.
      data: `FederatedData`, or batches of all participants.
      index: the participant.
      slot: where its rows of the data begin.
      row: the leaves of its state that are kept.
    """
    with shapes_only():
        leaves, treedef = jax.tree.flatten(federation.client.init(shared.params))
    stored = iter(row)
    start = [next(stored) if keep else leaf for leaf, keep in zip(leaves, kept, strict=True)]
    client = shared.participants[index]
    broadcast = {name: aux.narrow(client) for name, aux in shared.broadcast.items()}
    if isinstance(data, FederatedData):
        batches = walk(data, slot, federation.batch_size, federation.remainder, federation.epochs)
    else:
        pick: Callable[[Any], Any] = lambda tree: jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: E731
        batches = given(pick(data), shared.num_steps[index], pick(shared.mask))
    key = jax.random.fold_in(shared.key, client)
    state = jax.tree.unflatten(treedef, start)
    report, state = work(federation.client, federation.loss_fn, shared.params, state, broadcast, batches, key)

    finite = is_finite((report.delta, report.auxes))
    joined = jnp.array(True) if shared.dropped is None else ~shared.dropped[index]
    if federation.on_nonfinite == "skip":
        joined = joined & finite
    weight = jnp.float32(1) if federation.weighting == "uniform" else report.examples
    if shared.weights is not None:
        weight = shared.weights[index].astype(jnp.float32)
    totals = Totals(
        delta=jax.tree.map(lambda d: jnp.where(joined, weight.astype(d.real.dtype) * d, 0), report.delta),
        weight=jnp.where(joined, weight, 0),
        auxes={name: _taken(federation, name, aux, client, joined) for name, aux in report.auxes.items()},
        metrics=report.metrics,
        examples=report.examples,
        joined=joined.astype(jnp.float32),
        finite=finite.astype(jnp.float32),
    )
    return totals, choose(joined, keep_leaves(state, kept), row)


def _taken(federation: Any, name: str, aux: Any, client: jax.Array, joined: jax.Array) -> Any:
    if any("per-client" in marks for marks in aux.variables().values()):
        aux = aux.widen(client, federation.server.channels()[name].num_clients)
    return choose(joined, aux, fill(aux))


def keep_leaves(state: Any, kept: Sequence[bool]) -> list[jax.Array]:
    """Return the leaves of a state that are kept."""
    return [leaf for leaf, keep in zip(jax.tree.leaves(state), kept, strict=True) if keep]
