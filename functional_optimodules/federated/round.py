"""One round, from the server's parameters to its next ones.

    broadcast = server.collect
    each participant, wherever and whenever it is run:
        state = process(broadcast, begin_round(state, params)); y = params
        each batch:
            y, state = client.apply(grad(loss)(y, batch), state, y)
        send y - params and collect(state); state = commit(state)
    totals = the sums of what they send
    server: process(totals.auxes); params += server.update(-mean(delta))

A participant's work is a pure function of the client's own data, state and key, so
that it gives the same whether clients are run one by one, together, or on several
devices.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from functional_optimodules.aux_var import AuxVar, FromClients, FromServer, Reduction
from functional_optimodules.federated.batches import Batches, walk, walk_given
from functional_optimodules.federated.checks import Given, check_round
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows, chunk_size, run_participants
from functional_optimodules.federated.loss import Averages, LossFn, Metrics, averaged
from functional_optimodules.federated.state import FederationState, Side, Sides, own_sides
from functional_optimodules.numerics import cast_like, is_finite, where, wide
from functional_optimodules.optimizer import OptimizerState
from functional_optimodules.random.keys import shapes_only
from functional_optimodules.types import Params, PyTree, Updates
from functional_optimodules.xla import long_axis_last

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


Carry = tuple[Params, OptimizerState, Averages]


class Shared(NamedTuple):
    """What the participants of a round share.

    Attributes:
      params: the parameters, as clients hold them.
      broadcast: the server's auxiliary variables by name, as clients hold them.
      key: the key of the round.
      given: what the caller says of each, and who they are.
    """

    params: Params
    broadcast: dict[str, FromServer]
    key: jax.Array
    given: Given


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
    server = sides.server.begin_round(state.server, state.params)
    key = jax.random.fold_in(state.key, state.round)
    shared = Shared(sides.client.hold(state.params), sides.broadcast(server), key, given)
    slots = data.slots if isinstance(data, FederatedData) else state.slots
    slots = slots[participants] if slots.shape[0] else jnp.arange(count, dtype=jnp.int32)
    work = functools.partial(participate, federation, sides)
    chunk = chunk_size(federation.mapping, count, state.params)
    totals, bank = run_participants(federation.mapping, chunk, work, shared, data, state.bank, slots)
    free = sides.client.free
    server = sides.server.process({name: aux.map_shaped(free) for name, aux in totals.auxes.items()}, server)
    mean = jax.tree.map(lambda d: -d / jnp.maximum(totals.weight, 1e-30).astype(d.real.dtype), free(totals.delta))
    stepped = sides.server.apply(cast_like(mean, state.params), server, state.params)
    joined = totals.each["joined"] > 0
    # Where nobody joined there was no round for the server; the bank's rows are the old ones already.
    params, server = where(jnp.any(joined), stepped, (state.params, state.server))
    known = {"round": state.round, "participants": participants, "finite": totals.each["finite"] > 0, "joined": joined}
    return state._replace(params=params, server=server, bank=bank, round=state.round + 1), totals.each | known


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
    client = sides.client
    told = jax.tree.map(lambda leaf: leaf[index], shared.given)
    who = told.participants
    if isinstance(data, FederatedData):
        batches = walk(data, slot, federation.batch_size, federation.remainder, federation.epochs, shuffled=True)
    else:
        batches = walk_given(jax.tree.map(lambda leaf: leaf[index], data), told.num_steps, told.mask)
    with shapes_only():
        state = sides.restored(row, client.init(shared.params))
    broadcast: dict[str, AuxVar] = {name: aux.narrow(who) for name, aux in shared.broadcast.items()}
    state = client.process(broadcast, client.begin_round(state, shared.params))
    key = jax.random.fold_in(shared.key, who)
    y, state, metrics = _take_steps(client, federation.loss_fn, shared.params, state, batches, key)
    delta = jax.tree.map(lambda new, old: wide(new) - wide(old), y, shared.params)
    auxes = cast(dict[str, FromClients], client.collect(state))

    finite = is_finite((delta, auxes))
    joined = jnp.array(True) if told.dropped is None else ~told.dropped
    if federation.on_nonfinite == "skip":
        joined = joined & finite
    weight = jnp.float32(1) if federation.weighting == "uniform" else batches.examples
    if told.weights is not None:
        weight = told.weights.astype(jnp.float32)
    each = {"examples": batches.examples, "joined": joined.astype(jnp.float32), "finite": finite.astype(jnp.float32)}
    known = {name: n for name, module in federation.server.channels().items() if (n := module.clients()) is not None}
    auxes = {name: aux.widen(who, known[name]) if aux.is_per_client() else aux for name, aux in auxes.items()}
    delta = jax.tree.map(lambda d: jnp.where(joined, weight.astype(d.real.dtype) * d, 0), delta)
    auxes = {name: where(joined, aux, aux.neutral()) for name, aux in auxes.items()}
    totals = Totals(delta, jnp.where(joined, weight, 0), auxes, metrics | each)
    return totals, where(joined, sides.row(client.commit(state)), row)


def _take_steps(
    client: Side, loss_fn: LossFn, params: Params, state: OptimizerState, batches: Batches, key: jax.Array
) -> tuple[Params, OptimizerState, Metrics]:
    """Take a client's local steps, and return where they lead, its state, and the averages of its metrics."""

    def step(index: jax.Array, carry: Carry, order: jax.Array, epoch_key: jax.Array) -> Carry:
        y, state, averages = carry
        batch, mask = batches.take(order, index)
        loss = averaged(loss_fn, mask, batches.size)
        key = jax.random.fold_in(epoch_key, index + 1)
        gradients, metrics = jax.grad(loss, has_aux=True)(client.free(y), batch, key)
        y, state = client.apply(jax.tree.map(long_axis_last, gradients), state, y)
        return y, state, averages.add(metrics, mask, batches.size)

    def epoch(index: jax.Array, carry: Carry) -> Carry:
        epoch_key = jax.random.fold_in(key, index)
        order = batches.begin(jax.random.fold_in(epoch_key, 0))
        return jax.lax.fori_loop(0, batches.steps, lambda i, c: step(i, c, order, epoch_key), carry)

    start = params, state, Averages.start(loss_fn, client.free(params), batches)
    end = epoch(jnp.int32(0), start) if batches.epochs == 1 else jax.lax.fori_loop(0, batches.epochs, epoch, start)
    y, state, averages = end
    return y, state, averages.value()


class Totals(NamedTuple):
    """What the clients of a round came to together, in the carry of a loop; or what one of them did.

    Attributes:
      delta: weighted sum of `y - params`, shaped like the parameters, in at least float32.
      weight: sum of their weights.
      auxes: their auxiliary variables, reduced, by name.
      each: by name, float32[S], one value for each participant; 0 for those absent:
        `examples`, how many it has; `joined`, 1 if it took part to the end; `finite`, 1 if
        all that it sent is; and the averages of its metrics over the examples that it
        stepped over. A scalar for one participant.
    """

    delta: Updates
    weight: jax.Array
    auxes: dict[str, FromClients]
    each: Metrics

    def nothing(self, participants: tuple[int, ...] = ()) -> "Totals":
        """Return totals over no client, from such shapes of one."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self)._replace(
            auxes={name: aux.neutral() for name, aux in self.auxes.items()},
            each={name: jnp.zeros(participants, leaf.dtype) for name, leaf in self.each.items()},
        )

    def add(self, one: "Totals", index: jax.Array) -> "Totals":
        """Add what the participant of that index came to."""
        delta = jax.tree.map(jnp.add, self.delta, one.delta)
        auxes = {name: aux.merge(one.auxes[name]) for name, aux in self.auxes.items()}
        each = {name: values.at[index].add(one.each[name]) for name, values in self.each.items()}
        return Totals(delta, self.weight + one.weight, auxes, each)

    def across(self, axis: str) -> "Totals":
        """Add up the totals of all devices by one all-reduce, and one for each variable that is no sum."""
        # One vector of several dtypes; integers go through float32 exactly below 2**24.
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(self)))
        vector, restore = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), self))
        summed = jax.tree.map(lambda new, old: new.astype(old.dtype), restore(jax.lax.psum(vector, axis)), self)

        def reduced(aux: FromClients, sums: FromClients) -> FromClients:
            others = {name: v.reduction for name, v in aux.variables().items() if v.reduction is not Reduction.SUM}
            return dataclasses.replace(sums, **{name: r.across(getattr(aux, name), axis) for name, r in others.items()})

        return summed._replace(auxes={name: reduced(aux, summed.auxes[name]) for name, aux in self.auxes.items()})
