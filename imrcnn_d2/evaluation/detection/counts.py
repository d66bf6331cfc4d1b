"""The confusion matrix of a detector, with background as a class."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.masks import union
from imrcnn_d2.evaluation.detection.matching import match, overlaps

__all__ = [
    "COLUMNS",
    "SHARES",
    "SIZES",
    "ConfusionMatrix",
    "UnitCounts",
    "add_up",
    "by_class",
    "by_size",
    "by_stratum",
    "confusion_matrix",
    "count_images",
    "divide",
    "named",
    "number_units",
    "overlap_of_hits",
    "union_overlaps",
]


def divide(part, whole):
    """
    Args:
        part, whole (np.ndarray): of one shape, or scalars.

    Returns:
        np.ndarray or np.float64: part / whole, NaN where ``whole`` is 0.
    """
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)[()]


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


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """
    Attributes:
        classes (list[str]): the k classes by ascending id, then "background" ("no lesion" if one of
            the classes is called that).
        counts (np.ndarray): (k+1, k+1) float, rows by truth, columns by prediction. In the last
            column are the lesions that no detection hits, in the last row the false alarms; NaN in
            the corner, since background that is rightly left alone can't be counted.
    """

    classes: list
    counts: np.ndarray

    def rows(self):
        """list[list[int or None]]: the counts, None in the corner."""
        return [[None if np.isnan(n) else int(n) for n in row] for row in self.counts]


def confusion_matrix(gt, detections, matching, *, tau, iou_threshold, iou_type):
    """
    Detections are matched with the lesions of all classes alike: by falling score (at most 100 an
    image), each takes the free lesion that it overlaps most, if they overlap enough. With one class
    that is the matching of the lesion-level figures.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        matching (Matching): of these two, class by class.
        tau (float): score from which on a detection counts.
        iou_threshold (float): least overlap of a match, in (0, 1].
        iou_type (str): "segm" or "bbox".

    Returns:
        ConfusionMatrix: each row of a class adds up to its lesions. Detections that match only a
        crowd region, of whatever class, are in no column.
    """
    k = len(gt.categories)
    if k > 1:
        blind_gt = replace(gt, categories=gt.categories[:1], regions=_of_one_class(gt.regions))
        blind = replace(detections, regions=_of_one_class(detections.regions))
        matching = match(blind_gt, blind, overlaps(blind_gt, blind, iou_type), iou_threshold)
    counted = matching.counts & (detections.score >= tau)
    hit = matching.gt[counted]
    missed = ~gt.crowd
    missed[hit[hit >= 0]] = False
    counts = np.zeros((k + 1, k + 1))
    # A false alarm, of which matching.gt is -1, finds the background at the end.
    truth = np.append(gt.regions.category, k)[hit]
    np.add.at(counts, (truth, detections.regions.category[counted]), 1)
    np.add.at(counts, (gt.regions.category[missed], k), 1)
    counts[k, k] = np.nan
    names = [category["name"] for category in gt.categories]
    names.append("no lesion" if "background" in names else "background")
    return ConfusionMatrix(names, counts)


def _of_one_class(regions):
    return replace(regions, category=np.zeros_like(regions.category))
