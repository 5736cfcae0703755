"""What each client keeps between rounds, in a file."""

import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from functional_optimodules.federated.data import Integers
from functional_optimodules.federated.staged.files import transfer_rows
from functional_optimodules.types import HostArray


class Bank:
    """What each client keeps between rounds, in a file, of which no more than what was written takes room.

    Of a folder, a client has room for two rows: one counts, the other is written. Each has a
    stamp, the number of rounds after which it was, 0 for a row that was not.

    Attributes:
      kept: what a client's row is at first, but for its keys.
      folder: where it is; `None` for one that goes as the process does.
      round: the number of rounds after which its rows are.
      writing: what is being written, if anything.
      draft: the state that the rows are of, written, while it does not count.
    """

    def __init__(
        self, kept: Sequence[HostArray], num_clients: int, folder: Path | None, number: int, whose: str = ""
    ) -> None:
        """Open the bank as it was after some number of rounds.

        Args:
          kept: what a client's row is at first, but for its keys.
          num_clients: N.
          folder: its folder; `None` for none.
          number: how many rounds; what was written after a later one does not count.
          whose: what the names of its files end in, of a process that has its own.

        Raises:
          ValueError: if a file of the folder is of another size.
        """
        self.kept, self.folder, self.round = kept, folder, number
        self.writing: Future[None] | None = None
        self.draft: Path | None = None
        self.width = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in kept)
        self.copies = 1 if folder is None else 2
        shape = num_clients, self.copies
        if folder is None or not self.width:
            self.stamps: NDArray[np.int32] = np.zeros(shape, np.int32)
        else:
            path = _room(folder / f"stamps{whose}", 4 * math.prod(shape), new=not number, full=True)
            self.stamps = np.memmap(path, np.int32, "r+", shape=shape)
            self.stamps[self.stamps > number] = 0
        size = self.width * math.prod(shape)
        if folder is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                self.file = os.dup(file.fileno())
        else:
            self.file = os.open(_room(folder / f"rows{whose}", size, new=not number), os.O_RDWR)
        weakref.finalize(self, os.close, self.file)

    def count(self) -> None:
        """Let what was written count: its state takes the place of the last one."""
        if self.draft is not None:
            os.replace(self.draft, self.draft.with_suffix(".json"))
            self.draft = None

    def settle(self) -> None:
        """Wait until all is written."""
        if self.writing is not None:
            self.writing.result()

    def read(self, clients: Integers, wanted: NDArray[np.bool_], rows: Sequence[HostArray]) -> Integers:
        """Read the rows of those clients that are wanted into arrays.

        Returns:
          Which of the clients wanted have no row as yet: indices.
        """
        stamps = self.stamps[clients]
        places = (clients * self.copies + stamps.argmax(axis=1)) * self.width
        there = stamps.max(axis=1) > 0
        chosen = np.flatnonzero(there & wanted)
        runs = zip(chosen.tolist(), itertools.repeat(1), places[chosen].tolist())
        transfer_rows(os.preadv, self.file, rows, runs, self.width)
        return np.flatnonzero(~there & wanted)

    def write(self, clients: Integers, rows: Sequence[HostArray], number: int) -> None:
        """Write the rows that clients have after some number of rounds, beside those that count.

        Raises:
          OSError: if the disk is full, or fails.
        """
        stamps = self.stamps[clients]
        chosen = np.where(stamps.any(axis=1), stamps.argmax(axis=1) + 1, 0) % self.copies
        places = ((clients * self.copies + chosen) * self.width).tolist()
        runs = zip(itertools.count(), itertools.repeat(1), places)
        transfer_rows(os.pwritev, self.file, rows, runs, self.width)
        self.stamps[clients, chosen] = number


def _room(path: Path, size: int, new: bool, full: bool = False) -> Path:
    """Make a file of zeros, if it is new and not there; without holes, if it is to be full."""
    if new and not path.exists():
        draft = path.with_suffix(".partial")
        with draft.open("wb") as file:
            if full:  # where memory is mapped to a hole, a full disk ends the process
                file.write(bytes(size))
            file.truncate(size)
        os.replace(draft, path)
    if not path.exists():
        raise ValueError(f"StagedFederation: {path} is missing, without which the run cannot go on")
    if path.stat().st_size != size:
        raise ValueError(f"StagedFederation: {path} has {path.stat().st_size} bytes: expected {size}")
    return path
