"""Images in, lesions out."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.layers.mask_ops import _do_paste_mask
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor

from imrcnn_d2.config import get_node
from imrcnn_d2.data import training_images
from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.endoscope_view import View, find_crop
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.mapper import CropToView
from imrcnn_d2.data.masks import encode, parts_of_others
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import TorchRuntime, build_runtime
from imrcnn_d2.deploy.runtimes.base import Runtime, export_metadata
from imrcnn_d2.evaluation.alarms import AlarmRule
from imrcnn_d2.task import Task
from imrcnn_d2.utils import hub

FIRST_FRAMES = 10
# Of a repository without a card of `imrcnn report`.
_CARD = """
# {model}, backbone {backbone}

**Research use only, not a medical device: not for diagnosis or treatment.**

It finds in endoscopic images: {classes}. {threshold}

```python
from imrcnn_d2.deploy import Predictor

predictor = Predictor.from_pretrained("{repo}")
```

Training data, evaluation, terms of use: *to be filled in by the authors.*

Written by imrcnn-d2 {version} from weights of sha256 {weights_sha256}.
"""


class FrameViews:
    """The view of an image, or of the frames of a video in turn: estimated anew in each of the
    first ten frames, from the brightest pixels so far, and then kept, as single frames may be dark.
    """

    def __init__(self):
        self._brightest, self._view, self._left = None, None, FIRST_FRAMES

    def __call__(self, image: np.ndarray) -> View | None:
        """Of the next frame, (H, W, 3) RGB, uint8; None while `find_crop` finds none."""
        if self._brightest is None or self._brightest.shape != image.shape:
            self.__init__()
            self._brightest = np.zeros_like(image)
        if self._left or self._view is None:
            self._brightest = np.maximum(self._brightest, image)
            self._view = find_crop(self._brightest)
            self._left = max(0, self._left - 1)
        return self._view


class Predictor:
    """A trained model, ready for images.

    .. code-block:: python

        predictor = Predictor.from_pretrained("model_best.pth")
        instances = predictor("image.jpg")
        lesions = instances[instances.scores >= predictor.tau]
        detections = supervision.Detections.from_detectron2({"instances": lesions})

    ``tau`` is the threshold of scores, None of a classification model; ``operating_point`` is that
    of the weights, and ``score_map`` makes probabilities of the network's scores, both None where
    the weights have none; ``suppress_parts`` is whether detections inside others are left out, as
    the operating point says; ``classes`` are named by class index; ``training_images`` are of
    `training_hashes`, None where the weights carry none; ``metadata`` are of model, weights, config
    and runtime.
    """

    def __init__(
        self,
        config: CfgNode | str | Path | None,
        weights: str | Path,
        *,
        runtime: str | None = None,
        tau: float | None = None,
        device: str | None = None,
        crop_view: bool | None = None,
        alarm_rule: AlarmRule | str | Path | None = None,
    ):
        """See `load_model` and `build_runtime`; ``tau`` None is that of the weights. ``crop_view``
        is whether the network sees the endoscope's view only, black outside it; None: as it was
        trained, by INPUT.CROP_TO_VIEW. Predictions are of the whole frame. ``alarm_rule``, or its
        file, has its own ``tau``, and decides which detections in a video are alarms.

        Raises:
            FileNotFoundError, ValueError: see there; a classification model is given a ``tau`` or
                an ``alarm_rule``; both are given; or the rule was chosen for other weights.
        """
        self._loaded = loaded = load_model(config, weights, device=device, crop_view=crop_view)
        cfg, stored = loaded.cfg, loaded.weights
        self.classes = loaded.classes
        self.cfg, self.task, self.has_masks = cfg, Task.of(cfg), cfg.MODEL.MASK_ON
        self.tau = loaded.tau if tau is None else tau
        self.crop_view = get_node(cfg, "INPUT.CROP_TO_VIEW")
        self.alarm_rule = self._checked_rule(alarm_rule, tau)
        if self.alarm_rule is not None:
            self.tau = self.alarm_rule.tau
        self.score_map, self.operating_point = stored.score_map, stored.operating_point
        suppresses = self.operating_point is not None and self.operating_point.suppress_parts
        self.suppress_parts = self.has_masks and suppresses
        self.training_images = loaded.metadata.get(training_images.KEY)
        if tau is not None and not self.task.localises:
            raise ValueError("A classification model takes the likeliest class: it has no τ")
        self._augmentation = T.AugmentationList(
            build_augmentation(cfg, is_train=False)
            if self.task.localises
            else self.task.mapper.from_config(cfg, is_train=False)["augmentations"]
        )
        self._format = cfg.INPUT.FORMAT
        side = cfg.INPUT.MIN_SIZE_TEST or 512
        example = self.prepare(np.full((side, side, 3), 128, np.uint8))
        self._runtime = build_runtime(runtime, loaded.model, example)
        self.metadata = {**loaded.facts, "tau": self.tau, "runtime": self._runtime.name}
        if self._runtime.precision:
            self.metadata["precision"] = self._runtime.precision
        if self.score_map is not None:
            self.metadata["score_map"] = vars(self.score_map)
        if self.suppress_parts:
            self.metadata["suppress_parts"] = True
        if self.crop_view:
            self.metadata["crop_view"] = True
        if self.alarm_rule is not None:
            self.alarm_rule.check_weights(self.metadata)
            self.metadata["alarm_rule"] = vars(self.alarm_rule)

    def _checked_rule(self, rule, tau):
        if rule is None:
            return None
        if not self.task.localises:
            raise ValueError("An alarm rule is for detections: a classification model has none")
        if tau is not None:
            raise ValueError("An alarm rule has its own τ: give no other one")
        return rule if isinstance(rule, AlarmRule) else AlarmRule.of_file(rule)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs) -> "Predictor":
        """From weights by name: "demo" comes with the package and finds polyps of the colon,
        "USER/REPO" and "USER/REPO@REVISION" are in the Hugging Face Hub. A file of that name on
        this machine, or a folder that holds such a repository, comes first.
        """
        path = Path(name)
        if hub.is_repository(str(name)):
            if path.is_dir():
                name = path / hub.MODEL_FILE
            elif not path.exists():
                name = f"hf://{name}"
        return cls(None, name, **kwargs)

    def push_to_hub(
        self,
        repo: str,
        *,
        card: str | Path | None = None,
        license: str = "other",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Publish the model in the Hugging Face Hub, for `from_pretrained`; returns the address of
        the commit. The repository gets model.safetensors with weights, config, classes, τ and the
        map of scores, the config to read (config.yaml) and a model card (README.md), none with a
        path of this machine.

        Args:
            repo: "USER/REPO", which is made if there is none.
            card: a file of `imrcnn report --card`; None for a short one.
            license: the Hub's name of one, for a short card; the training data have to allow it.
            private: whether a new repository is; None for the account's default.
            token: None for that of `hf auth login`.

        Raises:
            OSError: the Hub cannot be reached, or refuses it.
            ValueError: the model is an exported graph.
        """
        loaded = self._loaded
        if isinstance(loaded.model, Runtime):
            raise ValueError(f"{loaded.weights.path} is a graph: publish the weights it is made of")
        text = self._card(repo, license) if card is None else Path(card).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            TorchRuntime.export(loaded, folder / hub.MODEL_FILE)
            (folder / "config.yaml").write_text(export_metadata(loaded, "fp32")["config"])
            (folder / "README.md").write_text(text, encoding="utf-8")
            return hub.upload(folder, repo, "Upload model", private=private, token=token)

    def _card(self, repo, license):
        facts = self._loaded.facts
        tag = "image-segmentation" if self.has_masks else "object-detection"
        threshold = f"A detection is positive from a score of {facts['tau']} on."
        if self.score_map is not None:
            threshold += (
                " A score is the probability that a detection hits a lesion, by a map that was "
                "fitted on validation data; `raw_scores` are the network's."
            )
        if not self.task.localises:
            tag, threshold = "image-classification", ""
            if self.score_map is not None:
                threshold = "Its probabilities are calibrated on validation data, by a temperature."
        names = {"repo": repo, "classes": ", ".join(self.classes), "threshold": threshold}
        return hub.front_matter(tag, facts["model"], license=license) + _CARD.format(
            **facts, **names
        )

    def __call__(
        self, images: str | Path | np.ndarray | list, batch_size: int = 1
    ) -> Instances | Tensor | list:
        """Returns for each image, a file or RGB (H, W, 3) uint8, ``pred_boxes`` (N, 4) xyxy in
        pixels, ``scores`` (N,), ``pred_classes`` (N,) and ``pred_masks`` (N, H, W) bool, by falling
        score, also those below ``tau``; without `parts_of_others` where the operating point of the
        weights says so. Where there is a ``score_map``, ``scores`` are float64, the
        probabilities of a hit, and ``raw_scores`` are the network's. Of a classification model, the
        classes' probabilities (K,), mapped likewise.

        Raises:
            BadInputError: a file cannot be read.
            ValueError: an array is no RGB image.
        """
        if isinstance(images, str | Path) or getattr(images, "ndim", 0) == 3:
            return self([images])[0]
        outputs = self.in_batches(map(self.load, images), batch_size)
        finished = (self.finish(output, *frame) for frame, output in outputs)
        return [self._without_parts(item) if self.suppress_parts else item for item in finished]

    def _without_parts(self, instances):
        masks = [encode(mask.numpy()) for mask in instances.pred_masks]
        columns = instances.scores.tolist(), instances.pred_classes.tolist()
        return instances[torch.from_numpy(~parts_of_others(masks, *columns))]

    def load(self, image: str | Path | np.ndarray) -> tuple[tuple[int, int, View | None], Tensor]:
        """Of an image, a file or RGB (H, W, 3) uint8: its height, width and view, for `finish` and
        `records`, and what the network sees of it, see `prepare`."""
        array = read_image(Path(image)) if isinstance(image, str | Path) else image
        view = self.views()(array)
        return (*array.shape[:2], view), self.prepare(array, view)

    def views(self) -> Callable[[np.ndarray], View | None]:
        """A function from an image, or the frames of a video in turn, to the view for `prepare`."""
        return FrameViews() if self.crop_view else lambda image: None

    def prepare(self, image: np.ndarray, view: View | None = None) -> Tensor:
        """What the network sees of an image, (H, W, 3) RGB uint8, or of its view: (3, h, w) uint8,
        resized and in INPUT.FORMAT. Raises a ValueError if it is none, or too thin to be resized.
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
        """Yields each item with the output for its image from `prepare`; None for an item without
        an image, which only keeps its place.
        """
        for batch in batches(items, batch_size):
            yield from self.predict(batch)

    def predict(
        self, batch: list[tuple[Any, Tensor | None]]
    ) -> list[tuple[Any, Instances | Tensor | None]]:
        """The same for one of the `batches`. Several threads may call it at once."""
        images = [prepared for _, prepared in batch if prepared is not None]
        outputs = iter(self.forward(images) if images else ())
        return [(item, None if image is None else next(outputs)) for item, image in batch]

    def finish(
        self, output: Instances | Tensor, height: int, width: int, view: View | None = None
    ) -> Instances | Tensor:
        """One of the outputs of `forward`, which is used up, with mapped scores, and scaled to the
        original image, whose ``view`` the network saw; see `__call__`.
        """
        if not self.task.localises:
            return output if self.score_map is None else self._mapped(output)
        instances, patches = self.scaled(output, height, width, view)
        if self.has_masks:
            instances.pred_masks = torch.zeros(len(instances), height, width, dtype=torch.bool)
            for mask, (patch, left, top) in zip(instances.pred_masks, patches, strict=True):
                mask[top : top + len(patch), left : left + patch.shape[1]] = patch
        return instances

    def scaled(
        self, output: Instances, height: int, width: int, view: View | None = None
    ) -> tuple[Instances, Iterator[tuple[Tensor, int, int]]]:
        """Of a detector, what `finish` returns without the masks, and these one by one: the part
        around the box, (h, w) bool, and where its left top corner is.
        """
        if self.score_map is not None:
            output.raw_scores, output.scores = output.scores, self._mapped(output.scores)
        crop = None if view is None else CropToView(view)
        size, left, top = (height, width), 0, 0
        if crop is not None:
            size, left, top = (crop.h, crop.w), crop.x0, crop.y0
        fields = dict(output.get_fields())
        if self.has_masks:  # under another name Detectron2 does not paste them into the image
            fields["probabilities"] = fields.pop("pred_masks")
        cropped = detector_postprocess(Instances(output.image_size, **fields), *size)
        instances = Instances(size, **cropped.get_fields())
        if crop is not None:
            instances = crop.to_frame(instances)
        if not self.has_masks:
            return instances, iter(())
        instances.remove("probabilities")
        pasted = _pasted(cropped.probabilities, cropped.pred_boxes.tensor, *size)
        return instances, ((patch, x + left, y + top) for patch, x, y in pasted)

    def _mapped(self, scores):
        return torch.from_numpy(self.score_map(scores.numpy()))


def batches(
    items: Iterable[tuple[Any, Tensor | None]], size: int
) -> Iterator[list[tuple[Any, Tensor | None]]]:
    """Yields the items, with an image of `Predictor.prepare` or None, in batches of ``size`` images
    that are of one shape: padding one to another's would change its predictions.
    """
    batch, shape, number = [], None, 0
    for item, image in items:
        if number and image is not None and image.shape != shape:
            yield batch
            batch, number = [], 0
        batch.append((item, image))
        if image is not None:
            shape, number = image.shape, number + 1
        if number == size or not number:
            yield batch
            batch, number = [], 0
    if batch:
        yield batch


def _pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterator:
    """Masks (N, 1, h, w) in boxes of an image, as `Predictor.scaled` yields them. One at a time: a
    hundred of a large image would fill the memory.
    """
    for mask, box in zip(masks[:, None], boxes[:, None], strict=True):
        values, (rows, columns) = _do_paste_mask(mask, box, height, width)
        yield values[0] >= 0.5, int(columns.start), int(rows.start)
