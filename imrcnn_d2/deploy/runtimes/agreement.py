"""Whether two predictors say the same."""

from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.images import read_image
from imrcnn_d2.deploy.outputs import records

__all__ = ["LEAST_SCORE", "Agreement", "compare_predictors", "compare_records"]


LEAST_SCORE = 0.3  # of the detections that the other predictor has to find as well
LEAST_IOU = 0.5  # of two that are taken for the same


@dataclass(frozen=True)
class Agreement:
    """
    The differences between two predictors.

    Attributes:
        images (int): compared.
        detections (int): with a score of at least 0.3 from either; of a recognition model the
            images.
        unmatched (int): those of them that the other has not (box IoU of 0.5, same class). Of two
            that overlap by about NMS_THRESH_TEST, a rounding decides which one stays.
        lost (int): the unmatched that count, with a score of at least the reference's ``tau``.
        scores (np.ndarray): of each detection that both have, the scores' difference, or the
            largest one of the classes' probabilities.
        boxes (np.ndarray): likewise, the largest one of the box's sides, in percent of the image's
            longer side.
        mask_ious (np.ndarray): likewise, the masks' overlap; empty where there are none.
    """

    images: int
    detections: int
    unmatched: int
    lost: int
    scores: np.ndarray
    boxes: np.ndarray
    mask_ious: np.ndarray

    def largest(self, share=1.0):
        """
        Args:
            share (float): of the detections, in (0, 1], that differ by no more.

        Returns:
            tuple[float, float, float]: difference of scores, of boxes, and least overlap of masks.
        """
        score, box = (
            float(np.quantile(values, share, method="higher")) if len(values) else 0.0
            for values in (self.scores, self.boxes)
        )
        ious = self.mask_ious
        iou = float(np.quantile(ious, 1 - share, method="lower")) if len(ious) else 1.0
        return score, box, iou

    def exceeded(self, *, lost, unmatched, score, box, mask_iou, share=1.0):
        """
        Args:
            lost, unmatched (float): bounds, in percent of the detections.
            score, box, mask_iou (float): bounds of :meth:`largest`.
            share (float): that they hold for.

        Returns:
            list[str]: what is beyond its bound, in words.
        """
        one_only = [100 * n / max(self.detections, 1) for n in (self.lost, self.unmatched)]
        found = self.largest(share)
        checks = [  # NaN is beyond any bound
            (
                one_only[0] > lost,
                f"{self.lost} detections that count are in one of the two only, over {lost:g} %",
            ),
            (
                one_only[1] > unmatched,
                f"{one_only[1]:.3g} % are in one of the two only, over {unmatched:g} %",
            ),
            (not found[0] <= score, f"scores differ by {found[0]:.3g}, more than {score:g}"),
            (not found[1] <= box, f"boxes differ by {found[1]:.3g} %, more than {box:g} %"),
            (not found[2] >= mask_iou, f"masks overlap {found[2]:.3g}, less than {mask_iou:g}"),
        ]
        return [text for failed, text in checks if failed]


def compare_predictors(reference, other, paths):
    """
    Args:
        reference, other (Predictor): of the same model.
        paths (list[Path]): images.

    Returns:
        Agreement:
    """
    sizes, found = [], ([], [])
    for path in paths:
        image = read_image(path)
        sizes.append(image.shape[:2])
        for predictor, results in zip((reference, other), found, strict=True):
            output = predictor.forward([predictor.prepare(image)])[0]
            results.append(records(predictor, output, *sizes[-1]))
    return compare_records(*found, sizes, reference.tau)


def compare_records(reference, other, sizes, tau):
    """
    Args:
        reference, other (list[list[dict]]): what two predictors found in the same images, see
            :func:`records`.
        sizes (list[tuple[int, int]]): of the images, (height, width).
        tau (float or None): score from which on a detection counts; None of recognition models.

    Returns:
        Agreement:
    """
    scores, boxes, ious = [], [], []
    detections, unmatched = 0, []
    for ones, twos, size in zip(reference, other, sizes, strict=True):
        if tau is None:
            detections += 1
            pair = [np.array(found[0]["probabilities"]) for found in (ones, twos)]
            scores.append(float(abs(pair[0] - pair[1]).max()))
            continue
        pairs, missing = _pairs(ones, twos)
        detections += len(pairs) + len(missing)
        unmatched += missing
        for one, two in pairs:
            scores.append(abs(one["score"] - two["score"]))
            boxes.append(100 * abs(_corners(one) - _corners(two)).max() / max(size))
            if "segmentation" in one:
                ious.append(_overlap(one["segmentation"], two["segmentation"]))
    return Agreement(
        images=len(sizes),
        detections=detections,
        unmatched=len(unmatched),
        lost=0 if tau is None else sum(score >= tau for score in unmatched),
        scores=np.array(scores),
        boxes=np.array(boxes),
        mask_ious=np.array(ious),
    )


def _overlap(mask, other):
    if not mask_util.area([mask, other]).any():  # a thin box can hold no pixel's centre
        return 1.0
    return float(mask_util.iou([mask], [other], [0])[0, 0])


def _corners(annotation):
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _pairs(ones, twos):
    """
    The same detections of two predictors, each at most once, by falling overlap; and the scores of
    those that are left, if they matter. One of a small score may be the other's of a larger one.
    """
    boxes = [np.array([a["bbox"] for a in found]).reshape(-1, 4) for found in (ones, twos)]
    iou = np.asarray(mask_util.iou(*boxes, [0] * len(twos))).reshape(len(ones), len(twos))
    classes = [np.array([a["category_id"] for a in found]) for found in (ones, twos)]
    iou[classes[0][:, None] != classes[1]] = 0
    pairs, left = [], [set(range(len(ones))), set(range(len(twos)))]
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = map(int, np.unravel_index(flat, iou.shape))
        if iou[i, j] < LEAST_IOU:
            break
        if i in left[0] and j in left[1]:
            left[0].remove(i)
            left[1].remove(j)
            if max(ones[i]["score"], twos[j]["score"]) >= LEAST_SCORE:
                pairs.append((ones[i], twos[j]))
    missing = [ones[i]["score"] for i in left[0]] + [twos[j]["score"] for j in left[1]]
    return pairs, [score for score in missing if score >= LEAST_SCORE]
