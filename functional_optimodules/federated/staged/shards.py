"""Which device has which clients, and how what each device has is one array over all of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from functional_optimodules.federated.data import Integers
from functional_optimodules.federated.placement import AXIS, SPLIT, WHOLE, has_whole_models, mesh_size, sharding
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.files import memory
from functional_optimodules.random.keys import words
from functional_optimodules.types import HostArray

Blocks = Mapping[int, HostArray]
"""Of each shard of this process, an array of the same shape."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """Clients dealt out to the devices along the axis `clients` of a mesh, once for all; one shard without a mesh.

    Attributes:
      mesh: the mesh, if there is one.
      members: of each shard, its clients in rising order.
      shard: int32[N], the shard of each client.
      processes: of each shard, the process that has its devices.
    """

    mesh: Mesh | None
    members: list[Integers]
    shard: Integers
    processes: list[int]

    @classmethod
    def deal(cls, mesh: Mesh | None, data: StagedData) -> Self:
        """Deal the clients out as `FederatedData` does.

        Raises:
          ValueError: if a mesh of several processes has another axis than `clients`.
        """
        members = data.dealt(mesh_size(mesh))
        shard = np.zeros(data.num_clients, np.int32)
        for number, each in enumerate(members):
            shard[each] = number
        if mesh is None:
            return cls(mesh, members, shard, [jax.process_index()])
        rows = np.moveaxis(mesh.devices, mesh.axis_names.index(AXIS), 0).reshape(len(members), -1)
        made = cls(mesh, members, shard, [row[0].process_index for row in rows])
        if made.several and not has_whole_models(mesh):
            raise ValueError(
                f"StagedFederation: over processes a mesh has one axis, 'clients', and not {mesh.axis_names}"
            )
        return made

    @property
    def own(self) -> list[int]:
        """The shards on devices of this process."""
        return [shard for shard, process in enumerate(self.processes) if process == jax.process_index()]

    @property
    def several(self) -> bool:
        """Whether they are of several processes."""
        return len(set(self.processes)) > 1

    @property
    def first(self) -> bool:
        """Whether this process keeps what all have alike: the only one, or the first."""
        return not self.several or jax.process_index() == 0

    @property
    def slots(self) -> Integers:
        """int32[N], the slot of each client where all are laid out, as `FederatedData` has it."""
        slots = np.zeros(len(self.shard), np.int32)
        for shard, each in enumerate(self.members):
            slots[each] = shard * -(-len(self.shard) // len(self.members)) + np.arange(len(each))
        return slots

    def split(self, clients: Integers) -> list[Integers]:
        """Return, of clients in rising order, those that each shard has."""
        return [clients[self.shard[clients] == shard] for shard in range(len(self.members))]

    def put(self, blocks: Blocks, place: Sharding | None = None) -> jax.Array:
        """Put the blocks of this process on its devices: its part of an array of those of all shards, in a row.

        Args:
          blocks: of each of its shards, an array of the same shape.
          place: how the array lies over the mesh; by default split along the axis of clients alone.
        """
        place = place or sharding(self.mesh, SPLIT)
        if place is None:
            return jax.device_put(blocks[0])
        block = blocks[self.own[0]]
        shape = len(self.members) * len(block), *block.shape[1:]

        def part(index: Any) -> HostArray:
            whole = blocks[(index[0].start or 0) // len(block)]
            found = whole[:, *index[1:]]
            if found.shape == whole.shape:
                return whole
            copy = memory(found.shape, found.dtype, aligned=False)
            copy[:] = found
            return copy

        return jax.make_array_from_callback(shape, place, part)

    def put_whole(self, value: HostArray) -> jax.Array:
        """Put an array on each of this process's devices."""
        place = sharding(self.mesh, WHOLE)
        if place is None:
            return jax.device_put(value)
        return jax.make_array_from_callback(value.shape, place, lambda index: value)

    def take(self, array: jax.Array) -> dict[int, HostArray]:
        """Return the blocks of this process of an array as `put` makes it; of one of keys, their words."""
        raw = words(array)
        if self.mesh is None:
            return {0: np.asarray(raw)}
        rows, found = raw.shape[0] // len(self.members), dict[int, HostArray]()
        for part in raw.addressable_shards:
            shard, values = (part.index[0].start or 0) // rows, np.asarray(part.data)
            if values.shape[1:] == raw.shape[1:]:
                found[shard] = values
            else:
                whole = found.setdefault(shard, np.empty((rows, *raw.shape[1:]), raw.dtype))
                whole[:, *part.index[1:]] = values
        return found
