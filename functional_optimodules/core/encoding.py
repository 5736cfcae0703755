"""Arrays and pytrees as JSON, bit by bit, for every dtype that JAX has.

An array is `{"dtype": name, "shape": sizes, "data": base64}`, of its
little-endian bytes; an array of PRNG keys has `key:` and the generator's name
for a dtype. A tree shaped like the parameters maps the path of each leaf to
its array. Nothing is trusted when read: sizes are checked against the bytes
that are there before any array is made.
"""

import binascii
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from functional_optimodules.core.chacha import CHACHA20
from functional_optimodules.core.fields import require_keys
from functional_optimodules.core.paths import Specs, is_path_tree, keystr, read_dtype, read_shape

KEY = "key:"
_OWN_GENERATORS = {"chacha20": CHACHA20}
# NumPy takes longer to name a dtype than to encode a small array.
_name: Callable[[Any], str] = functools.cache(str)


def is_key(leaf: Any) -> bool:
    """Whether an array, or its spec, is of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def encode_array(array: Any) -> dict[str, Any]:
    """Write an array as JSON values."""
    if is_key(array):
        payload = encode_array(jax.random.key_data(array))
        return {**payload, "dtype": f"{KEY}{_generator_name(array)}", "shape": list(array.shape)}
    values = np.asarray(array)
    if sys.byteorder == "big":
        values = values.byteswap()
    raw = np.ascontiguousarray(values).view(np.uint8).data if values.size else b""
    data = str(binascii.b2a_base64(raw, newline=False), "ascii")
    return {"dtype": _name(values.dtype), "shape": list(values.shape), "data": data}


def _generator_name(keys: Any) -> str:
    generator = jax.random.key_impl(keys)
    for name, own in _OWN_GENERATORS.items():
        if generator == own:
            return name
    if isinstance(generator, str):
        return generator
    raise TypeError(f"keys of {generator} cannot be saved: JAX knows their generator by no name")


def decode_array(payload: Any, what: str) -> jax.Array:
    """Read what `encode_array` wrote.

    Args:
      payload: the JSON values.
      what: how errors name the array.

    Raises:
      ValueError: if the dtype is unknown, the shape malformed, the base64
        wrong, or the number of bytes not that of the shape.
    """
    if not isinstance(payload, Mapping) or set(payload) != {"dtype", "shape", "data"}:
        found = sorted(payload) if isinstance(payload, Mapping) else type(payload).__name__
        raise ValueError(f"{what} should be an array (dtype, shape, data), not {found}")
    shape = read_shape(payload["shape"], what)
    name = payload["dtype"]
    if isinstance(name, str) and name.startswith(KEY):
        return _decode_keys(name.removeprefix(KEY), shape, payload["data"], what)
    return _put(_decode_values(read_dtype(name, what), shape, payload["data"], what))


# On the CPU, `device_put` takes memory that is so aligned over rather than copy it, `may_alias` or not, and what is not
# JAX's own cannot be donated in place. `jnp.array` always copies, a large array twice, but costs less per call.
_ALIGNMENT, _LARGE = 64, 2**16


def _put(values: np.ndarray[Any, Any]) -> jax.Array:
    aligned = values.ctypes.data % _ALIGNMENT == 0
    return jnp.array(values) if aligned or values.nbytes < _LARGE else jax.device_put(values)


def _decode_values(dtype: Any, shape: tuple[int, ...], data: Any, what: str) -> np.ndarray[Any, Any]:
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{what}: 'data' is not base64 ({error})") from None
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(f"{what}: {len(raw)} bytes, where {dtype}{list(shape)} takes {expected}")
    if dtype == np.bool_ and raw.translate(None, b"\0\1"):
        raise ValueError(f"{what}: a boolean is a byte of 0 or 1")
    values = np.frombuffer(raw, dtype).reshape(shape)
    return values.byteswap() if sys.byteorder == "big" else values


def _decode_keys(name: str, shape: tuple[int, ...], data: Any, what: str) -> jax.Array:
    generator: Any = _OWN_GENERATORS.get(name, name)
    try:
        words = jax.random.key_data(jax.random.key(0, impl=generator)).shape
    except (TypeError, ValueError):
        raise ValueError(f"{what}: {name!r} is no generator of random numbers that JAX has") from None
    values = _decode_values(np.dtype(np.uint32), shape + words, data, what)
    return jax.random.wrap_key_data(_put(values), impl=generator)


def encode_tree(tree: Any, specs: Specs) -> dict[str, Any]:
    """Write a tree that has the parameters' container as `{path: array}`.

    What stands for a parameter may be several arrays, or none: those of optax's
    `sm3`, or of masked parameters. It is then a mapping itself.
    """
    return dict(sorted(zip(specs.paths, map(_encode_node, specs.leaves_of(tree)), strict=True)))


def _encode_node(node: Any) -> dict[str, Any]:
    if jax.tree_util.all_leaves([node]):
        return encode_array(node)
    return {keystr(path): encode_array(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(node)[0]}


def decode_tree(payload: Any, specs: Specs, read: Callable[[str, Any, str], Any], what: str) -> Any:
    """Read what `encode_tree` wrote into the parameters' container.

    Args:
      payload: the JSON values.
      specs: the parameters', whose paths are those of the tree.
      read: makes the leaf of a path, a payload and a name for errors.
      what: how errors name the tree.

    Raises:
      ValueError: if a path is missing or unknown, or an array is malformed.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"{what} should map each parameter's path to an array, not be {type(payload).__name__}")
    for path in sorted(set(specs.paths) ^ set(payload)):
        fault = "lacks the leaf" if path in specs.paths else "has an unknown leaf"
        raise ValueError(f"{what} {fault} {path!r}")
    return specs.tree({path: read(path, payload[path], f"{what} at {path!r}") for path in specs.paths})


def _decode_node(payload: Any, like: Any, what: str) -> Any:
    if jax.tree_util.all_leaves([like]):
        return decode_like(payload, like, what)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [keystr(path) for path, _ in leaves]
    if not isinstance(payload, Mapping) or set(payload) != set(names):
        raise ValueError(f"{what} should hold the arrays {names}")
    arrays = [decode_like(payload[name], leaf, f"{what}/{name}") for name, (_, leaf) in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def decode_like(payload: Any, like: Any, what: str) -> jax.Array:
    """Read an array of a known shape and dtype, which are checked before its bytes are read.

    Raises:
      ValueError: if the array is malformed, or not of that shape and dtype.
    """
    if isinstance(payload, Mapping):
        if payload.get("shape") != list(like.shape):
            raise ValueError(f"{what} has shape {payload.get('shape')!r}: expected {list(like.shape)}")
        if not is_key(like) and payload.get("dtype") != _name(like.dtype):
            raise ValueError(f"{what} has dtype {payload.get('dtype')!r}: expected {str(like.dtype)!r}")
    array = decode_array(payload, what)
    if array.dtype != like.dtype:
        raise ValueError(f"{what} has dtype {payload['dtype']!r}: expected keys of {like.dtype}")
    return array


def is_sharded(leaf: Any) -> bool:
    """Whether an array is laid out over a mesh of devices."""
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


class Layout:
    """Which parts of a state are shaped like the parameters, and where each part is.

    Args:
      skeleton: the state's shapes, made over a `PathTree` of the parameters.
    """

    def __init__(self, skeleton: Any) -> None:
        self.treedef: Any
        parts, self.treedef = jax.tree_util.tree_flatten_with_path(skeleton, is_leaf=is_path_tree)
        self.parts = {keystr(path): part for path, part in parts}

    def split(self, state: Any) -> Iterator[tuple[str, Any, Any]]:
        """Yield the name, the shapes and the value of each part of a state."""
        values = self.treedef.flatten_up_to(state)
        return zip(self.parts, self.parts.values(), values, strict=True)

    def encode(self, state: Any, specs: Specs) -> dict[str, Any]:
        """Write a state as `{part: array or {path: array}}`."""
        return {
            name: encode_tree(value, specs) if is_path_tree(part) else encode_array(value)
            for name, part, value in self.split(state)
        }

    def decode(self, payload: Any, specs: Specs, owner: str) -> Any:
        """Read what `encode` wrote, over the specs' container.

        Raises:
          KeyError: if a part is missing or unknown.
          ValueError: if a part is not as expected.
        """
        if not isinstance(payload, Mapping):
            raise ValueError(f"{owner}: 'variables' should be a mapping, not {payload!r}")
        require_keys(payload, self.parts, f"{owner}: the state", "variable")
        return jax.tree.unflatten(self.treedef, [self._decode(payload, specs, name, owner) for name in self.parts])

    def _decode(self, payload: Mapping[str, Any], specs: Specs, name: str, owner: str) -> Any:
        part, what = self.parts[name], f"{owner}: variable {name!r}"
        if is_path_tree(part):
            return decode_tree(payload[name], specs, lambda path, array, at: _decode_node(array, part[path], at), what)
        return decode_like(payload[name], part, what)

    def place(self, state: Any, specs: Specs, params: Any) -> Any:
        """Put a state where sharded parameters are.

        Parts of their shapes go beside them, and the rest on all of their devices.
        """
        homes = specs.leaves_of(params)
        mesh = next(home.sharding.mesh for home in homes if is_sharded(home))
        everywhere = NamedSharding(mesh, PartitionSpec())

        def put(leaf: Any, home: Any) -> Any:
            return jax.device_put(leaf, home.sharding if is_sharded(home) and leaf.shape == home.shape else everywhere)

        def part(tree: Any) -> Any:
            leaves = zip(specs.leaves_of(tree), homes, strict=True)
            return jax.tree.unflatten(
                specs.treedef, [jax.tree.map(lambda x, h=home: put(x, h), leaf) for leaf, home in leaves]
            )

        return jax.tree.unflatten(
            self.treedef,
            [part(value) if is_path_tree(like) else put(value, None) for _, like, value in self.split(state)],
        )

    def rehang(self, state: Any, old: Specs, new: Specs) -> Any:
        """Move a state from one container of the same parameters to another."""
        move: Callable[[Any], Any] = lambda tree: new.tree(  # noqa: E731
            dict(zip(old.paths, old.leaves_of(tree), strict=True))
        )
        return jax.tree.unflatten(
            self.treedef, [move(value) if is_path_tree(part) else value for _, part, value in self.split(state)]
        )
