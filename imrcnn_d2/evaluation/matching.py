"""Which detection hits which ground truth.

One rule for the whole package, per image and class: detections go by falling score, each takes the
free ground truth that it overlaps most, if they overlap enough. Since the rule never looks ahead,
the matching of the detections above any score threshold is part of the matching of all of them: it
is made once and every threshold read off it.
"""

from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

__all__ = ["MAX_DETECTIONS", "Matching", "Overlap", "match", "match_group", "overlaps"]

# Detections considered per image and class, as in COCO.
MAX_DETECTIONS = 100

# What a detection can match besides a ground truth's index.
NOTHING = -1
CROWD = -2


@dataclass(frozen=True, eq=False)
class Overlap:
    """
    Overlaps in one image, for one class.

    Attributes:
        dt (np.ndarray): (D,) int, positions in ``Detections``, by falling score.
        gt (np.ndarray): (G,) int, positions in ``GroundTruth.regions``, in file order.
        iou (np.ndarray): (D, G) float in [0, 1]; for a crowd the intersection over the detection's
            own area, as in COCO.
    """

    dt: np.ndarray
    gt: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True, eq=False)
class Matching:
    """
    Attributes:
        gt (np.ndarray): (N,) int, for each detection the position of the ground truth it hits, or
            -1: a false alarm, at whatever threshold it is let through.
        iou (np.ndarray): (N,) float in [0, 1], overlap with it; NaN for false alarms.
        counts (np.ndarray): (N,) bool, False for detections that match only a crowd and those
            beyond MAX_DETECTIONS: they are neither hits nor false alarms, and count nowhere.
    """

    gt: np.ndarray
    iou: np.ndarray
    counts: np.ndarray

    @property
    def hit(self):
        """np.ndarray: (N,) bool, the detection hits a ground truth."""
        return self.gt >= 0


def overlaps(gt, detections, iou_type):
    """
    Args:
        gt (GroundTruth):
        detections (Detections):
        iou_type (str): "segm" (both must have masks) or "bbox".

    Returns:
        list[Overlap]: one for each image and class with detections, by image, then class.
    """
    size = len(gt.categories)
    in_group = _by_image_and_class(gt.regions, size)
    nothing = np.zeros(0, dtype=np.int64)
    result = []
    groups = _by_image_and_class(detections.regions, size)
    for key, dt in tqdm(groups.items(), desc=f"Overlaps ({iou_type})", delay=2):
        dt = dt[np.argsort(-detections.score[dt], kind="stable")][:MAX_DETECTIONS]
        objects = in_group.get(key, nothing)
        iou = np.zeros((len(dt), len(objects)))
        if len(objects):
            crowd = gt.crowd[objects].tolist()
            if iou_type == "segm":
                ours = [detections.regions.masks[i] for i in dt]
                theirs = [gt.regions.masks[i] for i in objects]
            else:
                ours, theirs = detections.regions.boxes[dt], gt.regions.boxes[objects]
            iou = mask_util.iou(ours, theirs, crowd)
        result.append(Overlap(dt, objects, iou))
    return result


def _by_image_and_class(regions, num_categories):
    """{image * num_categories + class: (K,) positions in file order}, by ascending key."""
    key = regions.image * num_categories + regions.category
    order = np.argsort(key, kind="stable")
    keys, starts = np.unique(key[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(keys) else []
    return dict(zip(keys.tolist(), parts, strict=True))


def match_group(iou, crowd, threshold):
    """
    Match the detections of one image and class.

    Args:
        iou (np.ndarray): (D, G), detections by falling score.
        crowd (np.ndarray): (G,) bool.
        threshold (float): least IoU of a match, in (0, 1].

    Returns:
        np.ndarray: (D,) int, for each detection the index of its ground truth, -1 where it has
        none and -2 where only a crowd overlaps it enough. A ground truth is taken once, a crowd any
        number of times. Of equal overlaps the last in file order is taken, as in pycocotools.
    """
    matched = np.full(len(iou), NOTHING, dtype=np.int64)
    if not iou.size:
        return matched
    # pycocotools' own slack, so that an IoU of 1 meets a threshold of 1.
    enough = iou >= min(threshold, 1 - 1e-10)
    free = ~crowd
    for d in np.flatnonzero(enough.any(axis=1)):
        candidates = np.flatnonzero(enough[d] & free)
        if len(candidates):
            best = candidates[::-1][np.argmax(iou[d, candidates[::-1]])]
            matched[d] = best
            free[best] = False
        elif (enough[d] & crowd).any():
            matched[d] = CROWD
    return matched


def match(gt, detections, groups, threshold):
    """
    Match all detections of a data set.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        groups (list[Overlap]): from :func:`overlaps` of these two.
        threshold (float): least IoU of a match, in (0, 1].

    Returns:
        Matching: of N detections.
    """
    number = len(detections.score)
    hit = np.full(number, NOTHING, dtype=np.int64)
    iou = np.full(number, np.nan)
    counts = np.zeros(number, dtype=bool)
    for group in groups:
        matched = match_group(group.iou, gt.crowd[group.gt], threshold)
        counts[group.dt] = matched != CROWD
        rows = np.flatnonzero(matched >= 0)
        hit[group.dt[rows]] = group.gt[matched[rows]]
        iou[group.dt[rows]] = group.iou[rows, matched[rows]]
    return Matching(hit, iou, counts)
