"""What an audit says of the images' files, from what was measured in them."""

from collections.abc import Iterator, Sequence

import numpy as np

from imrcnn_d2.data.audit.examine import Examined
from imrcnn_d2.data.audit.findings import Finding, finding

__all__ = ["file_findings"]

# Chosen on Kvasir-SEG and on its images made worse: of its 1,000 images at 352x352 the darkest has
# a brightness of 111, the most blurred 0.52, the whitest 0.15, the least red 47 more red than blue;
# blurred with a sigma of 0.6 % of the longer side, 98 % measure 0.59 or more.
BLACK = 40  # gray value under which 95 % of the image are
BLURRED = 0.54
WHITE_SHARE = 0.2  # of the view
GRAY_CHROMA = 10  # gray values
CAST = 6  # robust standard deviations of colour from the data set's median, and at least:
CAST_DISTANCE = 30  # in CIELAB's a and b


def file_findings(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Black, blurred and over-exposed images, unusual colours, writing beside the view.

    Args:
        examined: all images, since colours are compared with those of the others.
    """
    seen = [one for one in examined if one.measures is not None]
    lit = [one for one in seen if one.measures.brightness >= BLACK]
    middle, spread = _usual_colour(np.array([one.measures.colour[1:] for one in lit]))
    for one in seen:
        measures = one.measures
        where = [one.entry.name], [one.entry.split]
        if measures.text:
            told = f"{len(measures.text)} lines that look like writing: it was not read."
            yield finding("text_outside_view", *where, told, score=float(len(measures.text)))
        if measures.brightness < BLACK:
            told = f"95 % of it are darker than {measures.brightness:.0f} of 255."
            yield finding("black_frame", *where, told, score=measures.brightness)
            continue  # nothing else can be told
        if measures.white > WHITE_SHARE:
            told = f"{measures.white:.0%} of the view are white."
            yield finding("overexposed", *where, told, score=measures.white)
        if measures.blur > BLURRED:
            told = f"Blur effect {measures.blur:.2f}, where 0 is sharp and 1 blurred."
            yield finding("blur", *where, told, score=measures.blur)
        told = _colour_fault(measures, middle, spread)
        if told and measures.white <= WHITE_SHARE:
            distance = float(np.hypot(*(np.array(measures.colour[1:]) - middle)))
            yield finding("colour", *where, told, score=distance)


def _usual_colour(colours: np.ndarray) -> tuple[np.ndarray, float]:
    """Median (a, b), and the robust standard deviation of the distances from it."""
    if not len(colours):
        return np.zeros(2), 0.0
    middle = np.median(colours, axis=0)
    return middle, float(1.4826 * np.median(np.hypot(*(colours - middle).T)))


def _colour_fault(measures, middle: np.ndarray, spread: float) -> str:
    """What is unusual about an image's colour, empty if nothing."""
    if measures.chroma < GRAY_CHROMA:
        return "It is grey, or nearly so."
    distance = float(np.hypot(*(np.array(measures.colour[1:]) - middle)))
    if distance < max(CAST * spread, CAST_DISTANCE):
        return ""
    if measures.red_minus_blue < 0:
        return "There is more blue in it than red: mucosa is red, were the channels exchanged?"
    return f"Its mean colour is {distance:.0f} from the others' in CIELAB."
