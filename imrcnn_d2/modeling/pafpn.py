"""FPN followed by a bottom-up path (PANet, Liu et al., CVPR 2018) with CBAM before the fusion."""

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from imrcnn_d2.config import get_node
from imrcnn_d2.modeling.cbam import CBAM


class PAFPN(FPN):
    """The neck of IBMR-CNN and, with attention, of IMR-CNN (Sci Rep 14:7847, 2024).

    With P_l the outputs of the FPN for l = first..last, from high to low resolution::

        A_l     = cbam_l(P_l) with attention "cbam", P_l otherwise
        N_first = A_first
        M_l     = act(pan_down{l-1}(N_{l-1})) + A_l        3x3, stride 2
        N_l     = act(pan_output{l}(M_l))                  3x3, for l > first

    and p{l} = N_l. With attention before "top_down", the FPN fuses refined lateral maps too. It is
    a subclass of FPN, so every key of an FPN checkpoint keeps its name; the new ones are
    ``pan_down{l}``, ``pan_output{l}``, ``cbam{l}`` and ``cbam_lateral{l}``.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        *,
        pan_norm: str = "",
        init: str = "identity",
        activation: str = "",
        attention: str = "",
        attention_before: Sequence[str] = ("bottom_up",),
        cbam_reduction: int = 16,
        cbam_kernel_size: int = 7,
        cbam_gate: str = "double_sigmoid",
    ):
        """As :class:`detectron2.modeling.backbone.FPN`; the further options are those of
        MODEL.PAFPN and MODEL.CBAM.

        Args:
            top_block: its ``in_feature`` is a level of this pyramid or of ``bottom_up``.

        Raises:
            ValueError: for unknown values, and where ``init="identity"`` cannot be an identity.
        """
        _check_options(init, activation, attention, attention_before, pan_norm, cbam_gate)
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        self._activation = activation

        def conv(stride):
            norms = {"bias": pan_norm == "", "norm": get_norm(pan_norm, out_channels)}
            return Conv2d(out_channels, out_channels, 3, stride, padding=1, **norms)

        shapes = bottom_up.output_shape()
        stages = [int(math.log2(shapes[f].stride)) for f in in_features]
        # Plain lists, as in FPN: the modules are registered once, by name. The first three go from
        # high to low resolution, lateral_cbams from low to high as lateral_convs.
        self.down_convs, self.pan_output_convs, self.cbams, self.lateral_cbams = [], [], [], []
        for stage in stages[:-1]:
            self.down_convs.append(conv(stride=2))
            self.pan_output_convs.append(conv(stride=1))
            self.add_module(f"pan_down{stage}", self.down_convs[-1])
            self.add_module(f"pan_output{stage + 1}", self.pan_output_convs[-1])
        cbam_options = out_channels, cbam_reduction, cbam_kernel_size, cbam_gate
        for stage in stages if attention else ():
            if "bottom_up" in attention_before:
                self.cbams.append(CBAM(*cbam_options))
                self.add_module(f"cbam{stage}", self.cbams[-1])
            if "top_down" in attention_before:
                self.lateral_cbams.insert(0, CBAM(*cbam_options))
                self.add_module(f"cbam_lateral{stage}", self.lateral_cbams[0])
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

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None) -> dict:
        fpn, pafpn, cbam = cfg.MODEL.FPN, get_node(cfg, "MODEL.PAFPN"), get_node(cfg, "MODEL.CBAM")
        return {
            "bottom_up": bottom_up,
            "top_block": top_block,
            **{
                key: fpn[key.upper()]
                for key in ("in_features", "out_channels", "norm", "fuse_type")
            },
            "pan_norm": pafpn.NORM,
            **{
                k: pafpn[k.upper()] for k in ("init", "activation", "attention", "attention_before")
            },
            **{f"cbam_{key}": cbam[key.upper()] for key in ("reduction", "kernel_size", "gate")},
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "p{l}" -> (N, out_channels, H / 2^l, W / 2^l) for images (N, 3, H, W)."""
        bottom_up_features = self.bottom_up(x)
        results = self._top_down(bottom_up_features)  # P_l

        for idx, cbam in enumerate(self.cbams):  # A_l; empty without attention
            results[idx] = cbam(results[idx])

        # N_l, from high to low resolution.
        convs = zip(self.down_convs, self.pan_output_convs, strict=True)
        for idx, (down_conv, output_conv) in enumerate(convs):
            merged = self._act(down_conv(results[idx])) + results[idx + 1]
            results[idx + 1] = self._act(output_conv(merged))

        if self.top_block is not None:
            if self.top_block.in_feature in bottom_up_features:
                top_block_in_feature = bottom_up_features[self.top_block.in_feature]
            else:
                top_block_in_feature = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(top_block_in_feature))
        return dict(zip(self._out_features, results, strict=True))

    def _top_down(self, bottom_up_features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The FPN's outputs in order of l; a method, so that its memory is free afterwards."""
        features = [bottom_up_features[name] for name in self.in_features[::-1]]
        # From low to high resolution, as lateral_convs.
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for idx, cbam in enumerate(self.lateral_cbams):
            laterals[idx] = cbam(laterals[idx])

        prev_features = laterals[0]
        results = [self.output_convs[0](prev_features)]
        for lateral, output_conv in zip(laterals[1:], self.output_convs[1:], strict=True):
            top_down_features = F.interpolate(prev_features, scale_factor=2.0, mode="nearest")
            prev_features = lateral + top_down_features
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
    needed = [("MODEL.PAFPN.ACTIVATION", activation, ""), ("MODEL.PAFPN.NORM", pan_norm, "")]
    if attention == "cbam":
        needed.append(("MODEL.CBAM.GATE", cbam_gate, "double_sigmoid"))
    conflicts = [
        f"{key} {value!r} (needs {need!r})" for key, value, need in needed if value != need
    ]
    if init == "identity" and conflicts:
        raise ValueError(
            "MODEL.PAFPN.INIT 'identity' cannot start from the plain FPN with "
            f"{', '.join(conflicts)}; change these or set MODEL.PAFPN.INIT 'xavier'"
        )
