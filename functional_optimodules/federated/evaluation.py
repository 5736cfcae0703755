"""The clients' losses at some parameters, in one program."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from functional_optimodules.aux_var import Params
from functional_optimodules.federated.batches import walk
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.execution import chunk_size, mesh_of, require_blocks
from functional_optimodules.federated.loss import Averages, LossFn, Metrics, averaged, maskable
from functional_optimodules.federated.options import Execution
from functional_optimodules.federated.placement import AXIS, WHOLE


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def evaluate(
    loss_fn: LossFn, execution: Execution, batch_size: int | None, params: Params, data: FederatedData, key: jax.Array
) -> Metrics:
    """Return each client's loss and metrics, by client; see `Federation.evaluate`."""
    require_blocks(data, execution)
    chunk = chunk_size(execution, data.per_shard, params)

    def local(params: Params, data: FederatedData, key: jax.Array) -> Metrics:
        def assess(slot: jax.Array) -> Metrics:
            batches = walk(data, slot, batch_size, "mask", shuffled=False)
            own_key = jax.random.fold_in(key, data.ids[slot])
            loss, order = maskable(loss_fn, params, batches, own_key), batches.begin(own_key)

            def step(index: jax.Array, averages: Averages) -> Averages:
                batch, mask = batches.take(order, index)
                metrics = averaged(loss, mask, batches.size)(params, batch, jax.random.fold_in(own_key, index))[1]
                return averages.add(metrics, mask, batches.size)

            return jax.lax.fori_loop(0, batches.steps, step, Averages.start(loss, params, batches)).value()

        by_slot = jax.lax.map(assess, jnp.arange(data.ids.shape[0]), batch_size=chunk)
        return jax.tree.map(lambda each: jnp.zeros(data.num_clients).at[data.ids].set(each, mode="drop"), by_slot)

    mesh = mesh_of(execution)
    if mesh is None:
        return local(params, data, key)
    specs = WHOLE, data.partition_specs(), WHOLE
    gathered: Callable[..., Metrics] = lambda *args: jax.lax.psum(local(*args), AXIS)  # noqa: E731
    return jax.shard_map(gathered, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)(params, data, key)
