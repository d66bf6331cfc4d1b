"""Whether an exported file predicts what its original does, within bounds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.images import read_image
from imrcnn_d2.deploy.outputs import records

if TYPE_CHECKING:
    from imrcnn_d2.deploy.predictor import Predictor

__all__ = ["LEAST_SCORE", "Differences", "compare_predictors", "compare_records"]

LEAST_SCORE = 0.3  # of detections that the other predictor must have too
LEAST_IOU = 0.5  # of two detections that are taken for the same


@dataclass(frozen=True)
class Differences:
    """
    The differences between two predictors, a reference and another.

    Attributes:
        images: number compared.
        detections: with a score of at least 0.3 from either; of a classification model the images.
        unmatched: detections that the other predictor lacks (box IoU of 0.5, same class). Of two
            boxes that overlap by about NMS_THRESH_TEST, a rounding decides which one stays.
        lost: unmatched detections with a score of at least the reference's ``tau``.
        scores: of each matched pair the difference of scores, or the largest difference of the
            classes' probabilities.
        boxes: of each matched pair the largest difference of the box's sides, in percent of the
            image's longer side.
        mask_ious: of each matched pair the masks' IoU; empty where there are no masks.
    """

    images: int
    detections: int
    unmatched: int
    lost: int
    scores: np.ndarray
    boxes: np.ndarray
    mask_ious: np.ndarray

    def largest(self, share: float = 1.0) -> tuple[float, float, float]:
        """Bounds that hold for this share of pairs: of scores, of boxes, and the least mask IoU."""
        score, box = (
            float(np.quantile(values, share, method="higher")) if len(values) else 0.0
            for values in (self.scores, self.boxes)
        )
        ious = self.mask_ious
        iou = float(np.quantile(ious, 1 - share, method="lower")) if len(ious) else 1.0
        return score, box, iou

    def exceeded(
        self,
        *,
        lost: float,
        unmatched: float,
        score: float,
        box: float,
        mask_iou: float,
        share: float = 1.0,
    ) -> list[str]:
        """
        Args:
            lost, unmatched: bounds, in percent of the detections.
            score, box, mask_iou: bounds of `largest`.
            share: of the pairs, for which these have to hold.

        Returns:
            A sentence for each bound that is exceeded.
        """
        lost_percent, unmatched_percent = (
            100 * number / max(self.detections, 1) for number in (self.lost, self.unmatched)
        )
        largest_score, largest_box, least_iou = self.largest(share)
        checks = [  # NaN is beyond any bound
            (
                lost_percent > lost,
                f"{self.lost} detections above τ are in one of the two only, over {lost:g} %",
            ),
            (
                unmatched_percent > unmatched,
                f"{unmatched_percent:.3g} % are in one of the two only, over {unmatched:g} %",
            ),
            (
                not largest_score <= score,
                f"scores differ by {largest_score:.3g}, more than {score:g}",
            ),
            (not largest_box <= box, f"boxes differ by {largest_box:.3g} %, more than {box:g} %"),
            (not least_iou >= mask_iou, f"masks overlap {least_iou:.3g}, less than {mask_iou:g}"),
        ]
        return [text for exceeds, text in checks if exceeds]


def compare_predictors(reference: "Predictor", other: "Predictor", paths: list[Path]):
    """Returns the `Differences` of two predictors of the same model on images."""
    sizes, results = [], ([], [])
    for path in paths:
        image = read_image(path)
        sizes.append(image.shape[:2])
        for predictor, annotations in zip((reference, other), results, strict=True):
            output = predictor.forward([predictor.prepare(image)])[0]
            annotations.append(records(predictor, output, *sizes[-1]))
    return compare_records(*results, sizes, reference.tau)


def compare_records(
    reference: list[list[dict]],
    other: list[list[dict]],
    sizes: list[tuple[int, int]],
    tau: float | None,
) -> Differences:
    """
    Args:
        reference, other: the predictions of two models in the same images, see `records`.
        sizes: of the images, (height, width).
        tau: the threshold of scores; None of classification models.
    """
    scores, boxes, ious = [], [], []
    detections, unmatched = 0, []
    for in_reference, in_other, size in zip(reference, other, sizes, strict=True):
        if tau is None:
            detections += 1
            one, two = (np.array(each[0]["probabilities"]) for each in (in_reference, in_other))
            scores.append(float(abs(one - two).max()))
            continue
        pairs, missing = _match(in_reference, in_other)
        detections += len(pairs) + len(missing)
        unmatched += missing
        for one, two in pairs:
            scores.append(abs(one["score"] - two["score"]))
            boxes.append(100 * abs(_corners(one) - _corners(two)).max() / max(size))
            if "segmentation" in one:
                ious.append(_mask_iou(one["segmentation"], two["segmentation"]))
    return Differences(
        images=len(sizes),
        detections=detections,
        unmatched=len(unmatched),
        lost=0 if tau is None else sum(score >= tau for score in unmatched),
        scores=np.array(scores),
        boxes=np.array(boxes),
        mask_ious=np.array(ious),
    )


def _mask_iou(mask, other):
    if not mask_util.area([mask, other]).any():  # a thin box can hold no pixel's centre
        return 1.0
    return float(mask_util.iou([mask], [other], [0])[0, 0])


def _corners(annotation):
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _match(reference, other):
    """
    Pairs of the same detections, by falling overlap, and the scores of those without a partner, if
    they matter. A detection of a small score may be the other's of a larger one.
    """
    both = reference, other
    boxes = [np.array([a["bbox"] for a in each]).reshape(-1, 4) for each in both]
    iou = np.asarray(mask_util.iou(*boxes, [0] * len(other))).reshape(len(reference), len(other))
    classes = [np.array([a["category_id"] for a in each]) for each in both]
    iou[classes[0][:, None] != classes[1]] = 0
    pairs, left = [], [set(range(len(each))) for each in both]
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = map(int, np.unravel_index(flat, iou.shape))
        if iou[i, j] < LEAST_IOU:
            break
        if i in left[0] and j in left[1]:
            left[0].remove(i)
            left[1].remove(j)
            if max(reference[i]["score"], other[j]["score"]) >= LEAST_SCORE:
                pairs.append((reference[i], other[j]))
    missing = [each[i]["score"] for each, rest in zip(both, left, strict=True) for i in rest]
    return pairs, [score for score in missing if score >= LEAST_SCORE]
