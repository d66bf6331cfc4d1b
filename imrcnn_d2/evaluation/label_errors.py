"""Annotations that models which never saw them disagree with.

Three scores from 0 to 1, with masks where Tkachenko, Thyagarajan and Mueller's ObjectLab (2023,
cleanlab's scores of detection) have boxes:

- of a lesion's outline that no detection let through hits: 1 - the largest score times IoU of any
  detection, however low its score;
- of an outline that one hits: its score times 2 (1 - IoU), so that 1 is an IoU of one half;
- of a detection let through that hits nothing: its score times the share of its area that is in no
  outline, of whatever class.

A detection and an outline that miss each other for an IoU below one half, but meet, are one
suspicion: an outline in the wrong place or of the wrong extent.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.masks import union

__all__ = ["KINDS", "LabelError", "find_label_errors", "pool_label_errors"]


KINDS = ("unlabelled_lesion", "unmatched_outline", "badly_fitting_outline")
_MEET = 0.1  # IoU


@dataclass(frozen=True)
class LabelError:
    """
    Attributes:
        kind (str): one of ``KINDS``.
        score (float): 0 to 1.
        image (int): position among the images.
        region (int or None): position among the ground truth's regions; None of an
            "unlabelled_lesion".
        detection (int or None): position among the detections, the one that speaks against the
            outline or for the lesion; None where nothing meets the outline.
        iou (float): of detection and outline; 0 where there is but one of them.
    """

    kind: str
    score: float
    image: int
    region: int | None
    detection: int | None
    iou: float


def find_label_errors(results):
    """
    Args:
        results (LesionResults): of a model on images that it was not trained on.

    Returns:
        list[LabelError]: one for each outline that is no crowd, and for each detection let through
        that hits no lesion and meets no outline that is missed otherwise.
    """
    gt, detections = results.ground_truth, results.detections
    pairs = results.overlaps[results.meta["iou_type"]]
    kept = ~gt.crowd[pairs.gt] & (pairs.iou > 0)
    of_outline = defaultdict(list)  # region -> its pairs (detection, IoU)
    for dt, region, iou in zip(pairs.dt[kept], pairs.gt[kept], pairs.iou[kept], strict=True):
        of_outline[int(region)].append((int(dt), float(iou)))
    hit_by = {
        int(results.matching.gt[dt]): int(dt)
        for dt in np.flatnonzero(results.above_threshold & (results.matching.gt >= 0))
    }
    alarms = set(np.flatnonzero(results.above_threshold & (results.matching.gt < 0)).tolist())
    # An alarm and a missed outline that meet are one suspicion; those that meet best come first.
    meetings = sorted(
        (-iou, -detections.score[dt], region, dt)
        for region, own in of_outline.items()
        for dt, iou in own
        if region not in hit_by and dt in alarms and iou >= _MEET
    )
    for _, _, region, dt in meetings:
        if region not in hit_by and dt in alarms:
            hit_by[region] = dt
            alarms.discard(dt)
    suspects = []
    for region in np.flatnonzero(~gt.crowd).tolist():
        suspect = _of_outline(of_outline[region], hit_by.get(region), detections)
        suspects.append(LabelError(image=int(gt.regions.image[region]), region=region, **suspect))
    outside = _outside(sorted(alarms), results)
    for dt, share in outside.items():
        score = float(detections.score[dt]) * share
        image = int(detections.regions.image[dt])
        suspects.append(LabelError("unlabelled_lesion", min(score, 1.0), image, None, dt, 0.0))
    return suspects


def _of_outline(pairs, hit, detections):
    """What is said of an outline: kind, score, detection and iou."""
    if hit is not None:
        iou = dict(pairs)[hit]
        score = min(float(detections.score[hit]), 1.0) * min(2 * (1 - iou), 1.0)
        return {"kind": "badly_fitting_outline", "score": score, "detection": hit, "iou": iou}
    best = max(pairs, key=lambda pair: detections.score[pair[0]] * pair[1], default=None)
    found = 0.0 if best is None else float(detections.score[best[0]]) * best[1]
    return {
        "kind": "unmatched_outline",
        "score": max(1 - found, 0.0),
        "detection": None if best is None else best[0],
        "iou": 0.0 if best is None else best[1],
    }


def _outside(chosen, results):
    """{detection: share of its area in no outline of its image, crowds included}."""
    gt, regions = results.ground_truth, results.detections.regions
    use_masks = gt.regions.masks is not None and regions.masks is not None
    shares = {}
    for dt in chosen:
        own = np.flatnonzero(gt.regions.image == regions.image[dt])
        inside = 0.0
        if len(own):
            if use_masks:
                # One mask of all, since an intersection with a crowd is over the detection's area.
                outlines = union([gt.regions.masks[i] for i in own])
                inside = mask_util.iou([regions.masks[dt]], [outlines], [True])[0, 0]
            else:
                inside = mask_util.iou(
                    regions.boxes[dt][None], gt.regions.boxes[own], [True] * len(own)
                ).max()
        shares[dt] = 1 - float(inside)
    return shares


def pool_label_errors(models):
    """
    What several models, or one with several seeds, say of the same images together.

    Args:
        models (list[list[LabelError]]): of each, on the same ground truth.

    Returns:
        list[tuple[LabelError, int]]: by falling score: for each outline, and for the detections
        without an outline of an image, the mean over the models of the highest score, as the
        LabelError of the model with the highest; and the position of that model.
    """
    best = defaultdict(dict)  # what it is about -> model -> suspect
    for model, suspects in enumerate(models):
        for suspect in suspects:
            about = (suspect.image, suspect.region)
            known = best[about].get(model)
            if known is None or suspect.score > known.score:
                best[about][model] = suspect
    pooled = []
    for own in best.values():
        model, top = max(own.items(), key=lambda item: item[1].score)
        score = sum(suspect.score for suspect in own.values()) / len(models)
        fields = {**vars(top), "score": score}
        pooled.append((LabelError(**fields), model))
    return sorted(pooled, key=lambda item: (-item[0].score, item[0].image))
