"""The picture of a comparison: losses beside optax's, averaged parameters, and what the optimizers tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .train import History

COLOURS = ("#0072B2", "#D55E00", "#009E73")  # told apart by colour-blind readers too
SMOOTH = 20


def draw(path: Path, histories: Mapping[str, History], losses: Mapping[str, Sequence[float]], bound: float) -> None:
    """Write the picture.

    Args:
      path: where to.
      histories: what was measured in each step, by the name of the run.
      losses: the losses of the same runs in optax.
      bound: what differences of losses are to stay below.
    """
    figure = Figure(figsize=(13, 7.2), dpi=95, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    loss, difference, held_out, rate, norm, ratio = figure.subplots(2, 3).flat
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        ours = column(history, "loss")[1]
        loss.plot(*smooth(ours), color=colour, linewidth=5, alpha=0.35, label=name)
        loss.plot(*smooth(losses[name]), color=colour, linewidth=1, linestyle="--", label=f"{name}, in optax")
        difference.semilogy(np.abs(ours - losses[name]), ".", color=colour, markersize=3, label=name)
        held_out.plot(*column(history, "held_out"), color=colour, label=name)
        held_out.plot(*column(history, "held_out_averaged"), color=colour, linestyle=":", label=f"{name}, averaged")
        norm.plot(*column(history, "gradient_norm"), color=colour, linewidth=0.8, label=name)
        clipped = column(history, "l2-global-clipping/clipped")[1].mean()
        norm.lines[-1].set_label(f"{name}, {clipped:.0%} of steps clipped")
    for name, history in histories.items():
        for prefix in sorted({key.rpartition("/")[0] for key in history[0] if key.endswith("lrate")}):
            label, prefix = (f"{name}: {prefix.removeprefix('groups/')}", f"{prefix}/") if prefix else (name, "")
            colour = COLOURS[len(rate.lines)]
            thick = {} if prefix else {"linewidth": 5, "alpha": 0.35}
            rate.plot(*column(history, f"{prefix}lrate"), color=colour, label=label, **thick)
            ratio.semilogy(*column(history, f"{prefix}update_ratio"), color=colour, linewidth=0.8, label=label)
    difference.axhline(bound, color="black", linewidth=0.8, label=f"{bound:g}")
    difference.set_ylim(top=max(30 * bound, difference.get_ylim()[1]))
    held_out.set_ylim(top=1 + min(row["held_out"] for history in histories.values() for row in history[-1:]))
    norm.axhline(1, color="black", linewidth=0.8)
    ratio.set_ylim(bottom=1e-4)
    finish(loss, f"Training loss, mean of {SMOOTH} batches", "nats per byte")
    finish(difference, "Training loss, difference to optax", "nats per byte")
    finish(held_out, "Held-out loss", "nats per byte")
    finish(rate, "Learning rate", "")
    finish(norm, "Norm of gradients before clipping", "")
    finish(ratio, "Norm of updates / norm of parameters", "")
    figure.savefig(path)


def column(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return in which steps something was measured, from 1, and what it was."""
    rows = [(step, row[name]) for step, row in enumerate(history, 1) if name in row]
    return np.array(rows).T


def smooth(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, and the mean of the losses up to each."""
    return np.arange(SMOOTH, len(losses) + 1), np.convolve(losses, np.ones(SMOOTH) / SMOOTH, "valid")


def finish(axes: Axes, title: str, unit: str) -> None:
    """Give a panel its words."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("batch")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
