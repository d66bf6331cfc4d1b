"""Which regions of an image are drawn, in which style, and where their outlines run."""

import math

import cv2
import numpy as np
import pycocotools.mask as mask_util

from .style import PURPLE, SKY, VERMILION, YELLOW

__all__ = [
    "HALO_WIDTH",
    "LIGHT_HALO",
    "STYLES",
    "choose_images",
    "mask_outlines",
    "outlines",
    "regions_by_kind",
]

# Sky blue and purple are the truth, yellow and vermilion the model's word.
STYLES = {
    "ground truth": dict(color=SKY, linestyle="-", linewidth=1.6),
    "hit": dict(color=YELLOW, linestyle=(0, (4, 2)), linewidth=1.6),
    "missed lesion": dict(color=PURPLE, linestyle=(0, (1, 1)), linewidth=2.8),
    "false alarm": dict(color=VERMILION, linestyle=(0, (5, 1.2, 1, 1.2)), linewidth=2.2),
}
# Halos set the lines off from mucosa, which comes in all lightnesses and is orange itself: what
# went wrong in white, the rest in black.
LIGHT_HALO = ("missed lesion", "false alarm")
HALO_WIDTH = 4.2


def regions_by_kind(scored, position):
    """
    Args:
        scored (LesionResults): what a model found.
        position (int): of the image among ``scored.ground_truth.images``.

    Returns:
        list[tuple[str, Regions, np.ndarray]]: key of ``STYLES``, and which (K,) of the regions are
        of that kind, in the order of drawing. Crowds, and detections that only match one, are not.
    """
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


def outlines(regions, region):
    """
    Args:
        regions (Regions):
        region (int): position of the one asked for.

    Returns:
        list[np.ndarray]: closed lines (K, 2) of xy around it, holes included. Whole numbers are the
        centres of pixels. Where there are no masks, its box.
    """
    if regions.masks is None:
        x, y, width, height = regions.boxes[region]
        corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        return [np.array(corners) - 0.5]
    return mask_outlines(regions.masks[region])


def mask_outlines(rle):
    """
    Args:
        rle (dict): compressed RLE of a mask.

    Returns:
        list[np.ndarray]: as of :func:`outlines`.
    """
    contours, _ = cv2.findContours(mask_util.decode(rle), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) for contour in contours]


def choose_images(rows, number):
    """
    Choose which images stand for all. The first half of the choice are the worst, by the number of
    misses and false alarms, then by overlap; the other half is spread evenly over the rest, so that
    failures are shown without being all that is shown.

    Args:
        rows (list[list[dict]]): for each image, its row of ``per_image`` from each model.
        number (int): how many at most.

    Returns:
        list[int]: positions of the chosen, worst first.
    """

    def badness(position):
        own = rows[position]
        overlaps = [row["union_iou"] for row in own if not math.isnan(row["union_iou"])]
        errors = sum(row["FP"] + row["FN"] for row in own)
        return errors, 100 - np.mean(overlaps) if overlaps else 0.0

    ranked = sorted(range(len(rows)), key=badness, reverse=True)
    if len(ranked) <= number:
        return ranked
    worst, rest = ranked[: number // 2], ranked[number // 2 :]
    spread = np.linspace(0, len(rest) - 1, number - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]
