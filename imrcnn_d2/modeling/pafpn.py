"""FPN followed by a bottom-up path (PANet, Liu et al., CVPR 2018) with CBAM before the fusion."""

import math
from collections.abc import Iterable, Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from imrcnn_d2.config import get_node
from imrcnn_d2.modeling.cbam import CBAM

# Beginnings of the names of layers that have no pretrained weights: SOLVER.NEW_LAYER_LR_FACTOR is
# theirs. "simfp_" are those of a plain ViT's pyramid, see TimmBackbone. A variant adds its own in
# its file, and names its model as `PAFPN.model_name` does.
NEW_LAYERS = ["pan_", "cbam", "simfp_"]


class PAFPN(FPN):
    """The neck of IBMR-CNN and, with attention, of IMR-CNN (Sci Rep 14:7847, 2024).

    With P_l the outputs of the FPN for l = first..last, from high to low resolution::

        A_l     = cbam_l(P_l) with attention "cbam", P_l otherwise
        N_first = A_first
        D_l     = ReLU(pan_down{l-1}(N_{l-1}))               3x3, stride 2
        N_l     = ReLU(pan_output{l}(D_l + A_l))             3x3, form "panet": the paper's
        N_l     = A_l + pan_output{l}(D_l)                   form "residual"

    and p{l} = N_l. Form "residual" starts as exactly the FPN: pan_output is zero, each gate is 1.
    Form "affine" is that of version 0.1.0, "panet" without ReLU, for weights trained with it.

    The paper has CBAM "before layers of different paths are fused". ``attention_before`` names the
    maps that are meant, any of "backbone" (C_l, before its 1x1 convolution: ``cbam_backbone{l}``),
    "top_down" (the lateral maps: ``cbam_lateral{l}``), "bottom_up" (P_l: ``cbam{l}``) and
    "both_inputs" (P_l and D_l: ``cbam{l}`` and ``cbam_down{l}``).

    It is a subclass of FPN, so every key of an FPN checkpoint keeps its name; the new ones are
    those above and ``pan_down{l}``, ``pan_output{l}``.
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
        form: str = "panet",
        pan_norm: str = "",
        attention: str = "",
        attention_before: Sequence[str] = ("bottom_up",),
        cbam_reduction: int = 16,
        cbam_kernel_size: int = 7,
        cbam_gate: str = "sigmoid",
        **earlier: str,
    ):
        """As :class:`detectron2.modeling.backbone.FPN`; the further options are those of
        MODEL.PAFPN and MODEL.CBAM.

        Args:
            top_block: its ``in_feature`` is a level of this pyramid or of ``bottom_up``.
            earlier: refused; version 0.1.0 had ``init`` and ``activation``.

        Raises:
            ValueError: for unknown values, and where form "residual" could not start as the FPN.
        """
        if earlier:
            raise ValueError(
                f"PAFPN takes no {', '.join(earlier)}: `form` 'panet' or 'residual' says how it "
                "starts too, and 'affine' is what activation='' was, for weights of version 0.1.0"
            )
        _check_options(form, attention, attention_before, pan_norm, cbam_gate)
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        self.form, self.attention = form, attention

        def conv(stride):
            norms = {"bias": pan_norm == "", "norm": get_norm(pan_norm, out_channels)}
            return Conv2d(out_channels, out_channels, 3, stride, padding=1, **norms)

        shapes = bottom_up.output_shape()
        stages = [int(math.log2(shapes[f].stride)) for f in in_features]
        # Plain lists, as in FPN: the modules are registered once, by name. They go from high to low
        # resolution.
        self.down_convs, self.pan_output_convs = [], []
        for stage in stages[:-1]:
            self.down_convs.append(conv(stride=2))
            self.pan_output_convs.append(conv(stride=1))
            self.add_module(f"pan_down{stage}", self.down_convs[-1])
            self.add_module(f"pan_output{stage + 1}", self.pan_output_convs[-1])
            weight_init.c2_xavier_fill(self.down_convs[-1])
            weight_init.c2_xavier_fill(self.pan_output_convs[-1])
            if form == "residual":
                nn.init.zeros_(self.pan_output_convs[-1].weight)

        def cbams(name, before, widths):
            if not attention or before.isdisjoint(attention_before):
                return []
            made = []
            for stage, width in widths.items():
                made.append(CBAM(width, cbam_reduction, cbam_kernel_size, cbam_gate))
                self.add_module(f"{name}{stage}", made[-1])
            return made

        levels = dict.fromkeys(stages, out_channels)
        inputs = {stage: shapes[f].channels for stage, f in zip(stages, in_features, strict=True)}
        self.backbone_cbams = cbams("cbam_backbone", {"backbone"}, inputs)
        self.lateral_cbams = cbams("cbam_lateral", {"top_down"}, levels)
        self.cbams = cbams("cbam", {"bottom_up", "both_inputs"}, levels)
        upper = dict.fromkeys(stages[1:], out_channels)
        self.down_cbams = cbams("cbam_down", {"both_inputs"}, upper)
        if form == "residual":
            # Not those of D_l, which pan_output hides at first: at 1 as well, their first layers
            # would have no gradient before the third step.
            for cbam in self.backbone_cbams + self.lateral_cbams + self.cbams:
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
            **{key: pafpn[key.upper()] for key in ("form", "attention", "attention_before")},
            **{f"cbam_{key}": cbam[key.upper()] for key in ("reduction", "kernel_size", "gate")},
        }

    @property
    def model_name(self) -> str:
        """Of a Mask R-CNN with this neck: the paper's names are for the paper's form."""
        name = "IMR-CNN" if self.attention else "IBMR-CNN"
        return name if self.form == "panet" else f"{name} ({self.form})"

    @property
    def earlier_option(self) -> str:
        """An option of version 0.1.0 that this neck has, for its weights alone; "" for none."""
        if self.form == "affine":
            return "MODEL.PAFPN.FORM 'affine'"
        residual = any(isinstance(m, CBAM) and m.residual for m in self.modules())
        return "MODEL.CBAM.GATE 'residual'" if residual else ""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "p{l}" -> (N, out_channels, H / 2^l, W / 2^l) for images (N, 3, H, W)."""
        bottom_up_features = self.bottom_up(x)
        results = self._top_down(bottom_up_features)  # P_l
        _refine(results, self.cbams)  # A_l

        # N_l, from high to low resolution.
        convs = zip(self.down_convs, self.pan_output_convs, strict=True)
        for idx, (down_conv, output_conv) in enumerate(convs):
            down = self._act(down_conv(results[idx]))  # D_l
            if self.down_cbams:
                down = self.down_cbams[idx](down)
            if self.form == "residual":
                results[idx + 1] = results[idx + 1] + output_conv(down)
            else:
                results[idx + 1] = self._act(output_conv(down + results[idx + 1]))

        if self.top_block is not None:
            if self.top_block.in_feature in bottom_up_features:
                top_block_in_feature = bottom_up_features[self.top_block.in_feature]
            else:
                top_block_in_feature = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(top_block_in_feature))
        return dict(zip(self._out_features, results, strict=True))

    def _top_down(self, bottom_up_features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The FPN's outputs in order of l; a method, so that its memory is free afterwards."""
        laterals = [bottom_up_features[name] for name in self.in_features]
        _refine(laterals, self.backbone_cbams)
        # lateral_convs go from low to high resolution.
        convs = zip(self.lateral_convs[::-1], laterals, strict=True)
        laterals = [conv(x) for conv, x in convs]
        _refine(laterals, self.lateral_cbams)
        laterals.reverse()

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
        return x if self.form == "affine" else F.relu_(x)


def _refine(maps: list[torch.Tensor], cbams: list[CBAM]) -> None:
    """Replace each map by its refined one; in place, so that one after the other is freed."""
    for idx, cbam in enumerate(cbams):
        maps[idx] = cbam(maps[idx])


def _check_options(
    form: str, attention: str, attention_before: Iterable[str], pan_norm: str, cbam_gate: str
) -> None:
    for key, value, known in (
        ("MODEL.PAFPN.FORM", form, ("panet", "residual", "affine")),
        ("MODEL.PAFPN.ATTENTION", attention, ("", "cbam")),
    ):
        if value not in known:
            raise ValueError(f"{key} is {value!r}; use one of {known}")
    places = {"backbone", "top_down", "bottom_up", "both_inputs"}
    if not attention_before or not places.issuperset(attention_before):
        raise ValueError(
            f"MODEL.PAFPN.ATTENTION_BEFORE is {attention_before!r}; use any of {sorted(places)}"
        )
    needed = [("MODEL.PAFPN.NORM", pan_norm, "")]
    if attention == "cbam":
        needed.append(("MODEL.CBAM.GATE", cbam_gate, "double_sigmoid"))
    conflicts = [
        f"{key} {value!r} (needs {need!r})" for key, value, need in needed if value != need
    ]
    if form == "residual" and conflicts:
        raise ValueError(
            "MODEL.PAFPN.FORM 'residual' cannot start from the plain FPN with "
            f"{', '.join(conflicts)}; change these or set MODEL.PAFPN.FORM 'panet'"
        )
