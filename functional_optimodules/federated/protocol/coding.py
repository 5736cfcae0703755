"""Arrays in few bytes, without loss: what a compressor leaves sparse, or of few values, travels so.

    raw      all values
    sparse   one value for all places but some, which places these are, and what they have
    palette  the values that there are, and of each place which of them it has, in 1 to 8 bits

An array is written in the way that takes the fewest bytes. Nothing is known of who made it:
top-k and random-k leave places without a value, sign and qsgd a handful of values, and a
parameter that is not due nothing at all.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from numpy.typing import NDArray

from functional_optimodules.config.outside import quote
from functional_optimodules.types import HostArray
from functional_optimodules.wire.paths import Spec, show

# Less is not worth a look.
_SMALLEST = 64
_SAMPLE = 1024
_PARTS = ({"raw"}, {"rest", "places", "values"}, {"codes", "palette"})


class Coded(NamedTuple):
    """An array as it travels.

    Attributes:
      dtype: its dtype.
      shape: its shape.
      parts: one-dimensional arrays by name: `raw`; or `rest`, `places` (uint32, rising) and `values`; or
        `palette` and `codes` (uint8: the bits of one place after those of another, low ones first).
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Mapping[str, HostArray]

    @classmethod
    def of(cls, array: jax.Array | HostArray) -> Self:
        """Write an array in the way that takes the fewest bytes."""
        values = np.asarray(array)
        flat = np.ascontiguousarray(values).reshape(-1)
        ways = [{"raw": flat}]
        if _SMALLEST <= flat.size < 2**32 and flat.dtype.itemsize in (1, 2, 4, 8) and flat.dtype.kind != "b":
            bits = flat.view(f"u{flat.dtype.itemsize}")
            sample, counts = np.unique(bits[:: -(-flat.size // _SAMPLE)], return_counts=True)
            # Of a value with a sign there are two zeros: what most places have need not be that of no bits.
            most = sample[counts.argmax()]
            others = bits != most
            if np.count_nonzero(others) * (4 + flat.dtype.itemsize) < flat.nbytes:
                places = np.flatnonzero(others).astype(np.uint32)
                rest = most.reshape(1).view(flat.dtype)
                ways.append({"rest": rest, "places": places, "values": flat[places]})
            if sample.size <= 256:
                palette, codes = np.unique(bits, return_inverse=True)
                if palette.size <= 256:
                    packed = _pack(codes.astype(np.uint8), _width(palette.size))
                    ways.append({"codes": packed, "palette": palette.view(flat.dtype)})
        return cls(values.dtype, values.shape, min(ways, key=_nbytes))

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return _nbytes(self.parts)

    def array(self, like: Spec, what: str) -> HostArray:
        """Return the array; where it is raw, a view of the bytes that it came in.

        Args:
          like: the shape and dtype that it must have.
          what: how errors name it.

        Raises:
          ValueError: if it has another shape or dtype, or its parts do not make such an array.
        """
        size, parts = math.prod(self.shape), self.parts
        if self.shape != like.shape or self.dtype != like.dtype:
            raise ValueError(f"{what} is {quote(f'{self.dtype}{list(self.shape)}')}: expected {show(like)}")
        if set(parts) not in _PARTS:
            raise ValueError(f"{what} has the parts {quote(sorted(parts))}: expected those of one of {_PARTS}")
        if "raw" in parts:
            raw = _part(parts, "raw", self.dtype, size, what)
            if self.dtype == np.bool_ and raw.view(np.uint8).max(initial=0) > 1:
                raise ValueError(f"{what}: a boolean is a byte of 0 or 1")
            return raw.reshape(self.shape)
        if "places" in parts:
            places = _part(parts, "places", np.dtype(np.uint32), None, what)
            values = _part(parts, "values", self.dtype, places.size, what)
            if places.size and (places[-1] >= size or (np.diff(places.astype(np.int64)) <= 0).any()):
                raise ValueError(f"{what}: places should rise, and be less than {size}")
            made = np.full(size, _part(parts, "rest", self.dtype, 1, what)[0], self.dtype)
            made[places] = values
            return made.reshape(self.shape)
        palette = _part(parts, "palette", self.dtype, None, what)
        if not 1 <= palette.size <= 256:
            raise ValueError(f"{what}: a palette of {palette.size} values: expected 1 to 256")
        width = _width(palette.size)
        codes = _unpack(_part(parts, "codes", np.dtype(np.uint8), -(-size * width // 8), what), width, size)
        if codes.max(initial=0) >= palette.size:
            raise ValueError(f"{what}: a code is beyond the palette of {palette.size} values")
        return palette[codes].reshape(self.shape)


def _nbytes(parts: Mapping[str, HostArray]) -> int:
    return sum(part.nbytes for part in parts.values())


def _part(parts: Mapping[str, HostArray], name: str, dtype: np.dtype[Any], size: int | None, what: str) -> HostArray:
    part = parts[name]
    if part.ndim != 1 or part.dtype != dtype or (size is not None and part.size != size):
        wanted = "" if size is None else size
        raise ValueError(f"{what}: {name} are {part.dtype}{list(part.shape)}: expected {dtype}[{wanted}]")
    return part


def _width(values: int) -> int:
    """Return how many bits say which of some values."""
    return max(values - 1, 1).bit_length()


def _pack(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(codes[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def _unpack(packed: HostArray, width: int, size: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(packed, count=size * width, bitorder="little").reshape(size, width)
    return np.packbits(bits, axis=1, bitorder="little")[:, 0]
