"""Named arrays in a directory, of which the old or the new is there, whenever a process dies.

    checkpoint.json     {"crc32": of the rest as written, "checkpoint": {
                           "format": 1, "kind": ..., "about": {...}, "data": the other file's name,
                           "arrays": {path: {"dtype", "shape", "offset", "crc32"}}}}
    arrays-<number>     the arrays, little-endian, one after the other

Arrays of typed PRNG keys are the words that these are made of, with the generator's name beside.
It takes JSON and NumPy to read one, and nothing of this library. The arrays are written first, under
a name that no other has; then one rename puts the description in the place of the old one. Arrays
are written and read one by one: of what is saved there is no second copy in memory.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from functional_optimodules.config.fields import require_keys
from functional_optimodules.config.outside import quote, require_shallow
from functional_optimodules.random.keys import CIPHER, from_words, generator_name, is_key, words
from functional_optimodules.types import HostArray, Json, PyTree
from functional_optimodules.wire.paths import Spec, Specs, by_path, matching, read_dtype, read_shape, show

FORMAT = 1
_NAME = "checkpoint.json"
_DATA = "arrays-"
_MOST_SHOWN = 20
# A reader that comes between two writers looks again.
_MOST_TRIES = 100


def write_checkpoint(folder: str | Path, kind: str, about: Mapping[str, Json], tree: PyTree) -> None:
    """Write the leaves of a tree by path, and what they are about, in the place of what the folder had.

    Args:
      folder: the folder, which is made if it is missing.
      kind: what it is a checkpoint of.
      about: JSON values by name.
      tree: a pytree of arrays.

    Raises:
      OSError: if the disk is full, or fails; what the folder had stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _replace(folder, kind, about, tree)


def _replace(folder: Path, kind: str, about: Mapping[str, Json], tree: PyTree) -> None:
    name = f"{_DATA}{secrets.token_hex(8)}"
    draft = folder / f"{_NAME}-{name.removeprefix(_DATA)}"
    try:
        with (folder / name).open("wb") as file:
            arrays = {path: _write(file, leaf) for path, leaf in by_path(tree).items()}
            _flush(file)
        checkpoint = {"format": FORMAT, "kind": kind, "about": dict(about), "data": name, "arrays": arrays}
        text = json.dumps(checkpoint, allow_nan=False)
        with draft.open("wb") as file:
            file.write(f'{{"crc32": {zlib.crc32(text.encode())}, "checkpoint": {text}}}\n'.encode())
            _flush(file)
        os.replace(draft, folder / _NAME)
        _flush_folder(folder)
    except OSError as error:
        for path in (folder / name, draft):
            path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: {folder} has what it had before") from error
    # What an older checkpoint, or one that was cut off, has left.
    for path in (*folder.glob(f"{_DATA}*"), *folder.glob(f"{_NAME}-*")):
        if path.name != name:
            path.unlink(missing_ok=True)


def _write(file: BinaryIO, leaf: Any) -> dict[str, Json]:
    values = np.asarray(words(leaf)) if isinstance(leaf, jax.Array) else np.asarray(leaf)
    raw = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).reshape(-1).view(np.uint8)
    offset = file.tell()
    file.write(raw.data)
    told: dict[str, Json] = {"dtype": str(values.dtype), "shape": list(values.shape), "offset": offset}
    if isinstance(leaf, jax.Array) and is_key(leaf):
        told["generator"] = generator_name(leaf)
    return {**told, "crc32": zlib.crc32(raw.data)}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process, or thread, at a time write to a folder."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _flush_folder(folder: Path) -> None:
    """Let the names in a folder outlive the machine's power, where a folder can be opened."""
    with contextlib.suppress(PermissionError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class Saved:
    """An array of a checkpoint, which is not read yet.

    Attributes:
      spec: its shape and dtype; of PRNG keys, those of their words.
      offset: where it begins in the file.
      crc32: its checksum.
      generator: of PRNG keys, the name of their generator; otherwise `None`.
    """

    spec: Spec
    offset: int
    crc32: int
    generator: str | None

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize

    def __str__(self) -> str:
        return show(self.spec) if self.generator is None else f"{self.generator} keys as {show(self.spec)}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, of which no array is read yet.

    Attributes:
      folder: where it is.
      kind: what it is a checkpoint of.
      about: what it is about.
      file: the file of its arrays, open.
      arrays: the arrays by path.
    """

    folder: Path
    kind: str
    about: Mapping[str, Any]
    file: int
    arrays: Mapping[str, Saved]

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read what a folder says of its checkpoint.

        Raises:
          FileNotFoundError: if it has none.
          ValueError: if it is damaged, or of another format.
        """
        folder = Path(folder)
        for _ in range(_MOST_TRIES):
            checkpoint = cls._described(folder)
            if checkpoint is not None:
                return checkpoint
        raise ValueError(f"the checkpoint {folder / _NAME} is damaged: the file of its arrays is missing")

    @classmethod
    def _described(cls, folder: Path) -> "Checkpoint | None":
        """Return what a folder says of its checkpoint; `None` if its arrays are gone: another one was written."""
        what = f"the checkpoint {folder / _NAME}"
        try:
            text = (folder / _NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{folder} has no checkpoint: expected a {_NAME} in it") from None
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} is damaged: it is no JSON: {quote(str(error))}") from None
        require_shallow(whole, what)
        if not isinstance(whole, Mapping) or not isinstance(whole.get("checkpoint"), Mapping):
            raise ValueError(f"{what} is damaged: it holds {quote(whole)}")
        checkpoint = whole["checkpoint"]
        if checkpoint.get("format") != FORMAT:
            raise ValueError(f"{what} has format {quote(checkpoint.get('format'))}: expected {FORMAT}")
        if zlib.crc32(json.dumps(checkpoint, allow_nan=False).encode()) != whole.get("crc32"):
            raise ValueError(f"{what} is damaged: its checksum is another than {quote(whole.get('crc32'))}")
        require_keys(checkpoint, ("format", "kind", "about", "data", "arrays"), what)
        name, arrays = checkpoint["data"], checkpoint["arrays"]
        if not isinstance(name, str) or not name.startswith(_DATA) or Path(name).name != name:
            raise ValueError(f"{what} is damaged: its arrays are in {quote(name)}")
        if not isinstance(arrays, Mapping) or not isinstance(checkpoint["about"], Mapping):
            raise ValueError(f"{what} is damaged: its arrays are {quote(arrays)}, about {quote(checkpoint['about'])}")
        try:
            file = os.open(folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        size = os.fstat(file).st_size
        try:
            found = {path: _saved(told, size, f"{what}, {quote(path)},") for path, told in arrays.items()}
        except ValueError:
            os.close(file)
            raise
        made = cls(folder, checkpoint["kind"], checkpoint["about"], file, found)
        weakref.finalize(made, os.close, file)
        return made

    def table(self) -> str:
        """Return what it is about, and a table of its arrays: the path, what it is, and how many bytes it takes."""
        facts = [f"{name}: {quote(value)}" for name, value in (("kind", self.kind), *self.about.items())]
        rows = [(path, str(array), f"{array.nbytes:,}") for path, array in self.arrays.items()]
        total = ("total", f"{len(rows)} arrays", f"{sum(array.nbytes for array in self.arrays.values()):,}")
        table = [("array", "what", "bytes"), *rows, total]
        path, what, size = (max(map(len, column)) for column in zip(*table, strict=True))
        return "\n".join([*facts, "", *(f"{a:{path}}  {b:{what}}  {c:>{size}}" for a, b, c in table)])

    def tree(self, like: PyTree, only: tuple[str, ...] = ()) -> PyTree:
        """Read the arrays into a tree, one by one, and put each on the device.

        Args:
          like: a tree of arrays, or their shapes, as they are expected; of PRNG keys, keys.
          only: patterns of the paths to read, as `matching` takes them: the rest is as in `like`.

        Raises:
          ValueError: if arrays are missing, unknown, or of another shape or dtype: it names each; if a pattern
            matches no path; or if an array is damaged.
        """
        expected = by_path(like)
        chosen = matching(only, expected, str(self.folder)) if only else frozenset(expected)
        arrays = _with_words(self.arrays, expected)
        if differences := _differences(arrays, expected, chosen, partial=bool(only)):
            more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
            raise ValueError(
                f"the checkpoint in {self.folder} is of another kind: {'; '.join(differences[:_MOST_SHOWN])}{more}"
            )
        read = {
            path: self._read(path, arrays[path], leaf) if path in chosen else leaf for path, leaf in expected.items()
        }
        return Specs.of(like).tree(read)

    def _read(self, path: str, saved: Saved, like: Any) -> Any:
        values: HostArray = np.empty(saved.spec.shape, saved.spec.dtype)
        raw = values.reshape(-1).view(np.uint8)
        done = 0
        while done < saved.nbytes and (got := os.preadv(self.file, [raw[done:].data], saved.offset + done)):
            done += got
        if done != saved.nbytes or zlib.crc32(raw.data) != saved.crc32:
            raise ValueError(f"the checkpoint in {self.folder} is damaged: {path!r} has another checksum")
        return from_words(values, like) if is_key(like) else jax.device_put(values)


def _with_words(arrays: Mapping[str, Saved], expected: Collection[str]) -> dict[str, Saved]:
    """Return what was saved, that of `CipherKey`s as it is saved now: it was once told from other arrays."""

    def item(path: str, array: Saved) -> tuple[str, Saved]:
        now = f"{path}/words"
        was = array.generator == CIPHER and path not in expected and now in expected
        return (now, replace(array, generator=None)) if was else (path, array)

    return dict(itertools.starmap(item, arrays.items()))


def _differences(
    arrays: Mapping[str, Saved], expected: Mapping[str, Any], chosen: frozenset[str], partial: bool
) -> list[str]:
    found = []
    for path in sorted(chosen.union(() if partial else arrays)):
        if path not in arrays:
            found.append(f"it lacks {path!r}")
        elif path not in expected:
            found.append(f"it has {quote(path)} ({arrays[path]})")
        elif str(arrays[path]) != str(_like(expected[path])):
            found.append(f"{path!r} is {arrays[path]}, and {_like(expected[path])} here")
    return found


def _saved(told: Json, size: int, what: str) -> Saved:
    if not isinstance(told, Mapping) or not {"dtype", "shape", "offset", "crc32"} <= told.keys():
        raise ValueError(f"{what} is damaged: {quote(told)}")
    spec = Spec(read_shape(told["shape"], what), read_dtype(told["dtype"], what))
    saved = Saved(spec, told["offset"], told["crc32"], told.get("generator"))
    if type(saved.offset) is not int or not 0 <= saved.offset <= size - saved.nbytes:
        raise ValueError(
            f"{what} is cut short: {saved.nbytes} bytes from {quote(saved.offset)} on, of a file of {size}"
        )
    return saved


def _like(leaf: Any) -> Saved:
    if isinstance(leaf, jax.Array) and is_key(leaf):
        raw = jax.eval_shape(words, leaf)
        return Saved(Spec(raw.shape, raw.dtype), 0, 0, generator_name(leaf))
    return Saved(Spec(leaf.shape, leaf.dtype), 0, 0, None)
