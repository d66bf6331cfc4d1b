"""Which parts of a classifier or detector learn: its head, its backbone from some stage on, all."""

import re

from torch.nn.modules.batchnorm import _NormBase

from .classifier import ImageClassifier
from .timm_backbone import graph_leaves

__all__ = ["check_trainable", "frozen_norms", "trainable_parameters"]

_STAGES = re.compile(r"stages from (\d+)")


def check_trainable(text):
    """
    Args:
        text (str): ``trainable`` of a phase.

    Returns:
        int or None: k of "stages from k", else None.

    Raises:
        ValueError: it is none of "head", "stages from k" and "all".
    """
    match = _STAGES.fullmatch(text) if isinstance(text, str) else None
    if match is None and text not in ("head", "all"):
        raise ValueError(f"trainable is {text!r}; use 'head', 'stages from k' (such as 4) or 'all'")
    return int(match[1]) if match else None


def trainable_parameters(model, trainable):
    """
    The parameters that a phase of a training names, of those that have ``requires_grad`` now.

    Args:
        model (nn.Module): an ImageClassifier, or a detector of Detectron2 with a ``backbone``.
        trainable (str): "head", all outside the backbone (for a backbone with a pyramid, outside
            its ``bottom_up``); "stages from k", besides these all of the backbone but what its
            feature maps of stride 2^(k-1) and less are made by (k = 4 for ResNet: res4 and res5);
            or "all".

    Returns:
        set[str]: names of parameters.

    Raises:
        ValueError: for another ``trainable``, and for a stage that the backbone does not have.
    """
    first = check_trainable(trainable)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable == "all":
        return set(learning)
    prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    head = {name for name in learning if not name.startswith(prefix)}
    if trainable == "head":
        return head
    maps = _feature_maps(model)
    if first not in maps:
        raise ValueError(
            f"trainable is {trainable!r}, but the backbone has the stages {sorted(maps)} "
            "(k makes the feature map of stride 2^k)"
        )
    below = graph_leaves(feature for level, feature in maps.items() if level < first)
    return head | {name for name, p in learning.items() if id(p) not in below}


def _feature_maps(model):
    """The backbone's feature maps of an empty image: k -> that of stride 2^k."""
    if isinstance(model, ImageClassifier):
        return model.trace_features()
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    shapes = bottom_up.output_shape()
    size = 4 * max(shape.stride for shape in shapes.values())
    channels = len(model.pixel_mean)
    image = next(bottom_up.parameters()).new_zeros(1, channels, size, size)
    was_training = bottom_up.training
    bottom_up.eval()
    features = bottom_up(image)
    bottom_up.train(was_training)
    return {shapes[name].stride.bit_length() - 1: features[name] for name in shapes}


def frozen_norms(model):
    """
    Args:
        model (nn.Module): with ``requires_grad`` as it trains.

    Returns:
        list[nn.Module]: its layers that keep running statistics of their inputs and have no
        parameter that learns.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.track_running_stats
        and not any(p.requires_grad for p in module.parameters())
    ]
