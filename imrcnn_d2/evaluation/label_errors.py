"""Annotations that models which were not trained on them disagree with.

Three scores from 0 to 1, with masks where Tkachenko, Thyagarajan and Mueller's ObjectLab (2023,
cleanlab's scores of detection) have boxes:

- of an annotation that no detection above the threshold hits: 1 - the largest score times IoU of
  any detection, however low its score;
- of an annotation that one hits: its score times 2 (1 - IoU), so that 1 is an IoU of one half;
- of a detection above the threshold that hits nothing: its score times the share of its area that
  is in no annotation, of any class.

A detection and an annotation that overlap by an IoU below one half are one label error: an
annotation in the wrong place or of the wrong extent.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.masks import union
from imrcnn_d2.evaluation.detection.results import LesionResults

KINDS = ("unlabelled_lesion", "unmatched_outline", "badly_fitting_outline")
_OVERLAP = 0.1  # IoU from which on a detection and an annotation are one label error


@dataclass(frozen=True)
class LabelError:
    kind: str  # one of ``KINDS``
    score: float  # 0 to 1
    image: int  # position among the images
    region: int | None  # position among the ground truth's; None of an "unlabelled_lesion"
    # Position of the one that contradicts the annotation or suggests the lesion; None where nothing
    # overlaps the annotation.
    detection: int | None
    iou: float  # of detection and annotation; 0 where one of them is missing


def find_label_errors(results: LesionResults) -> list[LabelError]:
    """The label errors that a model finds in images that it was not trained on: one for each
    annotation that is no crowd, and for each detection above the threshold that hits no lesion and
    overlaps no annotation that is missed otherwise."""
    gt, detections, matched = results.ground_truth, results.detections, results.matching.gt
    pairs = results.counter.overlaps[results.meta["iou_type"]]
    kept = ~gt.crowd[pairs.gt] & (pairs.iou > 0)
    ious = defaultdict(dict)  # region -> detection -> IoU
    for dt, region, iou in zip(pairs.dt[kept], pairs.gt[kept], pairs.iou[kept], strict=True):
        ious[int(region)][int(dt)] = float(iou)
    above = np.flatnonzero(results.above_threshold).tolist()
    hit_by = {int(matched[dt]): dt for dt in above if matched[dt] >= 0}
    alarms = {dt for dt in above if matched[dt] < 0}
    # A false alarm and a missed annotation that overlap are one label error; best overlaps first.
    candidates = sorted(
        (-iou, -detections.score[dt], region, dt)
        for region, region_ious in ious.items()
        for dt, iou in region_ious.items()
        if region not in hit_by and dt in alarms and iou >= _OVERLAP
    )
    for _, _, region, dt in candidates:
        if region not in hit_by and dt in alarms:
            hit_by[region] = dt
            alarms.discard(dt)
    errors = []
    for region in np.flatnonzero(~gt.crowd).tolist():
        kind, score, dt, iou = _disagreement(ious[region], hit_by.get(region), detections.score)
        errors.append(LabelError(kind, score, int(gt.regions.image[region]), region, dt, iou))
    for dt in sorted(alarms):
        score = min(float(detections.score[dt]) * _share_outside(dt, results), 1.0)
        image = int(detections.regions.image[dt])
        errors.append(LabelError("unlabelled_lesion", score, image, None, dt, 0.0))
    return errors


def _disagreement(ious, hit, scores):
    """Kind, score, detection and iou of an annotation, given {detection: IoU} and what hits it."""
    if hit is not None:
        score = min(float(scores[hit]), 1.0) * min(2 * (1 - ious[hit]), 1.0)
        return "badly_fitting_outline", score, hit, ious[hit]
    best = max(ious, key=lambda dt: scores[dt] * ious[dt], default=None)
    if best is None:
        return "unmatched_outline", 1.0, None, 0.0
    support = float(scores[best]) * ious[best]
    return "unmatched_outline", max(1 - support, 0.0), best, ious[best]


def _share_outside(dt, results):
    """Share of a detection's area in no annotation of its image, crowds included."""
    truth, regions = results.ground_truth.regions, results.detections.regions
    rows = np.flatnonzero(truth.image == regions.image[dt])
    if not len(rows):
        return 1.0
    if truth.masks is None or regions.masks is None:
        boxes = regions.boxes[dt][None], truth.boxes[rows]
        return 1 - float(mask_util.iou(*boxes, [True] * len(rows)).max())
    # One mask of all, since an intersection with a crowd is over the detection's area.
    annotated = union([truth.masks[row] for row in rows])
    return 1 - float(mask_util.iou([regions.masks[dt]], [annotated], [True])[0, 0])


def pool_label_errors(models: list[list[LabelError]]) -> list[tuple[LabelError, int]]:
    """Combine the label errors of several models, or of one with several seeds, on the same images.

    Returns:
        By falling score: for each annotation, and for the detections without an annotation of an
        image, the mean over the models of the highest score, as the LabelError of the model with
        the highest; and the position of that model.
    """
    best = defaultdict(dict)  # (image, region) -> model -> label error
    for model, errors in enumerate(models):
        for error in errors:
            known = best[error.image, error.region].get(model)
            if known is None or error.score > known.score:
                best[error.image, error.region][model] = error
    pooled = []
    for by_model in best.values():
        model, top = max(by_model.items(), key=lambda item: item[1].score)
        score = sum(error.score for error in by_model.values()) / len(models)
        pooled.append((replace(top, score=score), model))
    return sorted(pooled, key=lambda item: (-item[0].score, item[0].image))
