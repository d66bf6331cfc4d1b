"""What happened in each image: counts and overlaps, from which every figure at a threshold is made.

A unit is an image or a patient. Figures are formulas over sums of columns that have a value a unit,
so that to resample units is to reweigh their rows: a matrix product.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pycocotools.mask as mask_util

from ..data.shapes import union

__all__ = [
    "COLUMNS",
    "UnitCounts",
    "add_up",
    "count_images",
    "named",
    "number_units",
    "overlap_of_hits",
    "union_overlaps",
]

# The columns of which every figure at a threshold is made (see UnitCounts.columns).
COLUMNS = (
    "units",
    "tp",
    "fp",
    "fn",
    "free",
    "free_silent",
    "free_fp",
    "positive",
    "positive_called",
    "positive_hit",
    "iou",
    "dice",
    "iou_box",
    "union_iou",
    "union_dice",
)


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
        union_iou, union_dice (float): overlap in [0, 1] of all that is detected in an image with
            all lesions in it, 0 for images without a lesion; of larger units sums over images. NaN
            where there are no masks.
    """

    lesions: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    score: np.ndarray
    iou: np.ndarray
    dice: np.ndarray
    iou_box: np.ndarray
    union_iou: np.ndarray
    union_dice: np.ndarray

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

    def columns(self):
        """
        Returns:
            np.ndarray: (U, K) float, a column for each name in COLUMNS: 1 (the unit itself), hits,
            false alarms, missed lesions; is it lesion-free, and silent too, false alarms if it is;
            has it a lesion, and is it called too, and a lesion hit; sums of overlaps.
        """
        free, positive = ~self.positive, self.positive
        columns = (
            np.ones(len(self.tp)),
            self.tp,
            self.fp,
            self.fn,
            free,
            free & ~self.called,
            self.fp * free,
            positive,
            positive & self.called,
            positive & (self.tp > 0),
            self.iou,
            self.dice,
            self.iou_box,
            self.union_iou,
            self.union_dice,
        )
        return np.stack(columns, axis=1).astype(float)

    def sums(self):
        """
        Returns:
            dict[str, np.float64]: what :mod:`.metrics` makes figures of, every unit counted once.
        """
        return named(self.columns().sum(axis=0))

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


def named(sums):
    """
    Args:
        sums (np.ndarray): (..., K) sums of the columns.

    Returns:
        dict[str, np.ndarray or np.float64]: (...,) by the names of COLUMNS.
    """
    return dict(zip(COLUMNS, np.moveaxis(sums, -1, 0), strict=True))


def number_units(images):
    """
    Args:
        images (list[dict]): records; patients are known where all have a ``patient_id``.

    Returns:
        tuple: "patient" where they are known, else "image"; (I,) int, the number of the unit that
        each image belongs to; and how many units there are.
    """
    patients = [record.get("patient_id") for record in images]
    if not patients or None in patients:
        return "image", np.arange(len(images)), len(images)
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    return "patient", np.array([number[patient] for patient in patients]), len(number)


def add_up(columns, unit, number):
    """
    Args:
        columns (np.ndarray): (U, K) float.
        unit (np.ndarray): (U,) int in [0, number), the larger unit that each row belongs to.
        number (int): of larger units.

    Returns:
        np.ndarray: (number, K) float, sums over the rows of each larger unit.
    """
    total = np.zeros((number, columns.shape[1]))
    np.add.at(total, unit, columns)
    return total


def count_images(gt, detections, groups, matching, counted, other=None):
    """
    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        groups (dict[str, Overlaps]): overlaps by "bbox" and, where there are masks, by "segm".
        matching (Matching): of the N detections.
        counted (np.ndarray): (N,) bool, those that count and reach the threshold.
        other (UnitCounts or None): the same at another threshold. Where an image has as many
            detections at both, they are the same ones, and their union is not made again.

    Returns:
        UnitCounts: of all images.
    """
    score = np.zeros(len(gt.images))
    image = detections.regions.image
    np.maximum.at(score, image[matching.counts], detections.score[matching.counts])
    counts = counter(gt, detections, groups, matching)(~gt.crowd, counted)
    if other is None:
        iou = union_overlaps(gt, detections, counted)
    else:
        same = counts.tp + counts.fp == other.tp + other.fp
        iou = union_overlaps(gt, detections, counted & ~same[image])
        iou = np.where(same, other.union_iou, iou)
    return replace(counts, score=score, union_iou=iou, union_dice=2 * iou / (1 + iou))


def counter(gt, detections, groups, matching):
    """
    Args:
        gt (GroundTruth): R regions.
        detections (Detections): N of them.
        groups (dict[str, Overlaps]): overlaps by "bbox" and, where there are masks, by "segm".
        matching (Matching): of the N detections.

    Returns:
        callable: of (R,) bool, the lesions to count, and (N,) bool, the detections; gives the
        UnitCounts of all images, with ``score`` 0 and the unions NaN.
    """
    number = len(gt.images)
    nothing = np.zeros(number)
    unknown = np.full(number, np.nan)
    iou = {kind: overlap_of_hits(own, matching) for kind, own in groups.items()}

    def count(lesions, taken):
        hit = taken & matching.hit

        def total(of, values=None):
            image = detections.regions.image[of]
            return np.bincount(image, values if values is None else values[of], minlength=number)

        masks = iou.get("segm")
        return UnitCounts(
            lesions=np.bincount(gt.regions.image[lesions], minlength=number),
            tp=total(hit),
            fp=total(taken & ~matching.hit),
            score=nothing,
            iou=unknown if masks is None else total(hit, masks),
            dice=unknown if masks is None else total(hit, 2 * masks / (1 + masks)),
            iou_box=total(hit, iou["bbox"]),
            union_iou=unknown,
            union_dice=unknown,
        )

    return count


def overlap_of_hits(overlaps, matching):
    """
    Args:
        overlaps (Overlaps): of masks or of boxes, whichever the matching was made of.
        matching (Matching): of N detections.

    Returns:
        np.ndarray: (N,) IoU in [0, 1] of each with the ground truth it hits, NaN where it has none.
    """
    iou = np.full(len(matching.gt), np.nan)
    pairs = matching.gt[overlaps.dt] == overlaps.gt
    iou[overlaps.dt[pairs]] = overlaps.iou[pairs]
    return iou


def union_overlaps(gt, detections, counted):
    """
    Overlap of all that is detected in an image with all lesions in it, of whatever class.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        counted (np.ndarray): (N,) bool, those that count and reach the threshold.

    Returns:
        np.ndarray: (number of images,) IoU in [0, 1]; 0 for images without a lesion. NaN
        throughout where there are no masks.
    """
    if gt.regions.masks is None or detections.regions.masks is None:
        return np.full(len(gt.images), np.nan)
    iou = np.zeros(len(gt.images))
    found = _by_image(detections.regions, counted)
    for position, outlines in _by_image(gt.regions, ~gt.crowd).items():
        if position in found:
            detected, outline = ([union(masks)] for masks in (found[position], outlines))
            iou[position] = mask_util.iou(detected, outline, [False])[0, 0]
    return iou


def _by_image(regions, chosen):
    """{image position: masks of the chosen regions}."""
    masks = {}
    rows = np.flatnonzero(chosen)
    for row, image in zip(rows.tolist(), regions.image[rows].tolist(), strict=True):
        masks.setdefault(image, []).append(regions.masks[row])
    return masks
