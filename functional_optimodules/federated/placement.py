"""Where things lie: a mesh with an axis of clients, what is split over it, and what every device has."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "clients"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


def clients_mesh(devices: Any = None) -> Mesh:
    """Return a mesh with one axis, `clients`, over devices: by default all, of all processes."""
    devices = np.array(jax.devices() if devices is None else devices)
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def mesh_size(mesh: Mesh) -> int:
    """Return the number of devices along the axis of clients.

    Raises:
      ValueError: if the mesh has no axis `clients`.
    """
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, and none named {AXIS!r}: see `clients_mesh`")
    return int(mesh.shape[AXIS])


def automatic(mesh: Mesh) -> Mesh:
    """Return the mesh with axes that JAX places arrays on by itself, whatever theirs were."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def split(array: np.ndarray[Any, Any], mesh: Mesh | None) -> jax.Array:
    """Put blocks of rows on the devices of a mesh, each device's its own."""
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, NamedSharding(automatic(mesh), SPLIT))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Copy a tree of arrays to every device: with several processes, that of process 0.

    The copies are in buffers of their own, so that they may be donated.
    """
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.numpy.array(leaf), tree)
    place = NamedSharding(automatic(mesh), WHOLE)
    if jax.process_count() == 1:
        return jax.tree.map(lambda leaf: jax.device_put(jax.numpy.array(leaf), place), tree)
    return jax.tree.map(lambda leaf: _from_first(leaf, place), tree)


def _from_first(leaf: Any, place: NamedSharding) -> Any:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _from_first(jax.random.key_data(leaf), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Byte by byte, for every dtype alike.
    values = np.asarray(leaf)
    first = multihost_utils.broadcast_one_to_all(np.frombuffer(values.tobytes(), np.uint8))
    shared = np.asarray(first).tobytes()
    whole = np.frombuffer(shared, values.dtype).reshape(np.shape(leaf))
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def make_bank(row: Callable[..., list[jax.Array]], shared: Any, ids: jax.Array, mesh: Mesh | None) -> list[jax.Array]:
    """Make a row for the client of each slot, where it belongs.

    Args:
      row: `(shared, id) -> row`.
      shared: what all rows are made from.
      ids: the client of each slot.
      mesh: the mesh to spread the slots over, in equal numbers.
    """
    rows = jax.vmap(row, (None, 0))
    if mesh is None:
        return jax.jit(rows)(shared, ids)
    if missing := -ids.shape[0] % mesh_size(mesh):
        ids = jax.numpy.pad(ids, (0, missing), constant_values=ids.shape[0])
    return jax.jit(rows, out_shardings=NamedSharding(mesh, SPLIT))(shared, ids)
