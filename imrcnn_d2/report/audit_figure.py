"""Where the annotations of a data set lie, how large they are, and of which class."""

from collections import Counter

import cv2
import numpy as np
import pycocotools.mask as mask_util
from matplotlib.figure import Figure

from .style import BLUE, save_figure, tidy

__all__ = ["draw_annotations"]

CELLS = 64  # of the heat map, in both directions


def draw_annotations(audit, path):
    """
    Draw a heat map of the annotations' places, a histogram of their sizes and the counts of the
    classes.

    Args:
        audit (imrcnn_d2.data.audit.audit.Audit): with at least one outline.
        path (str or Path): the picture to write.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    heat, shares = np.zeros((CELLS, CELLS)), []
    for one in audit.examined:
        for outline in one.outlines:
            mask = mask_util.decode(outline.rle).astype(np.float32)
            heat += cv2.resize(mask, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
            shares.append(outline.area / mask.size)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    place, size, classes = figure.subplots(1, 3)

    shown = place.imshow(100 * heat / len(shares), cmap="cividis", vmin=0)
    place.set(title="Where they are", xticks=[], yticks=[])
    figure.colorbar(shown, ax=place, label="annotations that cover it, %", shrink=0.85)

    edges = np.logspace(min(-4, np.log10(min(shares))), 0, 41)
    size.hist(shares, edges, color=BLUE)
    size.set(title="How large they are", xscale="log", ylabel="annotations")
    size.set_xlabel("share of the image")
    ticks = [tick for tick in (1e-4, 1e-3, 1e-2, 1e-1, 1) if tick >= edges[0]]
    size.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    tidy(size)

    counts = Counter(
        outline.annotation["category_id"] for one in audit.examined for outline in one.outlines
    )
    names = {category["id"]: str(category["name"]) for category in audit.data.categories}
    order = sorted(names, key=lambda number: counts[number])
    classes.barh([names[number] for number in order], [counts[n] for n in order], color=BLUE)
    classes.set(title="Of which class", xlabel="annotations")
    tidy(classes)
    save_figure(figure, path)
    return figure
