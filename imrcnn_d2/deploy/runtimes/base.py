"""The interface of all runtimes, and the base of those that run a graph.

Detectron2 loops over the images of a batch and passes objects between its parts; a traced loop has
a fixed length. In a graph the same computation works on all images at once, so that batch and image
size stay free.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn import functional as F
from torchvision.ops import nms

from imrcnn_d2.data import training_images
from imrcnn_d2.deploy.outputs import Differences, compare_records, records
from imrcnn_d2.engine.checkpoint import METADATA_VERSION
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.utils.files import BadInputError, write_atomically
from imrcnn_d2.utils.safe_loading import UnsafeFileError

if TYPE_CHECKING:
    from imrcnn_d2.deploy.loading import LoadedModel
    from imrcnn_d2.deploy.predictor import Predictor

Compile = Callable[[tuple[int, int] | None], Callable[[np.ndarray], Sequence[np.ndarray]]]

INPUT = "images"  # a graph's one input, (N, C, H, W) uint8
FREE_AXES = {0: "images", 2: "height", 3: "width"}  # of the input, as ONNX names them
# A detector's graph returns these, in this order; masks only where it has them.
OUTPUTS = ("image", "boxes", "scores", "classes", "masks")
METADATA_KEY = "imrcnn_d2"  # the key of a file's metadata, as JSON
_OPSET = 17
_OWN_GRAPHS = 2  # sizes of images that each have a compiled graph


class Runtime(ABC):
    """Runs the network of a model. Pre- and post-processing are the `Predictor`'s, and so the same
    for all runtimes.
    """

    name: ClassVar[str]  # in RUNTIMES and --runtime
    suffix: ClassVar[str | None] = None  # of the files that it exports; None if it exports none
    precisions: ClassVar[tuple[str, ...]] = ()  # of these files
    precision: ClassVar[str | None] = None  # of its arithmetic, whatever the weights are in
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
            for predictor, in_images in zip((original, exported), results, strict=True):
                frame, prepared = predictor.load(path)
                (output,) = predictor.forward([prepared])
                in_images.append(records(predictor, output, *frame))
            sizes.append(frame[:2])
        return compare_records(*results, sizes, original.tau)


def export_metadata(loaded: LoadedModel, precision: str) -> dict:
    """The metadata of an exported file, of JSON types; ``weights_sha256`` is of the original
    weights, also where ``loaded`` is an export of them, ``artifact`` the format's version. Nothing
    is of the machine of the training.
    """
    cfg = loaded.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.DATASETS.ROOT, cfg.MODEL.DEVICE = "./output", "", "cpu"
    point, score_map = loaded.weights.operating_point, loaded.weights.score_map
    facts = {**loaded.facts, "artifact": METADATA_VERSION, "precision": precision}
    facts["weights_sha256"] = facts.pop("source_sha256") or facts["weights_sha256"]
    return {
        **facts,
        **{"classes": loaded.classes, "operating_point": point and vars(point)},
        **{"score_map": score_map and vars(score_map), "config": cfg.dump()},
        training_images.KEY: loaded.metadata.get(training_images.KEY),
    }


class GraphRuntime(Runtime):
    """Runs a graph that was traced from a model. A subclass knows one format of such graphs."""

    def __init__(self, compile: Compile, metadata: dict | None):
        """``compile`` takes the height and width of images, or None for any size, to a function
        from an image (1, C, H, W) uint8 to the arrays that `DetectorGraph` or `ClassifierGraph`
        returns; ``metadata`` are of the graph's file, if it was loaded.
        """
        self._compile, self._compiled, self._lock = compile, {}, threading.Lock()
        self.metadata = metadata or {}

    @classmethod
    def from_model(cls, model, example):
        return cls(*cls._open(cls._graph(model.to("cpu"), example)))

    def __call__(self, images):
        return [self._predict(image) for image in images]

    def _predict(self, image):
        """Of one image: on CPUs, batches of several are no faster."""
        size = tuple(image.shape[1:])
        outputs = self._graph_of(size)(image[None].contiguous().numpy())
        outputs = [torch.as_tensor(output) for output in outputs]
        num_classes = len(self.metadata.get("classes", ())) or None  # None where it is not known
        if is_classifier := len(outputs) == 1:
            shapes = [(1, num_classes or outputs[0].shape[-1])]
        else:
            number, mask_size = len(outputs[0]), outputs[-1].shape[2:]
            each = (number,)
            shapes = [each, (number, 4), each, each, (number, 1, *mask_size)]
        for output, shape in zip(outputs, shapes, strict=False):
            if tuple(output.shape) != shape:
                raise ValueError(f"The graph gave {tuple(output.shape)} where {shape} is expected")
        if is_classifier:
            return outputs[0][0]
        _, boxes, scores, classes, *masks = outputs
        if num_classes and not ((classes >= 0) & (classes < num_classes)).all():
            raise ValueError(f"The graph names classes that are none of its {num_classes}")
        result = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        if masks:
            result.pred_masks = masks[0]
        return result

    def _graph_of(self, size):
        """The graph for images of a size: for the first sizes one of their own, which is faster,
        and for all others one in common, since compiling takes as long as many images.
        """
        with self._lock:
            key = size if size in self._compiled or len(self._compiled) < _OWN_GRAPHS else None
            if key not in self._compiled:
                self._compiled[key] = self._compile(key)
            return self._compiled[key]

    @classmethod
    def export(cls, loaded, path, *, example=None, precision="fp32", calibration=()):
        content = cls._graph(loaded.model, example, precision, calibration)
        metadata = {**export_metadata(loaded, precision), "format": cls.suffix[1:]}
        write_atomically(path, cls._with_metadata(content, json.dumps(metadata)))

    @classmethod
    def load(cls, path):
        with _opening(path):
            compile, metadata = cls._open(path.read_bytes())
            if not isinstance(metadata, dict | None):
                raise ValueError(f"its {METADATA_KEY} is no JSON object")
        if metadata is None:
            raise BadInputError(path, "does not name its classes: write it with imrcnn export")

        def checked(size):
            with _opening(path):
                return compile(size)

        return cls(checked, metadata)

    @classmethod
    def _graph(cls, model, example, precision="fp32", calibration=()) -> bytes:
        """A file without metadata."""
        cls.check_precision(precision)
        if precision == "int8" and not len(calibration):
            raise ValueError("int8 needs images of the training set, for the ranges of its values")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(model, example, path)
            return cls._convert(path, calibration if precision == "int8" else ())

    @classmethod
    @abstractmethod
    def _open(cls, content: bytes) -> tuple[Compile, object]:
        """The arguments of `__init__` from a file."""

    @classmethod
    @abstractmethod
    def _convert(cls, path: Path, calibration: Sequence[torch.Tensor]) -> bytes:
        """A file of the runtime from one of ONNX; of int8 if there are images to calibrate on."""

    @classmethod
    @abstractmethod
    def _with_metadata(cls, content: bytes, metadata: str) -> bytes:
        """The file with its metadata added."""


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Names the file in errors of opening it."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} was refused: {error}") from None
    except Exception as error:  # each runtime raises its own
        text = " ".join(str(error).split())[:200]
        raise BadInputError(path, f"cannot be opened: {text}") from error


def write_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Traces a model in evaluation mode and writes its graph as ONNX, for images of any number and
    size; ``example`` is (C, H, W) uint8.

    Raises:
        ValueError: see `DetectorGraph`.
        ModuleNotFoundError: onnx is missing.
    """
    import onnx  # noqa: F401  what torch needs to write it

    graph = ClassifierGraph(model) if isinstance(model, ImageClassifier) else DetectorGraph(model)
    # Two images: with one, an axis of length 1 could be taken for fixed.
    batch = torch.stack([example, example.flip(-1)])
    with torch.no_grad(), _bicubic_as_products():
        traced = torch.jit.trace(graph.eval(), (batch,), check_trace=False)
    free = {name: {0: "detections"} for name in graph.outputs}
    free[INPUT] = FREE_AXES
    names = {"input_names": [INPUT], "output_names": list(graph.outputs), "dynamic_axes": free}
    with warnings.catch_warnings():
        # The exporter by tracing is the one that knows torchvision's operators.
        warnings.simplefilter("ignore")
        torch.onnx.export(traced, (batch,), str(path), opset_version=_OPSET, dynamo=False, **names)


@contextlib.contextmanager
def _bicubic_as_products() -> Iterator[None]:
    """Has antialiased bicubic interpolation, by which timm resizes position embeddings, traced as
    products of matrices: ONNX has no such operator in this opset.
    """
    name = "_upsample_bicubic2d_aa"
    stock = getattr(torch._C._nn, name)

    def interpolate(x, size, align_corners, scales=None):
        rows, columns = map(_bicubic_weights, x.shape[2:], size)
        return rows.to(x) @ x @ columns.to(x).T

    setattr(torch._C._nn, name, interpolate)
    try:
        yield
    finally:
        setattr(torch._C._nn, name, stock)


def _bicubic_weights(length, new_length):
    """Of antialiased bicubic interpolation along an axis, as PyTorch's (Keys, 1981, a = -0.5):
    (new_length, length).
    """
    scale = torch.as_tensor(length / new_length)
    centers = (torch.arange(new_length) + 0.5) * scale
    x = (torch.arange(length) + 0.5 - centers[:, None]).abs() / scale.clamp(min=1)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = near * (x < 1) + far * ((x >= 1) & (x < 2))
    return weights / weights.sum(dim=1, keepdim=True)


class DetectorGraph(nn.Module):
    """``GeneralizedRCNN.inference`` of a batch of images of one size, up to rounding; ``outputs``
    names what it returns.

    Raises:
        ValueError: the model is no GeneralizedRCNN with an RPN and StandardROIHeads.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        heads = getattr(model, "roi_heads", None)
        if (
            not isinstance(model, GeneralizedRCNN)
            or not isinstance(model.proposal_generator, RPN)
            or not isinstance(heads, StandardROIHeads)
            or isinstance(heads, CascadeROIHeads)
            or heads.keypoint_on
            or (heads.mask_on and heads.mask_pooler is None)
        ):
            raise ValueError(
                f"{type(model).__name__} with {type(heads).__name__} cannot be exported: only "
                "detectors with an RPN and StandardROIHeads for boxes and masks can, none in "
                "cascades, and image classifiers"
            )
        self.model = model
        self.outputs = OUTPUTS if heads.mask_on else OUTPUTS[:-1]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From uint8 images (N, C, H, W) in INPUT.FORMAT to D detections, by image and then by
        falling score: the image's index (D,), boxes (D, 4) xyxy in pixels, scores (D,), classes
        (D,) and, where the model has masks, their probabilities within the box (D, 1, h, w).
        """
        # Padded at the right and at the bottom to what the backbone divides by.
        height, width = images.shape[2:]
        x = (images.to(self.model.pixel_mean.dtype) - self.model.pixel_mean) / self.model.pixel_std
        divisor = self.model.backbone.size_divisibility
        x = F.pad(x, (0, -width % divisor, 0, -height % divisor)) if divisor > 1 else x
        features = self.model.backbone(x)
        rois = self._proposals(features, height, width)
        rois, scores, classes = self._detections(features, rois, height, width)
        detections = rois[:, 0].to(torch.int64), rois[:, 1:], scores, classes
        if "masks" in self.outputs:
            return *detections, self._masks(features, rois, classes)
        return detections

    def _proposals(self, features, height, width):
        """RPN.forward: (R, 5) of image index and xyxy, by image and then by falling score."""
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        anchors = rpn.anchor_generator(maps)
        number = maps[0].shape[0]
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            # (N, A, H, W) -> (N, H W A), and (N, A 4, H, W) -> (N, H W A, 4)
            score = logit.permute(0, 2, 3, 1).flatten(1)
            delta = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            limit, size = rpn.pre_nms_topk[False], score.shape[1]  # a tensor in tracing
            size = size.clamp(max=limit) if torch.is_tensor(size) else min(size, limit)
            score, best = score.topk(size, dim=1)
            delta = delta.gather(1, best[..., None].expand(-1, -1, 4)).flatten(0, 1)
            box = rpn.box2box_transform.apply_deltas(delta, anchor.tensor[best.flatten()])
            boxes.append(box.reshape(number, -1, 4))
            scores.append(score)
            levels.append(torch.full_like(best, level))
        levels, boxes, scores = (
            torch.cat(each, dim=1).flatten(0, 1) for each in (levels, boxes, scores)
        )
        each_image = torch.arange(number, device=boxes.device)
        images = each_image.repeat_interleave(scores.shape[0] // number)
        boxes = _clip(boxes, height, width)
        usable = ((boxes[:, 2:] - boxes[:, :2]) > rpn.min_box_size).all(dim=1) & scores.isfinite()
        levels, images, boxes, scores = (each[usable] for each in (levels, images, boxes, scores))
        kept = _suppress(boxes, scores, images * len(maps) + levels, rpn.nms_thresh, height, width)
        kept = kept[_first_of_each(images[kept], number, rpn.post_nms_topk[False])]
        return torch.cat([images[kept, None].to(boxes.dtype), boxes[kept]], dim=1)

    def _detections(self, features, rois, height, width):
        """The box head on R ROIs: D of them as (D, 5), scores (D,) and classes (D,)."""
        heads = self.model.roi_heads
        predictor = heads.box_predictor
        maps = [features[name] for name in heads.box_in_features]
        pooled, places = _pool(heads.box_pooler, maps, rois)
        scores, deltas = (output[places] for output in predictor(heads.box_head(pooled)))
        scores = scores.softmax(dim=1)[:, :-1]
        boxes = predictor.box2box_transform.apply_deltas(deltas, rois[:, 1:])
        boxes = _clip(boxes.reshape(-1, 4), height, width).reshape(-1, deltas.shape[1] // 4, 4)
        roi, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
        class_agnostic = boxes.shape[1] == 1
        boxes = boxes[roi, 0] if class_agnostic else boxes[roi, classes]
        scores, images = scores[roi, classes], rois[roi, 0].to(torch.int64)
        groups = images * predictor.num_classes + classes
        kept = _suppress(boxes, scores, groups, predictor.test_nms_thresh, height, width)
        number = maps[0].shape[0]
        kept = kept[_first_of_each(images[kept], number, predictor.test_topk_per_image)]
        rois = torch.cat([images[kept, None].to(boxes.dtype), boxes[kept]], dim=1)
        return rois, scores[kept], classes[kept]

    def _masks(self, features, rois, classes):
        """Probabilities (D, 1, h, w) within the boxes of D detections."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        pooled, places = _pool(heads.mask_pooler, maps, rois)
        logits = heads.mask_head.layers(pooled)[places]
        if logits.shape[1] > 1:  # else one mask for all classes
            chosen = classes[:, None, None, None].expand(-1, -1, *logits.shape[2:])
            logits = logits.gather(1, chosen)
        return logits.sigmoid()


class ClassifierGraph(nn.Module):
    """An image classifier as a graph: uint8 images (N, C, H, W) in, probabilities (N, K) out."""

    outputs = ("probabilities",)

    def __init__(self, model: ImageClassifier):
        super().__init__()
        self.model = model

    def forward(self, images):
        pixels = images.to(self.model.pixel_mean.dtype)
        logits = self.model.logits((pixels - self.model.pixel_mean) / self.model.pixel_std)
        return (logits.softmax(dim=1),)


def _clip(boxes, height, width):
    """Boxes (B, 4) xyxy, within the image."""
    x = boxes[:, 0::2].clamp(min=0).minimum(torch.as_tensor(width).to(boxes))
    y = boxes[:, 1::2].clamp(min=0).minimum(torch.as_tensor(height).to(boxes))
    return torch.stack([x, y], dim=2).flatten(1)


def _suppress(boxes, scores, groups, threshold, height, width):
    """Non-maximum suppression of clipped boxes within each group: indices by falling score. Groups
    are moved apart, which rounds coordinates to some thousandths of a pixel.
    """
    apart = torch.as_tensor(height + width).to(boxes) * groups.to(boxes.dtype)
    moved = (boxes + apart[:, None]).reshape(-1, 4)  # OpenVINO needs a constant 4
    return nms(moved, scores, threshold)


def _first_of_each(images, number, limit):
    """Positions of the first `limit` entries of each of the `number` images, by image."""
    is_of_image = images[:, None] == torch.arange(number, device=images.device)
    rank = is_of_image.to(torch.int64).cumsum(0).gather(1, images[:, None])[:, 0]
    positions = (rank <= limit).nonzero()[:, 0]
    return positions[(images[positions] * images.shape[0] + positions).argsort()]


def _pool(pooler, maps, rois):
    """ROIPooler.forward for ROIs (R, 5) of image index and xyxy, but by level; and where each of
    the ROIs is in it, (R,). Putting rows back is cheaper after the head, where they are short.
    """
    pooler = getattr(pooler, "pooler", pooler)  # of FP32SeparableROIPooler
    levels = pooler.min_level, pooler.max_level
    canonical = pooler.canonical_box_size, pooler.canonical_level
    level = assign_boxes_to_levels([Boxes(rois[:, 1:])], *levels, *canonical)
    of_level = [(level == i).nonzero()[:, 0] for i in range(len(maps))]
    pooled = [
        pool(x.float(), rois[indices])
        for pool, x, indices in zip(pooler.level_poolers, maps, of_level, strict=True)
    ]
    return torch.cat(pooled), torch.cat(of_level).argsort()
