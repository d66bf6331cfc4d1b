"""COCO's average precision, by faster-coco-eval: pycocotools' values, computed in C++."""

import contextlib
import io
from collections import defaultdict
from itertools import product

import numpy as np
from faster_coco_eval import COCOeval_faster
from pycocotools.cocoeval import COCOeval

from imrcnn_d2.evaluation.detection.counts import LesionCounter
from imrcnn_d2.evaluation.detection.curves import RankedDetections, Ranking
from imrcnn_d2.evaluation.detection.inputs import mask_areas

# Positions in COCOeval.stats.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Positions of COCO's IoU thresholds (0.5, 0.55, ... 0.95) and of its area ranges (all, small,
# medium, large), over which each metric is a mean.
PARTS = {
    **{"AP": (range(10), 0), "AP75": ((5,), 0)},
    **{"APs": (range(10), 1), "APm": (range(10), 2), "APl": (range(10), 3)},
}


class _OverlapsGiven:
    """Either COCOeval with the overlaps given, so that it needs no masks and no index. Images and
    classes go by their positions."""

    def computeIoU(self, image, category):
        """(D, G) array, detections by falling score and ground truths in file order; [] if none."""
        return self.overlaps.get((image, category), [])


class _Fast(_OverlapsGiven, COCOeval_faster):
    def _prepare(self):
        for side, records in ((self.gt_dataset, self.truth), (self.dt_dataset, self.detected)):
            for record in records:
                side.append_ref(record["image_id"], record["category_id"], record)
        self._nonempty_iou_pairs = self.overlaps.keys()


class _Readable(_OverlapsGiven, COCOeval):
    """pycocotools' evaluation, which exposes its matches."""

    def _prepare(self):
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for side, records in ((self._gts, self.truth), (self._dts, self.detected)):
            for record in records:
                side[record["image_id"], record["category_id"]].append(record)


def coco_average_precision(counter: LesionCounter, iou_type: str) -> dict[str, float]:
    """AP AP50 AP75 APs APm APl in percent, as detectron2's COCOEvaluator reports them, also without
    a detection: 0 where there are ground truths. NaN where the data set has no ground truth (of
    that size), without masks and without scores. Sizes are those of masks ("segm") or boxes."""
    if not counter.detections.scored or iou_type not in counter.overlaps:
        return dict.fromkeys(STATS, float("nan"))
    evaluation = _evaluate(_Fast, counter, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: float(100 * value) if value >= 0 else float("nan")  # COCO says -1 for undefined
        for name, value in zip(STATS, evaluation.stats, strict=False)
    }


def ranked_by_coco(
    counter: LesionCounter, iou_type: str, unit_of_image: np.ndarray, num_units: int
) -> dict[str, list[RankedDetections]]:
    """What COCO's metrics are made of, to be made under other weights: pycocotools matches once, at
    each IoU threshold and for each range of areas, and leaves out what it ignores there. AP AP75
    APs APm APl -> one for each class and IoU threshold, over whose ``sampled_area`` the metric is a
    mean."""
    evaluation = _evaluate(_Readable, counter, iou_type)
    images = len(counter.gt.images)
    ranked = {}
    for k, a in product(range(len(counter.gt.categories)), range(4)):
        start = (k * 4 + a) * images
        parts = [part for part in evaluation.evalImgs[start : start + images] if part]
        if not parts:
            continue
        units = unit_of_image[[part["image_id"] for part in parts]]
        unit = np.repeat(units, [len(part["dtIds"]) for part in parts])
        score = np.concatenate([part["dtScores"] for part in parts])
        hit = np.concatenate([part["dtMatches"] for part in parts], axis=1) > 0
        ignored = np.concatenate([part["dtIgnore"] for part in parts], axis=1).astype(bool)
        truths = [np.sum(np.asarray(part["gtIgnore"]) == 0) for part in parts]
        lesions = np.bincount(units, truths, minlength=num_units).astype(int)
        for t in range(len(hit)):
            evaluated = ~ignored[t]
            ranking = Ranking(score[evaluated], unit[evaluated])
            ranked[k, a, t] = RankedDetections(ranking, hit[t, evaluated], lesions)
    return {
        name: [curve for (_, a, t), curve in ranked.items() if a == area and t in thresholds]
        for name, (thresholds, area) in PARTS.items()
    }


def _evaluate(cls, counter, iou_type):
    """An evaluation of class ``cls``, which has matched."""
    gt, regions = counter.gt, counter.detections.regions
    area = regions.boxes[:, 2] * regions.boxes[:, 3]
    if iou_type == "segm":
        area = mask_areas(regions.masks)
    evaluation = cls(iouType="bbox")  # "segm" would decode all masks
    evaluation.params.imgIds = list(range(len(gt.images)))
    evaluation.params.catIds = list(range(len(gt.categories)))
    crowd = gt.crowd.astype(int)
    evaluation.truth = _records(gt.regions, area=gt.area, iscrowd=crowd, ignore=crowd)
    evaluation.detected = _records(regions, area=area, score=counter.detections.score)
    evaluation.overlaps = _dense(regions, len(gt.categories), counter.overlaps[iou_type])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return evaluation


def _dense(regions, num_categories, overlaps):
    """{(image, category): (D, G) overlaps} where there are both."""
    key = (regions.image * num_categories + regions.category)[overlaps.dt]
    limits = np.flatnonzero(np.diff(key, prepend=-1, append=-1))
    last = overlaps.dt[limits[1:] - 1]
    parts = np.split(overlaps.iou, limits[1:-1])[: len(last)]
    columns = (values[last].tolist() for values in (regions.image, regions.category, overlaps.rank))
    return {
        (image, category): part.reshape(rank + 1, -1)
        for image, category, rank, part in zip(*columns, parts, strict=True)
    }


def _records(regions, **columns):
    """Regions as COCO annotations, each with the value that every column has for it."""
    columns |= {"image_id": regions.image, "category_id": regions.category}
    # From 1: COCOeval takes a match with the ground truth of id 0 for none.
    columns["id"] = np.arange(1, len(regions) + 1)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
