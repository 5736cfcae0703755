"""One round, from the server's parameters to its next ones.

    broadcast = server.collect; x = server.share(params)
    each participant, wherever and whenever it is run:
        state = process(broadcast, begin_round(state, x)); y = x
        each batch:
            y, state = client.apply(grad(loss)(y, batch), state, y)
        state = end_round(state, what is known of the round)
        send uplink(y - x) and collect(state); state = commit(state)
    totals = the sums of what they send
    server: process(totals.auxes); params += server.update(-aggregation(delta))

What a participant does is in `participant`, what they come to together in `totals`.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp

from functional_optimodules.federated.aggregation import StackAggregator, SumAggregator, WeightedSum
from functional_optimodules.federated.checks import Given, check_round
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows, chunk_size, run_participants
from functional_optimodules.federated.loss import Metrics
from functional_optimodules.federated.participant import Shared, give_gradient, participate
from functional_optimodules.federated.parts import Turns
from functional_optimodules.federated.sides import Sides
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.federated.totals import Totals
from functional_optimodules.numerics import cast_like, where
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs, is_path_tree

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


def share(
    federation: "Federation", sides: Sides, state: FederationState, server: OptimizerState, given: Given
) -> Shared:
    """Return what the participants of the next round share, all but a mean gradient."""
    key = jax.random.fold_in(state.key, state.round)
    sent = sides.server.share(sides.params.shared(state.params), server)
    return Shared(
        params=sides.client.hold(sent),
        stats=sides.stats.shared(state.stats),
        broadcast=sides.broadcast(server),
        key=key,
        round=state.round,
        coin=jax.random.uniform(_stream(key, state, 1)) if "coin" in asked_of(sides) else None,
        steps=_draw_steps(federation, _stream(key, state, 2)),
        mean_gradient=None,
        aggregation=state.aggregation,
        given=given,
    )


def _stream(key: jax.Array, state: FederationState, number: int) -> jax.Array:
    """Return a key that all share; clients fold in their number, which is less, and who samples them N."""
    return jax.random.fold_in(key, state.num_clients + number)


def drop_out(state: FederationState, size: int, rate: jax.Array | float) -> jax.Array:
    """Draw who of some participants drops out of the next round: bool[size]."""
    key = _stream(jax.random.fold_in(state.key, state.round), state, 3)
    return jax.random.bernoulli(key, rate, (size,))


def _draw_steps(federation: "Federation", key: jax.Array) -> jax.Array | None:
    if federation.coin is None:
        return None if federation.steps is None else jnp.int32(federation.steps)
    # How often one tosses until a coin of that probability shows heads.
    tails = jnp.log(jax.random.uniform(key, minval=jnp.finfo(jnp.float32).tiny)) / jnp.log1p(-federation.coin)
    return 1 + jnp.minimum(jnp.floor(tails), 2.0**30).astype(jnp.int32)


def asked_of(sides: Sides) -> frozenset[str]:
    """Return the names of all that bricks of either side ask for."""
    each = [side.brick.asks() for side in (sides.client, sides.uplink, sides.server)]
    return frozenset().union(*(names for one in each for names in one))


def run_round(
    federation: "Federation", state: FederationState, data: PyTree, given: Given
) -> tuple[FederationState, Metrics]:
    """Run one round; see `Federation.round`."""
    given = check_round(federation, state, data, given)
    sides = own_sides(federation, state)
    participants, count = given.participants, given.participants.shape[0]
    data = jax.tree.map(jnp.asarray, data)
    if isinstance(data, FederatedData):
        alike = data.smallest == data.largest
    else:
        alike = given.num_steps is None and given.mask is None
        if given.num_steps is None:
            given = given._replace(num_steps=jnp.full(count, jax.tree.leaves(data)[0].shape[1], jnp.int32))
    before = sides.params.shared(state.params)
    server = sides.server.begin_round(state.server, before)
    shared = share(federation, sides, state, server, given)
    if isinstance(data, FederatedData):
        slots = data.slots_of(participants)
    else:
        slots = state.slots[participants] if state.slots.shape[0] else jnp.arange(count, dtype=jnp.int32)
    chunk = chunk_size(federation.mapping, count, state.params, alike)

    def run(one: Callable[..., tuple[Totals, Rows]]) -> tuple[Totals, Rows]:
        work = functools.partial(one, federation, sides)
        return run_participants(federation.mapping, chunk, work, shared, data, state.bank, slots)

    known = {"coin": shared.coin}
    if "mean_gradient" in asked_of(sides):
        first, _ = run(give_gradient)
        gradient = sides.client.free(first.sums.mean())
        shared = shared._replace(mean_gradient=sides.client.hold(gradient))
        known["mean_gradient"] = gradient
    totals, bank = run(participate)
    joined = totals.each["joined"] > 0
    tell = {"round": state.round, "participants": participants, "finite": totals.each["finite"] > 0, "joined": joined}
    state, told = step_server(federation, sides, state._replace(bank=bank), server, totals, known)
    return state, totals.each | tell | told


def step_server(
    federation: "Federation",
    sides: Sides,
    state: FederationState,
    server: OptimizerState,
    totals: Totals,
    known: dict[str, PyTree],
    scale: jax.Array | None = None,
) -> tuple[FederationState, Metrics]:
    """Take the server's step.

    Args:
      federation: the `Federation`.
      sides: its two sides.
      state: its state, with the new bank.
      server: the server's state in this round.
      totals: what the participants came to.
      known: what is known of the round, but for who joined it.
      scale: what the aggregate is multiplied by, if by anything.

    Returns:
      The state after the round, and what the server's bricks say of it.
    """
    free, before, kept = sides.client.free, sides.params.shared(state.params), sides.stats.shared(state.stats)
    server = sides.server.process({name: aux.map_shaped(free) for name, aux in totals.auxes.items()}, server)
    delta, aggregation = _aggregate(federation, totals, state.aggregation)
    gradients = jax.tree.map(jnp.negative, free(delta))
    if scale is not None:
        gradients = jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradients)
    known = known | {"joined": jnp.sum(totals.each["joined"])}
    asked = {name: known[name] for name in sides.server.brick.asks().step - {"lrate"}}
    anyone = jnp.any(totals.each["joined"] > 0)
    params, moved = sides.server.apply(cast_like(gradients, before), server, before, **asked)
    if sides.turns is not None:
        params, moved = _by_turns(federation, sides, state.round, (params, moved), (before, server))
    stats = None
    if kept is not None:  # of weights that are all 0 there is no mean
        stats = where(totals.stats.weight > 0, cast_like(totals.stats.mean(), kept), kept)
    # Where nobody joined there was no round for the server; the bank's rows are the old ones already.
    old = before, state.server, state.aggregation, kept
    params, moved, aggregation, stats = where(anyone, (params, moved, aggregation, stats), old)
    state = state._replace(
        params=sides.params.whole(params, sides.params.kept(state.params)),
        server=moved,
        round=state.round + 1,
        stats=sides.stats.whole(stats, sides.stats.kept(state.stats)),
        aggregation=aggregation,
    )
    told = sides.server.brick.metrics(moved)
    return state, {f"server/{name}": jnp.asarray(value) for name, value in told.items()}


def _by_turns(
    federation: "Federation",
    sides: Sides,
    now: jax.Array,
    new: tuple[Params, OptimizerState],
    old: tuple[Params, OptimizerState],
) -> tuple[Params, OptimizerState]:
    """Return the server's parameters and state, of which only what is shared in this round has moved."""
    turns = cast(Turns, sides.turns)
    due = Turns.of(new[0], federation.fragments, turns.mixing).due
    with shapes_only():
        layout = Layout(jax.eval_shape(federation.server.init, Specs.of(new[0]).by_path))
    both = zip(layout.split(new[1]), layout.split(old[1]), strict=True)
    parts = [due(a, b, now) if is_path_tree(part) else a for (_, part, a), (_, _, b) in both]
    return due(new[0], old[0], now), jax.tree.unflatten(layout.treedef, parts)


def _aggregate(federation: "Federation", totals: Totals, kept: PyTree) -> tuple[PyTree, PyTree]:
    """Return the aggregate of the deltas, and what the aggregation keeps."""
    aggregation = federation.aggregation
    if isinstance(aggregation, StackAggregator):
        # Each row is a participant's on the device that ran it, and nothing on others.
        count = totals.each["joined"].shape[0]
        blocks = totals.rows.weight.shape[0] // count
        if blocks == 1:  # a sum over one block would be a copy
            return aggregation.aggregate(*totals.rows), kept
        stacked = jax.tree.map(lambda rows: jnp.sum(rows.reshape(blocks, count, *rows.shape[1:]), axis=0), totals.rows)
        return aggregation.aggregate(*stacked), kept
    assert isinstance(aggregation, SumAggregator)
    delta, kept = aggregation.combine(totals.sums, aggregation.begin_round(kept))
    for _ in range(1, aggregation.passes):

        def again(row: WeightedSum, kept: PyTree = kept) -> PyTree:
            return aggregation.contribute(row.delta, row.weight, kept)

        sums = jax.tree.map(lambda each: jnp.sum(each, axis=0), jax.vmap(again)(totals.rows))
        delta, kept = aggregation.combine(sums, kept)
    return delta, kept
