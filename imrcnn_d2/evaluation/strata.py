"""Counts of some of the lesions: by size, and by class."""

import numpy as np

from .counting import counter
from .metrics import lesion_figures, lesion_proportions

__all__ = [
    "SHARES",
    "SIZES",
    "by_class",
    "by_size",
    "by_stratum",
    "size_figures",
    "size_proportions",
]

# Name and lower limit of each stratum; the next one's is the upper limit, and not in it.
# Share of the image in percent:
SHARES = {"<1 %": 0.0, "1-5 %": 1.0, "5-15 %": 5.0, "15-30 %": 15.0, ">=30 %": 30.0}
# COCO's sizes, in pixels.
SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}


def by_size(gt, detections, groups, matching, counted):
    """
    Lesions by size, with the detections that hit them. False alarms are left out: they are of no
    lesion, so that there is no precision by size.

    Args:
        gt (GroundTruth): its ``area`` is what counts.
        detections (Detections): N of them.
        groups (dict[str, Overlaps]): overlaps by "bbox" and, where there are masks, by "segm".
        matching (Matching): of the N detections.
        counted (np.ndarray): (N,) bool, those that count and reach the threshold.

    Returns:
        dict[str, dict[str, UnitCounts]]: per image, by the names of SHARES under "share_of_image"
        and by those of SIZES under "coco". The former is left out where the height and width of an
        image with lesions are unknown.
    """
    pixels = np.array([i.get("height", np.nan) * i.get("width", np.nan) for i in gt.images], float)
    share = 100 * gt.area / pixels[gt.regions.image]
    scales = {"share_of_image": (share, SHARES), "coco": (gt.area, SIZES)}
    if np.isnan(share[~gt.crowd]).any():
        del scales["share_of_image"]
    return {
        scale: by_stratum(
            *(gt, detections, groups, matching, counted),
            np.searchsorted(list(limits.values()), size, side="right") - 1,
            list(limits),
        )
        for scale, (size, limits) in scales.items()
    }


def by_stratum(gt, detections, groups, matching, counted, stratum, names):
    """
    Lesions by whatever tells them apart, with the detections that hit them.

    Args:
        gt, detections, groups, matching, counted: as of :func:`by_size`; R regions.
        stratum (np.ndarray): (R,) int, place in ``names`` of each.
        names (list[str]): of the strata.

    Returns:
        dict[str, UnitCounts]: per image, by name.
    """
    count = counter(gt, detections, groups, matching)
    strata = {}
    for number, name in enumerate(names):
        lesions = ~gt.crowd & (stratum == number)
        hits = counted & matching.hit & np.append(lesions, False)[matching.gt]
        strata[name] = count(lesions, hits)
    return strata


def by_class(gt, detections, groups, matching, counted):
    """
    Args:
        gt, detections, groups, matching, counted: as of :func:`by_size`.

    Returns:
        dict[str, UnitCounts]: per image, the lesions and detections of each class by its name.
    """
    count = counter(gt, detections, groups, matching)
    return {
        category["name"]: count(
            ~gt.crowd & (gt.regions.category == position),
            counted & (detections.regions.category == position),
        )
        for position, category in enumerate(gt.categories)
    }


def size_figures(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over the images of a stratum of :func:`by_size`.

    Returns:
        dict[str, np.ndarray]: (...,) "n" (lesions), and in percent recall, iou, iou_box, iou_all,
        dice, as in :func:`lesion_figures`.
    """
    figures = lesion_figures(sums)
    names = ("recall", "iou", "iou_box", "iou_all", "dice")
    return {"n": sums["tp"] + sums["fn"], **{name: figures[name] for name in names}}


def size_proportions(sums):
    """As :func:`lesion_proportions`, of the figures by size."""
    return {"recall": lesion_proportions(sums)["recall"]}
