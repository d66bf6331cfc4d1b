"""Whether two predictors say the same."""

from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.images import read_image

from .records import records

__all__ = ["Agreement", "compare_predictors"]

LEAST_SCORE = 0.3  # of the detections that the other predictor has to find as well
LEAST_IOU = 0.5  # of two that are taken for the same


@dataclass(frozen=True)
class Agreement:
    """
    The largest differences between two predictors.

    Attributes:
        images (int): compared.
        detections (int): with a score of at least 0.3 from either; of a recognition model the
            images.
        unmatched (int): those of them that the other has not (box IoU of 0.5, same class). Of two
            that overlap by about NMS_THRESH_TEST, a rounding decides which one stays.
        lost (int): the unmatched that count, with a score of at least the reference's ``tau``.
        score (float): largest difference of two scores, or of a class's probabilities.
        box (float): of a box's side, in percent of the image's longer side.
        mask_iou (float): smallest overlap of two masks; 1 where there are none.
    """

    images: int
    detections: int
    unmatched: int
    lost: int
    score: float
    box: float
    mask_iou: float

    def exceeded(self, *, unmatched, score, box, mask_iou):
        """
        Args:
            unmatched (float): bound, in percent of the detections.
            score, box, mask_iou (float): bounds.

        Returns:
            list[str]: what is beyond its bound, in words.
        """
        share = 100 * self.unmatched / max(self.detections, 1)
        checks = [
            (self.lost > 0, f"{self.lost} detections that count are in one of the two only"),
            (share > unmatched, f"{share:.3g} % are in one of the two only, over {unmatched:g} %"),
            (self.score > score, f"scores differ by {self.score:.3g}, more than {score:g}"),
            (self.box > box, f"boxes differ by {self.box:.3g} %, more than {box:g} %"),
            (
                self.mask_iou < mask_iou,
                f"masks overlap {self.mask_iou:.3g}, less than {mask_iou:g}",
            ),
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
    scores, boxes, ious = [0.0], [0.0], [1.0]
    detections, unmatched = 0, []
    for path in paths:
        image = read_image(path)
        size = image.shape[:2]
        found = [
            records(each, each.forward([each.prepare(image)])[0], *size)
            for each in (reference, other)
        ]
        if reference.is_classifier:
            detections += 1
            pair = [np.array(annotations[0]["probabilities"]) for annotations in found]
            scores.append(float(abs(pair[0] - pair[1]).max()))
            continue
        pairs, missing = _pairs(*found)
        detections += len(pairs) + len(missing)
        unmatched += missing
        for one, two in pairs:
            scores.append(abs(one["score"] - two["score"]))
            boxes.append(100 * abs(_corners(one) - _corners(two)).max() / max(size))
            if "segmentation" in one:
                masks = [one["segmentation"]], [two["segmentation"]]
                ious.append(float(mask_util.iou(*masks, [0])[0, 0]))
    return Agreement(
        images=len(paths),
        detections=detections,
        unmatched=len(unmatched),
        lost=sum(score >= reference.tau for score in unmatched),
        score=max(scores),
        box=float(max(boxes)),
        mask_iou=min(ious),
    )


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
