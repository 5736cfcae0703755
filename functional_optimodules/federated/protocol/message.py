r"""What a server and its clients tell each other: a few words, and arrays by path.

A message is data: it has a JSON form, and a binary one, of the layout

    bytes 0 to 7      b"FOPMSG\\r\\n"
    bytes 8 to 11     the layout's version, 1: an unsigned integer, as all of them little-endian
    bytes 12 to 15    how many bytes the head takes
    the head          JSON in UTF-8, deflated (RFC 1950), and zeros:
                        {"about": {...}, "arrays": {path: [dtype, shape, {part: [dtype, size, offset]}]}}
    the arrays' parts from the first multiple of 64 on, to which the offsets are relative

Parts are little-endian and begin at a multiple of 8, large ones of 64. What the parts of an array are,
`coding` says. Nothing is trusted when read: what takes room is checked against the bytes that are there.
"""

import json
import struct
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.federated.protocol.coding import Coded
from functional_optimodules.types import HostArray, Json, PyTree
from functional_optimodules.wire.arrays import decode_array, encode_array
from functional_optimodules.wire.paths import Specs, by_path, read_dtype, read_shape

_MAGIC, _VERSION = b"FOPMSG\r\n", 1
_START = struct.Struct("<8sII")
_ALIGNED, _LARGE, _PAGE = 64, 2**16, 1024
# Of who does not know yet how many arrays there are.
_MOST_HEAD = 2**22
_MOST_PARTS = 3


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
      about: what it is about: JSON values by name.
      arrays: its arrays, by path.
    """

    about: Mapping[str, Json]
    arrays: Mapping[str, Coded]

    @classmethod
    def of(cls, about: Mapping[str, Json], tree: PyTree) -> Self:
        """Make a message of the leaves of a tree."""
        return cls(about, {path: Coded.of(leaf) for path, leaf in by_path(tree).items()})

    def tree(self, specs: Specs, what: str) -> PyTree:
        """Return the arrays in a container, as NumPy arrays.

        Args:
          specs: the container, and what its leaves must be.
          what: how errors name the message.

        Raises:
          ValueError: if a leaf is missing or unknown, or not as it must be.
        """
        expected = specs.by_path
        for path in sorted(expected.keys() ^ self.arrays.keys()):
            fault = "lacks the array" if path in expected else "has an unknown array"
            raise ValueError(f"{what} {fault} {quote(path)}")
        return specs.tree({path: self.arrays[path].array(expected[path], f"{what}, {path!r}") for path in expected})

    @property
    def nbytes(self) -> int:
        """How many bytes its arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    def to_json(self) -> dict[str, Json]:
        """Return the message as JSON values."""
        arrays = {
            path: {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                **{name: encode_array(part) for name, part in array.parts.items()},
            }
            for path, array in self.arrays.items()
        }
        return {"about": dict(self.about), "arrays": arrays}

    @classmethod
    def from_json(cls, payload: Json, most_bytes: int | None = None) -> Self:
        """Read what `to_json` wrote.

        Args:
          payload: the JSON values.
          most_bytes: how many characters its arrays may have at most; any number if `None`.

        Raises:
          KeyError: if a key is missing or unknown.
          ValueError: if it is malformed, or has more.
        """
        require_shallow(payload, "the message")
        if not isinstance(payload, Mapping):
            raise ValueError(f"the message should be a mapping, not {quote(payload)}")
        require_keys(payload, ("about", "arrays"), "the message")
        about, arrays = payload["about"], payload["arrays"]
        if not isinstance(about, Mapping) or not isinstance(arrays, Mapping):
            raise ValueError("the message: 'about' and 'arrays' should be mappings")
        size = sum(_characters(array) for array in arrays.values())
        if most_bytes is not None and size > 2 * most_bytes:
            raise ValueError(f"the message has arrays of {size} characters: expected at most {2 * most_bytes}")
        return cls(about, {path: _array_from_json(array, path) for path, array in arrays.items()})

    def to_bytes(self) -> bytes:
        """Return the message in its binary form."""
        table: dict[str, Json] = {}
        placed: list[tuple[int, HostArray]] = []
        end = 0
        for path, array in self.arrays.items():
            parts = {}
            for name, part in array.parts.items():
                end += -end % (_ALIGNED if part.nbytes >= _LARGE else 8)
                parts[name] = [str(part.dtype), part.size, end]
                placed.append((end, part))
                end += part.nbytes
            table[path] = [str(array.dtype), list(array.shape), parts]
        head = zlib.compress(json.dumps({"about": self.about, "arrays": table}, allow_nan=False).encode())
        # What is the same in the messages to several clients lies at the same place, for those who carry it to see.
        begin = _aligned(_START.size + len(head), _PAGE if end >= _LARGE else _ALIGNED)
        head = head.ljust(begin - _START.size, b"\0")
        pieces: list[bytes | memoryview] = [_START.pack(_MAGIC, _VERSION, len(head)), head]
        done = 0
        for offset, part in placed:
            raw = np.ascontiguousarray(part if sys.byteorder == "little" else part.byteswap())
            pieces += [bytes(offset - done), raw.view(np.uint8).data]
            done = offset + part.nbytes
        return b"".join(pieces)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, most_head: int = _MOST_HEAD) -> Self:
        """Read what `to_bytes` wrote. The arrays are views of the bytes; of those that may change, of a copy.

        Args:
          data: the bytes.
          most_head: how many bytes its head may have, inflated.

        Raises:
          KeyError: if a key is missing or unknown.
          ValueError: if it is malformed, or has a larger head.
        """
        view = memoryview(data).cast("B")
        if not view.readonly:
            view = memoryview(bytes(view))
        if len(view) < _START.size:
            raise ValueError(f"the message has {len(view)} bytes: expected at least {_START.size}")
        magic, version, size = _START.unpack_from(view)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError(f"the message begins with {magic!r}, version {version}: expected {_MAGIC!r}, {_VERSION}")
        if size > len(view) - _START.size:
            raise ValueError(f"the message has {len(view)} bytes, and its head alone should have {size}")
        head = _read_head(view[_START.size : _START.size + size], most_head)
        body = view[min(_aligned(_START.size + size), len(view)) :]
        require_keys(head, ("about", "arrays"), "the message")
        if not isinstance(head["about"], Mapping) or not isinstance(head["arrays"], Mapping):
            raise ValueError("the message: 'about' and 'arrays' should be mappings")
        arrays = {path: _array_within(body, array, path) for path, array in head["arrays"].items()}
        places = [(head["arrays"][path][2][name], part) for path, a in arrays.items() for name, part in a.parts.items()]
        end = max((place[2] + part.nbytes for place, part in places), default=0)
        if len(body) != end:
            raise ValueError(f"the message has {len(body)} bytes of arrays: expected {end}")
        return cls(head["about"], arrays)


Carried: TypeAlias = Message | Mapping[str, Json] | bytes | bytearray | memoryview
"""A message in any of its forms."""


def opened(message: Carried, most_head: int = _MOST_HEAD, most_bytes: int | None = None) -> Message:
    """Return a message that came in any of its forms.

    Args:
      message: the message.
      most_head: how many bytes the head of a binary one may have, inflated.
      most_bytes: how many bytes it may have; any number if `None`.

    Raises:
      KeyError: if a key is missing or unknown.
      TypeError: if it is something else.
      ValueError: if it is malformed, or larger.
    """
    if isinstance(message, Message):
        return message
    if isinstance(message, bytes | bytearray | memoryview):
        size = memoryview(message).nbytes
        if most_bytes is not None and size > most_bytes:
            raise ValueError(f"the message has {size} bytes: expected at most {most_bytes}")
        return Message.from_bytes(message, most_head)
    if isinstance(message, Mapping):
        return Message.from_json(message, most_bytes)
    raise TypeError(f"a message is a Message, its JSON values or its bytes, not {type(message).__name__}")


def _aligned(size: int, to: int = _ALIGNED) -> int:
    return size + -size % to


def _read_head(data: memoryview, most: int) -> Mapping[str, Json]:
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(data, most)
        if not reader.eof:
            raise ValueError(f"it is cut short, or longer than {most} bytes")
        head = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"the message's head cannot be read: {quote(str(error))}") from None
    require_shallow(head, "the message's head")
    if not isinstance(head, Mapping):
        raise ValueError(f"the message's head should be a mapping, not {quote(head)}")
    return head


def _array_within(body: memoryview, payload: Json, path: str) -> Coded:
    what = f"the message, {quote(path)}"
    if not isinstance(payload, list) or len(payload) != 3 or not isinstance(payload[2], Mapping):
        raise ValueError(f"{what} should be [dtype, shape, parts], not {quote(payload)}")
    name, sizes, parts = payload
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{what} has {len(parts)} parts: expected at most {_MOST_PARTS}")
    return Coded(
        np.dtype(read_dtype(name, what)),
        read_shape(sizes, what),
        {part: _part_within(body, place, f"{what}, {quote(part)}") for part, place in parts.items()},
    )


def _characters(array: Json) -> int:
    """Return how many characters the parts of an array have."""
    parts = array.values() if isinstance(array, Mapping) else ()
    texts = [part.get("data") for part in parts if isinstance(part, Mapping)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _part_within(body: memoryview, place: Json, what: str) -> HostArray:
    if not isinstance(place, list) or len(place) != 3 or any(type(each) is not int or each < 0 for each in place[1:]):
        raise ValueError(f"{what} should be [dtype, size, offset], not {quote(place)}")
    dtype, (size, offset) = np.dtype(read_dtype(place[0], what)), place[1:]
    if offset % 8 or offset + size * dtype.itemsize > len(body):
        raise ValueError(f"{what}: {size} of {dtype} at {offset} do not lie in {len(body)} bytes")
    part: HostArray = np.frombuffer(body, dtype, size, offset)
    return part if sys.byteorder == "little" else part.byteswap()


def _array_from_json(payload: Json, path: Any) -> Coded:
    what = f"the message, {quote(path)}"
    if not isinstance(path, str) or not isinstance(payload, Mapping) or not {"dtype", "shape"} <= payload.keys():
        raise ValueError(f"{what} should have a dtype, a shape and parts, not be {quote(payload)}")
    parts = {name: part for name, part in payload.items() if name not in ("dtype", "shape")}
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{what} has {len(parts)} parts: expected at most {_MOST_PARTS}")
    read = {name: np.asarray(decode_array(part, f"{what}, {quote(name)}")) for name, part in parts.items()}
    return Coded(np.dtype(read_dtype(payload["dtype"], what)), read_shape(payload["shape"], what), read)
