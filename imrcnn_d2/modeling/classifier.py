"""Which parts of an image a classifier's score comes from."""

import difflib
import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from imrcnn_d2.config import get_node
from imrcnn_d2.modeling.timm_backbone import create_timm_model, freeze_timm_layers

__all__ = ["ImageClassifier", "grad_cam", "timm_input"]


def timm_input(name):
    """
    What images a timm model was trained on, from timm's data config.

    Args:
        name (str): a timm model name.

    Returns:
        dict: "size" (int, pixels of a square's side), "pixel_mean" and "pixel_std" (list of three
        floats, for RGB values from 0 to 255).

    Raises:
        ValueError: timm has no model of that name.
    """
    import timm  # here, as below: a tenth of the time of `import imrcnn_d2`
    from timm.data import resolve_data_config

    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r}: timm {timm.__version__} has no such model"
            + (f"; near it are {', '.join(near)}" if near else "")
        )
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    return {
        "size": config["input_size"][-1],
        "pixel_mean": [255 * value for value in config["mean"]],
        "pixel_std": [255 * value for value in config["std"]],
    }


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """
    A timm model up to its pooled features, and a linear head: scores of classes for whole images.

    ``backbone`` is the timm model under timm's own key names up to its global pooling (VGG without
    its two hidden layers, 120 of its 140 million weights); ``head`` is new. Mean and standard
    deviation of the images are stored with the weights.
    """

    input_format = "RGB"  # timm's

    @configurable
    def __init__(
        self,
        name,
        num_classes,
        *,
        input_size=0,
        weights="",
        freeze_at=0,
        norm="BN",
        dropout=0.0,
        label_smoothing=0.0,
        class_weights=None,
    ):
        """
        Args:
            name (str): a timm model name, such as "resnet50".
            num_classes (int): at least 2.
            input_size (int): pixels of a side of the square images; 0 is timm's.
            weights (str): of the backbone, see :func:`create_timm_model`.
            freeze_at (int): 0 freezes nothing, k all that the feature maps of stride 2^k or less
                are made by.
            norm (str): "FrozenBN" freezes all batch norms, "BN" only those of frozen layers.
            dropout (float): probability with which each pooled feature is zeroed in training.
            label_smoothing (float): share of a target that is spread over all classes, in [0, 1).
            class_weights (list[float] or None): of the classes in the loss, (num_classes,).

        Raises:
            ValueError: for a name that timm does not have, an unknown norm, and class weights that
                are not one positive number a class.
        """
        super().__init__()
        if norm not in ("FrozenBN", "BN"):
            raise ValueError(f"MODEL.TIMM.NORM is {norm!r}; use 'FrozenBN' or 'BN'")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"MODEL.CLASSIFIER.LABEL_SMOOTHING is {label_smoothing}; 0 to below 1")
        from timm.layers import freeze_batch_norm_2d
        from timm.models.vgg import VGG

        about = timm_input(name)
        self.name, self.input_size = name, input_size or about["size"]
        self.backbone = create_timm_model(name, weights, num_classes=0)
        channels = self.backbone.head_hidden_size
        if isinstance(self.backbone, VGG):
            self.backbone.pre_logits = nn.Identity()
            channels = self.backbone.num_features
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.label_smoothing = label_smoothing
        self._class_weights = _check_class_weights(class_weights, num_classes)
        for key in ("pixel_mean", "pixel_std"):
            self.register_buffer(key, torch.tensor(about[key]).view(3, 1, 1))
        if freeze_at > 0:
            maps = self.trace_features()
            freeze_timm_layers(self.backbone, [maps[k] for k in maps if k <= freeze_at])
        if norm == "FrozenBN":
            self.backbone = freeze_batch_norm_2d(self.backbone)

    @classmethod
    def from_config(cls, cfg):
        """
        Args:
            cfg (CfgNode): MODEL.TIMM, MODEL.CLASSIFIER and INPUT are read.
        """
        backbone, node = get_node(cfg, "MODEL.TIMM"), get_node(cfg, "MODEL.CLASSIFIER")
        if cfg.INPUT.FORMAT != cls.input_format:
            raise ValueError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but timm's models take 'RGB': set it to "
                "that (imrcnn_d2.engine.load_config does)"
            )
        return {
            "name": backbone.NAME,
            "input_size": cfg.INPUT.get("SIZE", 0),
            "weights": backbone.WEIGHTS,
            "freeze_at": backbone.FREEZE_AT,
            "norm": backbone.NORM,
            "num_classes": node.NUM_CLASSES,
            "dropout": node.DROPOUT,
            "label_smoothing": node.LABEL_SMOOTHING,
            "class_weights": node.CLASS_WEIGHTS or None,
        }

    @property
    def device(self):
        return self.pixel_mean.device

    def forward(self, batched_inputs):
        """
        Args:
            batched_inputs (list[dict]): "image": (3, H, W) RGB tensor, values from 0 to 255, all of
                one size; for training "label": int.

        Returns:
            dict[str, Tensor] in training: "loss_cls", a scalar; else list[dict], one an image:
            "scores": (num_classes,) float tensor of probabilities, softmax.
        """
        logits = self.logits(self.preprocess_image(batched_inputs))
        if not self.training:
            return [{"scores": scores} for scores in logits.softmax(dim=1)]
        labels = torch.tensor([sample["label"] for sample in batched_inputs], device=self.device)
        loss = F.cross_entropy(
            logits, labels, self._loss_weights(), label_smoothing=self.label_smoothing
        )
        return {"loss_cls": loss}

    def logits(self, images):
        """
        Args:
            images (Tensor): (N, 3, H, W), normalised.

        Returns:
            Tensor: (N, num_classes), float32.
        """
        return self.head(self.dropout(self.backbone(images))).float()

    def preprocess_image(self, batched_inputs):
        """
        Args:
            batched_inputs (list[dict]): as of :meth:`forward`.

        Returns:
            Tensor: (N, 3, H, W), normalised, on the model's device.

        Raises:
            ValueError: the images differ in size.
        """
        images = [sample["image"].to(self.device) for sample in batched_inputs]
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"The images of a batch differ in size: {sorted(sizes)}; resize them")
        return (torch.stack(images) - self.pixel_mean) / self.pixel_std

    def feature_layers(self):
        """
        Returns:
            dict[int, nn.Module]: k -> the layer that gives the last feature map of stride 2^k, by
            timm's feature info; without those that timm does not say a layer of.
        """
        layers = dict(self.backbone.named_modules())
        return {
            round(math.log2(info["reduction"])): layers[info["module"]]
            for info in getattr(self.backbone, "feature_info", ())
            if info["module"] in layers
        }

    def trace_features(self):
        """
        Returns:
            dict[int, Tensor]: k -> the feature map of stride 2^k of an empty image, with autograd
            graph, in evaluation mode.
        """
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

    def _loss_weights(self):
        if isinstance(self._class_weights, str):
            raise ValueError(
                "MODEL.CLASSIFIER.CLASS_WEIGHTS is 'balanced', for which the model would have to "
                "know the training set: train with imrcnn_d2's Trainer, or give one number a class"
            )
        weights = self._class_weights
        return None if weights is None else torch.tensor(weights, device=self.device)


def _check_class_weights(weights, num_classes):
    """Numbers as floats; None and "balanced" as they are, since inference needs none."""
    if weights is None or weights == "balanced":
        return weights
    if isinstance(weights, str) or len(weights) != num_classes or not all(w > 0 for w in weights):
        raise ValueError(
            f"MODEL.CLASSIFIER.CLASS_WEIGHTS is {weights!r}; give 'balanced' or {num_classes} "
            "positive numbers, one a class"
        )
    return [float(weight) for weight in weights]


class _Logits(nn.Module):
    """What the grad-cam package takes: images in, logits out."""

    def __init__(self, model):
        super().__init__()
        self._model = model

    def forward(self, images):
        return self._model.logits(images)


def grad_cam(model, batched_inputs, classes):
    """
    Grad-CAM (Selvaraju et al., 2017) at the backbone's last feature map, by the grad-cam package.

    Args:
        model (ImageClassifier): left in evaluation mode.
        batched_inputs (list[dict]): N images, as the model takes them.
        classes (list[int]): (N,), the class whose score is explained, image by image.

    Returns:
        ndarray: (N, H, W) float32 of the images' size, from 0 to 1 in each image; all 0 where
        nothing speaks for the class.

    Raises:
        ImportError: the package is not installed.
        ValueError: the backbone has no feature map of (N, C, H, W).
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError("Grad-CAM needs a package: pip install grad-cam") from error
    model.eval()
    maps = model.trace_features()
    last = max(maps, default=None)
    if last is None or maps[last].ndim != 4:
        raise ValueError(
            f"Grad-CAM needs a feature map of (N, C, H, W), which timm model {model.name!r} does "
            "not have"
        )
    # Gradients are wanted even where all weights are frozen.
    images = model.preprocess_image(batched_inputs).requires_grad_()
    targets = [ClassifierOutputTarget(index) for index in classes]
    with torch.enable_grad(), GradCAM(_Logits(model), [model.feature_layers()[last]]) as cam:
        return cam(input_tensor=images, targets=targets)
