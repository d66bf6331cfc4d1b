"""Which detection hits which ground truth.

One rule for the whole package, per image and class: detections go by falling score, each takes the
free ground truth that it overlaps most, if they overlap enough. Since the rule never looks ahead,
the matching of the detections above any score threshold is part of the matching of all of them: it
is made once and every threshold read off it.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.evaluation.detection.inputs import MAX_DETECTIONS, Detections, GroundTruth
from imrcnn_d2.utils.progress import tqdm


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Overlaps of the P pairs of a detection and a ground truth of the same image and class: by
    image, then class, then falling score, then the ground truths' file order."""

    dt: np.ndarray  # (P,) int, positions in ``Detections``
    gt: np.ndarray  # (P,) int, positions in ``GroundTruth.regions``
    iou: np.ndarray  # (P,) in [0, 1]; for a crowd, as in COCO, intersection / detection's area
    # (number of detections,) int, place of each by falling score in its image and class, from 0.
    # From MAX_DETECTIONS on they are in no pair.
    rank: np.ndarray


@dataclass(frozen=True, eq=False)
class Matching:
    """Of N detections: those that match only a crowd and those beyond MAX_DETECTIONS are not
    evaluated, they are neither hits nor false alarms."""

    gt: np.ndarray  # (N,) int, position of the ground truth it hits, -1 for a false alarm
    evaluated: np.ndarray  # (N,) bool

    @property
    def hit(self) -> np.ndarray:
        """(N,) bool, the detection hits a ground truth."""
        return self.gt >= 0


def overlaps(gt: GroundTruth, detections: Detections, iou_type: str) -> Overlaps:
    """The overlaps of masks ("segm"; both must have some) or of boxes ("bbox")."""
    size = len(gt.categories)
    key, truth_key = (
        regions.image * size + regions.category for regions in (detections.regions, gt.regions)
    )
    order = np.lexsort((-detections.score, key))  # stable: ties stay in file order
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(key[order], key[order])
    truths = np.argsort(truth_key, kind="stable")
    # Each detection with all the ground truths of its group.
    dt = order[rank[order] < MAX_DETECTIONS]
    first, last = (np.searchsorted(truth_key[truths], key[dt], side) for side in ("left", "right"))
    number = last - first
    ends = np.cumsum(number)
    pairs = np.arange(number.sum()) - np.repeat(ends - number - first, number)
    dt, truth = np.repeat(dt, number), truths[pairs]
    if iou_type == "bbox":
        iou = _box_overlaps(detections.regions.boxes[dt], gt.regions.boxes[truth], gt.crowd[truth])
    else:
        iou = _mask_overlaps(detections.regions, gt, dt, truth, key[dt])
    return Overlaps(dt, truth, iou, rank)


def _box_overlaps(boxes, truths, crowd):
    """(P,) overlaps of (P, 4) XYWH boxes, as pycocotools'."""
    low = np.maximum(boxes[:, :2], truths[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], truths[:, :2] + truths[:, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=1)
    area, truth_area = boxes[:, 2] * boxes[:, 3], truths[:, 2] * truths[:, 3]
    whole = np.where(crowd, area, area + truth_area - both)
    return np.divide(both, whole, out=np.zeros(len(both)), where=both > 0)


def _mask_overlaps(regions, gt, dt, truth, key):
    """(P,) overlaps of masks: group by group, all of a group's detections and ground truths."""
    iou = np.zeros(len(dt))
    limits = np.flatnonzero(np.diff(key, prepend=-1, append=-1))
    # Ground truths of each group: the pairs of its first detection.
    first = np.flatnonzero(np.diff(dt, prepend=-1))
    numbers = np.diff(first, append=len(dt))[np.searchsorted(first, limits[:-1])]
    groups = zip(pairwise(limits), numbers, strict=True)
    for (start, end), number in tqdm(groups, "Overlaps of masks", len(numbers), delay=2):
        group = truth[start : start + number]
        detected = [regions.masks[d] for d in dt[start:end:number]]
        annotated = [gt.regions.masks[g] for g in group]
        iou[start:end] = mask_util.iou(detected, annotated, gt.crowd[group].tolist()).ravel()
    return iou


def match(
    gt: GroundTruth,
    detections: Detections,
    overlaps: Overlaps,
    threshold: float,
    ignored: np.ndarray | None = None,
) -> Matching:
    """Match all detections of a data set, at a least IoU in (0, 1]. A ground truth is taken once, a
    crowd any number of times. Those ``ignored``, (R,) bool, by default the crowds, are taken only
    by a detection that finds no other, which then is not evaluated. Of equal overlaps the last in
    file order is taken, as in pycocotools."""
    ignored = gt.crowd if ignored is None else ignored
    hit = np.full(len(detections.score), -1, dtype=np.int64)
    # pycocotools' own slack, so that an IoU of 1 meets a threshold of 1.
    enough = np.flatnonzero(overlaps.iou >= min(threshold, 1 - 1e-10))
    taken = np.zeros(len(gt.crowd), dtype=bool)
    # One rank at a time: that is at most one detection of each image and class.
    rank = overlaps.rank[overlaps.dt[enough]]
    order = np.argsort(rank, kind="stable")
    for pairs in np.split(enough[order], np.flatnonzero(np.diff(rank[order])) + 1):
        pairs = pairs[~taken[overlaps.gt[pairs]]]
        dt, truth = overlaps.dt[pairs], overlaps.gt[pairs]
        best = np.lexsort((overlaps.iou[pairs], ~ignored[truth], dt))
        best = best[np.diff(dt[best], append=-1) != 0]
        hit[dt[best]] = truth[best]
        taken[truth[best]] = ~gt.crowd[truth[best]]
    evaluated = overlaps.rank < MAX_DETECTIONS
    in_ignored = np.append(ignored, False)[hit]
    evaluated[in_ignored] = False
    hit[in_ignored] = -1
    return Matching(hit, evaluated)
