"""The clients' losses at some parameters, in one program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from functional_optimodules.federated.batches import walk
from functional_optimodules.federated.client import assess
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.mapping import chunk_size, mesh_of, require_blocks
from functional_optimodules.federated.placement import AXIS, WHOLE


@functools.partial(jax.jit, static_argnums=(0, 3))
def evaluate(
    federation: Any, params: Any, data: FederatedData, batch_size: int | None, key: jax.Array
) -> dict[str, jax.Array]:
    """Return each client's loss and metrics, by client; see `Federation.evaluate`."""
    require_blocks(data, federation.mapping)
    total = data.num_clients
    chunk = chunk_size(federation.mapping, data.per_shard, params)

    def local(params: Any, data: FederatedData, key: jax.Array) -> dict[str, jax.Array]:
        def one(slot: jax.Array) -> dict[str, jax.Array]:
            batches = walk(data, slot, batch_size, federation.remainder, shuffled=False)
            return assess(federation.loss_fn, params, batches, jax.random.fold_in(key, data.ids[slot]))

        slots = jnp.arange(data.ids.shape[0])
        by_slot = jax.lax.map(one, slots, batch_size=chunk)
        return {name: jnp.zeros(total).at[data.ids].set(value, mode="drop") for name, value in by_slot.items()}

    mesh = mesh_of(federation.mapping)
    if mesh is None:
        return local(params, data, key)

    def gathered(params: Any, data: FederatedData, key: jax.Array) -> dict[str, jax.Array]:
        found = local(params, data, key)
        together = jax.lax.psum(jnp.stack(list(found.values())), AXIS)
        return dict(zip(found, together, strict=True))

    run = jax.shard_map(gathered, mesh=mesh, in_specs=(WHOLE, data.specs(), WHOLE), out_specs=WHOLE, check_vma=False)
    return run(params, data, key)
