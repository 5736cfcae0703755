"""Where things lie: a mesh with an axis of clients, what is split over it, and what every device has."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from functional_optimodules.federated.options import Execution
from functional_optimodules.random.keys import is_key
from functional_optimodules.types import PyTree

AXIS = "clients"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


def clients_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with one axis, `clients`, over devices: by default all, of all processes."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,), axis_types=(AxisType.Auto,))


def mesh_size(mesh: Mesh | None) -> int:
    """Return the number of devices along the axis of clients: 1 without a mesh.

    Raises:
      ValueError: if the mesh has no axis `clients`.
    """
    axes = {AXIS: 1} if mesh is None else mesh.shape
    if AXIS not in axes:
        raise ValueError(f"the mesh has axes {tuple(axes)}, and none named {AXIS!r}: see `clients_mesh`")
    return axes[AXIS]


def device_of(mesh: Mesh | None) -> jax.Device:
    """Return one of this process's devices that a program runs on: of the mesh, or of JAX's default backend."""
    return jax.local_devices()[0] if mesh is None else mesh.local_devices[0]


def has_whole_models(mesh: Mesh | None) -> bool:
    """Whether each device has all of a model: on a mesh of clients alone, and without one."""
    return mesh is None or mesh.axis_names == (AXIS,)


def mesh_of(execution: Execution) -> Mesh | None:
    """Return the mesh, where participants are spread over one."""
    return with_auto_axes(execution) if isinstance(execution, Mesh) else None


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Return the mesh with axes that JAX places arrays on by itself, whatever theirs were."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def sharding(mesh: Mesh | None, spec: PartitionSpec) -> NamedSharding | None:
    """Return how arrays lie over a mesh: anywhere without one."""
    return None if mesh is None else NamedSharding(with_auto_axes(mesh), spec)


def spec_within(mesh: Mesh | None, leaf: PyTree) -> PartitionSpec:
    """Return how an array is split along the axes of a mesh, where it is on it and whole for each block of clients."""
    place = getattr(leaf, "sharding", None)
    if mesh is None or not isinstance(place, NamedSharding) or place.mesh.axis_names != mesh.axis_names:
        return WHOLE
    return WHOLE if AXIS in jax.tree.leaves(tuple(place.spec)) else place.spec


def rows_sharding(mesh: Mesh | None, leaf: PyTree) -> NamedSharding | None:
    """Return how arrays of a row for each client lie over a mesh, where each row is split as an array is."""
    return sharding(mesh, PartitionSpec(AXIS, *spec_within(mesh, leaf)))


def replicate(tree: PyTree, mesh: Mesh | None, like: PyTree = None) -> PyTree:
    """Copy a tree of arrays to every device: with several processes, that of process 0.

    The copies are in buffers of their own, so that they may be donated. With one process,
    what is split along another axis of the mesh than that of clients stays so, or becomes
    so as in `like`.
    """
    place = sharding(mesh, WHOLE)
    if place is None or jax.process_count() == 1:

        def put(leaf: jax.Array, other: jax.Array) -> jax.Array:
            # Of what is not on a device yet, `jnp.array` would compile a program for each shape.
            copied = jax.numpy.array(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
            return jax.device_put(copied, sharding(mesh, spec_within(mesh, other)))

        return jax.tree.map(put, tree, tree if like is None else like)
    return jax.tree.map(lambda leaf: _from_first(leaf, place), tree)


def _from_first(leaf: jax.Array, place: NamedSharding) -> jax.Array:
    if is_key(leaf):
        data = _from_first(jax.random.key_data(leaf), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Byte by byte, for every dtype alike.
    values = np.asarray(leaf)
    first = multihost_utils.broadcast_one_to_all(np.frombuffer(values.tobytes(), np.uint8))
    whole = np.frombuffer(np.asarray(first).tobytes(), values.dtype).reshape(np.shape(leaf))
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])
