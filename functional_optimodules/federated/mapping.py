"""How participants are mapped to devices and to time.

Whatever the mapping, a participant's work is the same program on the same key,
and sums are accumulated in the loop's carry: memory grows with the chunk. Over a
mesh each device runs the participants that it owns, with as many iterations as
these need and no collective among them, and one all-reduce ends the round.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.placement import AXIS, SPLIT, WHOLE, automatic, mesh_size
from functional_optimodules.federated.reduction import Totals, add, all_reduce, choose, nothing, widened

Mapping = Literal["scan", "vmap"] | int | Mesh | None
Work = Callable[[Any, Any, jax.Array, jax.Array, list[jax.Array]], tuple[Totals, list[jax.Array]]]

# Parameters, gradients, an optimizer's trees and what a step computes on the way: a guess, on the safe side.
_COPIES_PER_CLIENT = 32
_LARGEST_CHUNK = 256


def mesh_of(mapping: Mapping) -> Mesh | None:
    """Return the mesh, where the mapping is one."""
    return automatic(mapping) if isinstance(mapping, Mesh) else None


def check_mapping(mapping: Mapping) -> None:
    """Raise a `ValueError` for what is no mapping, or a mesh without an axis `clients`."""
    if isinstance(mapping, Mesh):
        mesh_size(mapping)
    elif not (mapping in (None, "scan", "vmap") or (type(mapping) is int and mapping >= 1)):
        raise ValueError(
            f"Federation: mapping={mapping!r} should be 'scan', 'vmap', a chunk of at least 1, a mesh with an axis "
            f"{AXIS!r}, or None"
        )


def require_blocks(data: FederatedData, mapping: Mapping) -> None:
    """Raise a `ValueError` if the data was not laid out for the devices of a mapping."""
    devices = mesh_size(mapping) if isinstance(mapping, Mesh) else 1
    if data.num_shards != devices:
        where = f"a mesh of {devices}: build it with that `mesh`" if isinstance(mapping, Mesh) else f"{mapping=}"
        raise ValueError(f"Federation: data in {data.num_shards} blocks, for {where}")


def chunk_size(mapping: Mapping, participants: int, params: Any) -> int:
    """Return how many participants are run at once on a device."""
    if isinstance(mapping, int):
        return min(mapping, participants)
    if mapping == "vmap":
        return participants
    # On CPU a client's own work fills the cores' caches; accelerators want many at once.
    if mapping == "scan" or jax.default_backend() == "cpu":
        return 1
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**33)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    fits = max(1, int(limit // 2 // (_COPIES_PER_CLIENT * max(size, 1))))
    # A power of two, so that processes whose devices differ by little compile the same program.
    return min(2 ** (fits.bit_length() - 1), _LARGEST_CHUNK, participants)


def run_participants(
    mapping: Mapping, work: Work, shared: Any, data: Any, bank: list[jax.Array], slots: jax.Array
) -> tuple[Totals, list[jax.Array]]:
    """Run the participants of a round.

    Args:
      mapping: how.
      work: `(shared, data, index, slot, row) -> totals, row`: the work of the participant
        of that index, whose rows are in that slot.
      shared: what all participants share, with `params`.
      data: `FederatedData`, or what else the participants share.
      bank: what clients keep between rounds, by slot.
      slots: int32[S], the slot of each participant.

    Returns:
      The totals and the new bank.
    """
    chunk = chunk_size(mapping, slots.shape[0], shared.params)
    mesh = mesh_of(mapping)
    held = isinstance(data, FederatedData)
    if held:
        require_blocks(data, mapping)
    if mesh is None:
        return _loop(work, chunk, shared, data, bank, slots, None)

    def local(shared: Any, data: Any, bank: list[jax.Array], slots: jax.Array) -> Any:
        device = jax.lax.axis_index(AXIS)
        if bank or held:
            owned = bank[0].shape[0] if bank else data.ids.shape[0]
            mine, slots = slots // owned == device, slots % owned
        else:
            mine = jnp.arange(slots.shape[0]) % mesh_size(mesh) == device
        totals, bank = _loop(work, chunk, shared, data, bank, slots, mine)
        return all_reduce(totals, AXIS), bank

    specs = WHOLE, data.specs() if held else WHOLE, SPLIT, WHOLE
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(WHOLE, SPLIT), check_vma=False)
    return run(shared, data, bank, slots)


def _loop(
    work: Work,
    chunk: int,
    shared: Any,
    data: Any,
    bank: list[jax.Array],
    slots: jax.Array,
    mine: jax.Array | None,
) -> tuple[Totals, list[jax.Array]]:
    """Run participants chunk after chunk: all of them, or those that are mine."""
    total = slots.shape[0]
    order: Any = jnp.arange(total) if mine is None else jnp.argsort(~mine, stable=True)
    count = total if mine is None else jnp.sum(mine, dtype=jnp.int32)
    order = jnp.pad(order, (0, -total % chunk))
    rows = bank[0].shape[0] if bank else 0
    shapes = jax.eval_shape(
        lambda *args: work(*args)[0], shared, data, jnp.int32(0), jnp.int32(0), [leaf[0] for leaf in bank]
    )

    # Each branch below is also what keeps XLA from reading rows again after they are
    # written, and from copying the whole bank for that.
    def run_one(step: jax.Array, carry: Any) -> Any:
        totals, bank = carry
        index = order[step]
        at = slots[index]
        row = [jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False) for leaf in bank]
        here, new = jax.lax.cond(
            step < count, lambda row: work(shared, data, index, at, row), lambda row: (nothing(shapes), row), row
        )
        write = jax.lax.dynamic_update_index_in_dim
        return add(totals, here, index), [write(leaf, value, at, 0) for leaf, value in zip(bank, new, strict=True)]

    def run_chunk(step: jax.Array, carry: Any) -> Any:
        totals, bank = carry
        index = jax.lax.dynamic_slice(order, (step * chunk,), (chunk,))
        active = step * chunk + jnp.arange(chunk) < count
        at = jnp.where(active, slots[index], rows)

        def one(index: jax.Array, active: jax.Array, row: list[jax.Array]) -> Any:
            # A branch for each would copy the data for each.
            return choose(active, work(shared, data, index, slots[index], row), (nothing(shapes), row))

        here, new = jax.lax.cond(
            step * chunk < count,
            lambda rows: jax.vmap(one)(index, active, rows),
            lambda rows: (jax.vmap(lambda _: nothing(shapes))(index), rows),
            [leaf[jnp.minimum(at, rows - 1)] for leaf in bank],
        )
        bank = [leaf.at[at].set(value, mode="drop") for leaf, value in zip(bank, new, strict=True)]
        return jax.lax.scan(lambda t, each: (add(t, *each), None), totals, (here, index))[0], bank

    start = nothing(widened(shapes, total)), list(bank)
    return jax.lax.fori_loop(0, -(-count // chunk), run_one if chunk == 1 else run_chunk, start)
