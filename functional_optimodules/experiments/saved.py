"""What an experiment leaves in its folder: state, history and curves.

state.json     the experiment, the last saved round, the history, the state
history.csv    one line a round; the first round is 0
history.json   the same
curves.png     loss and accuracy over rounds, where matplotlib is
"""

import csv
import json
import os
from pathlib import Path

from functional_optimodules.config.fields import differences
from functional_optimodules.types import Json

Curves = dict[str, list[float]]
"""A value a round, by name, as the files have them."""


def write_state(folder: Path, config: dict[str, Json], history: Curves, payload: dict[str, Json]) -> None:
    """Save a state, all at once: a run that is cut off leaves the last one whole.

    Args:
      folder: where.
      config: the experiment.
      history: up to the state's round.
      payload: what `Federation.encode` gave.
    """
    _replace(folder / "state.json", json.dumps({"experiment": config, "history": history, "state": payload}))


def read_state(folder: Path, config: dict[str, Json]) -> tuple[Curves, Json]:
    """Read the history of the same experiment, and its state as `Federation.decode` takes it.

    The number of rounds, how often to save and the mapping may have changed.

    Raises:
      ValueError: if anything else of the experiment differs, naming the key; or the file is malformed.
    """
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved, history, payload = content["experiment"], content["history"], content["state"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no saved state: {error!r}") from None
    for key, was, now in differences(saved, config):
        if key not in ("rounds.count", "rounds.save_every", "rounds.mapping"):
            raise ValueError(f"{path} is of another experiment: {key} was {was!r}, and is {now!r} here")
    return history, payload


def write_history(folder: Path, history: Curves) -> None:
    """Write the history as CSV and as JSON."""
    _replace(folder / "history.json", json.dumps(history, indent=1))
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(history)
        writer.writerows(zip(*history.values(), strict=True))


def draw(folder: Path, history: Curves, title: str) -> Path:
    """Draw loss and accuracy over rounds, and return the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, name, colour in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("tab:red", "tab:blue"), strict=True):
        axes.plot(history["round"], history[name], color=colour, linewidth=1.8)
        axes.set(xlabel="round", ylabel={"loss": "training loss of participants", "accuracy": "test accuracy"}[name])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    return path


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
