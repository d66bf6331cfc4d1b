"""A classifier's backbone as the start of a detector's."""

import logging
import re

import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from .timm_backbone import TimmBackbone

__all__ = ["classifier_backbone", "is_classifier_state"]

logger = logging.getLogger(__name__)

_RESNET = (  # timm's names and Detectron2's
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def is_classifier_state(state):
    """
    Args:
        state (dict): a checkpoint's weights.

    Returns:
        bool: whether they are an :class:`ImageClassifier`'s.
    """
    return {"head.weight", "head.bias", "pixel_mean", "pixel_std"} <= state.keys()


def classifier_backbone(state, model, source="the checkpoint"):
    """
    The weights of a classifier's backbone under the names of a detector's ``bottom_up``.

    Args:
        state (dict[str, Tensor]): of an :class:`ImageClassifier`.
        model (nn.Module): a detector whose bottom-up backbone is a :class:`TimmBackbone` or
            Detectron2's ResNet.
        source (str): names the weights in messages.

    Returns:
        dict[str, Tensor]: for ``model.load_state_dict(strict=False)``.

    Raises:
        ValueError: nothing in the backbone is of these names and shapes; or the detector would show
            the backbone other images than it was trained on.
    """
    prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    bottom_up = model.get_submodule(prefix[:-1])
    weights = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    if isinstance(bottom_up, TimmBackbone):
        # timm writes blocks.0 or blocks_0, depending on how it takes a model apart.
        def rename(name):
            return name.replace("_", ".")

        names = {rename(name.removeprefix("body.")): name for name in bottom_up.state_dict()}
        named = {names[rename(k)]: (k, v) for k, v in weights.items() if rename(k) in names}
    else:
        named = {_resnet_name(k): (k, v) for k, v in weights.items()}
    wanted = {k: v for k, v in bottom_up.state_dict().items() if "num_batches_tracked" not in k}
    found = {k: v for k, (_, v) in named.items() if k in wanted and v.shape == wanted[k].shape}
    if not found:
        raise ValueError(
            f"{source} is of a classifier, and none of the {len(weights)} tensors of its backbone "
            f"({', '.join(list(weights)[:3])}, ...) fits the detector's "
            f"{type(bottom_up).__name__}: build both on the same network"
        )
    _check_images(state, model, source)
    _check_strides(bottom_up)
    absent = [name for name in wanted if name not in found]
    used = {named[name][0] for name in found}
    unused = [k for k in weights if k not in used and "num_batches_tracked" not in k]
    logger.info(
        "%s is of a classifier: %d of the %d tensors of %s start from its backbone; it leaves out "
        "its head and %d tensors of its backbone: %s",
        source,
        len(found),
        len(wanted),
        prefix[:-1],
        len(unused),
        _some(unused),
    )
    if absent:
        logger.warning(
            "%s has nothing, or other shapes, for %d of the %d tensors of %s: %s",
            source,
            len(absent),
            len(wanted),
            prefix[:-1],
            _some(absent),
        )
    return {prefix + name: value for name, value in found.items()}


def _resnet_name(name):
    for pattern, replacement in _RESNET:
        name = re.sub(pattern, replacement, name)
    return name


def _some(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _check_images(state, model, source):
    own = {key: getattr(model, key).flatten().cpu() for key in ("pixel_mean", "pixel_std")}
    theirs = {key: torch.as_tensor(state[key]).flatten() for key in own}
    if model.input_format == "RGB" and all(
        torch.allclose(own[k], theirs[k], rtol=0, atol=0.1) for k in own
    ):
        return
    mean, std = ([round(value, 3) for value in theirs[key].tolist()] for key in own)
    raise ValueError(
        f"{source} is of a classifier of RGB images with other statistics than this detector's "
        f"{model.input_format} images: set INPUT.FORMAT RGB MODEL.PIXEL_MEAN '{mean}' "
        f"MODEL.PIXEL_STD '{std}'"
    )


def _check_strides(bottom_up):
    if not isinstance(bottom_up, ResNet):
        return
    for block in bottom_up.modules():
        if isinstance(block, BottleneckBlock) and max(block.conv1.stride) > 1:
            raise ValueError(
                "timm's ResNets halve a map in the 3x3 convolution of a block, this detector's in "
                "the 1x1 one before it: set MODEL.RESNETS.STRIDE_IN_1X1 False"
            )
