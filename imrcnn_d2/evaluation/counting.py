"""What happened in each image: counts and overlaps, from which every figure at a threshold is made.

A unit is an image or a patient. Figures are made of sums over units, so that to resample units is
to reweigh their counts.
"""

from dataclasses import dataclass, fields

import numpy as np
import pycocotools.mask as mask_util

__all__ = ["UnitCounts", "count_images", "union_overlaps"]


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """
    What happened in each of U units at one score threshold. Each attribute is a (U,) array.

    Attributes:
        lesions (int): ground truths, crowds left out.
        tp (int): detections at the threshold that hit a lesion.
        fp (int): detections at the threshold that hit none.
        score (float): highest score of any detection that counts, at any threshold; 0 without one.
        iou, dice, iou_box (float): sums over the hits of their overlaps in [0, 1]: masks, masks,
            boxes. NaN where there are no masks.
    """

    lesions: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    score: np.ndarray
    iou: np.ndarray
    dice: np.ndarray
    iou_box: np.ndarray

    @property
    def fn(self):
        """(U,) int, lesions that no detection at the threshold hits."""
        return self.lesions - self.tp

    @property
    def positive(self):
        """(U,) bool, there is a lesion."""
        return self.lesions > 0

    @property
    def called(self):
        """(U,) bool, there is a detection at the threshold, wherever it is."""
        return self.tp + self.fp > 0

    def merged(self, unit):
        """
        Args:
            unit (np.ndarray): (U,) int, the larger unit (such as the patient) that each belongs to,
                numbered from 0.

        Returns:
            UnitCounts: of the larger units.
        """
        number = int(unit.max()) + 1 if len(unit) else 0
        merged = {}
        for name in (field.name for field in fields(self)):
            values = getattr(self, name)
            merged[name] = np.zeros(number, dtype=values.dtype)
            combine = np.maximum if name == "score" else np.add
            combine.at(merged[name], unit, values)
        return UnitCounts(**merged)


def count_images(gt, detections, groups, matching, counted):
    """
    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        groups (dict[str, list[Overlap]]): overlaps by "bbox" and, where there are masks, by "segm".
        matching (Matching): of the N detections.
        counted (np.ndarray): (N,) bool, those that count and reach the threshold.

    Returns:
        UnitCounts: of all images.
    """
    number = len(gt.images)
    image = detections.regions.image
    hit = counted & matching.hit

    def total(of, values=None):
        return np.bincount(image[of], values if values is None else values[of], minlength=number)

    score = np.zeros(number)
    np.maximum.at(score, image[matching.counts], detections.score[matching.counts])
    if "segm" in groups:
        iou = _overlap_of_hits(groups["segm"], matching)
        of_masks = {"iou": total(hit, iou), "dice": total(hit, 2 * iou / (1 + iou))}
    else:
        of_masks = dict.fromkeys(("iou", "dice"), np.full(number, np.nan))
    return UnitCounts(
        lesions=gt.lesions,
        tp=total(hit),
        fp=total(counted & ~matching.hit),
        score=score,
        iou_box=total(hit, _overlap_of_hits(groups["bbox"], matching)),
        **of_masks,
    )


def _overlap_of_hits(groups, matching):
    """(N,) IoU of each detection with the ground truth it hits, NaN where it hits none."""
    iou = np.full(len(matching.gt), np.nan)
    for group in groups:
        rows = np.flatnonzero(matching.hit[group.dt])
        columns = np.searchsorted(group.gt, matching.gt[group.dt[rows]])
        iou[group.dt[rows]] = group.iou[rows, columns]
    return iou


def union_overlaps(gt, detections, counted):
    """
    Overlap of all that is detected in an image with all lesions in it, of whatever class.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        counted (np.ndarray): (N,) bool, those that count and reach the threshold.

    Returns:
        dict[str, np.ndarray]: "iou" and "dice", (number of images,) in [0, 1]. NaN for images
        without a lesion, and throughout where there are no masks.
    """
    iou = np.full(len(gt.images), np.nan)
    if gt.regions.masks is not None and detections.regions.masks is not None:
        found = _by_image(detections.regions, counted)
        for position, outlines in _by_image(gt.regions, ~gt.crowd).items():
            iou[position] = 0.0
            if position in found:
                unions = mask_util.merge(found[position]), mask_util.merge(outlines)
                iou[position] = mask_util.iou([unions[0]], [unions[1]], [False])[0, 0]
    return {"iou": iou, "dice": 2 * iou / (1 + iou)}


def _by_image(regions, chosen):
    """{image position: masks of the chosen regions}."""
    masks = {}
    for row in np.flatnonzero(chosen):
        masks.setdefault(int(regions.image[row]), []).append(regions.masks[row])
    return masks
