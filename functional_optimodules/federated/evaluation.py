"""Evaluation of parameters on each client's data: as all share them, or as each client has them.

The loss is that of evaluation, where there is one: without dropout, and with the
model's state as it is.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.federated.batches import check_batches, walk
from functional_optimodules.federated.checks import Given
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import Rows, chunk_size, require_blocks
from functional_optimodules.federated.loss import Averages, Metrics, averaged, maskable
from functional_optimodules.federated.participant import Shared, walk_round
from functional_optimodules.federated.placement import AXIS, SPLIT, WHOLE, mesh_of
from functional_optimodules.federated.round import share
from functional_optimodules.federated.sides import Sides
from functional_optimodules.federated.state import FederationState, own_sides
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.stateful.leaves import traced
from functional_optimodules.types import Params, PyTree

if TYPE_CHECKING:
    from functional_optimodules.federated.federation import Federation


def evaluate(
    federation: "Federation",
    model: Params | FederationState,
    data: FederatedData,
    batch_size: int | None,
    key: jax.Array,
    steps: int,
    train: FederatedData | None,
) -> Metrics:
    """Return each client's loss and metrics, in one program; see `Federation.evaluate`."""
    require_blocks(data, federation.mapping)
    if not isinstance(model, FederationState):
        if steps or train is not None:
            raise ValueError("Federation: to evaluate after local steps, pass the federation's state, not parameters")
        # Of what evaluates parameters alone, federations with equal losses share the program.
        alike = type(federation)(
            federation.loss_fn, Optimizer(0.0), mapping=federation.mapping, eval_fn=federation.eval_fn
        )
        return _compiled(alike, batch_size, 0, model, data, None, key)
    if type(steps) is not int or steps < 0:
        raise ValueError(f"Federation: steps={steps!r} should be an integer of at least 0")
    if steps and "mean_gradient" in federation.client.asks().step:
        raise ValueError("Federation: a brick asks for the participants' mean gradient, and one client alone has none")
    train = data if train is None else train
    own_sides(federation, model)
    if steps:
        check_batches(train, federation.batch_size, federation.remainder)
    for each in (data, train):
        slots = model.slots if model.bank else train.slots
        if not traced((each.slots, slots)) and not np.array_equal(each.slots, slots):
            raise ValueError(
                f"Federation: data of {each.num_clients} clients, not laid out as the {slots.shape[0]} that the state "
                "has: over one device the same clients, over a mesh of the same sizes too"
            )
    try:
        hash(federation)
    except TypeError:  # rates that are being traced cannot be told apart: what is around compiles this
        return _evaluate(federation, batch_size, steps, model, data, train, key)
    return _compiled(federation, batch_size, steps, model, data, train, key)


def _evaluate(
    federation: "Federation",
    batch_size: int | None,
    steps: int,
    model: Params | FederationState,
    data: FederatedData,
    train: FederatedData | None,
    key: jax.Array,
) -> Metrics:
    mesh, loss_fn = mesh_of(federation.mapping), federation.eval_fn or federation.loss_fn
    sides: Sides | None = None
    bank: Rows = []
    shared: Shared | Params = model
    if isinstance(model, FederationState):
        sides, bank, params = own_sides(federation, model), model.bank, model.params
        nobody = Given(jnp.zeros(0, jnp.int32), None, None, None, None)
        server = sides.server.begin_round(model.server, sides.params.shared(params))
        shared = share(federation, sides, model, server, nobody)._replace(steps=jnp.int32(steps))
        if not steps:  # a server may send others than it has
            shared = shared._replace(params=sides.client.hold(sides.params.shared(params)))
    else:
        params = model
    chunk = chunk_size(federation.mapping, data.per_shard, params)

    def personal(shared: Shared, row: Rows, train: FederatedData, slot: jax.Array) -> tuple[Params, PyTree]:
        """Return a client's parameters, and its model's state, after its local steps."""
        assert sides is not None
        own = sides.restored(row, shared.params)
        if not steps:
            params = sides.whole(shared.params, own, shared.round)
            return sides.client.free(params), sides.stats.whole(shared.stats, own.stats)
        batches = walk(train, slot, federation.batch_size, federation.remainder, 1, shuffled=True)
        _, _, walked = walk_round(federation, sides, shared, own, batches._replace(total=shared.steps), train.ids[slot])
        return sides.client.free(walked.y), walked.stats

    def local(shared: PyTree, bank: Rows, data: FederatedData, train: FederatedData | None, key: jax.Array) -> Metrics:
        def assess(slot: jax.Array) -> Metrics:
            own_key = jax.random.fold_in(key, data.ids[slot])
            if train is None:
                params, stats = shared, None
            else:
                params, stats = personal(shared, [leaf[slot] for leaf in bank], train, slot)
            batches = walk(data, slot, batch_size, "mask", epochs=1, shuffled=False)
            loss, order = maskable(loss_fn, params, stats, batches, own_key), batches.begin(own_key)

            def step(index: jax.Array, averages: Averages) -> Averages:
                batch, mask = batches.take(order, index)
                at = jax.random.fold_in(own_key, index)
                _, (metrics, _) = averaged(loss, mask, batches.size)(params, stats, batch, at)
                return averages.add(metrics, mask, batches.size)

            start = Averages.start(loss, params, stats, batches)
            return jax.lax.fori_loop(0, batches.steps, step, start).value()

        by_slot = jax.lax.map(assess, jnp.arange(data.ids.shape[0]), batch_size=chunk)
        found = jax.tree.map(data.by_client, by_slot)
        return found if mesh is None else jax.lax.psum(found, AXIS)

    if mesh is None:
        return local(shared, bank, data, train, key)
    laid = data.partition_specs(), None if train is None else train.partition_specs()
    specs = WHOLE, SPLIT, *laid, WHOLE
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=WHOLE, axis_names={AXIS}, check_vma=False)
    return run(shared, bank, data, train, key)


_compiled = jax.jit(_evaluate, static_argnums=(0, 1, 2))
