"""The folder of an experiment: what is in it, and that it is whole at any time.

state.json     the experiment, and of each run its values, its rounds and its state
history.csv    a line for each round of each run, as it grows; the first round is 0
history.jsonl  the same, as JSON lines
clients.csv    a line for each client of each run, when it has ended
summary.csv    the last round, as means and spreads over seeds
curves.png     the rounds, where matplotlib is
"""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from functional_optimodules.config.fields import differences
from functional_optimodules.experiments.sweep import get_at, set_at
from functional_optimodules.types import Json

Row = dict[str, Any]
"""A line of a table, by column."""
Run = dict[str, Any]
"""What is saved of a run: `values` of its swept fields, `rows` of its rounds, `clients`, `state`.

And `changed`, the fields that are not those of the state any more, until there is a new one.
"""

_SAVED = ("values", "rows", "clients", "state")
FREE = ("rounds.count", "rounds.save_every", "rounds.mapping")
"""The fields that may change from one command to the next."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if there is none; the system lets go of it however the process ends.

    Raises:
      FileExistsError: if another process holds it.
      OSError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot make the folder {folder}: {error.strerror}") from None
    try:
        import fcntl
    except ImportError:  # where there are no such locks, it is up to the user
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise FileExistsError(
            f"another run is at work in {folder}: wait for its end, or choose another folder"
        ) from None
    finally:
        os.close(handle)


def read(folder: Path) -> tuple[dict[str, Json], list[Run]]:
    """Return the experiment of a folder, and its runs.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is malformed.
    """
    path = folder / "state.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config, runs = content["experiment"], content["runs"]
        for run in runs:
            for key in _SAVED:
                run[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no saved state: {error!r}") from None
    return config, runs


def require_same(saved: dict[str, Json], config: dict[str, Json], overrides: Mapping[str, Json]) -> list[str]:
    """Check that a saved experiment is the same but for what was to be overridden, and say what was.

    The number of rounds, how often to save and the mapping may have changed.

    Raises:
      ValueError: for any other difference, naming it.
    """
    told: Json = saved
    for path in overrides:
        told = set_at(told, path, get_at(config, path))
    wrong = [
        f"{key} was {was!r}, and is {now!r} here" for key, was, now in differences(told, config) if key not in FREE
    ]
    if wrong:
        raise ValueError(
            f"the saved run is of another experiment: {'; '.join(wrong)}: choose another folder, or say --override"
        )
    changes = [(path, get_at(saved, path), get_at(config, path)) for path in overrides]
    return [f"{path} was {was!r}, and is {now!r}" for path, was, now in changes if was != now]


def write(folder: Path, config: Mapping[str, Json], runs: Sequence[Run]) -> None:
    """Save all runs, at once: what is cut off leaves the last state whole."""
    kept = [{key: run[key] for key in (*_SAVED, "changed") if key in run} for run in runs]
    _put(folder / "state.json", json.dumps({"experiment": config, "runs": kept}))


def _put(path: Path, text: str) -> None:
    draft = _draft(path)
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a new name might stand for a file that is not there after a power cut
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def is_new(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a first write leaves that was cut off."""
    return {path.name for path in folder.iterdir()} <= {_draft(folder / "state.json").name}


@contextlib.contextmanager
def telling_what_stays(folder: Path, rounds: int) -> Iterator[None]:
    """Make an error of the disk say what is still there."""
    try:
        yield
    except OSError as error:
        kept = f"the state after {rounds} rounds, saved before, is whole" if rounds else "no round was saved before"
        raise OSError(f"cannot write to {folder}: {error.strerror or error}: {kept}") from error


def rows_of(runs: Sequence[Run], table: str = "rows") -> list[Row]:
    """Return the lines of all runs, each with the run's values in front."""
    return [{**run["values"], **row} for run in runs for row in run[table]]


class History:
    """The files of a history, which grow.

    Args:
      folder: where.
      rows: the lines so far, which are written anew: files that were cut off may have others.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._table, self._lines = folder / "history.csv", folder / "history.jsonl"
        self._rows = list(rows)
        self._columns = _columns(rows)
        write_table(self._table, rows)
        _put(self._lines, "".join(map(_line, rows)))

    def add(self, rows: Sequence[Row]) -> None:
        """Append lines."""
        self._rows += rows
        with self._lines.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
        if set(_columns(rows)) <= set(self._columns):
            with self._table.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(rows)
        else:  # runs of another program may tell more
            self._columns = _columns(self._rows)
            write_table(self._table, self._rows)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write lines as CSV, at once."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows))
    writer.writeheader()
    writer.writerows(rows)
    _put(path, text.getvalue())


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _line(row: Row) -> str:
    # JSON has no number that is not finite.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
