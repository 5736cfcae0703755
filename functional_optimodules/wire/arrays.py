"""Arrays as JSON, bit by bit, for every dtype that JAX has.

An array is `{"dtype": name, "shape": sizes, "data": base64}`, of its
little-endian bytes; an array of PRNG keys has `key:` and the generator's name
for a dtype. Nothing is trusted when read: sizes are checked against the bytes
that are there before any array is made.
"""

import binascii
import functools
import itertools
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from functional_optimodules.config.outside import quote
from functional_optimodules.random.keys import CIPHER, generator_name, generator_named, is_key
from functional_optimodules.types import HostArray, Json
from functional_optimodules.wire.paths import Spec, read_dtype, read_shape

KEY = "key:"
# NumPy takes longer to name a dtype than to encode a small array.
_name: Callable[[Any], str] = functools.cache(str)


def encode_array(array: jax.Array | HostArray) -> dict[str, Json]:
    """Write an array as JSON values."""
    if is_key(array):
        payload = encode_array(jax.random.key_data(array))
        return {**payload, "dtype": f"{KEY}{generator_name(array)}", "shape": list(array.shape)}
    values = np.asarray(array)
    if sys.byteorder == "big":
        values = values.byteswap()
    raw = np.ascontiguousarray(values).view(np.uint8).data if values.size else b""
    data = str(binascii.b2a_base64(raw, newline=False), "ascii")
    return {"dtype": _name(values.dtype), "shape": list(values.shape), "data": data}


def decode_array(payload: Json, what: str, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Read what `encode_array` wrote.

    Args:
      payload: the JSON values.
      what: how errors name the array.
      shape: the shape that it must have, checked before its bytes are read; `None` for any.

    Raises:
      ValueError: if the dtype is unknown, the shape malformed or another, the
        base64 wrong, or the number of bytes not that of the shape.
    """
    if not isinstance(payload, Mapping) or set(payload) != {"dtype", "shape", "data"}:
        found = quote(list(payload)) if isinstance(payload, Mapping) else type(payload).__name__
        raise ValueError(f"{what} should be an array (dtype, shape, data), not {found}")
    name, sizes, data = payload["dtype"], payload["shape"], payload["data"]
    if shape is not None and sizes != list(shape):
        raise ValueError(f"{what} has shape {quote(sizes)}: expected {list(shape)}")
    shape = read_shape(sizes, what)
    if isinstance(name, str) and name.startswith(KEY):
        generator, words = generator_named(name.removeprefix(KEY), what)
        return jax.random.wrap_key_data(_decode(np.dtype(np.uint32), shape + words, data, what), impl=generator)
    return _decode(read_dtype(name, what), shape, data, what)


# On the CPU, `device_put` takes memory that is so aligned over rather than copy it, `may_alias` or not, and what is not
# JAX's own cannot be donated in place. `jnp.array` always copies, a large array twice, but costs less per call.
_ALIGNMENT, _LARGE = 64, 2**16


def _decode(dtype: Any, shape: tuple[int, ...], data: Json, what: str) -> jax.Array:
    expected = math.prod(shape) * dtype.itemsize
    most = 4 * -(-expected // 3)  # four characters for every three bytes
    if not isinstance(data, str) or len(data) > most:
        found = f"{len(data)} characters" if isinstance(data, str) else type(data).__name__
        raise ValueError(f"{what}: 'data' is not base64 of {expected} bytes, {most} characters, but {found}")
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what}: 'data' is not base64 ({error})") from None
    if len(raw) != expected:
        raise ValueError(f"{what}: {len(raw)} bytes, where {dtype}{list(shape)} takes {expected}")
    if dtype == np.bool_ and raw.translate(None, b"\0\1"):
        raise ValueError(f"{what}: a boolean is a byte of 0 or 1")
    values = np.frombuffer(raw, dtype).reshape(shape)
    if sys.byteorder == "big":
        values = values.byteswap()
    aligned = values.ctypes.data % _ALIGNMENT == 0
    return jnp.array(values) if aligned or values.nbytes < _LARGE else jax.device_put(values)


def with_words(arrays: Mapping[str, Json], expected: Collection[str]) -> dict[str, Json]:
    """Return arrays by name, those of `CipherKey`s as they are saved now: they were once of a dtype of their own."""

    def item(name: str, array: Json) -> tuple[str, Json]:
        now = f"{name}/words"
        if name in expected or now not in expected or not isinstance(array, Mapping):
            return name, array
        shape = array.get("shape")
        if array.get("dtype") != f"{KEY}{CIPHER}" or not isinstance(shape, list):
            return name, array
        return now, {**array, "dtype": "uint32", "shape": [*shape, *generator_named(CIPHER, name)[1]]}

    return dict(itertools.starmap(item, arrays.items()))


def decode_like(payload: Json, like: Spec, what: str) -> jax.Array:
    """Read an array of a known shape and dtype.

    Raises:
      ValueError: if the array is malformed, or not of that shape and dtype.
    """
    array = decode_array(payload, what, like.shape)
    if array.dtype != like.dtype:
        raise ValueError(f"{what} has dtype {quote(payload['dtype'])}: expected {str(like.dtype)!r}")
    return array
