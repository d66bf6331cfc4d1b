"""FPN with a bottom-up path behind it (PANet, Liu et al., CVPR 2018) and CBAM before the fusion."""

import copy
import functools
import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN
from torch import nn

from imrcnn_d2.config import get_node
from imrcnn_d2.modeling.cbam import CBAM

__all__ = ["PAFPN"]


class PAFPN(FPN):
    """
    The neck of IBMR-CNN and, with attention, of IMR-CNN (Sci Rep 14:7847, 2024).

    With P_l the outputs of the FPN for l = first..last, from high to low resolution::

        A_l     = cbam_l(P_l) with attention "cbam", P_l otherwise
        N_first = A_first
        M_l     = act(pan_down{l-1}(N_{l-1})) + A_l        3x3, stride 2
        N_l     = act(pan_output{l}(M_l))                  3x3, for l > first

    and p{l} = N_l. With attention before "top_down" as well, the FPN adds its paths from purified
    lateral maps too. It is a subclass of FPN, so every key of an FPN checkpoint keeps its name; the
    new ones are ``pan_down{l}``, ``pan_output{l}``, ``cbam{l}`` and ``cbam_lateral{l}``.
    """

    @configurable
    def __init__(
        self,
        bottom_up,
        in_features,
        out_channels,
        norm="",
        top_block=None,
        fuse_type="sum",
        *,
        pan_norm="",
        init="identity",
        activation="",
        attention="",
        attention_before=("bottom_up",),
        cbam_reduction=16,
        cbam_kernel_size=7,
        cbam_gate="double_sigmoid",
    ):
        """
        Args:
            bottom_up, in_features, out_channels, norm, top_block, fuse_type: as in
                :class:`detectron2.modeling.backbone.FPN`. ``top_block.in_feature`` names either a
                level of this pyramid (p5: it gets N_5) or a bottom-up feature (res5).
            pan_norm (str): norm of ``pan_down*`` and ``pan_output*``, "" for none.
            init (str): "identity" makes the pyramid equal the FPN's at the start; "xavier" is the
                conventional initialisation of all new convolutions.
            activation (str): act above, "relu" or "" (none).
            attention (str): "cbam" or "" (none).
            attention_before (sequence[str]): before which fusions it sits: "bottom_up" as above,
                "top_down" between the FPN's lateral convolutions and its path.
            cbam_reduction, cbam_kernel_size, cbam_gate: see :class:`CBAM`.

        Raises:
            ValueError: for unknown values, and where ``init="identity"`` cannot be an identity.
        """
        _check_options(init, activation, attention, attention_before, pan_norm, cbam_gate)
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        self._activation = activation

        shapes = bottom_up.output_shape()
        stages = [int(math.log2(shapes[f].stride)) for f in in_features]
        use_bias = pan_norm == ""
        down_convs, pan_output_convs = [], []
        for stage in stages:
            if stage == stages[-1]:
                break
            down, output = (
                Conv2d(
                    out_channels,
                    out_channels,
                    kernel_size=3,
                    stride=stride,
                    padding=1,
                    bias=use_bias,
                    norm=get_norm(pan_norm, out_channels),
                )
                for stride in (2, 1)
            )
            self.add_module(f"pan_down{stage}", down)
            self.add_module(f"pan_output{stage + 1}", output)
            down_convs.append(down)
            pan_output_convs.append(output)

        # Plain lists, as in FPN: the modules are registered once, under the names above.
        self.down_convs = down_convs
        self.pan_output_convs = pan_output_convs
        # From high to low resolution, and from low to high as lateral_convs.
        self.cbams, self.lateral_cbams = [], []
        for stage in stages if attention else ():
            cbam = functools.partial(
                CBAM, out_channels, cbam_reduction, cbam_kernel_size, cbam_gate
            )
            if "bottom_up" in attention_before:
                self.cbams.append(cbam())
                self.add_module(f"cbam{stage}", self.cbams[-1])
            if "top_down" in attention_before:
                self.lateral_cbams.insert(0, cbam())
                self.add_module(f"cbam_lateral{stage}", self.lateral_cbams[0])
        self._init_new_layers(init)

    @classmethod
    def from_config(cls, cfg, bottom_up, top_block):
        """
        Args:
            cfg (CfgNode): MODEL.FPN, MODEL.PAFPN and MODEL.CBAM are read.
            bottom_up (Backbone): the network below the pyramid.
            top_block (nn.Module or None): extra levels on top.
        """
        pafpn, cbam = get_node(cfg, "MODEL.PAFPN"), get_node(cfg, "MODEL.CBAM")
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": top_block,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "pan_norm": pafpn.NORM,
            "init": pafpn.INIT,
            "activation": pafpn.ACTIVATION,
            "attention": pafpn.ATTENTION,
            "attention_before": pafpn.ATTENTION_BEFORE,
            "cbam_reduction": cbam.REDUCTION,
            "cbam_kernel_size": cbam.KERNEL_SIZE,
            "cbam_gate": cbam.GATE,
        }

    def _init_new_layers(self, init):
        for down, output in zip(self.down_convs, self.pan_output_convs, strict=True):
            if init == "identity":
                nn.init.zeros_(down.weight)
                nn.init.zeros_(down.bias)
                nn.init.dirac_(output.weight)
                nn.init.zeros_(output.bias)
            else:
                weight_init.c2_xavier_fill(down)
                weight_init.c2_xavier_fill(output)
        if init == "identity":
            for cbam in self.cbams + self.lateral_cbams:
                cbam.init_identity()

    def __prepare_scriptable__(self):
        # TorchScript wants ModuleLists and each module registered once. As for Detectron2's FPN,
        # this renames keys of the scripted copy: script a deep copy of a model you go on using.
        ret = copy.deepcopy(self)
        lists = ["lateral_convs", "output_convs", "down_convs", "pan_output_convs"]
        for name in (*lists, "cbams", "lateral_cbams"):
            setattr(ret, name, nn.ModuleList(getattr(ret, name)))
        for name, _ in self.named_children():
            if name.startswith(("fpn_", "pan_", "cbam")):
                delattr(ret, name)
        return ret

    def forward(self, x):
        """
        Args:
            x (Tensor): images, (N, 3, H, W), H and W divisible by ``size_divisibility``.

        Returns:
            dict[str, Tensor]: "p{l}" -> (N, out_channels, H / 2^l, W / 2^l), in order of l.
        """
        bottom_up_features = self.bottom_up(x)
        results = self._top_down(bottom_up_features)  # P_l

        # Purification: A_l in `results`. Without attention `cbams` is empty.
        for idx, cbam in enumerate(self.cbams):
            results[idx] = cbam(results[idx])

        # Bottom-up path, from high to low resolution: N_l in `results`.
        for idx, (down_conv, output_conv) in enumerate(
            zip(self.down_convs, self.pan_output_convs)  # noqa: B905
        ):
            merged = self._act(down_conv(results[idx])) + results[idx + 1]
            results[idx + 1] = self._act(output_conv(merged))

        if self.top_block is not None:
            if self.top_block.in_feature in bottom_up_features:
                top_block_in_feature = bottom_up_features[self.top_block.in_feature]
            else:
                top_block_in_feature = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(top_block_in_feature))
        assert len(self._out_features) == len(results)
        return {f: res for f, res in zip(self._out_features, results)}  # noqa: B905

    def _top_down(self, bottom_up_features: dict[str, torch.Tensor]):
        """
        The outputs of the FPN, (N, out_channels, H / 2^l, W / 2^l) each, in order of l.

        A method of its own so that what it holds is free when the next path needs memory.
        """
        laterals = []  # from low to high resolution, as lateral_convs
        for idx, lateral_conv in enumerate(self.lateral_convs):
            laterals.append(lateral_conv(bottom_up_features[self.in_features[-idx - 1]]))
        # Without attention here `lateral_cbams` is empty.
        for idx, cbam in enumerate(self.lateral_cbams):
            laterals[idx] = cbam(laterals[idx])

        prev_features = laterals[0]
        results = [self.output_convs[0](prev_features)]
        for idx, output_conv in enumerate(self.output_convs):
            if idx > 0:
                top_down_features = F.interpolate(prev_features, scale_factor=2.0, mode="nearest")
                prev_features = laterals[idx] + top_down_features
                if self._fuse_type == "avg":
                    prev_features /= 2
                results.insert(0, output_conv(prev_features))
        return results

    def _act(self, x):
        return F.relu(x) if self._activation == "relu" else x


def _check_options(init, activation, attention, attention_before, pan_norm, cbam_gate):
    for key, value, known in (
        ("MODEL.PAFPN.INIT", init, ("identity", "xavier")),
        ("MODEL.PAFPN.ACTIVATION", activation, ("", "relu")),
        ("MODEL.PAFPN.ATTENTION", attention, ("", "cbam")),
    ):
        if value not in known:
            raise ValueError(f"{key} is {value!r}; use one of {known}")
    if not attention_before or not {"bottom_up", "top_down"}.issuperset(attention_before):
        raise ValueError(
            f"MODEL.PAFPN.ATTENTION_BEFORE is {attention_before!r}; use 'bottom_up', 'top_down' or "
            "both"
        )
    if init != "identity":
        return
    conflicts = []
    if activation:
        conflicts.append(f"MODEL.PAFPN.ACTIVATION {activation!r} (needs '')")
    if pan_norm:
        conflicts.append(f"MODEL.PAFPN.NORM {pan_norm!r} (needs '')")
    if attention == "cbam" and cbam_gate != "double_sigmoid":
        conflicts.append(f"MODEL.CBAM.GATE {cbam_gate!r} (needs 'double_sigmoid')")
    if conflicts:
        raise ValueError(
            "MODEL.PAFPN.INIT 'identity' cannot start from the plain FPN with "
            + ", ".join(conflicts)
            + "; change these or set MODEL.PAFPN.INIT 'xavier'"
        )
