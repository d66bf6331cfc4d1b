"""COCO's average precision, by pycocotools."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .records import mask_areas

__all__ = ["coco_average_precision"]

# Positions in COCOeval.stats.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


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
        truth (of that size), and throughout where "segm" is asked for and there are no masks.
    """
    if iou_type == "segm" and (gt.regions.masks is None or detections.regions.masks is None):
        return dict.fromkeys(STATS, float("nan"))
    truth = _coco(gt, gt.regions, iou_type, area=gt.area, iscrowd=gt.crowd.astype(int))
    if iou_type == "segm":
        area = mask_areas(detections.regions.masks)
    else:
        area = detections.regions.boxes[:, 2] * detections.regions.boxes[:, 3]
    found = _coco(gt, detections.regions, iou_type, area=area, score=detections.score)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: float(100 * value) if value >= 0 else float("nan")  # COCO says -1 for undefined
        for name, value in zip(STATS, evaluation.stats, strict=False)
    }


def _coco(gt, regions, iou_type, **columns):
    """Regions as a pycocotools COCO, each with the value that every column has for it."""
    coco = COCO()
    annotations = []
    for row in range(len(regions)):
        annotation = {
            # From 1: COCOeval takes a match with the ground truth of id 0 for none.
            "id": row + 1,
            "image_id": gt.images[regions.image[row]]["id"],
            "category_id": gt.categories[regions.category[row]]["id"],
            "iscrowd": 0,
            **{name: values[row] for name, values in columns.items()},
        }
        if iou_type == "segm":
            annotation["segmentation"] = regions.masks[row]
        else:
            annotation["bbox"] = regions.boxes[row].tolist()
        annotations.append(annotation)
    coco.dataset = {
        "images": gt.images,
        "categories": gt.categories,
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
