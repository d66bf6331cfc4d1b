"""The interface of all runtimes, and the metadata of the files that they export."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from detectron2.structures import Instances
from torch import nn

from imrcnn_d2.deploy.runtimes.check import Differences, compare_predictors
from imrcnn_d2.engine.run_record import config_sha256

if TYPE_CHECKING:
    from imrcnn_d2.deploy.loading import LoadedModel
    from imrcnn_d2.deploy.predictor import Predictor

__all__ = ["EXPORT_VERSION", "Runtime", "export_metadata"]

# Of the metadata of exported files; a larger one is of a later version of this package.
EXPORT_VERSION = 1


class Runtime(ABC):
    """
    Runs the network of a model. Pre- and post-processing are the `Predictor`'s, and so the same for
    all runtimes.

    Attributes:
        name: in ``RUNTIMES`` and ``--runtime``.
        suffix: of the files that it exports; None if it exports none.
        precisions: of these files.
        exact_precisions: those in which an export predicts exactly what its original does.
        metadata: of the file that it was loaded from, see `export_metadata`; else empty.
    """

    name: ClassVar[str]
    suffix: ClassVar[str | None] = None
    precisions: ClassVar[tuple[str, ...]] = ()
    exact_precisions: ClassVar[tuple[str, ...]] = ()
    metadata: dict = {}

    @abstractmethod
    def __call__(self, images: list[torch.Tensor]) -> list[Instances] | list[torch.Tensor]:
        """
        Args:
            images: uint8, (C, H, W), of one size.

        Returns:
            One item per image, on the CPU. Of a detector, ``Instances`` with ``pred_boxes`` (N, 4)
            xyxy in pixels of the input, ``scores`` (N,), ``pred_classes`` (N,) and, where it has
            masks, ``pred_masks`` (N, 1, h, w), probabilities within the box. Of an image
            classifier, the classes' probabilities (K,), float32.
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
        """
        Writes a model as one file, which a `Predictor` takes without a config.

        Args:
            path: ends with the runtime's suffix; replaced at once, or not at all.
            example: an image as the network sees it, (C, H, W) uint8.
            precision: one of ``precisions``.
            calibration: such images of the training set, to fit the ranges of int8; a few hundred
                are enough.

        Raises:
            ValueError: the model cannot be exported in this format or precision.
            ModuleNotFoundError: a package of the extra [deploy] is missing.
        """
        raise ValueError(f"The runtime {cls.name} has no files")

    @classmethod
    def check_precision(cls, precision: str) -> None:
        """
        Raises:
            ValueError: it is none of ``precisions``.
        """
        if precision not in cls.precisions:
            known = ", ".join(cls.precisions)
            raise ValueError(f"There is no {precision} of {cls.suffix[1:]}; choose of {known}")

    @classmethod
    def load(cls, path: Path) -> Runtime | None:
        """The runtime of an exported file; None if the file holds weights, not the network."""
        return None

    @classmethod
    def check(
        cls, original: Predictor, exported: Predictor, images: list[Path], bounds: dict[str, float]
    ) -> tuple[Differences, list[str]]:
        """Compares an exported file with its original, and returns `Differences.exceeded` too."""
        differences = compare_predictors(original, exported, images)
        return differences, differences.exceeded(**bounds)


def export_metadata(loaded: LoadedModel, precision: str) -> dict:
    """
    The metadata of an exported file, of JSON types: ``config`` (YAML), ``classes``,
    ``operating_point``, ``tau``, ``model``, ``backbone``, ``precision``, ``version``,
    ``config_sha256``, ``weights_sha256`` (of the original weights) and ``artifact`` (the format's
    version).
    """
    cfg = loaded.cfg.clone()
    cfg.defrost()
    # Of the machine that it was trained on.
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = "./output", "cpu"
    model, backbone = loaded.names
    point = loaded.weights.operating_point
    return {
        "artifact": EXPORT_VERSION,
        "version": importlib.metadata.version("imrcnn-d2"),
        "model": model,
        "backbone": backbone,
        "classes": loaded.classes,
        "tau": loaded.tau,
        "operating_point": point and vars(point),
        "precision": precision,
        "weights_sha256": loaded.weights.sha256,
        "config_sha256": config_sha256(cfg),
        "config": cfg.dump(),
    }
