"""What all pictures share: colours, and how they are saved."""

import io
from pathlib import Path

from matplotlib.text import Text

from imrcnn_d2.utils.files import write_atomically

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "STYLES",
    "VERMILION",
    "YELLOW",
    "label_operating_point",
    "legend_label",
    "save_figure",
    "tidy",
]


# Okabe and Ito's palette, told apart with every common colour blindness
# (https://jfly.uni-koeln.de/color/). Line styles differ as well, for print in grey.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"


# Line colours and styles of models in one picture, in their order.
STYLES = [
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREEN, "-."),
    (PURPLE, ":"),
    (ORANGE, (0, (7, 2, 1, 2, 1, 2))),
    (SKY, (0, (1, 1))),
    (BLACK, (0, (9, 3))),
]

MOST_PIXELS = 8000


def tidy(axes):
    """
    Args:
        axes (matplotlib.axes.Axes): gets a faint grid behind what is drawn, and no frame above and
            to the right.
    """
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_operating_point(axes, tau):
    """
    Say in the legend what the dots on curves are.

    Args:
        axes (matplotlib.axes.Axes):
        tau (float): score threshold of the dots.

    Returns:
        dict: style of a marker in the legend.
    """
    mark = dict(linestyle="none", markeredgecolor="0.2", markersize=7)
    axes.plot([], [], marker="o", color="0.6", label=f"operating point, score ≥ {tau:g}", **mark)
    return mark


def legend_label(name: str) -> str:
    """The name as a legend shows it: matplotlib leaves out those that start with ``_``."""
    return f" {name}" if name.startswith("_") else name


def save_figure(figure, path, dpi=150):
    """
    Texts are shown as they are: names of classes and models come from files, and ``$`` in them
    begins no mathematics.

    Args:
        figure (matplotlib.figure.Figure):
        path (str or Path): its suffix is the format, such as .png or .svg. An existing file is
            replaced only by a complete one.
        dpi (int): pixels per inch of raster formats; fewer where a side would have more than
            MOST_PIXELS, as with very many classes.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    dpi = min(dpi, MOST_PIXELS / max(figure.get_size_inches()))
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix(".").lower(), dpi=dpi)
    write_atomically(path, image.getvalue())
