"""The interface of all runtimes, the files that they export, and whether these predict alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Instances
from torch import nn

from imrcnn_d2.data.images import read_image
from imrcnn_d2.deploy.outputs import records

if TYPE_CHECKING:
    from imrcnn_d2.deploy.loading import LoadedModel
    from imrcnn_d2.deploy.predictor import Predictor

# Of the metadata of exported files; a larger one is of a later version of this package.
EXPORT_VERSION = 1
LEAST_SCORE = 0.3  # of detections that the other predictor must have too
LEAST_IOU = 0.5  # of two detections that are taken for the same


class Runtime(ABC):
    """Runs the network of a model. Pre- and post-processing are the `Predictor`'s, and so the same
    for all runtimes.
    """

    name: ClassVar[str]  # in RUNTIMES and --runtime
    suffix: ClassVar[str | None] = None  # of the files that it exports; None if it exports none
    precisions: ClassVar[tuple[str, ...]] = ()  # of these files
    exact_precisions: ClassVar[tuple[str, ...]] = ()  # an export predicts exactly what its original
    metadata: dict = {}  # of the file that it was loaded from, see `export_metadata`; else empty

    @abstractmethod
    def __call__(self, images: list[torch.Tensor]) -> list[Instances] | list[torch.Tensor]:
        """Returns one item per image, uint8 (C, H, W), all of one size, on the CPU. Of a detector,
        ``Instances`` with ``pred_boxes`` (N, 4) xyxy in pixels of the input, ``scores`` (N,),
        ``pred_classes`` (N,) and, where it has masks, ``pred_masks`` (N, 1, h, w), probabilities
        within the box. Of an image classifier, the classes' probabilities (K,), float32.
        """

    @classmethod
    @abstractmethod
    def from_model(cls, model: nn.Module, example: torch.Tensor | None) -> Runtime:
        """Makes the runtime of a model in evaluation mode; ``example`` is (C, H, W) uint8."""

    @classmethod
    def export(
        cls,
        loaded: LoadedModel,
        path: Path,
        *,
        example: torch.Tensor | None = None,
        precision: str = "fp32",
        calibration: Sequence[torch.Tensor] = (),
    ) -> None:
        """Writes a model as one file, which a `Predictor` takes without a config. Example and
        calibration images are as the network sees them, (C, H, W) uint8; int8 needs a few hundred
        images of the training set, to fit the ranges of its values.

        Raises:
            ValueError: the model cannot be exported in this format or precision.
            ModuleNotFoundError: a package of the extra [deploy] is missing.
        """
        raise ValueError(f"The runtime {cls.name} has no files")

    @classmethod
    def check_precision(cls, precision: str) -> None:
        """Raises a ValueError if it is none of ``precisions``."""
        if precision not in cls.precisions:
            known = ", ".join(cls.precisions)
            raise ValueError(f"There is no {precision} of {cls.suffix[1:]}; choose of {known}")

    @classmethod
    def load(cls, path: Path) -> Runtime | None:
        """The runtime of an exported file; None if the file holds weights, not the network."""
        return None

    @classmethod
    def check(cls, original: Predictor, exported: Predictor, images: list[Path]) -> Differences:
        """Compares an exported file with its original."""
        sizes, results = [], ([], [])
        for path in images:
            image = read_image(path)
            sizes.append(image.shape[:2])
            for predictor, in_images in zip((original, exported), results, strict=True):
                (output,) = predictor.forward([predictor.prepare(image)])
                in_images.append(records(predictor, output, *sizes[-1]))
        return compare_records(*results, sizes, original.tau)


def export_metadata(loaded: LoadedModel, precision: str) -> dict:
    """The metadata of an exported file, of JSON types; ``weights_sha256`` is of the original
    weights, ``artifact`` the format's version.
    """
    cfg = loaded.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = "./output", "cpu"  # not of the machine of the training
    point = loaded.weights.operating_point
    return {
        **{"artifact": EXPORT_VERSION, "precision": precision, **loaded.facts},
        **{"classes": loaded.classes, "operating_point": point and vars(point)},
        "config": cfg.dump(),
    }


@dataclass(frozen=True)
class Differences:
    """The differences between two predictors, a reference and another. Of a classification model,
    images count as detections.
    """

    images: int
    detections: int  # with a score of at least 0.3 from either
    # Detections that the other predictor lacks (box IoU of 0.5, same class): of two boxes that
    # overlap by about NMS_THRESH_TEST, a rounding decides which one stays.
    unmatched: int
    lost: int  # unmatched detections with a score of at least the reference's tau
    scores: np.ndarray  # difference of scores, or the largest of the classes' probabilities
    boxes: np.ndarray  # largest difference of the sides, in percent of the image's longer side
    mask_ious: np.ndarray  # empty where there are no masks

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
        self, *, lost: float, unmatched: float, score: float, box: float, mask_iou: float, share=1.0
    ) -> list[str]:
        """A sentence for each bound that is exceeded: ``lost`` and ``unmatched`` are in percent of
        the detections, the others have to hold for a ``share`` of the pairs, see `largest`.
        """
        percent = 100 / max(self.detections, 1)
        largest_score, largest_box, least_iou = self.largest(share)
        checks = {  # NaN is beyond any bound
            f"{self.lost} above τ are in one of the two only, over {lost:g} %": (
                percent * self.lost <= lost
            ),
            f"{percent * self.unmatched:.3g} % are in one of the two only, over {unmatched:g} %": (
                percent * self.unmatched <= unmatched
            ),
            f"scores differ by {largest_score:.3g}, more than {score:g}": largest_score <= score,
            f"boxes differ by {largest_box:.3g} %, more than {box:g} %": largest_box <= box,
            f"masks overlap {least_iou:.3g}, less than {mask_iou:g}": least_iou >= mask_iou,
        }
        return [text for text, holds in checks.items() if not holds]


def compare_records(
    reference: list[list[dict]], other: list[list[dict]], sizes: list, tau: float | None
) -> Differences:
    """Compares the predictions of two models in the same images, see `records`, with the images'
    (height, width), and the threshold of scores, None of classification models.
    """
    scores, boxes, ious = [], [], []
    detections, unmatched = 0, []
    for in_reference, in_other, size in zip(reference, other, sizes, strict=True):
        if tau is None:
            detections += 1
            first, second = (np.array(a[0]["probabilities"]) for a in (in_reference, in_other))
            scores.append(float(abs(first - second).max()))
            continue
        pairs, missing = _match(in_reference, in_other)
        detections += len(pairs) + len(missing)
        unmatched += missing
        for first, second in pairs:
            scores.append(abs(first["score"] - second["score"]))
            boxes.append(100 * abs(_corners(first) - _corners(second)).max() / max(size))
            if "segmentation" in first:
                masks = [first["segmentation"], second["segmentation"]]
                # a thin box can hold no pixel's centre
                is_empty = not mask_util.area(masks).any()
                ious.append(1.0 if is_empty else mask_util.iou(masks[:1], masks[1:], [0])[0, 0])
    lost = 0 if tau is None else sum(score >= tau for score in unmatched)
    values = map(np.array, (scores, boxes, ious))
    return Differences(len(sizes), detections, len(unmatched), lost, *values)


def _corners(annotation):
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _match(reference, other):
    """Pairs of the same detections, by falling overlap, and the scores of those without a partner,
    if they matter. A detection of a small score may be the other's of a larger one.
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
