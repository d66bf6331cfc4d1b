"""COCO's average precision, by faster-coco-eval: pycocotools' figures, computed in C++."""

import contextlib
import io
from itertools import product

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.cocoeval import COCOeval

from .ranking import RankedDetections
from .records import mask_areas

__all__ = ["coco_average_precision", "ranked_by_coco"]

# Positions in COCOeval.stats.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Positions of COCO's IoU thresholds (0.5, 0.55, ... 0.95) and of its area ranges (all, small,
# medium, large), over which each figure is a mean.
PARTS = {
    "AP": (range(10), 0),
    "AP75": ((5,), 0),
    "APs": (range(10), 1),
    "APm": (range(10), 2),
    "APl": (range(10), 3),
}


def coco_average_precision(gt, detections, iou_type):
    """
    What detectron2's COCOEvaluator reports, also without a detection: 0 where there are ground
    truths.

    Args:
        gt (GroundTruth):
        detections (Detections):
        iou_type (str): "segm" or "bbox".

    Returns:
        dict[str, float]: AP AP50 AP75 APs APm APl in percent. NaN where the data set has no ground
        truth (of that size), and throughout where "segm" is asked for and there are no masks, and
        for detections without scores.
    """
    without_masks = gt.regions.masks is None or detections.regions.masks is None
    if not detections.scored or (iou_type == "segm" and without_masks):
        return dict.fromkeys(STATS, float("nan"))
    evaluation = COCOeval_faster(*_coco(gt, detections, iou_type), iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return {
        name: float(100 * value) if value >= 0 else float("nan")  # COCO says -1 for undefined
        for name, value in zip(STATS, evaluation.stats, strict=False)
    }


def ranked_by_coco(gt, detections, iou_type, unit_of_image, num_units):
    """
    What COCO's figures are made of, to be made under other weights: pycocotools matches once, at
    each IoU threshold and for each range of areas, and leaves out what it ignores there.

    Args:
        gt (GroundTruth):
        detections (Detections):
        iou_type (str): "segm" (both must have masks) or "bbox".
        unit_of_image (np.ndarray): (number of images,) int in [0, num_units).
        num_units (int):

    Returns:
        dict[str, list[RankedDetections]]: AP AP75 APs APm APl -> one for each class and IoU
        threshold, over whose ``sampled_area`` the figure is a mean.
    """
    evaluation = COCOeval(*_coco(gt, detections, iou_type), iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    position = {image["id"]: i for i, image in enumerate(gt.images)}
    images = len(gt.images)
    ranked = {}
    for k, a in product(range(len(gt.categories)), range(4)):
        start = (k * 4 + a) * images
        parts = [part for part in evaluation.evalImgs[start : start + images] if part]
        if not parts:
            continue
        units = unit_of_image[[position[part["image_id"]] for part in parts]]
        unit = np.repeat(units, [len(part["dtIds"]) for part in parts])
        score = np.concatenate([part["dtScores"] for part in parts])
        hit = np.concatenate([part["dtMatches"] for part in parts], axis=1) > 0
        ignored = np.concatenate([part["dtIgnore"] for part in parts], axis=1).astype(bool)
        truths = [np.sum(np.asarray(part["gtIgnore"]) == 0) for part in parts]
        lesions = np.bincount(units, truths, minlength=num_units).astype(int)
        for t in range(len(hit)):
            own = ~ignored[t]
            ranked[k, a, t] = RankedDetections(score[own], hit[t, own], unit[own], lesions)
    return {
        name: [curve for (_, a, t), curve in ranked.items() if a == area and t in thresholds]
        for name, (thresholds, area) in PARTS.items()
    }


def _coco(gt, detections, iou_type):
    """(ground truth, detections), each as a COCO."""
    if iou_type == "segm":
        area = mask_areas(detections.regions.masks)
    else:
        area = detections.regions.boxes[:, 2] * detections.regions.boxes[:, 3]
    return (
        _side(gt, gt.regions, iou_type, area=gt.area, iscrowd=gt.crowd.astype(int)),
        _side(gt, detections.regions, iou_type, area=area, score=detections.score),
    )


def _side(gt, regions, iou_type, **columns):
    """Regions as a COCO, each with the value that every column has for it."""
    columns = {name: values.tolist() for name, values in columns.items()}
    image_ids = [image["id"] for image in gt.images]
    category_ids = [category["id"] for category in gt.categories]
    shape = {"segm": ("segmentation", regions.masks), "bbox": ("bbox", regions.boxes.tolist())}
    key, shapes = shape[iou_type]
    coco = COCO()
    coco.dataset = {
        # faster-coco-eval wants sizes, which it then has no use for: masks bring their own.
        "images": [{"height": 0, "width": 0, **image} for image in gt.images],
        "categories": gt.categories,
        "annotations": [
            {
                # From 1: COCOeval takes a match with the ground truth of id 0 for none.
                "id": row + 1,
                "image_id": image_ids[image],
                "category_id": category_ids[category],
                "iscrowd": 0,
                key: shapes[row],
                **{name: values[row] for name, values in columns.items()},
            }
            for row, (image, category) in enumerate(
                zip(regions.image.tolist(), regions.category.tolist(), strict=True)
            )
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
