"""Images in, lesions out."""

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor

from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.deploy.loading import load_model, pretrained
from imrcnn_d2.deploy.runtimes import build_runtime
from imrcnn_d2.engine.config import is_classifier
from imrcnn_d2.engine.run_record import config_sha256

__all__ = ["FrameViews", "Predictor", "in_whole_frame"]


FIRST_FRAMES = 10


class FrameViews:
    """
    The view of an image, or of the frames of a video in turn.

    It is estimated anew in each of the first ten frames, from the brightest pixels so far, and then
    kept: a view does not move, and single frames may be dark.
    """

    def __init__(self):
        self._brightest, self._view, self._left = None, None, FIRST_FRAMES

    def __call__(self, image: np.ndarray) -> View | None:
        """Of the next frame, (H, W, 3) RGB, uint8; None while all frames have been dark."""
        if self._brightest is None or self._brightest.shape != image.shape:
            self.__init__()
            self._brightest = np.zeros_like(image)
        if self._left or self._view is None:
            self._brightest = np.maximum(self._brightest, image)
            view = find_view(self._brightest)
            self._view = None if view.is_empty else view
            self._left = max(0, self._left - 1)
        return self._view


def in_whole_frame(instances: Instances, box, height: int, width: int) -> Instances:
    """Moves instances in the coordinates of a box to those of the frame that it is in."""
    ret = Instances((height, width), **instances.get_fields())
    ret.pred_boxes = instances.pred_boxes.clone()
    ret.pred_boxes.tensor += ret.pred_boxes.tensor.new_tensor([box.x0, box.y0, box.x0, box.y0])
    if instances.has("pred_masks"):
        padding = box.x0, width - box.x1, box.y0, height - box.y1
        ret.pred_masks = F.pad(instances.pred_masks, padding)
    return ret


class Predictor:
    """
    A trained model, ready for images.

    .. code-block:: python

        predictor = Predictor("config.yaml", "model_best.pth")
        instances = predictor("image.jpg")
        lesions = instances[instances.scores >= predictor.tau]

    Attributes:
        tau: the threshold of scores; None of a classification model, which takes the likeliest
            class.
        classes: names, by class index.
        is_classifier: whether it is a classification model.
        has_masks: whether it predicts masks.
        crop_view: whether the network sees the endoscope's view only.
        requested_runtime: the argument ``runtime``; ``metadata`` has the one chosen.
        metadata: model, backbone, version, weights_sha256, config_sha256, tau and runtime of the
            predictions; crop_view, if it is True.
    """

    def __init__(
        self,
        config: CfgNode | str | Path | None,
        weights: str | Path,
        *,
        runtime: str | None = None,
        tau: float | None = None,
        device: str | None = None,
        crop_view: bool = False,
    ):
        """
        Args:
            config, weights, device: see `load_model`.
            runtime: see `build_runtime`.
            tau: None for the operating point that was chosen on validation data when the weights
                were saved, else MODEL.IMRCNN.SCORE_THRESH.
            crop_view: show the network the endoscope's view only, black outside it, as data
                prepared with --deidentify are; predictions are still of the whole frame.

        Raises:
            FileNotFoundError, ValueError: see `load_model`; or there is no such runtime, or ``tau``
                is given for a classification model.
        """
        loaded = load_model(config, weights, device=device)
        cfg = loaded.cfg
        self.classes = loaded.classes
        self.is_classifier, self.has_masks = is_classifier(cfg), cfg.MODEL.MASK_ON
        self.requested_runtime = runtime
        self.tau = loaded.tau if tau is None else tau
        self.crop_view = crop_view
        if self.is_classifier and tau is not None:
            raise ValueError(
                "A classification model takes the likeliest class: it has no threshold τ"
            )
        self._augmentation = T.AugmentationList(_augmentations(cfg))
        self._format = cfg.INPUT.FORMAT
        side = cfg.INPUT.MIN_SIZE_TEST or 512
        example = self.prepare(np.full((side, side, 3), 128, np.uint8))
        self._runtime = build_runtime(runtime, loaded.model, example)
        model, backbone = loaded.names
        self.metadata = {
            "model": model,
            "backbone": backbone,
            "version": importlib.metadata.version("imrcnn-d2"),
            "weights_sha256": loaded.weights.sha256,
            "config_sha256": config_sha256(cfg),
            "tau": self.tau,
            "runtime": self._runtime.name,
            **({"crop_view": True} if crop_view else {}),
        }

    @classmethod
    def from_pretrained(cls, name: str, **kwargs) -> "Predictor":
        """From weights that come with the package: "demo" finds polyps of the colon."""
        return cls(None, pretrained(name), **kwargs)

    def __call__(
        self, images: str | Path | np.ndarray | list, batch_size: int = 1
    ) -> Instances | Tensor | list:
        """
        Args:
            images: files, or RGB images (H, W, 3), uint8; or one of these.
            batch_size: images that the network sees at once, as far as they follow each other and
                are of one size to it; it does not change the result.

        Returns:
            For each image ``pred_boxes`` (N, 4) xyxy in pixels, ``scores`` (N,), ``pred_classes``
            (N,) and ``pred_masks`` (N, H, W) bool, by falling score, down to
            MODEL.ROI_HEADS.SCORE_THRESH_TEST, not only those above ``tau``. Of a classification
            model, the classes' probabilities (K,).

        Raises:
            BadInputError: a file cannot be read.
            ValueError: an array is no RGB image.
        """
        if isinstance(images, str | Path) or getattr(images, "ndim", 0) == 3:
            return self([images])[0]
        outputs = self.in_batches(map(self._load, images), batch_size)
        return [self.finish(output, *size, view) for (size, view), output in outputs]

    def _load(self, image):
        array = read_image(Path(image)) if isinstance(image, str | Path) else image
        view = self.views()(array)
        return (array.shape[:2], view), self.prepare(array, view)

    def views(self) -> Callable[[np.ndarray], View | None]:
        """
        Returns a function from an image, or the frames of a video in turn, to the ``view`` that
        `prepare` and `finish` take; it gives None without ``crop_view``.
        """
        return FrameViews() if self.crop_view else lambda image: None

    def prepare(self, image: np.ndarray, view: View | None = None) -> Tensor:
        """
        Args:
            image: (H, W, 3) RGB, uint8.
            view: the part that the network sees; None for all.

        Returns:
            What the network sees, (3, h, w) uint8, resized and in INPUT.FORMAT.

        Raises:
            ValueError: it is no such image, or a strip too thin to be resized.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"An image is {image.dtype} of shape {image.shape}, but RGB is uint8 of (H, W, 3)"
            )
        if not image.size:
            raise ValueError(f"An image of {image.shape[1]}x{image.shape[0]} pixels is empty")
        if view is not None:
            image = view.crop(image)
        if self._format == "BGR":
            image = image[:, :, ::-1]
        data = T.AugInput(np.ascontiguousarray(image))
        try:
            self._augmentation(data)
        except ValueError as error:  # Pillow's, on a side of no pixels
            height, width = image.shape[:2]
            raise ValueError(f"An image of {width}x{height} is too thin ({error})") from error
        return torch.as_tensor(np.ascontiguousarray(data.image.transpose(2, 0, 1)))

    def forward(self, prepared: list[Tensor]) -> list[Instances] | list[Tensor]:
        """The network's outputs for images of `prepare` of one size, see `Runtime.__call__`."""
        return self._runtime(prepared)

    def in_batches(
        self, items: Iterable[tuple[Any, Tensor | None]], batch_size: int
    ) -> Iterator[tuple[Any, Instances | Tensor | None]]:
        """
        Predicts on images that come one after the other. Those in a batch are of one size: padding
        one to another's would change its predictions.

        Args:
            items: anything, and its image from `prepare`; None if it only keeps its place.
            batch_size: the most images in a batch.

        Yields:
            Each item, in turn, and its output, or None.
        """
        waiting, batch = [], []
        for item, prepared in items:
            if batch and prepared is not None and prepared.shape != batch[0].shape:
                yield from self._predict(waiting, batch)
                waiting, batch = [], []
            waiting.append((item, prepared is not None))
            if prepared is not None:
                batch.append(prepared)
            if len(batch) == batch_size or not batch:
                yield from self._predict(waiting, batch)
                waiting, batch = [], []
        yield from self._predict(waiting, batch)

    def _predict(self, items, batch):
        outputs = iter(self.forward(batch) if batch else ())
        for item, has_image in items:
            yield item, next(outputs) if has_image else None

    def finish(
        self, output: Instances | Tensor, height: int, width: int, view: View | None = None
    ) -> Instances | Tensor:
        """
        Args:
            output: one of those of `forward`; used up.
            height, width: of the original image.
            view: the part that the network saw, see `prepare`.

        Returns:
            The output scaled to the original; see `__call__`.
        """
        if self.is_classifier:
            return output
        if view is None:
            return detector_postprocess(output, height, width)
        box = view.box
        instances = detector_postprocess(output, box.y1 - box.y0, box.x1 - box.x0)
        return in_whole_frame(instances, box, height, width)


def _augmentations(cfg):
    """What evaluation does to an image before the network sees it."""
    if is_classifier(cfg):
        return ClassificationMapper.from_config(cfg, is_train=False)["augmentations"]
    return build_augmentation(cfg, is_train=False)
