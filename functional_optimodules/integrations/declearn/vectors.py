"""Vectors, in which declearn holds parameters of any framework, and dicts of JAX's arrays."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from declearn.model.api import Vector

from functional_optimodules.types import HostArray

V = TypeVar("V", bound=Vector[Any])


def arrays_of(vector: Vector[Any]) -> dict[str, jax.Array | HostArray]:
    """Return the coefficients of a Vector as arrays that JAX takes: its own as they are, others as NumPy's."""
    return dict(vector.coefs if _is_jax(vector) else vector.pack())


def vector_like(vector: V, arrays: Mapping[str, jax.Array]) -> V:
    """Return arrays as a Vector of the framework, the order of names, the dtypes and the devices of another.

    TensorFlow's alone lie where declearn's policy for devices says.
    """
    coefs = vector.coefs
    if _is_jax(vector):
        return type(vector)({name: arrays[name] for name in coefs})
    found = jax.device_get(dict(arrays))
    copies = {name: np.array(found[name], dtype) for name, dtype in vector.dtypes().items()}
    if all(hasattr(values, "new_tensor") for values in coefs.values()):  # PyTorch's
        return type(vector)({name: values.new_tensor(copies[name]) for name, values in coefs.items()})
    return type(vector).unpack(copies)


def _is_jax(vector: Vector[Any]) -> bool:
    return all(isinstance(values, jax.Array) for values in vector.coefs.values())
