"""The picture of the federated runs: what the clients have, and what comes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from functional_optimodules.experiments.data import Examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73")  # told apart by colour-blind readers too
GREY = "#555555"


def draw(path: Path, shares: Sequence[Examples], curves: Mapping[str, Sequence[float]], participants: int) -> None:
    """Write a picture of the clients' labels and of the accuracy of each algorithm by round."""
    figure = Figure(figsize=(11, 4.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _draw_labels(left, shares)
    _draw_curves(right, curves, f"{participants} of {len(shares)} clients in each round")
    figure.savefig(path)


def _draw_labels(axes: "Axes", shares: Sequence[Examples]) -> None:
    counts = np.array([np.bincount(images.y, minlength=10) for images in shares])
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=1.3 * counts.max(), aspect="auto")
    for (client, digit), count in np.ndenumerate(counts):
        if count:
            axes.text(digit, client, count, ha="center", va="center", fontsize=8, color="white")
    axes.set_title("What each client has seen", loc="left", fontweight="bold")
    axes.set_xlabel("digit")
    axes.set_ylabel("client")
    axes.set_xticks(range(10))
    axes.set_yticks(range(len(shares)))
    axes.tick_params(length=0)
    axes.spines[:].set_color("#cccccc")


def _draw_curves(axes: "Axes", curves: Mapping[str, Sequence[float]], subtitle: str) -> None:
    for (algorithm, accuracies), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(accuracies, color=colour, linewidth=2, label=algorithm)
    axes.set_title("Accuracy on digits from everyone", loc="left", fontweight="bold")
    axes.set_title(subtitle, loc="right", fontsize=9, color=GREY)
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy")
    axes.set_xlim(0, max(map(len, curves.values())) - 1)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, reverse=True)
