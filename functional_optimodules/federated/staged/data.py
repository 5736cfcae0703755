"""Examples of clients on the host or in files, of which some are read at a time."""

import math
import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from numpy.typing import ArrayLike

from functional_optimodules.federated.data import Integers, balance
from functional_optimodules.federated.staged.files import load, memory, transfer_rows
from functional_optimodules.types import HostArray, PyTree
from functional_optimodules.wire.paths import keystr


class StagedData:
    """The examples of N clients on the host or in files, client after client.

    Attributes:
      examples: pytree of arrays and of files, of M rows each.
      sizes: int64[N], how many rows each client has.
      offsets: int64[N], where they begin.
      smallest: the number of examples of the smallest client.
      largest: the number of examples of the largest client.
    """

    def __init__(self, examples: PyTree, sizes: ArrayLike | str | Path) -> None:
        """Take arrays and files as they are: nothing is read but their headers, and the sizes.

        Args:
          examples: a pytree of arrays, or paths of `.npy` files, with one example a row:
            those of client 0 first, then those of client 1, and so on. Files are read as
            they are needed; memory that is mapped (`np.load(mmap_mode="r")`) is too, but
            counts as this process's once it was.
          sizes: int[N], how many rows each client has; or the path of a `.npy` file.

        Raises:
          ValueError: if a file is no `.npy` file of C order, or shorter than it says; if there is
            no client, one has no examples, or the arrays are not of as many rows as all have.
        """
        self.examples = jax.tree.map(
            lambda leaf: _File(leaf) if isinstance(leaf, str | Path) else _Array(leaf), examples
        )
        counts = load(sizes) if isinstance(sizes, str | Path) else np.asarray(sizes)
        if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu":
            raise ValueError(f"StagedData: sizes of {counts.dtype}{list(counts.shape)}: expected an integer a client")
        if (empty := np.flatnonzero(counts < 1)).size:
            raise ValueError(f"StagedData: client {empty[0]} has no examples: its size is {counts[empty[0]]}")
        self.sizes = counts.astype(np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.smallest, self.largest = int(self.sizes.min()), int(self.sizes.max())
        self._dealt: dict[int, list[Integers]] = {}
        rows = int(self.sizes.sum())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.examples):
            if leaf.shape[:1] != (rows,):
                raise ValueError(
                    f"StagedData: {keystr(path)!r} of shape {list(leaf.shape)}: expected {rows} rows in front, as many "
                    f"as the {len(counts)} clients have"
                )

    @property
    def num_clients(self) -> int:
        """N, the number of clients."""
        return len(self.sizes)

    def dealt(self, shards: int) -> list[Integers]:
        """Return the clients of each of some shards, in rising order, as `FederatedData` deals them out."""
        if shards not in self._dealt:
            alone: Integers = np.arange(self.num_clients)
            self._dealt[shards] = [alone] if shards == 1 else balance(self.sizes, shards)
        return self._dealt[shards]

    def most_rows(self, among: Integers, count: int) -> int:
        """Return how many rows so many of some clients have together at most."""
        count = min(count, len(among))
        return int(np.partition(self.sizes[among], -count)[-count:].sum()) if count else 0

    def digest(self) -> int:
        """Return a number that tells how many rows each client has, and of which shapes and dtypes."""
        about = jax.tree.map(lambda leaf: (leaf.dtype.name, leaf.shape), self.examples)
        return zlib.crc32(self.sizes.tobytes(), zlib.crc32(repr(about).encode()))

    def room(self, rows: int) -> PyTree:
        """Return arrays of so many rows, without values, which a CPU takes over where they lie."""
        return jax.tree.map(lambda leaf: memory((rows, *leaf.shape[1:]), leaf.dtype, aligned=True), self.examples)

    def read(self, clients: Integers, room: PyTree) -> Integers:
        """Read the examples of some clients.

        Args:
          clients: their numbers, in rising order.
          room: the arrays to read them into, of at least as many rows as the clients'.

        Returns:
          Where in these each client's begin.

        Raises:
          ValueError: if a file ends before it should.
        """
        sizes = self.sizes[clients]
        places = np.cumsum(sizes) - sizes
        # Clients that lie one after the other are one run.
        begins = self.offsets[clients]
        first = np.flatnonzero(np.diff(begins, prepend=-1) != np.concatenate([[-1], sizes[:-1]]))
        counts = np.add.reduceat(sizes, first) if len(first) else sizes
        plan = list(zip(begins[first].tolist(), places[first].tolist(), counts.tolist(), strict=True))
        jax.tree.map(lambda leaf, found: leaf.read(plan, found), self.examples, room)
        return places


Plan = Sequence[tuple[int, int, int]]
"""Of each run of rows: where it begins, where it is put, and how many there are."""


class _Array:
    """An array of examples in memory, or mapped into it."""

    def __init__(self, array: ArrayLike) -> None:
        self.array = array if isinstance(array, np.ndarray) else np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, plan: Plan, found: HostArray) -> None:
        for begin, place, count in plan:
            found[place : place + count] = self.array[begin : begin + count]


class _File:
    """An array of examples in a `.npy` file."""

    def __init__(self, path: str | Path) -> None:
        mapped = load(path, "r")
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.begin = int(getattr(mapped, "offset", 0))
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def read(self, plan: Plan, found: HostArray) -> None:
        width = found.dtype.itemsize * math.prod(self.shape[1:])
        runs = ((place, count, self.begin + begin * width) for begin, place, count in plan)
        try:
            transfer_rows(os.preadv, self.file, [found], runs, width)
        except EOFError as error:
            raise ValueError(f"StagedData: {self.path} was cut short: {error}") from None
