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

A participant's work is a pure function of the client's own data, state and key, so
that it gives the same whether clients are run one by one, together, or on several
devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from functional_optimodules.aux_var import FromClients, FromServer, Reduction
from functional_optimodules.federated.aggregation import StackAggregator, SumAggregator, WeightedSum
from functional_optimodules.federated.batches import Batches, walk, walk_given
from functional_optimodules.federated.checks import Given, check_round
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows, chunk_size, run_participants
from functional_optimodules.federated.loss import Averages, LossFn, Metrics, averaged, maskable
from functional_optimodules.federated.parts import Turns
from functional_optimodules.federated.placement import SPLIT, WHOLE
from functional_optimodules.federated.sides import Own, Side, Sides, end_round
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.numerics import cast_like, is_finite, where, wide
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree
from functional_optimodules.wire.layout import Layout
from functional_optimodules.wire.paths import Specs, is_path_tree
from functional_optimodules.xla import long_axis_last

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


class Walked(NamedTuple):
    """A client in the midst of its steps.

    Attributes:
      y: its parameters.
      state: its optimizer's state.
      stats: the model's state.
      averages: its metrics so far.
    """

    y: Params
    state: OptimizerState
    stats: PyTree
    averages: Averages


class Shared(NamedTuple):
    """What the participants of a round share.

    Attributes:
      params: the parameters that they are sent, as clients hold them.
      stats: the model's state, likewise.
      broadcast: the server's auxiliary variables by name, as clients hold them.
      key: the key of the round.
      round: its number.
      coin: a number in [0, 1); `None` if nobody asks for it.
      steps: int32 scalar, how many local steps each takes; `None` for those of the epochs.
      mean_gradient: the participants' mean gradient at the parameters; `None` if nobody asks for it.
      aggregation: what the aggregation has kept.
      given: what the caller says of each, and who they are.
    """

    params: Params
    stats: PyTree
    broadcast: dict[str, FromServer]
    key: jax.Array
    round: jax.Array
    coin: jax.Array | None
    steps: jax.Array | None
    mean_gradient: PyTree
    aggregation: PyTree
    given: Given


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
        coin=jax.random.uniform(_stream(key, state, 1)) if "coin" in _asked(sides) else None,
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


def _asked(sides: Sides) -> frozenset[str]:
    each = [side.brick.asks() for side in (sides.client, sides.uplink, sides.server)]
    return frozenset().union(*(names for asked in each for names in asked))


def run_round(
    federation: "Federation", state: FederationState, data: PyTree, given: Given
) -> tuple[FederationState, Metrics]:
    """Run one round; see `Federation.round`."""
    given = check_round(federation, state, data, given)
    sides = own_sides(federation, state)
    participants, count = given.participants, given.participants.shape[0]
    data = jax.tree.map(jnp.asarray, data)
    if given.num_steps is None and not isinstance(data, FederatedData):
        given = given._replace(num_steps=jnp.full(count, jax.tree.leaves(data)[0].shape[1], jnp.int32))
    before = sides.params.shared(state.params)
    server = sides.server.begin_round(state.server, before)
    shared = share(federation, sides, state, server, given)
    if isinstance(data, FederatedData):
        slots = data.slots_of(participants)
    else:
        slots = state.slots[participants] if state.slots.shape[0] else jnp.arange(count, dtype=jnp.int32)
    chunk = chunk_size(federation.mapping, count, state.params)

    def run(one: Callable[..., tuple[Totals, Rows]]) -> tuple[Totals, Rows]:
        work = functools.partial(one, federation, sides)
        return run_participants(federation.mapping, chunk, work, shared, data, state.bank, slots)

    known = {"coin": shared.coin}
    if "mean_gradient" in _asked(sides):
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
    totals: "Totals",
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
        gradients = jax.tree.map(lambda g: scale.astype(g.real.dtype) * g, gradients)
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


def _aggregate(federation: "Federation", totals: "Totals", kept: PyTree) -> tuple[PyTree, PyTree]:
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


def _batches(federation: "Federation", shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array) -> Batches:
    """Return how a participant walks through its batches."""
    if isinstance(data, FederatedData):
        batches = walk(data, slot, federation.batch_size, federation.remainder, federation.epochs, shuffled=True)
        return batches._replace(total=shared.steps)
    told = jax.tree.map(lambda leaf: leaf[index], shared.given)
    return walk_given(jax.tree.map(lambda leaf: leaf[index], data), told.num_steps, told.mask)


def _weight(federation: "Federation", told: Given, batches: Batches) -> jax.Array:
    if told.weights is not None:
        return jnp.asarray(told.weights).astype(jnp.float32)
    return jnp.float32(1) if federation.weighting == "uniform" else batches.examples


def give_gradient(
    federation: "Federation", sides: Sides, shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array, row: Rows
) -> tuple["Totals", Rows]:
    """Return one participant's gradient at the server's parameters, over all of its data, by its weight."""
    told = jax.tree.map(lambda leaf: leaf[index], shared.given)
    own = sides.restored(row, shared.params)
    batches = _batches(federation, shared, data, index, slot)
    gradient = full_gradient(federation, sides, own, shared, data, index, slot)
    joined = jnp.array(True) if told.dropped is None else ~told.dropped
    if federation.on_nonfinite == "skip":
        joined = joined & is_finite(gradient)
    total = _zeroed(joined, WeightedSum.of(sides.shared(gradient), _weight(federation, told, batches)))
    return Totals(total, {}, (), {}, ()), row


def full_gradient(
    federation: "Federation", sides: Sides, own: Own, shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array
) -> PyTree:
    """Return the gradient of a client's mean loss at the server's parameters, in at least float32, as it holds them."""
    params, stats = sides.whole(shared.params, own, shared.round), sides.stats.whole(shared.stats, own.stats)
    batches = _batches(federation, shared, data, index, slot)
    if isinstance(data, FederatedData):
        batches = walk(data, slot, federation.batch_size, "mask", 1, shuffled=False)
    key = jax.random.fold_in(shared.key, shared.given.participants[index])
    free = sides.client.free(params)
    loss_fn, order = maskable(federation.loss_fn, free, stats, batches, key), batches.begin(key)

    def add(step: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        batch, mask = batches.take(order, step)
        if jax.tree.leaves(stats) and mask is not None:
            raise ValueError(
                "Federation: a brick asks for the gradient over all data, whose last batch may be partial, and what "
                "fills it up would count in the model's batches: take a batch_size that divides each client's examples"
            )
        loss = averaged(loss_fn, mask, batches.size)
        gradients, _ = jax.grad(loss, has_aux=True)(free, stats, batch, jax.random.fold_in(key, step + 1))
        real = jnp.float32(batches.size) if mask is None else jnp.sum(mask, dtype=jnp.float32)
        total = jax.tree.map(lambda t, g: t + real.astype(t.real.dtype) * wide(g), carry[0], gradients)
        return total, carry[1] + real

    start = jax.tree.map(lambda leaf: wide(jnp.zeros_like(leaf)), free), jnp.float32(0)
    total = WeightedSum(*jax.lax.fori_loop(0, batches.steps, add, start))
    return sides.client.hold(total.mean())


def participate(
    federation: "Federation", sides: Sides, shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array, row: Rows
) -> tuple["Totals", Rows]:
    """Take one participant's round, from its row of the bank to what it adds to the totals, and its new row.

    Args:
      federation: the `Federation`.
      sides: its two sides.
      shared: what all participants share.
      data: `FederatedData`, or batches of all participants.
      index: the participant.
      slot: where its rows of the data begin.
      row: what it keeps.
    """
    told = jax.tree.map(lambda leaf: leaf[index], shared.given)
    who = told.participants
    batches = _batches(federation, shared, data, index, slot)
    before = sides.restored(row, shared.params)
    start, own, walked = walk_round(federation, sides, shared, before, batches, who)
    # Of what is shared by turns, all that the client did since it last was.
    anchor = start if sides.turns is None else sides.params.whole(shared.params, own.params)
    delta = jax.tree.map(lambda new, old: wide(new) - wide(old), walked.y, anchor)
    weight = _weight(federation, told, batches)
    known: dict[str, Callable[[], PyTree]] = {
        "delta": lambda: delta,
        "num_steps": batches.taken,
        "weight": lambda: weight,
        "examples": lambda: batches.examples,
        "full_gradient": lambda: full_gradient(federation, sides, before, shared, data, index, slot),
        "coin": lambda: shared.coin,
    }
    ended = own._replace(
        client=walked.state,
        params=sides.mine(walked.y),
        stats=sides.stats.kept(walked.stats),
        last=None if sides.turns is None else shared.round,
    )
    sent = sides.shared(delta)
    if sides.turns is not None:
        sent = sides.shared(sides.turns.due(delta, jax.tree.map(jnp.zeros_like, delta), shared.round))
    updates, ended = end_round(
        sides, ended, jax.tree.map(jnp.negative, sent), shared.params, lambda name: known[name]()
    )
    if federation.uplink:
        sent = jax.tree.map(jnp.negative, updates)
    auxes = cast(dict[str, FromClients], sides.report(ended))
    stats = sides.stats.shared(walked.stats)

    finite = is_finite((sent, stats, auxes))
    joined = jnp.array(True) if told.dropped is None else ~told.dropped
    if federation.on_nonfinite == "skip":
        joined = joined & finite
    each = {"examples": batches.examples, "joined": joined.astype(jnp.float32), "finite": finite.astype(jnp.float32)}
    clients = {name: n for name, module in federation.server.channels().items() if (n := module.clients()) is not None}
    auxes = {name: aux.widen(who, clients[name]) if aux.is_per_client() else aux for name, aux in auxes.items()}
    totals = Totals(
        sums=_contribution(federation, sent, weight, shared.aggregation, joined),
        auxes={name: where(joined, aux, aux.neutral()) for name, aux in auxes.items()},
        stats=() if stats is None else _zeroed(joined, WeightedSum.of(jax.tree.map(wide, stats), weight)),
        each=walked.averages.value() | each | sides.metrics(ended),
        rows=_zeroed(joined, WeightedSum(sent, weight)) if _keeps_rows(federation) else (),
    )
    return totals, where(joined, sides.row(sides.commit(ended)), row)


def walk_round(
    federation: "Federation", sides: Sides, shared: Shared, own: Own, batches: Batches, who: jax.Array
) -> tuple[Params, Own, Walked]:
    """Take a client's local steps: return its parameters and what it has before them, and what is after them."""
    start = sides.whole(shared.params, own, shared.round)
    own = sides.hear(shared.broadcast, who, own, start)
    stats = sides.stats.whole(shared.stats, own.stats)
    key = jax.random.fold_in(shared.key, who)
    return start, own, _take_steps(federation.loss_fn, sides.client, shared, start, own.client, stats, batches, key)


def _take_steps(
    loss_fn: LossFn,
    client: Side,
    shared: Shared,
    params: Params,
    state: OptimizerState,
    stats: PyTree,
    batches: Batches,
    key: jax.Array,
) -> Walked:
    asked = client.brick.asks().step - {"lrate"}
    free = client.free

    def step(index: jax.Array, walked: Walked, order: jax.Array, epoch_key: jax.Array) -> Walked:
        y, state, stats, averages = walked
        batch, mask = batches.take(order, index)
        loss = averaged(loss_fn, mask, batches.size)
        if jax.tree.leaves(stats) and mask is not None:
            raise ValueError(
                "Federation: a batch may be partial, and what fills it up would count in the model's state: use "
                "remainder='drop' or 'wrap'"
            )
        key = jax.random.fold_in(epoch_key, index + 1)

        def gradient(params: Params, stats: PyTree = stats) -> tuple[PyTree, tuple[Metrics, PyTree]]:
            made, found = jax.grad(loss, has_aux=True)(free(params), stats, batch, key)
            return jax.tree.map(long_axis_last, made), found

        known: dict[str, Callable[[], PyTree]] = {
            "anchor_gradient": lambda: gradient(params)[0],
            "mean_gradient": lambda: shared.mean_gradient,
            "coin": lambda: shared.coin,
        }
        gradients, (metrics, stats) = gradient(y)
        y, state = client.apply(gradients, state, y, **{name: known[name]() for name in asked})
        return Walked(y, state, stats, averages.add(metrics, mask, batches.size))

    def epoch(index: jax.Array, walked: Walked) -> Walked:
        epoch_key = jax.random.fold_in(key, index)
        order = batches.begin(jax.random.fold_in(epoch_key, 0))
        steps = (
            batches.steps
            if batches.total is None
            else jnp.minimum(batches.steps, batches.total - index * batches.steps)
        )
        return jax.lax.fori_loop(0, steps, lambda i, c: step(i, c, order, epoch_key), walked)

    start = Walked(params, state, stats, Averages.start(loss_fn, free(params), stats, batches))
    if batches.total is not None:
        return jax.lax.fori_loop(0, -(-batches.total // batches.steps), epoch, start)
    return epoch(jnp.int32(0), start) if batches.epochs == 1 else jax.lax.fori_loop(0, batches.epochs, epoch, start)


def _zeroed(joined: jax.Array, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.where(joined, leaf, 0), tree)


def _contribution(
    federation: "Federation", delta: PyTree, weight: jax.Array, kept: PyTree, joined: jax.Array
) -> PyTree:
    """Return what a participant adds to the sums of the aggregation."""
    aggregation = federation.aggregation
    if not isinstance(aggregation, SumAggregator):
        return ()
    return _zeroed(joined, aggregation.contribute(delta, weight, aggregation.begin_round(kept)))


def _keeps_rows(federation: "Federation") -> bool:
    """Whether each participant's delta is needed, and not only sums over them."""
    aggregation = federation.aggregation
    return not isinstance(aggregation, SumAggregator) or aggregation.passes > 1


class Totals(NamedTuple):
    """What the clients of a round came to together, in the carry of a loop; or what one of them did.

    Attributes:
      sums: the sums of the aggregation.
      auxes: their auxiliary variables, reduced, by name.
      stats: the sum of the model's states, where it has one.
      each: by name, float32[S], one value for each participant; 0 for those absent:
        `examples`, how many it has; `joined`, 1 if it took part to the end; `finite`, 1 if
        all that it sent is; what its bricks say; and the averages of its metrics over the
        examples that it stepped over. A scalar for one participant.
      rows: the deltas with their weights, along a leading axis of participants, where the
        aggregation needs each; 0 for those absent. Each stays on the device that ran it.
    """

    sums: PyTree
    auxes: dict[str, FromClients]
    stats: PyTree
    each: Metrics
    rows: PyTree

    def nothing(self, participants: tuple[int, ...] = ()) -> "Totals":
        """Return totals over no client, from such shapes of one."""

        def zeros(tree: PyTree, axes: tuple[int, ...] = ()) -> PyTree:
            return jax.tree.map(lambda leaf: jnp.zeros((*axes, *leaf.shape), leaf.dtype), tree)

        auxes = {name: aux.neutral() for name, aux in self.auxes.items()}
        each, rows = zeros(self.each, participants), zeros(self.rows, participants)
        return Totals(zeros(self.sums), auxes, zeros(self.stats), each, rows)

    def add(self, one: "Totals", index: jax.Array) -> "Totals":
        """Add what the participant of that index came to."""
        sums, stats = jax.tree.map(jnp.add, (self.sums, self.stats), (one.sums, one.stats))
        auxes = {name: aux.merge(one.auxes[name]) for name, aux in self.auxes.items()}
        each = jax.tree.map(lambda a, b: a.at[index].add(b), self.each, one.each)

        def add_row(rows: jax.Array, row: jax.Array) -> jax.Array:
            # By slices: on CPU a scatter goes from number to number.
            row = row + jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(rows, row, index, 0)

        return Totals(sums, auxes, stats, each, jax.tree.map(add_row, self.rows, one.rows))

    def across(self, axis: str, whole: bool) -> "Totals":
        """Add up the totals of all devices by one all-reduce, and one for each variable that is no sum."""
        # Of several dtypes; integers go through float32 exactly below 2**24.
        mine = self._replace(rows=())
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(mine)))
        alike = jax.tree.map(lambda leaf: leaf.astype(dtype), mine)
        # In one vector, what is split along another axis would be gathered.
        vector, restore = ravel_pytree(alike) if whole else (alike, lambda tree: tree)
        summed = jax.tree.map(lambda new, old: new.astype(old.dtype), restore(jax.lax.psum(vector, axis)), mine)

        def reduced(aux: FromClients, sums: FromClients) -> FromClients:
            others = {name: v.reduction for name, v in aux.variables().items() if v.reduction is not Reduction.SUM}
            return dataclasses.replace(sums, **{name: r.across(getattr(aux, name), axis) for name, r in others.items()})

        auxes = {name: reduced(aux, summed.auxes[name]) for name, aux in self.auxes.items()}
        return summed._replace(auxes=auxes, rows=self.rows)

    @classmethod
    def partition_specs(cls) -> "Totals":
        """Say how totals lie over a mesh once they are added up across it, as `shard_map` asks."""
        return cls(WHOLE, WHOLE, WHOLE, WHOLE, SPLIT)  # type: ignore[arg-type]
