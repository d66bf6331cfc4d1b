"""What all pictures share: colours, and how they are saved."""

import io
from pathlib import Path

from ..evaluation.files import write_atomically

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "YELLOW",
    "save_figure",
]

# Okabe and Ito's palette, told apart with every common colour blindness
# (https://jfly.uni-koeln.de/color/). Line styles differ as well, for print in grey.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"


def save_figure(figure, path, dpi=150):
    """
    Args:
        figure (matplotlib.figure.Figure):
        path (str or Path): its suffix is the format, such as .png or .svg. An existing file is
            replaced only by a complete one.
        dpi (int): pixels per inch of raster formats.
    """
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix.removeprefix(".").lower(), dpi=dpi)
    write_atomically(path, image.getvalue())
