"""A participant's side of a round: from its row of the bank to what it sends, and its new row.

    state = process(broadcast, begin_round(state, x)); y = x
    each batch:
        y, state = client.apply(grad(loss)(y, batch), state, y)
    state = end_round(state, what is known of the round)
    send uplink(y - x) and collect(state); state = commit(state)

It is a pure function of the client's own data, state and key, so that it gives the same
whether clients are run one by one, together, or on several devices.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import FromClients, FromServer
from functional_optimodules.federated.aggregation import SumAggregator, WeightedSum
from functional_optimodules.federated.batches import Batches, walk, walk_given
from functional_optimodules.federated.checks import Given
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows
from functional_optimodules.federated.loss import Averages, LossFn, Metrics, averaged, maskable
from functional_optimodules.federated.sides import Own, Side, Sides, end_round
from functional_optimodules.federated.totals import Totals
from functional_optimodules.numerics import is_finite, where, wide
from functional_optimodules.optimizer import Optimizer, OptimizerState
from functional_optimodules.types import Params, PyTree
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
      place: where what the broadcast has for each client is this one's; `None` for its number.
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
    place: jax.Array | None = None


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
) -> tuple[Totals, Rows]:
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
    if isinstance(data, FederatedData):
        batches = walk(data, slot, federation.batch_size, "mask", 1, shuffled=False)
    else:
        batches = _batches(federation, shared, data, index, slot)
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
        total = jax.tree.map(lambda t, g: t + real.astype(t.dtype) * wide(g), carry[0], gradients)
        return total, carry[1] + real

    start = jax.tree.map(lambda leaf: wide(jnp.zeros_like(leaf)), free), jnp.float32(0)
    total = WeightedSum(*jax.lax.fori_loop(0, batches.steps, add, start))
    return sides.client.hold(total.mean())


class Sent(NamedTuple):
    """What one participant sends, as clients hold it, and how much it counts.

    Attributes:
      delta: where the shared parameters went, as the uplink made it, in at least float32.
      auxes: its auxiliary variables by name.
      stats: what is shared of the model's state.
      weight: float32 scalar, how much it counts in the mean.
      examples: float32 scalar, how many it has.
      each: float32 scalars by name: the averages of its metrics over the examples that it
        stepped over, and what its bricks say.
    """

    delta: PyTree
    auxes: dict[str, FromClients]
    stats: PyTree
    weight: jax.Array
    examples: jax.Array
    each: Metrics


def participate(
    federation: "Federation", sides: Sides, shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array, row: Rows
) -> tuple[Totals, Rows]:
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
    sent, ended = take_part(federation, sides, shared, data, index, slot, row)
    finite = is_finite((sent.delta, sent.stats, sent.auxes))
    joined = jnp.array(True) if told.dropped is None else ~told.dropped
    if federation.on_nonfinite == "skip":
        joined = joined & finite
    totals = totals_of(federation, sent, told.participants, joined, finite, shared.aggregation)
    if learns(federation):  # also of the last round, when it drops out of this one
        row = learned(sides, row, shared.params, shared.round)
    return totals, where(joined, sides.row(sides.commit(ended)), row)


def learns(federation: "Federation") -> bool:
    """Whether a client's brick takes in what came of its last report, when the next round begins."""
    return any(module.learns for module in federation.client.modules)


def learned(sides: Sides, row: Rows, params: Params, now: jax.Array) -> Rows:
    """Return the row of a client that was told the parameters of the round after its last report."""
    own = sides.restored(row, params)
    return sides.row(own._replace(client=sides.client.begin_round(own.client, sides.whole(params, own, now))))


def take_part(
    federation: "Federation", sides: Sides, shared: Shared, data: PyTree, index: jax.Array, slot: jax.Array, row: Rows
) -> tuple[Sent, Own]:
    """Take one participant's round: return what it sends, and what it has, to commit once that has arrived."""
    told = jax.tree.map(lambda leaf: leaf[index], shared.given)
    batches = _batches(federation, shared, data, index, slot)
    before = sides.restored(row, shared.params)
    start, own, walked = walk_round(federation, sides, shared, before, batches, told.participants)
    known: dict[str, Callable[[], PyTree]] = {
        "num_steps": batches.taken,
        "full_gradient": lambda: full_gradient(federation, sides, before, shared, data, index, slot),
    }
    weight = _weight(federation, told, batches)
    return send(sides, shared, start, own, walked, weight, batches.examples, known)


def send(
    sides: Sides,
    shared: Shared,
    start: Params,
    own: Own,
    walked: Walked,
    weight: jax.Array,
    examples: jax.Array,
    known: Mapping[str, Callable[[], PyTree]],
) -> tuple[Sent, Own]:
    """End a participant's round, after its last step.

    Args:
      sides: both sides.
      shared: what all participants share.
      start: the parameters before its steps.
      own: what it has before them.
      walked: what is after them.
      weight: how much it counts.
      examples: how many it has.
      known: what else is known of its round, by name.

    Returns:
      What it sends, and what it has, to commit once that has arrived.
    """
    # Of what is shared by turns, all that the client did since it last was.
    anchor = start if sides.turns is None else sides.params.whole(shared.params, own.params)
    delta = jax.tree.map(lambda new, old: wide(new) - wide(old), walked.y, anchor)
    everything: Mapping[str, Callable[[], PyTree]] = {
        "delta": lambda: delta,
        "weight": lambda: weight,
        "examples": lambda: examples,
        "coin": lambda: shared.coin,
        **known,
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
        sides, ended, jax.tree.map(jnp.negative, sent), shared.params, lambda name: everything[name]()
    )
    if cast(Optimizer, sides.uplink.brick).modules:
        sent = jax.tree.map(jnp.negative, updates)
    auxes = cast(dict[str, FromClients], sides.report(ended))
    each = walked.averages.value() | sides.metrics(ended)
    return Sent(sent, auxes, sides.stats.shared(walked.stats), weight, examples, each), ended


def totals_of(
    federation: "Federation", sent: Sent, who: jax.Array, joined: jax.Array, finite: jax.Array, kept: PyTree
) -> Totals:
    """Return what the totals of a round get of what one participant sent.

    Args:
      federation: the `Federation`.
      sent: what it sent.
      who: which client it is.
      joined: whether it counts.
      finite: whether all that it sent is.
      kept: what the aggregation has kept.
    """
    clients = {name: n for name, module in federation.server.channels().items() if (n := module.clients()) is not None}
    auxes = {name: aux.widen(who, clients[name]) if aux.is_per_client() else aux for name, aux in sent.auxes.items()}
    each = {"examples": sent.examples, "joined": joined.astype(jnp.float32), "finite": finite.astype(jnp.float32)}
    return Totals(
        sums=_contribution(federation, sent.delta, sent.weight, kept, joined),
        auxes={name: where(joined, aux, aux.neutral()) for name, aux in auxes.items()},
        stats=()
        if sent.stats is None
        else _zeroed(joined, WeightedSum.of(jax.tree.map(wide, sent.stats), sent.weight)),
        each=sent.each | each,
        rows=_zeroed(joined, WeightedSum(sent.delta, sent.weight)) if _keeps_rows(federation) else (),
    )


def walk_round(
    federation: "Federation", sides: Sides, shared: Shared, own: Own, batches: Batches, who: jax.Array
) -> tuple[Params, Own, Walked]:
    """Take a client's local steps: return its parameters and what it has before them, and what is after them."""
    start = sides.whole(shared.params, own, shared.round)
    own = sides.hear(shared.broadcast, who if shared.place is None else shared.place, own, start)
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
        steps = batches.steps
        if batches.total is not None:
            steps = jnp.minimum(steps, batches.total - index * steps)
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
