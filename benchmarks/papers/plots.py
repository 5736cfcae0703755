"""What the pictures of the papers' results share."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # told apart by all readers
GREY = "#555555"


def panels(rows, columns, **options):
    """Return a figure and its axes, of rows x columns."""
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.7 * rows + 0.4), dpi=130, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.grid(axis="y", color="#e5e5e5")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
