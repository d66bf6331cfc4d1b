"""What happened in each image: hits, false alarms and overlaps; the confusion matrix."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import pycocotools.mask as mask_util
from scipy.spatial import KDTree

from imrcnn_d2.data.formats.coco import run_lengths
from imrcnn_d2.data.masks import union
from imrcnn_d2.data.units import Units
from imrcnn_d2.evaluation.detection.inputs import Detections, GroundTruth
from imrcnn_d2.evaluation.detection.matching import Overlaps, match, overlaps
from imrcnn_d2.utils.progress import tqdm

# The columns that every metric at a threshold is made of, in the order of UnitCounts.columns.
COLUMNS = (
    "units tp fp fn no_alarm free free_silent free_fp positive positive_predicted positive_hit "
    "iou dice iou_box hd95 nsd union_iou union_dice"
).split()
# Name and lower limit of each stratum, up to the next one's limit, which is excluded.
# Share of the image in percent:
SHARES = {"<1 %": 0.0, "1-5 %": 1.0, "5-15 %": 5.0, "15-30 %": 15.0, ">=30 %": 30.0}
# COCO's sizes, in pixels.
SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}
# How far apart boundaries may be to agree in ``nsd``, as a share of the image's diagonal: 8 pixels
# of 640 x 512. Boundary IoU (Cheng et al. 2021) allows twice that in everyday photographs.
NSD_TOLERANCE = 0.01
_MOST_PAIRS = 2_000_000  # of pixels of two boundaries: of more, a tree finds the nearest faster
_BATCH = 32  # pairs of masks


def divide(part, whole):
    """part / whole of arrays of one shape, or of scalars; NaN where ``whole`` is 0."""
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)[()]


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """What happened in each of U units at one score threshold. Each attribute is a (U,) array;
    overlaps are in [0, 1], NaN where there are no masks."""

    lesions: np.ndarray  # ground truths, crowds left out
    tp: np.ndarray  # detections at the threshold that hit a lesion
    fp: np.ndarray  # detections at the threshold that hit none
    score: np.ndarray  # highest of any evaluated detection, at any threshold; 0 without one
    iou: np.ndarray  # sums over the hits of their overlaps: of masks, masks, boxes
    dice: np.ndarray
    iou_box: np.ndarray
    hd95: np.ndarray  # sums over the hits with masks, see boundary_agreement: in pixels,
    nsd: np.ndarray  # and in [0, 1]
    # Overlap of the union of an image's detections with the union of its lesions, 0 for images
    # without a lesion; of larger units sums over images.
    union_iou: np.ndarray
    union_dice: np.ndarray

    @property
    def fn(self) -> np.ndarray:
        """(U,) int, lesions that no detection at the threshold hits."""
        return self.lesions - self.tp

    @property
    def positive(self) -> np.ndarray:
        """(U,) bool, there is a lesion."""
        return self.lesions > 0

    @property
    def predicted_positive(self) -> np.ndarray:
        """(U,) bool, there is a detection at the threshold, wherever it is."""
        return self.tp + self.fp > 0

    def columns(self) -> np.ndarray:
        """(U, K) float, a column for each name in COLUMNS."""
        free, positive, predicted = ~self.positive, self.positive, self.predicted_positive
        cases = (np.ones(len(self.tp)), self.tp, self.fp, self.fn, self.fp == 0)
        free_columns = (free, free & ~predicted, self.fp * free)
        positive_columns = (positive, positive & predicted, positive & (self.tp > 0))
        sums = (self.iou, self.dice, self.iou_box, self.hd95, self.nsd)
        unions = (self.union_iou, self.union_dice)
        columns = (*cases, *free_columns, *positive_columns, *sums, *unions)
        return np.stack(columns, axis=1).astype(float)

    def take(self, rows: np.ndarray) -> "UnitCounts":
        """Those of the units at (K,) int positions."""
        return UnitCounts(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def merged(self, unit: np.ndarray) -> "UnitCounts":
        """Counts of larger units, such as patients, given the (U,) int number of each one's."""
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


@dataclass(frozen=True, eq=False)
class UniqueLesions:
    """L lesions that may be seen in several images, their frames: F pairs of a lesion and an image
    that shows it."""

    ids: list[tuple]  # patient_id and lesion_id of each, in the order of their first images
    unit: np.ndarray  # (L,) int, see Units
    lesion: np.ndarray  # (F,) int, the lesion of each frame
    frame: np.ndarray  # (R,) int, the frame of each region, -1 for crowds

    @property
    def frames(self) -> np.ndarray:
        """(L,) int, the frames of each lesion."""
        return np.bincount(self.lesion, minlength=len(self.ids))

    def found(self, regions: np.ndarray) -> np.ndarray:
        """(L,) int, the frames in which one of these (K,) int regions is of the lesion."""
        return np.bincount(self.lesion[np.unique(self.frame[regions])], minlength=len(self.ids))


def unique_lesions(gt: GroundTruth) -> UniqueLesions | None:
    """The lesions by patient, else sequence, and ``lesion_id``; None without a lesion and unless
    all lesions have both."""
    units = Units.of(gt.images)
    rows = np.flatnonzero(~gt.crowd)
    image = gt.regions.image[rows]
    ids = [gt.annotations[row].get("lesion_id") for row in rows]
    if not ids or None in ids or "image" in units.kinds[units.of_image[image]]:
        return None
    keys = list(zip(units.of_image[image].tolist(), ids, strict=True))
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    pairs = np.stack([[number[key] for key in keys], image], axis=1)
    frames, inverse = np.unique(pairs, axis=0, return_inverse=True)
    frame = np.full(len(gt.crowd), -1)
    frame[rows] = inverse.ravel()
    patients = units.patient_ids(gt.images)
    return UniqueLesions(
        ids=[(patients.get(unit), lesion) for unit, lesion in number],
        unit=np.array([unit for unit, _ in number]),
        lesion=frames[:, 0],
        frame=frame,
    )


def boundary_agreement(first: Sequence[dict], second: Sequence[dict]) -> np.ndarray:
    """(N, 2) float, how well the boundaries of N pairs of compressed RLEs, each of one image,
    agree: ``hd95`` in pixels and ``nsd`` in [0, 1].

    A pixel of a mask is on its boundary if one of its four neighbours is not of the mask, or not of
    the image. hd95 is the larger of the 95th percentiles of the distances from either boundary to
    the other; nsd, the normalised surface distance, the share of the pixels of both boundaries that
    are no farther than NSD_TOLERANCE from the other one (Nikolov et al. 2021, doi 10.2196/26151).
    Both as in Metrics Reloaded (Maier-Hein et al. 2024, doi 10.1038/s41592-023-02151-z). Where a
    mask is empty hd95 is the diagonal of the image, and nsd 0.
    """
    sizes = np.array([mask["size"] for mask in first]).reshape(-1, 2)
    diagonals = np.hypot(*sizes.T)
    agreement = np.stack([diagonals, np.zeros(len(first))], axis=1)
    x, y, limits = _boundary_pixels([*first, *second])
    # |a - b|² of all pairs of pixels is one product of these: from the middle of an image of such
    # a size, whole numbers that float32 holds.
    kind = np.float32 if diagonals.max(initial=0) < 4096 else float
    number = np.diff(limits)
    x, y = (
        (values - np.repeat(np.tile(side // 2, 2), number)).astype(kind)
        for values, side in ((x, sizes[:, 1]), (y, sizes[:, 0]))
    )
    squares, ones = x * x + y * y, np.ones_like(x)
    left, right = np.stack([x, y, squares, ones]), np.stack([-2 * x, -2 * y, ones, squares])
    nearest = np.zeros(len(x), kind)  # squared distance of each pixel to the other boundary
    slices = [slice(*pair) for pair in pairwise(limits.tolist())]
    # A new array for each product would take longer than the product.
    space = np.empty(min(number.max(initial=0) ** 2, _MOST_PAIRS), kind)
    for one, two in zip(slices, slices[len(first) :], strict=False):
        lengths = one.stop - one.start, two.stop - two.start
        if lengths[0] * lengths[1] > _MOST_PAIRS:
            trees = [KDTree(left[:2, each].T) for each in (one, two)]
            for each, tree, other in ((one, trees[1], trees[0]), (two, *trees)):
                nearest[each] = np.rint(tree.query(other.data)[0] ** 2)
        elif all(lengths):
            squared = space[: lengths[0] * lengths[1]].reshape(lengths)
            np.matmul(left[:, one].T, right[:, two], out=squared)
            squared.min(axis=1, out=nearest[one])
            squared.min(axis=0, out=nearest[two])
    mask = np.repeat(np.arange(len(number)), number)
    is_near = np.sqrt(nearest, dtype=float) <= NSD_TOLERANCE * np.tile(diagonals, 2)[mask]
    near = np.bincount(mask, is_near, minlength=len(number)).reshape(2, -1)
    # np.percentile(distances, 95) of all masks in one go; no square reaches 2 ** 34.
    keys = np.sort(nearest + mask * 2.0**34)
    begin, number = limits[:-1].reshape(2, -1), number.reshape(2, -1)
    both = number.all(axis=0)
    begin, number, near = begin[:, both], number[:, both], near[:, both]
    share, place = np.modf(0.95 * (number - 1))
    places = begin + place.astype(int), begin + np.minimum(place.astype(int) + 1, number - 1)
    low, high = (np.sqrt(keys[p] - mask[p] * 2.0**34) for p in places)
    hd95 = (low + share * (high - low)).max(axis=0)
    agreement[both] = np.stack([hd95, near.sum(axis=0) / number.sum(axis=0)], axis=1)
    return agreement


def _boundary_pixels(masks):
    """(P,) int each, x and y of the pixels on the boundaries of M masks, mask by mask; and (M + 1,)
    int, where those of each begin and the last ones end."""
    heights, widths = np.array([mask["size"] for mask in masks]).T
    texts = [mask["counts"] for mask in masks]
    runs, first = run_lengths([t if isinstance(t, str) else t.decode() for t in texts])
    number = np.repeat(np.arange(len(masks)), np.diff(first, append=len(runs)))
    through = np.cumsum(runs, dtype=np.int64)
    through -= (through - runs)[first][number]
    is_filled = (np.arange(len(runs)) - first[number]) % 2 == 1
    is_filled &= runs > 0
    number, begin, end = (values[is_filled] for values in (number, through - runs, through))
    # Runs that go on in the next column, as one per column.
    column = begin // heights[number]
    columns = (end - 1) // heights[number] - column + 1
    part = np.repeat(np.arange(len(columns)), columns)
    column = column[part] + np.arange(len(part)) - np.repeat(np.cumsum(columns) - columns, columns)
    number, height = number[part], heights[number[part]]
    begin = np.maximum(begin[part], column * height)
    end = np.minimum(end[part], (column + 1) * height)
    # All pixels as one line, with an empty one below each column and empty columns around a mask.
    lengths = heights + 1
    origin = np.cumsum(lengths * (widths + 2)) - lengths * (widths + 1)
    begin, end = (ends + column + origin[number] for ends in (begin, end))
    # A pixel has all four neighbours if it lies in the run without its ends, and in those of the
    # columns to either side moved to it. At one place, runs end before others begin.
    step = lengths[number]
    ends = 2 * np.concatenate([end - 1, end - step, end + step])
    begins = 2 * np.concatenate([begin + 1, begin - step, begin + step]) + 1
    places = np.sort(np.concatenate([ends, begins]))
    inner = np.flatnonzero(np.cumsum(2 * (places & 1) - 1) == 3)
    places >>= 1
    # The runs without those: of the beginnings and ends in turn.
    begin = np.sort(np.concatenate([begin, places[inner + 1]]))
    length = np.sort(np.concatenate([end, places[inner]])) - begin
    number = np.repeat(
        np.arange(len(masks)), np.diff(np.searchsorted(begin, origin), append=len(begin))
    )
    pixels = np.bincount(number, length, minlength=len(masks)).astype(int)
    begin -= origin[number]
    line = np.arange(length.sum()) + np.repeat(begin - np.cumsum(length) + length, length)
    return *np.divmod(line, np.repeat(lengths, pixels)), np.append(0, np.cumsum(pixels))


def union_overlaps(gt: GroundTruth, detections: Detections, selected: np.ndarray) -> np.ndarray:
    """(images,) IoU in [0, 1] of the union of an image's (N,) bool ``selected`` detections
    with that of its lesions, of any class; 0 for images without a lesion, NaN throughout where
    there are no masks."""
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
    masks = defaultdict(list)
    for row in np.flatnonzero(chosen).tolist():
        masks[int(regions.image[row])].append(regions.masks[row])
    return masks


class LesionCounter:
    """Counts what happened in each image, for any selection of R lesions and N detections, which
    are matched by "segm" or "bbox" at a least overlap in (0, 1].

    Args:
        mask_overlaps: of detections and ground truths whose masks are not at hand: hd95, nsd and
            the unions are then NaN.

    Attributes:
        overlaps: by "bbox" and, where there are masks or their overlaps, by "segm".
        matching: of all detections.
        unique_lesions: where known.
    """

    def __init__(
        self,
        gt: GroundTruth,
        detections: Detections,
        iou_type: str,
        threshold: float,
        mask_overlaps: Overlaps | None = None,
    ):
        self.gt, self.detections = gt, detections
        self._iou_type, self._threshold = iou_type, threshold
        has_masks = gt.regions.masks is not None and detections.regions.masks is not None
        kinds = ("bbox", "segm") if has_masks else ("bbox",)
        self.overlaps = {kind: overlaps(gt, detections, kind) for kind in kinds}
        if mask_overlaps is not None:
            self.overlaps["segm"] = mask_overlaps
        self.matching = match(gt, detections, self.overlaps[iou_type], threshold)
        self.unique_lesions = unique_lesions(gt)
        # (N,) IoU in [0, 1] of each detection with the ground truth it hits; NaN without one.
        self._iou = {kind: np.full(len(detections.score), np.nan) for kind in self.overlaps}
        for kind, pairs in self.overlaps.items():
            hits = self.matching.gt[pairs.dt] == pairs.gt
            self._iou[kind][pairs.dt[hits]] = pairs.iou[hits]
        # (N, 2) hd95 and nsd, likewise.
        self._boundaries = np.full((len(detections.score), 2), np.nan)
        hits = np.flatnonzero(self.matching.hit & has_masks)
        for start in tqdm(range(0, len(hits), _BATCH), desc="Boundaries of masks", delay=2):
            rows = hits[start : start + _BATCH]
            truth = gt.regions.take(self.matching.gt[rows])
            detected = detections.regions.take(rows)
            self._boundaries[rows] = boundary_agreement(detected.masks, truth.masks)

    def above(self, tau: float) -> np.ndarray:
        """(N,) bool, the evaluated detections with a score of at least ``tau``."""
        return self.matching.evaluated & (self.detections.score >= tau)

    def frames_found(self, selected: np.ndarray) -> np.ndarray:
        """(L,) int, the frames in which these (N,) bool detections hit each unique lesion."""
        return self.unique_lesions.found(self.matching.gt[selected & self.matching.hit])

    def count(self, lesions: np.ndarray, selected: np.ndarray) -> UnitCounts:
        """Counts of all images, with ``score`` 0 and the unions NaN, of these (R,) bool lesions and
        (N,) bool detections."""
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
            hd95=unknown if masks is None else total(hit, self._boundaries[:, 0]),
            nsd=unknown if masks is None else total(hit, self._boundaries[:, 1]),
            union_iou=unknown,
            union_dice=unknown,
        )

    def per_image(self, selected: np.ndarray, other: UnitCounts | None = None) -> UnitCounts:
        """Counts of all lesions and these (N,) bool detections, see :meth:`above`. Where an image
        has as many detections in ``other``, the counts at another threshold, they are the same
        ones, and their union is not made again."""
        gt, evaluated = self.gt, self.matching.evaluated
        image, score = self.detections.regions.image, np.zeros(len(gt.images))
        np.maximum.at(score, image[evaluated], self.detections.score[evaluated])
        counts = self.count(~gt.crowd, selected)
        # Of one detection that hits the one lesion the overlap is known.
        known, iou = (counts.tp == 1) & (counts.fp == 0) & (counts.lesions == 1), counts.iou
        if other is not None:
            same = ~known & (counts.tp + counts.fp == other.tp + other.fp)
            known, iou = known | same, np.where(same, other.union_iou, iou)
        iou = np.where(known, iou, union_overlaps(gt, self.detections, selected & ~known[image]))
        return replace(counts, score=score, union_iou=iou, union_dice=2 * iou / (1 + iou))

    def by_size(self, selected: np.ndarray) -> dict[str, dict[str, UnitCounts]]:
        """Lesions by size (``gt.area``), per image, with the (N,) bool detections that hit them:
        "share_of_image" -> the names of SHARES and "coco" -> those of SIZES. False alarms belong to
        no lesion, so that there is no precision by size. Shares are left out where the height and
        width of an image with lesions are unknown."""
        gt = self.gt
        pixels = [image.get("height", np.nan) * image.get("width", np.nan) for image in gt.images]
        share = 100 * gt.area / np.array(pixels, float)[gt.regions.image]
        scales = {"share_of_image": (share, SHARES), "coco": (gt.area, SIZES)}
        if np.isnan(share[~gt.crowd]).any():
            del scales["share_of_image"]
        strata = {}
        for scale, (size, limits) in scales.items():
            stratum = np.searchsorted(list(limits.values()), size, side="right") - 1
            strata[scale] = self.by_stratum(selected, stratum, list(limits))
        return strata

    def by_stratum(
        self, selected: np.ndarray, stratum: np.ndarray, names: list[str]
    ) -> dict[str, UnitCounts]:
        """Lesions by any partition, with the (N,) bool detections that hit them, given the (R,) int
        place of each region in the ``names`` of the strata."""
        strata = {}
        for number, name in enumerate(names):
            lesions = ~self.gt.crowd & (stratum == number)
            hits = selected & self.matching.hit & np.append(lesions, False)[self.matching.gt]
            strata[name] = self.count(lesions, hits)
        return strata

    def by_class(self, selected: np.ndarray) -> dict[str, UnitCounts]:
        """Per image, the lesions and (N,) bool detections of each class by its name."""
        gt, detected = self.gt, self.detections.regions.category
        return {
            category["name"]: self.count(
                ~gt.crowd & (gt.regions.category == position), selected & (detected == position)
            )
            for position, category in enumerate(gt.categories)
        }

    def confusion_matrix(self, tau: float) -> "ConfusionMatrix":
        """Detections are matched with the lesions of all classes alike: by falling score (at most
        100 an image), each takes the free lesion that it overlaps most, if they overlap enough.
        Each row of a class adds up to its lesions. Detections that match only a crowd region, of
        any class, are in no column."""
        gt, detections, matching = self.gt, self.detections, self.matching
        k = len(gt.categories)
        if k > 1:
            merged_gt = replace(gt, categories=gt.categories[:1], regions=_as_one_class(gt.regions))
            merged = replace(detections, regions=_as_one_class(detections.regions))
            pairs = overlaps(merged_gt, merged, self._iou_type)
            matching = match(merged_gt, merged, pairs, self._threshold)
        selected = matching.evaluated & (detections.score >= tau)
        hit = matching.gt[selected]
        missed = ~gt.crowd
        missed[hit[hit >= 0]] = False
        counts = np.zeros((k + 1, k + 1))
        # A false alarm, of which matching.gt is -1, gets the background at the end.
        truth = np.append(gt.regions.category, k)[hit]
        np.add.at(counts, (truth, detections.regions.category[selected]), 1)
        np.add.at(counts, (gt.regions.category[missed], k), 1)
        counts[k, k] = np.nan
        names = [category["name"] for category in gt.categories]
        names.append("no lesion" if "background" in names else "background")
        return ConfusionMatrix(names, counts)


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Lesions that no detection hits are in the last column, false alarms in the last row."""

    classes: list[str]  # k by ascending id, then "background" ("no lesion" if a class is called so)
    # (k+1, k+1) float, rows by truth, columns by prediction; NaN in the corner, since true negative
    # background can't be counted.
    counts: np.ndarray

    def rows(self) -> list[list[int | None]]:
        """The counts, None in the corner."""
        return [[None if np.isnan(n) else int(n) for n in row] for row in self.counts]


def _as_one_class(regions):
    return replace(regions, category=np.zeros_like(regions.category))
