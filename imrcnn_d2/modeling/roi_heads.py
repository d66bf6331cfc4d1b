"""ROI pooling and mask prediction that stay exact under mixed precision."""

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from imrcnn_d2.modeling.cpu_gradients import SeparableGradientROIAlign


class FP32SeparableROIPooler(nn.Module):
    """Pool in fp32 whatever the features' dtype, by :class:`SeparableGradientROIAlign`.

    Detectron2's ROIAlign casts the boxes to the features' dtype: in bf16, with its 8 bits of
    precision, they move by a pixel and more. Here the features are cast up instead.
    """

    def __init__(self, pooler: ROIPooler):
        super().__init__()
        self.pooler = pooler
        for level, pool in enumerate(pooler.level_poolers):
            if type(pool) is ROIAlign:
                pooler.level_poolers[level] = SeparableGradientROIAlign(
                    pool.output_size, pool.spatial_scale, pool.sampling_ratio, pool.aligned
                )

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]):
        """Return (M, C, output_size, output_size) fp32 for the M boxes on maps (N, C, H_l, W_l)."""
        return self.pooler([f.float() for f in x], box_lists)


@ROI_HEADS_REGISTRY.register()
class AMPSafeROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads`, built from a config with poolers that run in fp32."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_pooler"] = FP32SeparableROIPooler(ret["box_pooler"])
        return ret

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        ret = super()._init_mask_head(cfg, input_shape)
        if ret.get("mask_pooler") is not None:
            ret["mask_pooler"] = FP32SeparableROIPooler(ret["mask_pooler"])
        return ret


@ROI_MASK_HEAD_REGISTRY.register()
class AMPSafeMaskHead(MaskRCNNConvUpsampleHead):
    """:class:`MaskRCNNConvUpsampleHead` whose logits are fp32.

    Pasting a mask into an image casts the sampling grid to the mask's dtype, as ROIAlign its boxes.
    """

    def layers(self, x):
        """Return mask logits (M, num_classes, 2 H, 2 W) of pooled features (M, C, H, W)."""
        for layer in self:
            x = layer(x)
        return x.float()
