"""Images in, lesions out."""

import logging
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances

from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.deploy.loading import load_model, pretrained
from imrcnn_d2.deploy.runtimes.runtime import build_runtime
from imrcnn_d2.engine.config import is_classifier
from imrcnn_d2.engine.run_record import config_sha256

__all__ = ["FrameViews", "Predictor", "in_whole_frame"]

logger = logging.getLogger(__name__)


FIRST_FRAMES = 10


class FrameViews:
    """
    The view of an image, or of the frames of a video in turn.

    It is found anew in each of the first ten frames, by what any of them shows so far, and then
    kept: a view does not move, and single frames may be dark.
    """

    def __init__(self):
        self._brightest, self._view, self._left = None, None, FIRST_FRAMES

    def __call__(self, image):
        """
        Args:
            image (np.ndarray): (H, W, 3) RGB, uint8.

        Returns:
            View or None: of the frame; None where nothing has been lit so far.
        """
        if self._brightest is None or self._brightest.shape != image.shape:
            self.__init__()
            self._brightest = np.zeros_like(image)
        if self._left or self._view is None:
            self._brightest = np.maximum(self._brightest, image)
            view = find_view(self._brightest)
            self._view = None if view.is_empty else view
            self._left = max(0, self._left - 1)
        return self._view


def in_whole_frame(instances, box, height, width):
    """
    Args:
        instances (Instances): of what ``box`` shows, in its coordinates.
        box (Box): where it lies in the frame.
        height, width (int): of the frame.

    Returns:
        Instances: of the frame; nothing in them lies outside the box.
    """
    ret = Instances((height, width), **instances.get_fields())
    ret.pred_boxes = instances.pred_boxes.clone()
    ret.pred_boxes.tensor += ret.pred_boxes.tensor.new_tensor([box.x0, box.y0, box.x0, box.y0])
    if instances.has("pred_masks"):
        around = box.x0, width - box.x1, box.y0, height - box.y1
        ret.pred_masks = F.pad(instances.pred_masks, around)
    return ret


class _Loaded(NamedTuple):
    size: tuple
    view: View | None
    prepared: torch.Tensor


class Predictor:
    """
    A trained model, ready for images.

    .. code-block:: python

        predictor = Predictor("config.yaml", "model_best.pth")
        instances = predictor("image.jpg")
        lesions = instances[instances.scores >= predictor.tau]

    Attributes:
        tau (float or None): score from which on a detection counts; None of a recognition model,
            which takes the likeliest class.
        classes (list[str]): names, by class index.
        is_classifier (bool): whether it names an image's class.
        outlines (bool): whether it gives masks.
        crop_view (bool): whether it looks at the endoscope's view only.
        asked_runtime (str or None): the argument ``runtime``; ``about`` has the one chosen.
        about (dict): what a prediction is by: model, backbone, version, weights_sha256,
            config_sha256, tau and runtime; crop_view, if it does.
    """

    def __init__(self, config, weights, *, runtime=None, tau=None, device=None, crop_view=False):
        """
        Args:
            config, weights, device: see :func:`load_model`.
            runtime (str or None): see :func:`build_runtime`.
            tau (float or None): None for the operating point that was chosen on validation data
                when the weights were saved, else MODEL.IMRCNN.SCORE_THRESH.
            crop_view (bool): show the network the endoscope's view only, black around it, as data
                prepared with --deidentify are; what it gives is still of the whole frame.

        Raises:
            FileNotFoundError, ValueError: see :func:`load_model`; or no such runtime, or ``tau``
                for a recognition model.
        """
        loaded = load_model(config, weights, device=device)
        cfg = loaded.cfg
        self.classes = loaded.classes
        self.is_classifier, self.outlines = is_classifier(cfg), cfg.MODEL.MASK_ON
        self.asked_runtime = runtime
        self.tau = loaded.tau if tau is None else tau
        self.crop_view = crop_view
        if self.is_classifier and tau is not None:
            raise ValueError("A recognition model takes the likeliest class: it has no threshold τ")
        self._augmentation = T.AugmentationList(_augmentations(cfg))
        self._format = cfg.INPUT.FORMAT
        side = cfg.INPUT.MIN_SIZE_TEST or 512
        example = self.prepare(np.full((side, side, 3), 128, np.uint8))
        chosen, self._runtime = build_runtime(runtime, loaded.model, example)
        model, backbone = loaded.names
        self.about = {
            "model": model,
            "backbone": backbone,
            "version": metadata.version("imrcnn-d2"),
            "weights_sha256": loaded.weights.sha256,
            "config_sha256": config_sha256(cfg),
            "tau": self.tau,
            "runtime": chosen,
            **({"crop_view": True} if crop_view else {}),
        }

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        """
        Args:
            name (str): of weights that come with the package: "demo" finds polyps of the colon.
            **kwargs: of the constructor.

        Returns:
            Predictor:
        """
        return cls(None, pretrained(name), **kwargs)

    def __call__(self, images, batch_size=1):
        """
        Args:
            images (str, Path, np.ndarray, or a list of these): files, or RGB images (H, W, 3),
                uint8.
            batch_size (int): images that the network sees at once, as far as they follow each other
                and are of one size to it; it does not change the result.

        Returns:
            Instances, or a list of them for a list: ``pred_boxes`` (N, 4) xyxy in pixels,
            ``scores`` (N,), ``pred_classes`` (N,) and ``pred_masks`` (N, H, W) bool, by falling
            score, down to MODEL.ROI_HEADS.SCORE_THRESH_TEST: which of them count is for ``tau`` to
            say. Of a recognition model, the classes' probabilities (K,).

        Raises:
            BadInputError: a file cannot be read.
            ValueError: an array is no RGB image.
        """
        if isinstance(images, str | Path) or getattr(images, "ndim", 0) == 3:
            return self([images])[0]
        items = self.in_batches(map(self._load, images), batch_size)
        return [self.finish(output, *item.size, item.view) for item, output in items]

    def _load(self, image):
        array = read_image(Path(image)) if isinstance(image, str | Path) else image
        view = self.views()(array)
        return _Loaded(array.shape[:2], view, self.prepare(array, view))

    def views(self):
        """
        Returns:
            callable: from an image, or the frames of a video in turn, to the ``view`` that
            :meth:`prepare` and :meth:`finish` take; to None without ``crop_view``.
        """
        return FrameViews() if self.crop_view else lambda image: None

    def prepare(self, image, view=None):
        """
        Args:
            image (np.ndarray): (H, W, 3) RGB, uint8.
            view (View or None): what of it to show the network; None for all.

        Returns:
            Tensor: what the network sees, (3, h, w) uint8, resized and in INPUT.FORMAT.

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

    def forward(self, prepared):
        """
        Args:
            prepared (list[Tensor]): of one size, see :meth:`prepare`.

        Returns:
            list: what the runtime gives, see :class:`TorchRuntime`.
        """
        return self._runtime(prepared)

    def in_batches(self, items, batch_size):
        """
        Predict on images that are at hand one after the other. Those in a batch are of one size:
        padding one to another's would change what is predicted in it.

        Args:
            items (iterable): with an attribute ``prepared``, see :meth:`prepare`; None in an item
                that only keeps its place among the others.
            batch_size (int): at most so many images in a batch.

        Yields:
            tuple: each item, in turn, and what the runtime gives for it, or None.
        """
        waiting, batch = [], []
        for item in items:
            prepared = item.prepared
            if batch and prepared is not None and prepared.shape != batch[0].shape:
                yield from self._together(waiting, batch)
                waiting, batch = [], []
            waiting.append(item)
            if prepared is not None:
                batch.append(prepared)
            if len(batch) == batch_size or not batch:
                yield from self._together(waiting, batch)
                waiting, batch = [], []
        yield from self._together(waiting, batch)

    def _together(self, items, batch):
        outputs = iter(self.forward(batch) if batch else ())
        for item in items:
            yield item, None if item.prepared is None else next(outputs)

    def finish(self, output, height, width, view=None):
        """
        Args:
            output (Instances or Tensor): one of what :meth:`forward` gave; used up.
            height, width (int): of the original image.
            view (View or None): what of it the network saw, see :meth:`prepare`.

        Returns:
            Instances or Tensor: scaled to the original; see :meth:`__call__`.
        """
        if self.is_classifier:
            return output
        if view is None:
            return detector_postprocess(output, height, width)
        box = view.box
        seen = detector_postprocess(output, box.y1 - box.y0, box.x1 - box.x0)
        return in_whole_frame(seen, box, height, width)


def _augmentations(cfg):
    """What evaluation does to an image before the network sees it."""
    if is_classifier(cfg):
        return ClassificationMapper.from_config(cfg, is_train=False)["augmentations"]
    return build_augmentation(cfg, is_train=False)
