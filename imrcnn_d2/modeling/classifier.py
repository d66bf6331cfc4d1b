"""Classifiers of whole images on timm models, and which parts of an image a score comes from."""

import difflib
import math

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from imrcnn_d2.config import get_node
from imrcnn_d2.modeling.timm_backbone import (
    check_norm,
    create_timm_model,
    freeze_timm_layers,
    graph_leaves,
)
from imrcnn_d2.utils.files import install_extra


def timm_input(name: str) -> dict:
    """What images a timm model was trained on: "size" (pixels of a square's side), "pixel_mean" and
    "pixel_std" (three floats each, of RGB values from 0 to 255).

    Raises:
        ValueError: timm has no model of that name.
    """
    import timm  # here, as below: a tenth of the time of `import imrcnn_d2`
    from timm.data import resolve_data_config

    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r}: timm {timm.__version__} has no such model"
            + (f"; similar are {similar}" if similar else "")
        )
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    return {
        "size": config["input_size"][-1],
        "pixel_mean": [255 * value for value in config["mean"]],
        "pixel_std": [255 * value for value in config["std"]],
    }


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A timm model up to its pooled features, and a linear head: class scores of whole images.

    ``backbone`` has timm's key names (VGG lacks its two hidden layers, 120 of its 140 million
    weights); ``head`` is new. The images' mean and standard deviation are stored with the weights.
    """

    input_format = "RGB"  # timm's

    @configurable
    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        input_size: int = 0,
        weights: str = "",
        freeze_at: int = 0,
        norm: str = "BN",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: list[float] | str | None = None,
    ):
        """
        Args:
            name, weights, freeze_at, norm: see :class:`TimmBackbone`.
            input_size: side in pixels of the square images; 0 is timm's.
            dropout: probability with which each pooled feature is zeroed in training.
            label_smoothing: share of a target that is spread over all classes, in [0, 1).
            class_weights: of the classes in the loss, (num_classes,); "balanced" cannot be trained.

        Raises:
            ValueError: timm has no such model, or an option is out of its range.
        """
        super().__init__()
        check_norm(norm)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"MODEL.CLASSIFIER.LABEL_SMOOTHING is {label_smoothing}; 0 to below 1")
        if class_weights not in (None, "balanced") and (
            isinstance(class_weights, str)
            or len(class_weights) != num_classes
            or not all(weight > 0 for weight in class_weights)
        ):
            raise ValueError(
                f"MODEL.CLASSIFIER.CLASS_WEIGHTS is {class_weights!r}; give 'balanced' or "
                f"{num_classes} positive numbers, one per class"
            )
        from timm.layers import freeze_batch_norm_2d
        from timm.models.vgg import VGG

        known = timm_input(name)
        self.name, self.input_size = name, input_size or known["size"]
        self.backbone = create_timm_model(name, weights, num_classes=0)
        channels = self.backbone.head_hidden_size
        if isinstance(self.backbone, VGG):
            self.backbone.pre_logits = nn.Identity()
            channels = self.backbone.num_features
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.label_smoothing, self._class_weights = label_smoothing, class_weights
        for key in ("pixel_mean", "pixel_std"):
            self.register_buffer(key, torch.tensor(known[key]).view(3, 1, 1))
        if freeze_at > 0:
            maps = self.trace_features()
            frozen = graph_leaves(maps[k] for k in maps if k <= freeze_at)
            freeze_timm_layers(self.backbone, frozen)
        if norm == "FrozenBN":
            self.backbone = freeze_batch_norm_2d(self.backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone, node = get_node(cfg, "MODEL.TIMM"), get_node(cfg, "MODEL.CLASSIFIER")
        if cfg.INPUT.FORMAT != cls.input_format:
            raise ValueError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but timm's models take 'RGB': set it, as "
                "imrcnn_d2.engine.load_config does"
            )
        return {
            **{key: backbone[key.upper()] for key in ("name", "weights", "freeze_at", "norm")},
            **{key: node[key.upper()] for key in ("num_classes", "dropout", "label_smoothing")},
            "class_weights": node.CLASS_WEIGHTS or None,
            "input_size": cfg.INPUT.get("SIZE", 0),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Return {"loss_cls": scalar} in training, else for each image "scores": probabilities,
        (num_classes,) float.

        Args:
            batched_inputs: each "image", a (3, H, W) RGB tensor with values from 0 to 255, all of
                one size, and for training "label", an int.
        """
        logits = self.logits(self.preprocess_image(batched_inputs))
        if not self.training:
            return [{"scores": scores} for scores in logits.softmax(dim=1)]
        if self._class_weights == "balanced":
            raise ValueError(
                "MODEL.CLASSIFIER.CLASS_WEIGHTS 'balanced' depends on the training set: train with "
                "imrcnn_d2's Trainer, or give one number per class"
            )
        labels = torch.tensor([sample["label"] for sample in batched_inputs], device=self.device)
        weights = self._class_weights and torch.tensor(
            [float(weight) for weight in self._class_weights], device=self.device
        )
        loss = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        return {"loss_cls": loss}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(N, num_classes) float32 of normalised images (N, 3, H, W)."""
        return self.head(self.dropout(self.backbone(images))).float()

    def preprocess_image(self, batched_inputs: list[dict]) -> torch.Tensor:
        """The normalised images (N, 3, H, W) of :meth:`forward`'s inputs, on the model's device.

        Raises:
            ValueError: the images differ in size.
        """
        images = [sample["image"].to(self.device) for sample in batched_inputs]
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"The images of a batch differ in size: {sorted(sizes)}; resize them")
        return (torch.stack(images) - self.pixel_mean) / self.pixel_std

    def feature_layers(self) -> dict[int, nn.Module]:
        """k -> the layer of the last feature map of stride 2^k, where timm names it."""
        layers = dict(self.backbone.named_modules())
        return {
            round(math.log2(info["reduction"])): layers[info["module"]]
            for info in getattr(self.backbone, "feature_info", ())
            if info["module"] in layers
        }

    def trace_features(self) -> dict[int, torch.Tensor]:
        """k -> the map of stride 2^k of an empty image, evaluated, with autograd graph."""
        maps, handles = {}, []
        for level, layer in self.feature_layers().items():

            def keep(module, inputs, output, level=level):
                maps[level] = output

            handles.append(layer.register_forward_hook(keep))
        was_training = self.backbone.training
        self.backbone.eval()
        self.backbone(self.pixel_mean.new_zeros(1, 3, self.input_size, self.input_size))
        self.backbone.train(was_training)
        for handle in handles:
            handle.remove()
        return maps


class _Logits(nn.Module):
    """What the grad-cam package takes: images in, logits out."""

    def __init__(self, model: ImageClassifier):
        super().__init__()
        self._model = model

    def forward(self, images):
        return self._model.logits(images)


def grad_cam(model: ImageClassifier, batched_inputs: list[dict], classes: list[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., 2017) at the backbone's last feature map, by package grad-cam.

    Return (N, H, W) float32 of the images' size, from 0 to 1 in each image; all 0 where nothing
    supports the class. The model is left in evaluation mode.

    Args:
        batched_inputs: N images, as the model takes them.
        classes: (N,), the class whose score is explained in each.

    Raises:
        ImportError: the package is not installed.
        ValueError: the backbone has no feature map of (N, C, H, W).
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError(f"Grad-CAM needs a package: {install_extra('gradcam')}") from error
    model.eval()
    maps = model.trace_features()
    last = max(maps, default=None)
    if last is None or maps[last].ndim != 4:
        raise ValueError(
            f"Grad-CAM needs a feature map of (N, C, H, W), which timm model {model.name!r} lacks"
        )
    # The input needs gradients where all weights are frozen.
    images = model.preprocess_image(batched_inputs).requires_grad_()
    targets = [ClassifierOutputTarget(index) for index in classes]
    with torch.enable_grad(), GradCAM(_Logits(model), [model.feature_layers()[last]]) as cam:
        return cam(input_tensor=images, targets=targets)
