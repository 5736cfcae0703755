"""What came of runs: the last round as a table of means and spreads over seeds, and the rounds as curves."""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from functional_optimodules.config.fields import differences
from functional_optimodules.experiments.saved import Row, Run, read

_COSTS = ("bytes_up", "bytes_down")
_OF_ROUNDS = ("round", "participants", "update_norm", "drift", *_COSTS)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # told apart by colour-blind readers
_MOST_PANELS = 4


def summarize(runs: Sequence[Run]) -> list[Row]:
    """Return a line for each setting: its values, how many seeds, and of the last round means and spreads.

    The spread is the standard deviation over seeds, of which there must be two. Bytes
    are those of all rounds.
    """
    lines = []
    for setting, alike in _by_setting(runs):
        ends = [run["rows"][-1] for run in alike if run["rows"]]
        if not ends:
            continue
        line: Row = {**setting, "runs": len(ends), "rounds": ends[0]["round"] + 1}
        for name in (name for name in ends[0] if name not in ("round", "participants") and "/" not in name):
            values = [end.get(name, math.nan) for end in ends]
            if name in _COSTS:
                line[name] = round(statistics.fmean(sum(row[name] for row in run["rows"]) for run in alike))
                continue
            line[name] = statistics.fmean(values)
            if len(values) > 1:
                line[f"{name} ±"] = float(np.std(values, ddof=1))
        lines.append(line)
    return lines


def _by_setting(runs: Sequence[Run]) -> Iterator[tuple[Row, list[Run]]]:
    groups: dict[str, tuple[Row, list[Run]]] = {}
    for run in runs:
        setting = {name: value for name, value in run["values"].items() if name != "seed"}
        groups.setdefault(repr(setting), (setting, []))[1].append(run)
    yield from groups.values()


def table(lines: Sequence[Row]) -> str:
    """Write lines for a terminal, with each spread behind its mean."""
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if not name.endswith(" ±")]

    def cell(line: Row, name: str) -> str:
        spread = f" ± {_number(line[f'{name} ±'])}" if f"{name} ±" in line else ""
        return _number(line.get(name, "")) + spread

    rows = [names, *([cell(line, name) for name in names] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:.4g}"


def draw(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draw loss and what else is measured over rounds: for each setting the mean, and the range over seeds."""
    from matplotlib.figure import Figure

    known = dict.fromkeys(name for run in runs for row in run["rows"][:1] for name in row)
    names = [name for name in known if name not in _OF_ROUNDS and "/" not in name][:_MOST_PANELS]
    figure = Figure(figsize=(4.5 * len(names), 3.8), layout="constrained")
    figure.suptitle(title)
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    for number, (setting, alike) in enumerate(_by_setting(runs)):
        label = ", ".join(f"{name}={value}" for name, value in setting.items())
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)]}
        for axes, name in zip(panels, names, strict=True):
            curves = [[row.get(name, math.nan) for row in run["rows"]] for run in alike]
            length = min(map(len, curves))
            values, rounds = np.array([curve[:length] for curve in curves], float), np.arange(length)
            axes.plot(rounds, values.mean(axis=0), linewidth=1.8, label=label or None, **style)
            if len(alike) > 1:
                axes.fill_between(rounds, values.min(axis=0), values.max(axis=0), alpha=0.2, **style)
            axes.set(xlabel="round", title=name.replace("_", " "))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    if any(run["values"].keys() - {"seed"} for run in runs):
        panels[-1].legend(fontsize="x-small", frameon=False)
    figure.savefig(path, dpi=150)


def compare(folders: Sequence[Path]) -> tuple[list[Run], str]:
    """Set finished or unfinished runs side by side.

    Args:
      folders: those of the runs.

    Returns:
      All runs, with `run` among their values; and a text: the table, and in what the
      experiments differ.

    Raises:
      FileNotFoundError: if a folder holds no run.
      ValueError: if what it holds is malformed, or there is no round yet.
    """
    found = [(str(folder), *read(folder)) for folder in folders]
    for name, _, each in found:
        if not any(run["rows"] for run in each):
            raise ValueError(f"{name} holds no round yet")
    runs = [{**run, "values": {"run": name, **run["values"]}} for name, _, each in found for run in each]
    first, config, _ = found[0]
    lines = [
        f"{key}: {was!r} in {first}, {now!r} in {name}"
        for name, other, _ in found[1:]
        for key, was, now in differences(config, other)
    ]
    return runs, "\n".join([table(summarize(runs)), "", *lines])
