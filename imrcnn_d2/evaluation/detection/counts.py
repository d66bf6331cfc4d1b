"""What happened in each image: hits, false alarms and overlaps; the confusion matrix."""

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
    "LesionCounter",
    "UnitCounts",
    "add_up",
    "confusion_matrix",
    "divide",
    "named",
    "number_units",
    "union_overlaps",
]


def divide(part, whole):
    """part / whole of arrays of one shape, or of scalars; NaN where ``whole`` is 0."""
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)[()]


# The columns that every metric at a threshold is made of (see UnitCounts.columns).
COLUMNS = (
    "units",
    "tp",
    "fp",
    "fn",
    "free",
    "free_silent",
    "free_fp",
    "positive",
    "positive_predicted",
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
        score (float): highest score of any evaluated detection, at any threshold; 0 without one.
        iou, dice, iou_box (float): sums over the hits of their overlaps in [0, 1]: masks, masks,
            boxes. NaN where there are no masks.
        union_iou, union_dice (float): overlap in [0, 1] of the union of an image's detections with
            the union of its lesions, 0 for images without a lesion; of larger units sums over
            images. NaN where there are no masks.
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
    def predicted_positive(self):
        """(U,) bool, there is a detection at the threshold, wherever it is."""
        return self.tp + self.fp > 0

    def columns(self) -> np.ndarray:
        """(U, K) float, a column for each name in COLUMNS."""
        free, positive = ~self.positive, self.positive
        columns = (
            np.ones(len(self.tp)),
            self.tp,
            self.fp,
            self.fn,
            free,
            free & ~self.predicted_positive,
            self.fp * free,
            positive,
            positive & self.predicted_positive,
            positive & (self.tp > 0),
            self.iou,
            self.dice,
            self.iou_box,
            self.union_iou,
            self.union_dice,
        )
        return np.stack(columns, axis=1).astype(float)

    def sums(self) -> dict[str, np.float64]:
        """Sums of the columns by name, every unit counted once."""
        return named(self.columns().sum(axis=0))

    def merged(self, unit: np.ndarray) -> "UnitCounts":
        """
        Counts of larger units, such as patients.

        Args:
            unit: (U,) int, the larger unit that each belongs to, numbered from 0.
        """
        number = int(unit.max()) + 1 if len(unit) else 0
        merged = {}
        for name in (field.name for field in fields(self)):
            values = getattr(self, name)
            merged[name] = np.zeros(number, dtype=values.dtype)
            combine = np.maximum if name == "score" else np.add
            combine.at(merged[name], unit, values)
        return UnitCounts(**merged)


def named(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(..., K) sums of the columns as (...,) arrays by the names of COLUMNS."""
    return dict(zip(COLUMNS, np.moveaxis(sums, -1, 0), strict=True))


def number_units(images: list[dict]) -> tuple[str, np.ndarray, int]:
    """
    Returns:
        "patient" where all records have a ``patient_id``, else "image"; (I,) int, the number of the
        unit that each image belongs to; and the number of units.
    """
    patients = [record.get("patient_id") for record in images]
    if not patients or None in patients:
        return "image", np.arange(len(images)), len(images)
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    return "patient", np.array([number[patient] for patient in patients]), len(number)


def add_up(columns: np.ndarray, unit: np.ndarray, number: int) -> np.ndarray:
    """(number, K) sums over the rows of (U, K) columns that belong to each larger unit, given the
    (U,) int in [0, number) of each row."""
    total = np.zeros((number, columns.shape[1]))
    np.add.at(total, unit, columns)
    return total


def _overlap_of_hits(overlaps, matching):
    """(N,) IoU in [0, 1] of each detection with the ground truth it hits; NaN without one."""
    iou = np.full(len(matching.gt), np.nan)
    pairs = matching.gt[overlaps.dt] == overlaps.gt
    iou[overlaps.dt[pairs]] = overlaps.iou[pairs]
    return iou


def union_overlaps(gt, detections, selected: np.ndarray) -> np.ndarray:
    """
    Overlap of the union of an image's detections with the union of its lesions, of any class.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        selected: (N,) bool.

    Returns:
        (number of images,) IoU in [0, 1]; 0 for images without a lesion. NaN throughout where there
        are no masks.
    """
    if gt.regions.masks is None or detections.regions.masks is None:
        return np.full(len(gt.images), np.nan)
    iou = np.zeros(len(gt.images))
    detected = _by_image(detections.regions, selected)
    for position, lesions in _by_image(gt.regions, ~gt.crowd).items():
        if position in detected:
            unions = ([union(masks)] for masks in (detected[position], lesions))
            iou[position] = mask_util.iou(*unions, [False])[0, 0]
    return iou


def _by_image(regions, chosen):
    """{image position: masks of the chosen regions}."""
    masks = {}
    rows = np.flatnonzero(chosen)
    for row, image in zip(rows.tolist(), regions.image[rows].tolist(), strict=True):
        masks.setdefault(image, []).append(regions.masks[row])
    return masks


# Name and lower limit of each stratum, up to the next one's limit, which is excluded.
# Share of the image in percent:
SHARES = {"<1 %": 0.0, "1-5 %": 1.0, "5-15 %": 5.0, "15-30 %": 15.0, ">=30 %": 30.0}
# COCO's sizes, in pixels.
SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}


class LesionCounter:
    """Counts what happened in each image, for any selection of lesions and detections."""

    def __init__(self, gt, detections, overlaps: dict, matching):
        """
        Args:
            gt (GroundTruth): R regions.
            detections (Detections): N of them.
            overlaps: Overlaps by "bbox" and, where there are masks, by "segm".
            matching (Matching): of the N detections.
        """
        self.gt, self.detections = gt, detections
        self.overlaps, self.matching = overlaps, matching
        self._iou = {kind: _overlap_of_hits(pairs, matching) for kind, pairs in overlaps.items()}

    def above(self, tau: float) -> np.ndarray:
        """(N,) bool, the evaluated detections with a score of at least ``tau``."""
        return self.matching.evaluated & (self.detections.score >= tau)

    def count(self, lesions: np.ndarray, selected: np.ndarray) -> UnitCounts:
        """
        Args:
            lesions: (R,) bool, the lesions to count.
            selected: (N,) bool, the detections.

        Returns:
            UnitCounts of all images, with ``score`` 0 and the unions NaN.
        """
        number, image = len(self.gt.images), self.detections.regions.image
        unknown = np.full(number, np.nan)
        hit = selected & self.matching.hit

        def total(rows, values=None):
            values = None if values is None else values[rows]
            return np.bincount(image[rows], values, minlength=number)

        masks = self._iou.get("segm")
        return UnitCounts(
            lesions=np.bincount(self.gt.regions.image[lesions], minlength=number),
            tp=total(hit),
            fp=total(selected & ~self.matching.hit),
            score=np.zeros(number),
            iou=unknown if masks is None else total(hit, masks),
            dice=unknown if masks is None else total(hit, 2 * masks / (1 + masks)),
            iou_box=total(hit, self._iou["bbox"]),
            union_iou=unknown,
            union_dice=unknown,
        )

    def per_image(self, selected: np.ndarray, other: UnitCounts | None = None) -> UnitCounts:
        """
        Args:
            selected: (N,) bool, as of :meth:`above`.
            other: the same at another threshold. Where an image has as many detections at both,
                they are the same ones, and their union is not made again.
        """
        gt, evaluated = self.gt, self.matching.evaluated
        image, score = self.detections.regions.image, np.zeros(len(gt.images))
        np.maximum.at(score, image[evaluated], self.detections.score[evaluated])
        counts = self.count(~gt.crowd, selected)
        if other is None:
            iou = union_overlaps(gt, self.detections, selected)
        else:
            same = counts.tp + counts.fp == other.tp + other.fp
            iou = union_overlaps(gt, self.detections, selected & ~same[image])
            iou = np.where(same, other.union_iou, iou)
        return replace(counts, score=score, union_iou=iou, union_dice=2 * iou / (1 + iou))

    def by_size(self, selected: np.ndarray) -> dict[str, dict[str, UnitCounts]]:
        """
        Lesions by size (``gt.area``), with the detections that hit them. False alarms belong to no
        lesion, so that there is no precision by size.

        Returns:
            Per image, by the names of SHARES under "share_of_image" and by those of SIZES under
            "coco". The former is left out where the height and width of an image with lesions are
            unknown.
        """
        gt = self.gt
        pixels = np.array(
            [i.get("height", np.nan) * i.get("width", np.nan) for i in gt.images], float
        )
        share = 100 * gt.area / pixels[gt.regions.image]
        scales = {"share_of_image": (share, SHARES), "coco": (gt.area, SIZES)}
        if np.isnan(share[~gt.crowd]).any():
            del scales["share_of_image"]
        return {
            scale: self.by_stratum(
                selected,
                np.searchsorted(list(limits.values()), size, side="right") - 1,
                list(limits),
            )
            for scale, (size, limits) in scales.items()
        }

    def by_stratum(self, selected, stratum: np.ndarray, names: list) -> dict[str, UnitCounts]:
        """
        Lesions by any partition, with the detections that hit them.

        Args:
            selected: (N,) bool, as of :meth:`above`.
            stratum: (R,) int, place in ``names`` of each region.
            names: of the strata.
        """
        strata = {}
        for number, name in enumerate(names):
            lesions = ~self.gt.crowd & (stratum == number)
            hits = selected & self.matching.hit & np.append(lesions, False)[self.matching.gt]
            strata[name] = self.count(lesions, hits)
        return strata

    def by_class(self, selected: np.ndarray) -> dict[str, UnitCounts]:
        """Per image, the lesions and detections of each class by its name."""
        gt = self.gt
        return {
            category["name"]: self.count(
                ~gt.crowd & (gt.regions.category == position),
                selected & (self.detections.regions.category == position),
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
            the corner, since true negative background can't be counted.
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
    that is the matching of the lesion-level metrics.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        matching (Matching): of these two, class by class.
        tau (float): score threshold.
        iou_threshold (float): least overlap of a match, in (0, 1].
        iou_type (str): "segm" or "bbox".

    Returns:
        ConfusionMatrix: each row of a class adds up to its lesions. Detections that match only a
        crowd region, of any class, are in no column.
    """
    k = len(gt.categories)
    if k > 1:
        merged_gt = replace(gt, categories=gt.categories[:1], regions=_of_one_class(gt.regions))
        merged = replace(detections, regions=_of_one_class(detections.regions))
        matching = match(merged_gt, merged, overlaps(merged_gt, merged, iou_type), iou_threshold)
    selected = matching.evaluated & (detections.score >= tau)
    hit = matching.gt[selected]
    missed = ~gt.crowd
    missed[hit[hit >= 0]] = False
    counts = np.zeros((k + 1, k + 1))
    # A false alarm, of which matching.gt is -1, finds the background at the end.
    truth = np.append(gt.regions.category, k)[hit]
    np.add.at(counts, (truth, detections.regions.category[selected]), 1)
    np.add.at(counts, (gt.regions.category[missed], k), 1)
    counts[k, k] = np.nan
    names = [category["name"] for category in gt.categories]
    names.append("no lesion" if "background" in names else "background")
    return ConfusionMatrix(names, counts)


def _of_one_class(regions):
    return replace(regions, category=np.zeros_like(regions.category))
