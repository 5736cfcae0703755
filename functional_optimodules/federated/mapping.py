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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.reduction import Totals, all_reduce, choose, fill, is_finite

Mapping = Literal["scan", "vmap"] | int | Mesh | None

AXIS = "clients"


def chunk_size(mapping: Mapping, participants: int) -> int:
    """Return how many participants are run at once on a device."""
    if mapping is None or isinstance(mapping, Mesh):
        # On CPU a client's own work fills the cores' caches; accelerators want many at once.
        mapping = "scan" if jax.default_backend() == "cpu" else 64
    if mapping == "scan":
        return 1
    if mapping == "vmap":
        return participants
    if type(mapping) is not int or mapping < 1:
        raise ValueError(f"Federation: mapping={mapping!r} should be 'scan', 'vmap', a chunk size, a mesh or None")
    return min(mapping, participants)


def place_bank(rows: Callable[[jax.Array], list[jax.Array]], ids: jax.Array, mapping: Mapping) -> list[jax.Array]:
    """Make the bank's rows for the clients of each slot, where they belong."""
    if not isinstance(mapping, Mesh):
        return rows(ids)
    shards = mesh_size(mapping)
    slots = jnp.concatenate([jnp.asarray(ids), jnp.zeros(-len(ids) % shards, jnp.int32)])
    return jax.jit(rows, out_shardings=NamedSharding(mapping, PartitionSpec(AXIS)))(slots)


def mesh_size(mesh: Mesh) -> int:
    """Return the number of devices along the axis of clients."""
    if AXIS not in mesh.shape:
        raise ValueError(f"Federation: the mesh has axes {tuple(mesh.shape)}, and none named {AXIS!r}")
    return int(mesh.shape[AXIS])


def run_participants(
    federation: Any, state: Any, data: Any, participants: jax.Array, broadcast: Any, key: jax.Array, options: Any
) -> tuple[Totals, list[jax.Array]]:
    """Run the participants of a round, and return their totals and the new bank."""
    mesh = federation.mapping
    if not isinstance(mesh, Mesh):
        slots = data.slots[participants] if isinstance(data, FederatedData) else participants
        return _loop(federation, state, data, participants, slots, None, broadcast, key, options)
    shards = mesh_size(mesh)
    held = isinstance(data, FederatedData)
    if held and data.num_shards != shards:
        raise ValueError(f"Federation: data in {data.num_shards} blocks, for a mesh of {shards}: build it with `mesh`")

    def local(
        bank: Any, data: Any, rest: Any, participants: jax.Array, broadcast: Any, key: jax.Array, options: Any
    ) -> Any:
        per_shard = data.sizes.shape[0] if held else (bank[0].shape[0] if bank else participants.shape[0])
        slots = data.slots[participants] if held else participants
        first = jax.lax.axis_index(AXIS) * per_shard
        mine = (slots >= first) & (slots < first + per_shard)
        order = jnp.argsort(~mine, stable=True)
        totals, bank = _loop(
            federation,
            rest._replace(bank=bank),
            data,
            participants,
            slots - first,
            (order, jnp.sum(mine, dtype=jnp.int32)),
            broadcast,
            key,
            options,
        )
        return all_reduce(totals, AXIS), bank

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    blocks: Any = whole
    if held:
        blocks = FederatedData(split, split, split, split, whole, data.num_shards, data.largest)  # type: ignore[arg-type]
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, blocks, whole, whole, whole, whole, whole),
        out_specs=(whole, split),
        check_vma=False,
    )
    return mapped(state.bank, data, state._replace(bank=[]), participants, broadcast, key, options)


def _loop(
    federation: Any,
    state: Any,
    data: Any,
    participants: jax.Array,
    slots: jax.Array,
    owned: tuple[jax.Array, jax.Array] | None,
    broadcast: Any,
    key: jax.Array,
    options: Any,
) -> tuple[Totals, list[jax.Array]]:
    """Run participants chunk after chunk: all of them, or the first `owned[1]` in the order `owned[0]`."""
    total = participants.shape[0]
    chunk = chunk_size(federation.mapping, total)
    order, count = (jnp.arange(total), total) if owned is None else owned
    order = jnp.pad(order, (0, -total % chunk))
    rows = state.bank[0].shape[0] if state.bank else 0

    def one(index: jax.Array, active: jax.Array, row: list[jax.Array]) -> Any:
        """Run a participant, unless it is padding; what it came to, and its row."""

        def run(row: list[jax.Array]) -> Any:
            batches = federation.batches(data, slots[index], index, options)
            client_key = jax.random.fold_in(key, participants[index])
            report, new = federation.work(state, row, broadcast, batches, client_key)
            finite = is_finite((report.delta, report.auxes))
            stays = jnp.array(True) if options["dropped"] is None else ~options["dropped"][index]
            if federation.on_nonfinite == "skip":
                stays = stays & finite
            weight = _weight(federation, report, index, options)
            here = Totals(
                delta=jax.tree.map(lambda d: jnp.where(stays, weight.astype(d.real.dtype) * d, 0), report.delta),
                weight=jnp.where(stays, weight, 0),
                auxes={
                    name: _taken(federation, name, aux, participants[index], stays)
                    for name, aux in report.auxes.items()
                },
                joined=stays.astype(jnp.float32),
                metrics=report.metrics,
                examples=report.examples,
                finite=finite.astype(jnp.float32),
            )
            return here, choose(stays, new, row)

        shapes = jax.eval_shape(run, row)[0]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        nothing = nothing._replace(auxes={name: fill(aux) for name, aux in shapes.auxes.items()})
        # The branch is also what keeps XLA from reading the row again after it is
        # written, and from copying the whole bank for that.
        return jax.lax.cond(active, run, lambda row: (nothing, row), row)

    def body(step: jax.Array, carry: Any) -> Any:
        totals, bank = carry
        at = step * chunk + jnp.arange(chunk)
        index, active = jax.lax.dynamic_slice(order, (step * chunk,), (chunk,)), at < count
        where = jnp.where(active, slots[index], rows)
        if chunk == 1:
            here, new = one(
                index[0], active[0], [jax.lax.dynamic_index_in_dim(leaf, where[0], keepdims=False) for leaf in bank]
            )
            bank = [
                jax.lax.dynamic_update_index_in_dim(leaf, value, where[0], 0)
                for leaf, value in zip(bank, new, strict=True)
            ]
            return _add(totals, here, index[0]), bank
        here, new = jax.vmap(one)(index, active, [leaf[jnp.minimum(where, rows - 1)] for leaf in bank])
        bank = [leaf.at[where].set(value, mode="drop") for leaf, value in zip(bank, new, strict=True)]
        return jax.lax.scan(lambda t, each: (_add(t, *each), None), totals, (here, index))[0], bank

    index = jnp.int32(0)
    shapes = jax.eval_shape(lambda bank: one(index, jnp.array(True), [leaf[0] for leaf in bank])[0], state.bank)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    per_client = lambda leaf: jnp.zeros(total, leaf.dtype)  # noqa: E731
    zeros = zeros._replace(
        auxes={name: fill(aux) for name, aux in shapes.auxes.items()},
        metrics=jax.tree.map(per_client, shapes.metrics),
        examples=per_client(shapes.examples),
        finite=per_client(shapes.finite),
    )
    steps = -(-count // chunk)
    return jax.lax.fori_loop(0, steps, body, (zeros, list(state.bank)))


def _weight(federation: Any, report: Any, index: jax.Array, options: Any) -> jax.Array:
    if options["weights"] is not None:
        return options["weights"][index].astype(jnp.float32)
    return report.examples if federation.weighting == "examples" else jnp.float32(1)


def _taken(federation: Any, name: str, aux: Any, client: jax.Array, stays: jax.Array) -> Any:
    if any("per-client" in marks for marks in aux.variables().values()):
        aux = aux.widen(client, federation.server.channels()[name].num_clients)
    return choose(stays, aux, fill(aux))


def _merge(totals: Totals, here: Totals) -> dict[str, Any]:
    return {name: aux.merge(here.auxes[name]) for name, aux in totals.auxes.items()}


def _add(totals: Totals, here: Totals, index: jax.Array) -> Totals:
    put = lambda total, value: total.at[index].add(value)  # noqa: E731
    return Totals(
        delta=jax.tree.map(jnp.add, totals.delta, here.delta),
        weight=totals.weight + here.weight,
        auxes=_merge(totals, here),
        joined=totals.joined + here.joined,
        metrics=jax.tree.map(put, totals.metrics, here.metrics),
        examples=put(totals.examples, here.examples),
        finite=put(totals.finite, here.finite),
    )
