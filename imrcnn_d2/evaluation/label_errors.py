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

__all__ = ["KINDS", "LabelError", "find_label_errors", "pool_label_errors"]


KINDS = ("unlabelled_lesion", "unmatched_outline", "badly_fitting_outline")
_OVERLAP = 0.1  # IoU from which on a detection and an annotation are one label error


@dataclass(frozen=True)
class LabelError:
    """
    Attributes:
        kind: one of ``KINDS``.
        score: 0 to 1.
        image: position among the images.
        region: position among the ground truth's regions; None of an "unlabelled_lesion".
        detection: position among the detections, the one that contradicts the annotation or
            suggests the lesion; None where nothing overlaps the annotation.
        iou: of detection and annotation; 0 where one of them is missing.
    """

    kind: str
    score: float
    image: int
    region: int | None
    detection: int | None
    iou: float


def find_label_errors(results) -> list[LabelError]:
    """
    Args:
        results (LesionResults): of a model on images that it was not trained on.

    Returns:
        One for each annotation that is no crowd, and for each detection above the threshold that
        hits no lesion and overlaps no annotation that is missed otherwise.
    """
    gt, detections = results.ground_truth, results.detections
    pairs = results.overlaps[results.meta["iou_type"]]
    kept = ~gt.crowd[pairs.gt] & (pairs.iou > 0)
    pairs_of = defaultdict(list)  # region -> its pairs (detection, IoU)
    for dt, region, iou in zip(pairs.dt[kept], pairs.gt[kept], pairs.iou[kept], strict=True):
        pairs_of[int(region)].append((int(dt), float(iou)))
    hit_by = {
        int(results.matching.gt[dt]): int(dt)
        for dt in np.flatnonzero(results.above_threshold & (results.matching.gt >= 0))
    }
    alarms = set(np.flatnonzero(results.above_threshold & (results.matching.gt < 0)).tolist())
    # A false alarm and a missed annotation that overlap are one label error; best overlaps first.
    candidates = sorted(
        (-iou, -detections.score[dt], region, dt)
        for region, region_pairs in pairs_of.items()
        for dt, iou in region_pairs
        if region not in hit_by and dt in alarms and iou >= _OVERLAP
    )
    for _, _, region, dt in candidates:
        if region not in hit_by and dt in alarms:
            hit_by[region] = dt
            alarms.discard(dt)
    errors = []
    for region in np.flatnonzero(~gt.crowd).tolist():
        error = _of_annotation(pairs_of[region], hit_by.get(region), detections)
        errors.append(LabelError(image=int(gt.regions.image[region]), region=region, **error))
    for dt, share in _outside(sorted(alarms), results).items():
        score = float(detections.score[dt]) * share
        image = int(detections.regions.image[dt])
        errors.append(LabelError("unlabelled_lesion", min(score, 1.0), image, None, dt, 0.0))
    return errors


def _of_annotation(pairs, hit, detections):
    """Kind, score, detection and iou."""
    if hit is not None:
        iou = dict(pairs)[hit]
        score = min(float(detections.score[hit]), 1.0) * min(2 * (1 - iou), 1.0)
        return {"kind": "badly_fitting_outline", "score": score, "detection": hit, "iou": iou}
    best = max(pairs, key=lambda pair: detections.score[pair[0]] * pair[1], default=None)
    support = 0.0 if best is None else float(detections.score[best[0]]) * best[1]
    return {
        "kind": "unmatched_outline",
        "score": max(1 - support, 0.0),
        "detection": None if best is None else best[0],
        "iou": 0.0 if best is None else best[1],
    }


def _outside(selected, results):
    """{detection: share of its area in no annotation of its image, crowds included}."""
    gt, regions = results.ground_truth, results.detections.regions
    use_masks = gt.regions.masks is not None and regions.masks is not None
    shares = {}
    for dt in selected:
        rows = np.flatnonzero(gt.regions.image == regions.image[dt])
        inside = 0.0
        if len(rows) and use_masks:
            # One mask of all, since an intersection with a crowd is over the detection's area.
            annotated = union([gt.regions.masks[row] for row in rows])
            inside = mask_util.iou([regions.masks[dt]], [annotated], [True])[0, 0]
        elif len(rows):
            boxes = regions.boxes[dt][None], gt.regions.boxes[rows]
            inside = mask_util.iou(*boxes, [True] * len(rows)).max()
        shares[dt] = 1 - float(inside)
    return shares


def pool_label_errors(models: list[list[LabelError]]) -> list[tuple[LabelError, int]]:
    """
    Combine the label errors of several models, or of one with several seeds, on the same images.

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
