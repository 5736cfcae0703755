"""How participants are mapped to devices and to time.

Whatever the mapping, a participant's work is the same program on the same key,
and sums are accumulated in the loop's carry: memory grows with the chunk. Over a
mesh each device runs the participants that it owns, with as many iterations as
these need and no collective among them, and one all-reduce ends the round.
"""

import functools
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.options import Execution
from functional_optimodules.federated.placement import (
    AXIS,
    SPLIT,
    WHOLE,
    device_of,
    has_whole_models,
    mesh_of,
    mesh_size,
)
from functional_optimodules.numerics import where
from functional_optimodules.types import Params, PyTree
from functional_optimodules.xla import behind_branch

# Parameters, gradients, an optimizer's trees and what a step computes on the way: a guess, on the safe side.
_COPIES_PER_CLIENT = 32
_LARGEST_CHUNK = 256
# On CPU, by `python -m benchmarks.rounds.chunks`: what so many clients have together stays in a core's caches.
_CPU_CHUNK, _CPU_BYTES = 10, 2**21

Rows = list[jax.Array]


class Sums(Protocol):
    """What participants come to, one or together: a pytree that can be added up."""

    def nothing(self, participants: tuple[int, ...] = ()) -> Self:
        """Return what no one comes to, for an array of participants of that shape, or for one."""

    def add(self, one: Self, index: jax.Array) -> Self:
        """Add what the participant of that index comes to."""

    def across(self, axis: str, whole: bool) -> Self:
        """Add up what the devices along an axis of a mesh have, whole on each or split along other axes."""

    @classmethod
    def partition_specs(cls) -> Self:
        """Say how what `across` returns lies over a mesh."""


Total = TypeVar("Total", bound=Sums)
Work = Callable[[PyTree, PyTree, jax.Array, jax.Array, Rows], tuple[Total, Rows]]
One = Callable[[jax.Array, jax.Array, Rows], tuple[Total, Rows]]


def require_blocks(data: FederatedData, execution: Execution) -> None:
    """Raise a `ValueError` if the data was not laid out for the devices in use."""
    devices = mesh_size(mesh_of(execution))
    if data.num_shards != devices:
        mesh = f"a mesh of {devices}: build it with that `mesh`"
        place = mesh if isinstance(execution, Mesh) else f"mapping={execution!r}"
        raise ValueError(f"Federation: data in {data.num_shards} blocks, for {place}")


def chunk_size(execution: Execution, participants: int, params: Params, alike: bool = False) -> int:
    """Return how many participants are run at once on a device.

    Args:
      execution: how they are mapped.
      participants: how many there are.
      params: the parameters of each.
      alike: whether all take as many steps, so that none waits for others.
    """
    if isinstance(execution, int):
        return min(execution, participants)
    if execution == "vmap":
        return participants
    if execution == "scan":
        return 1
    device = device_of(mesh_of(execution))
    size = max(1, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
    # More than its share would be idle places on each device.
    share = -(-participants // mesh_size(mesh_of(execution)))
    if device.platform == "cpu":
        # Convolutions with kernels of each client's own, of more than two axes, become grouped ones, and gain nothing.
        plain = alike and all(leaf.ndim <= 2 for leaf in jax.tree.leaves(params))
        most = max(1, min(_CPU_CHUNK, _CPU_BYTES // size)) if plain else 1
        # In as many chunks, as even as they can be.
        return -(-share // -(-share // most))
    fits = max(1, int(_memory(device) // 2 // (_COPIES_PER_CLIENT * size)))
    # A power of two, so that processes whose devices differ by little compile the same program.
    return min(2 ** (fits.bit_length() - 1), _LARGEST_CHUNK, share)


def _memory(device: jax.Device) -> int:
    """Return the bytes that a device has; a guess where it does not tell, as one that is only described."""
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:
        stats = None
    return (stats or {}).get("bytes_limit", 2**33)


def run_participants(
    execution: Execution, chunk: int, work: Work[Total], shared: PyTree, data: PyTree, bank: Rows, slots: jax.Array
) -> tuple[Total, Rows]:
    """Run the participants of a round.

    Args:
      execution: on one device, or over a mesh.
      chunk: how many at once on a device.
      work: `(shared, data, index, slot, row) -> sums, row`: the work of the participant
        of that index, whose rows are in that slot.
      shared: what all participants share.
      data: `FederatedData`, or what else the participants share.
      bank: what clients keep between rounds, by slot.
      slots: int32[S], the slot of each participant.

    Returns:
      The sums and the new bank.
    """
    mesh = mesh_of(execution)
    held = isinstance(data, FederatedData)
    if held:
        require_blocks(data, execution)
    if mesh is None:
        return _loop(functools.partial(work, shared, data), chunk, bank, slots, None)

    def local(shared: PyTree, data: PyTree, bank: Rows, slots: jax.Array) -> tuple[Total, Rows]:
        device = jax.lax.axis_index(AXIS)
        if bank or held:
            owned = bank[0].shape[0] if bank else data.ids.shape[0]
            mine, slots = slots // owned == device, slots % owned
        else:
            mine = jnp.arange(slots.shape[0]) % mesh_size(mesh) == device
        totals, bank = _loop(functools.partial(work, shared, data), chunk, bank, slots, mine)
        return totals.across(AXIS, whole=has_whole_models(mesh)), bank

    specs = WHOLE, data.partition_specs() if held else WHOLE, SPLIT, WHOLE
    total, _ = jax.eval_shape(
        lambda *args: work(*args), shared, data, jnp.int32(0), jnp.int32(0), [leaf[0] for leaf in bank]
    )
    out_specs = total.partition_specs(), SPLIT
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names={AXIS}, check_vma=False)
    return run(shared, data, bank, slots)


def _loop(work: One[Total], chunk: int, bank: Rows, slots: jax.Array, mine: jax.Array | None) -> tuple[Total, Rows]:
    """Run participants chunk after chunk: all of them, or those that are mine."""
    total = slots.shape[0]
    order = jnp.arange(total) if mine is None else jnp.argsort(~mine, stable=True)
    count: int | jax.Array = total if mine is None else jnp.sum(mine, dtype=jnp.int32)
    order = jnp.pad(order, (0, -total % chunk))
    rows = bank[0].shape[0] if bank else 0
    one = jax.eval_shape(lambda row: work(jnp.int32(0), jnp.int32(0), row)[0], [leaf[0] for leaf in bank])

    def run_one(step: jax.Array, carry: tuple[Total, Rows]) -> tuple[Total, Rows]:
        totals, bank = carry
        index = order[step]
        at = slots[index]
        row = [jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False) for leaf in bank]
        here, new = behind_branch(step < count, lambda row: work(index, at, row), lambda row: (one.nothing(), row), row)
        write = jax.lax.dynamic_update_index_in_dim
        return totals.add(here, index), [write(leaf, value, at, 0) for leaf, value in zip(bank, new, strict=True)]

    def run_chunk(step: jax.Array, carry: tuple[Total, Rows]) -> tuple[Total, Rows]:
        totals, bank = carry
        index = jax.lax.dynamic_slice(order, (step * chunk,), (chunk,))
        active = step * chunk + jnp.arange(chunk) < count
        at = jnp.where(active, slots[index], rows)

        def run_active(index: jax.Array, active: jax.Array, row: Rows) -> tuple[Total, Rows]:
            # A branch for each would copy the data for each.
            return where(active, work(index, slots[index], row), (one.nothing(), row))

        here, new = behind_branch(
            step * chunk < count,
            lambda rows: jax.vmap(run_active)(index, active, rows),
            lambda rows: (jax.vmap(lambda _: one.nothing())(index), rows),
            _rows_at(bank, jnp.minimum(at, rows - 1)),
        )
        bank = [leaf.at[at].set(value, mode="drop") for leaf, value in zip(bank, new, strict=True)]
        return jax.lax.scan(lambda t, each: (t.add(*each), None), totals, (here, index))[0], bank

    start = one.nothing((total,)), list(bank)
    return jax.lax.fori_loop(0, -(-count // chunk), run_one if chunk == 1 else run_chunk, start)


def _rows_at(bank: Rows, at: jax.Array) -> Rows:
    """Return some rows of a bank, along a leading axis."""

    def gather(bank: Rows, at: jax.Array) -> Rows:
        return [leaf[at] for leaf in bank]

    def one_by_one(bank: Rows, at: jax.Array) -> Rows:
        return jax.lax.map(lambda each: [jax.lax.dynamic_index_in_dim(leaf, each, keepdims=False) for leaf in bank], at)

    # On a TPU a gather of long rows is made of gathers of parts of them, and each part of the bank copied first.
    return jax.lax.platform_dependent(bank, at, tpu=one_by_one, default=gather)
