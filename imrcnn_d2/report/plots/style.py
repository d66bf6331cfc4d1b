"""Colours, line styles and legends of all plots, and how they are saved."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from imrcnn_d2.report.names import threshold_name
from imrcnn_d2.utils.files import write_atomically

# Okabe and Ito's palette, distinct with every common colour blindness
# (https://jfly.uni-koeln.de/color/). Line styles differ as well, for print in grey.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
# Lines of several models in one plot, in their order.
STYLES = [
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREEN, "-."),
    (PURPLE, ":"),
    (ORANGE, (0, (7, 2, 1, 2, 1, 2))),
    (SKY, (0, (1, 1))),
    (BLACK, (0, (9, 3))),
]
# Contours of several annotators.
CONTOUR_LINES = [
    (SKY, "-"),
    (VERMILION, (0, (5, 1.5))),
    (YELLOW, (0, (1, 1))),
    (GREEN, (0, (6, 1.5, 1, 1.5))),
    (PURPLE, (0, (3, 1))),
    (ORANGE, (0, (1, 2))),
]
DOT = dict(markersize=8, markeredgewidth=1.3, markeredgecolor="white", zorder=4)
LEGEND = dict(fontsize=8.5, framealpha=0.95, handlelength=3.2)
MOST_PIXELS = 8000


def line_style(number: int) -> dict:
    """Colour and line style of the ``number``-th line of a plot."""
    colour, style = STYLES[number % len(STYLES)]
    return {"color": colour, "linestyle": style}


def tidy(axes: Axes):
    """Give the axes a faint grid below the lines, and no frame above and to the right."""
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_operating_point(axes: Axes, tau: float | None, mapped: bool) -> dict:
    """Name the dots on curves, if any, in the legend; returns the style of a marker there."""
    mark = dict(linestyle="none", markeredgecolor="0.2", markersize=7)
    if tau is not None:
        label = f"operating point, {threshold_name(tau, mapped)}"
        axes.plot([], [], marker="o", color="0.6", label=label, **mark)
    return mark


def legend_label(name: str) -> str:
    """The name as a legend shows it: matplotlib leaves out those that start with ``_``."""
    return f" {name}" if name.startswith("_") else name


def save_figure(figure: Figure, path: str | Path, dpi: float = 150) -> Figure:
    """Save a figure in the format of the path's suffix, and return it. An existing file is replaced
    only by a complete one.

    ``$`` in a text begins no mathematics: names of classes and models come from files. ``dpi`` is
    lowered where a side would have more than MOST_PIXELS, as with very many classes.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    dpi = min(dpi, MOST_PIXELS / max(figure.get_size_inches()))
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix(".").lower(), dpi=dpi)
    write_atomically(path, image.getvalue())
    return figure
