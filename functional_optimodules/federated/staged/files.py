"""Files and memory of rows: read and written in one call for many buffers, without a copy in between."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from functional_optimodules.types import HostArray

Bytes = NDArray[np.uint8]

# How many buffers POSIX lets a call fill, at most.
_MOST_BUFFERS = 1024
# What XLA asks of memory that it takes over.
_ALIGNMENT = 64


def memory(shape: tuple[int, ...], dtype: np.dtype[Any], aligned: bool) -> HostArray:
    """Return an array without values: on the CPU, JAX takes one that is aligned over, and copies one that is not."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + 2 * _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT + (0 if aligned else _ALIGNMENT // 2)
    return memory[begin : begin + size].view(dtype).reshape(shape)


def load(path: str | Path, mode: Any = None) -> HostArray:
    """Return the array of a `.npy` file; or one that is mapped to it, with `mode="r"`.

    Raises:
      ValueError: if it is no such file, or was cut short, or is not in C order.
    """
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"StagedData: {path} is no .npy file, or was cut short: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"StagedData: {path} should be a .npy file of one array, not an archive")
    if not array.flags.c_contiguous:
        raise ValueError(f"StagedData: {path} is in Fortran's order: save it with `np.ascontiguousarray`")
    return array


def as_bytes(array: HostArray) -> Bytes:
    """Return an array as uint8[rows, bytes of a row]."""
    width = array.dtype.itemsize * math.prod(array.shape[1:])
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8).reshape(len(array), width)


def transfer_rows(
    call: Callable[..., int], file: int, rows: Sequence[HostArray], places: Iterable[tuple[int, int, int]], width: int
) -> None:
    """Read or write rows of some arrays, those of one run after the other in the file.

    Args:
      call: `os.preadv` or `os.pwritev`.
      file: the file.
      rows: arrays of as many rows each, in C order.
      places: of each run, its first row in the arrays, how many rows, and where the run begins in the file. Of several
        arrays a run has one row.
      width: how many bytes a row has, of all arrays together.

    Raises:
      EOFError: if the file ends before that.
    """
    views = [(raw.reshape(-1).data, raw.shape[1]) for raw in map(as_bytes, rows) if raw.size]
    for first, count, place in places:
        buffers = [view[first * size : (first + count) * size] for view, size in views]
        # All at once, but where a signal or a limit of the system comes in between.
        if call(file, buffers, place) != count * width:
            transfer(call, file, [np.frombuffer(buffer, np.uint8) for buffer in buffers], place)


def transfer(call: Callable[..., int], file: int, buffers: list[Bytes], at: int) -> None:
    """Read or write all of some buffers, one after the other in the file.

    Raises:
      EOFError: if the file ends before that.
    """
    while buffers:
        moved = call(file, buffers[:_MOST_BUFFERS], at)
        if not moved and any(len(buffer) for buffer in buffers):
            raise EOFError(f"it ends at byte {at}")
        at += moved
        # All at once, but where a signal or a limit of the system comes in between.
        while buffers and moved >= len(buffers[0]):
            moved -= len(buffers.pop(0))
        if moved:
            buffers[0] = buffers[0][moved:]
