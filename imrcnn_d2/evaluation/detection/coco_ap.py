"""COCO's average precision: pycocotools' values."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from imrcnn_d2.evaluation.detection.counts import LesionCounter
from imrcnn_d2.evaluation.detection.curves import RankedDetections, Ranking
from imrcnn_d2.evaluation.detection.inputs import mask_areas
from imrcnn_d2.evaluation.detection.matching import match

IOUS = np.linspace(0.5, 0.95, 10)
# Pixels, both limits included: all, small, medium, large.
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
# Positions in IOUS and AREAS over which each metric is a mean.
PARTS = {
    **{"AP": (range(10), 0), "AP50": ((0,), 0), "AP75": ((5,), 0)},
    **{"APs": (range(10), 1), "APm": (range(10), 2), "APl": (range(10), 3)},
}


def coco_average_precision(counter: LesionCounter, iou_type: str) -> dict[str, float]:
    """AP AP50 AP75 APs APm APl in percent, as detectron2's COCOEvaluator reports them, also without
    a detection: 0 where there are ground truths. NaN where the data set has no ground truth (of
    that size), without masks and without scores. Sizes are those of masks ("segm") or boxes."""
    areas = defaultdict(list)
    if counter.detections.scored and iou_type in counter.overlaps:
        once, unit = np.ones((1, 1), dtype=np.int32), np.zeros(len(counter.gt.images), dtype=int)
        for names, ranked in coco_curves(counter, iou_type, unit, 1):
            for name in names if ranked.lesions.any() else ():
                areas[name].append(ranked.weigh(once).sampled_area[0])
    return {name: float(100 * np.mean(areas[name] or np.nan)) for name in PARTS}


def coco_curves(
    counter: LesionCounter, iou_type: str, unit_of_image: np.ndarray, num_units: int
) -> Iterator[tuple[list[str], RankedDetections]]:
    """What COCO's metrics are made of: for each class, range of areas and IoU threshold, those of
    PARTS that are a mean over its ``sampled_area``, under whatever weights.

    A ground truth of another size is ignored: a detection that hits no other is not evaluated, and
    neither is a false alarm of another size.
    """
    gt, regions, score = counter.gt, counter.detections.regions, counter.detections.score
    classes = range(len(gt.categories))
    size = regions.boxes[:, 2] * regions.boxes[:, 3]
    if iou_type == "segm":
        size = mask_areas(regions.masks)
    everything = Ranking(score, unit_of_image[regions.image])
    category = regions.category[everything.order]
    for a, (low, high) in enumerate(AREAS):
        ignored = gt.crowd | (gt.area < low) | (gt.area > high)
        inside = (size >= low) & (size <= high)
        truths = [gt.regions.image[~ignored & (gt.regions.category == k)] for k in classes]
        lesions = [np.bincount(unit_of_image[image], minlength=num_units) for image in truths]
        for t, threshold in enumerate(IOUS):
            names = [name for name, (ious, area) in PARTS.items() if area == a and t in ious]
            matching = match(gt, counter.detections, counter.overlaps[iou_type], threshold, ignored)
            evaluated = (matching.evaluated & (matching.hit | inside))[everything.order]
            for k in classes:
                ranking = everything.part(evaluated & (category == k))
                yield names, RankedDetections(ranking, matching.hit, lesions[k])
