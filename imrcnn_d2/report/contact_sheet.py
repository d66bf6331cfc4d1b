"""Test images with what is in them and what was detected, as one picture."""

import math
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageOps

from ..evaluation import evaluate_lesions
from .style import PURPLE, SKY, VERMILION, YELLOW, save_figure

__all__ = ["draw_contact_sheet"]

# Halos set the lines off from mucosa, which comes in all lightnesses and is orange itself.
DARK = [patheffects.withStroke(linewidth=3.8, foreground="black", alpha=0.5)]
LIGHT = [patheffects.withStroke(linewidth=4.2, foreground="white", alpha=0.9)]
# Sky blue and purple are the truth, yellow and vermilion the model's word.
OUTLINES = {
    "ground truth": dict(color=SKY, linestyle="-", linewidth=1.6, path_effects=DARK),
    "hit": dict(color=YELLOW, linestyle=(0, (4, 2)), linewidth=1.6, path_effects=DARK),
    "missed lesion": dict(color=PURPLE, linestyle=(0, (1, 1)), linewidth=2.8, path_effects=DARK),
    "false alarm": dict(
        color=VERMILION, linestyle=(0, (5, 1.2, 1, 1.2)), linewidth=2.2, path_effects=LIGHT
    ),
}
COLUMNS = 4
TILE = 2.4  # inches
NAME_LENGTH = 30


def draw_contact_sheet(gt, results, image_root, path, *, tau=0.7, max_images=16):
    """
    Outline ground truth, hits, misses and false alarms in a choice of test images.

    The first half of the choice are the worst images, by the number of misses and false alarms,
    then by overlap; the other half is spread evenly over the rest, so that the sheet shows failures
    without being made of them. Worst first.

    Args:
        gt (dict, COCO, str or Path): COCO ground truth, see :func:`evaluate_lesions`.
        results (list[dict], dict, str or Path): COCO results, likewise.
        image_root (str or Path): folder that ``file_name`` is relative to.
        path (str or Path): the picture to write, .png, .jpg or .pdf.
        tau (float): score from which on a detection is shown.
        max_images (int): tiles at most.

    Returns:
        matplotlib.figure.Figure: what was saved.

    Raises:
        FileNotFoundError: if one of the images is not there.
        ValueError: on bad input, see :func:`evaluate_lesions`.
    """
    scored = evaluate_lesions(gt, results, tau=tau)
    chosen = _choose(scored.per_image, max_images)
    columns = min(COLUMNS, max(len(chosen), 1))
    rows = max(math.ceil(len(chosen) / columns), 1)
    figure = Figure(figsize=(columns * TILE, rows * (TILE + 0.36) + 0.7), layout="constrained")
    figure.suptitle(
        f"{len(chosen)} of {len(scored.per_image)} images, worst first; "
        f"detections with score ≥ {tau:g}",
        fontsize=9,
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, position in zip(grid.flat, chosen, strict=False):
        _draw_tile(axes, scored, position, Path(image_root))
    handles = [Line2D([], [], label=name, **line) for name, line in OUTLINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    save_figure(figure, path)
    return figure


def _choose(rows, number):
    """Positions of the images to show, worst first."""

    def badness(position):
        row = rows[position]
        overlap = row["union_iou"]
        return row["FP"] + row["FN"], 0.0 if math.isnan(overlap) else 100 - overlap

    ranked = sorted(range(len(rows)), key=badness, reverse=True)
    if len(ranked) <= number:
        return ranked
    worst, rest = ranked[: number // 2], ranked[number // 2 :]
    spread = np.linspace(0, len(rest) - 1, number - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]


def _draw_tile(axes, scored, position, image_root):
    record, row = scored.ground_truth.images[position], scored.per_image[position]
    with Image.open(image_root / record["file_name"]) as image:
        axes.imshow(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    axes.autoscale(False)  # a box may lead out of the image
    for kind, regions, chosen in _by_kind(scored, position):
        for region in chosen:
            for outline in _outlines(regions, region):
                axes.plot(*outline.T, **OUTLINES[kind])
    name = Path(record["file_name"]).name
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"
    axes.set_title(f"{name}\n{_summary(row)}", fontsize=7.5)


def _by_kind(scored, position):
    """[(key of OUTLINES, Regions, which of them)] of one image, in the order of drawing."""
    truth, found = scored.ground_truth.regions, scored.detections.regions
    lesions = np.flatnonzero((truth.image == position) & ~scored.ground_truth.crowd)
    shown = np.flatnonzero(scored.counted & (found.image == position))
    matched = scored.matching.gt[shown]
    return [
        ("ground truth", truth, np.intersect1d(lesions, matched)),
        ("missed lesion", truth, np.setdiff1d(lesions, matched)),
        ("false alarm", found, shown[matched < 0]),
        ("hit", found, shown[matched >= 0]),
    ]


def _summary(row):
    """What happened in an image, in a few words."""
    score = f"score {row['score']:.2f}"
    if not row["n_gt"]:
        return f"no lesion · {score}"
    if not math.isnan(row["union_iou"]):
        return f"{score} · IoU {row['union_iou']:.0f} %"
    if not math.isnan(row["iou_box"]):
        return f"{score} · box IoU {row['iou_box']:.0f} %"
    return f"{score} · missed"


def _outlines(regions, region):
    """Closed lines (K, 2) of xy around one region, holes included."""
    if regions.masks is None:
        x, y, width, height = regions.boxes[region]
        corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        return [np.array(corners) - 0.5]  # pixel centres are at whole numbers in imshow
    contours, _ = cv2.findContours(
        mask_util.decode(regions.masks[region]), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) for contour in contours]
