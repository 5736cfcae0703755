"""Arrays end to end in one buffer, and cut out of it again.

    Join(arrays):        buffer = concatenate(each array, flat)
    Cut(buffer, shapes): arrays = slices of the buffer
    d Cut:               one split, whose transpose is one concatenation

Leading axes, the same for all arrays, stay in front.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding

from functional_optimodules import xla

Arrays = list[jax.Array]
Shape = tuple[int, ...]


@functools.partial(jax.jit, static_argnums=1, inline=True)
def join(arrays: Arrays, shapes: tuple[Shape, ...]) -> jax.Array:
    """Lay arrays of some shapes, behind any leading axes, end to end."""
    leads = [array.shape[: array.ndim - len(shape)] for array, shape in zip(arrays, shapes, strict=True)]
    return xla.end_to_end([array.reshape((*lead, -1)) for array, lead in zip(arrays, leads, strict=True)])


def cut(buffer: jax.Array, shapes: tuple[Shape, ...]) -> Arrays:
    """Cut what `join` made into arrays of these shapes; of a NumPy array, views.

    Raises:
      ValueError: if the buffer does not hold them.
    """
    sizes = tuple(map(math.prod, shapes))
    if not buffer.ndim or buffer.shape[-1] != sum(sizes):
        raise ValueError(f"a buffer of shape {list(buffer.shape)}: expected {sum(sizes)} along its last axis")
    if isinstance(buffer, np.ndarray):
        pieces = np.split(buffer, np.cumsum(sizes)[:-1], axis=-1)
        return [piece.reshape((*piece.shape[:-1], *shape)) for piece, shape in zip(pieces, shapes, strict=True)]
    return _cut_compiled(buffer, shapes)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _cut_compiled(buffer: jax.Array, shapes: tuple[Shape, ...]) -> Arrays:
    pieces = _pieces(buffer, tuple(map(math.prod, shapes)))
    return [piece.reshape((*piece.shape[:-1], *shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def home_of(sharding: Any) -> NamedSharding | None:
    """Return how an array lies on a mesh of devices, if it is for JAX to say how what is made of it lies.

    On a mesh with explicit axes that is a part of the arrays' types.
    """
    on_mesh = isinstance(sharding, NamedSharding)
    return sharding if on_mesh and all(kind == AxisType.Auto for kind in sharding.mesh.axis_types) else None


def homed(array: Any, home: Any) -> Any:
    """Have an array lie so on a mesh of devices, in a compiled program too; anywhere for `None`."""
    if home is None:
        return array
    if isinstance(array, jax.core.Tracer):
        return lax.with_sharding_constraint(array, home)
    moves = isinstance(array, jax.Array) and array.sharding != home
    return jax.device_put(array, home) if moves else array


_pieces = jax.custom_jvp(xla.pieces, nondiff_argnums=(1,))


@_pieces.defjvp
def _pieces_jvp(sizes: Shape, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Arrays, Arrays]:
    # The transpose of slices would be as many paddings as there are.
    (tangent,) = tangents
    return _pieces(*primals, sizes), list(lax.split(tangent, sizes, tangent.ndim - 1))
