"""ROI pooling and mask prediction that stay exact under mixed precision."""

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from imrcnn_d2.modeling.cpu_gradients import SeparableGradientROIAlign

__all__ = ["AMPSafeMaskHead", "AMPSafeROIHeads", "FP32ROIPooler"]


class FP32ROIPooler(nn.Module):
    """
    Pool in fp32 whatever the features' dtype.

    Detectron2's ROIAlign casts the boxes to the features' dtype: in bf16, with its 8 bits of
    precision, they move by a pixel and more. Here the features are cast up instead.
    """

    def __init__(self, pooler):
        """
        Args:
            pooler (ROIPooler): what pools.
        """
        super().__init__()
        self.pooler = pooler
        for level, pool in enumerate(pooler.level_poolers):
            if type(pool) is ROIAlign:
                pooler.level_poolers[level] = SeparableGradientROIAlign(
                    pool.output_size, pool.spatial_scale, pool.sampling_ratio, pool.aligned
                )

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]):
        """
        Args:
            x (list[Tensor]): feature maps, (N, C, H_l, W_l) each.
            box_lists (list[Boxes]): N sets of boxes, M in all.

        Returns:
            Tensor: (M, C, output_size, output_size), fp32.
        """
        return self.pooler([f.float() for f in x], box_lists)


@ROI_HEADS_REGISTRY.register()
class AMPSafeROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads`, built from a config with poolers that run in fp32."""

    # For scripting: heads that are off are not compiled. Detectron2 does so for its own class.
    mask_on: torch.jit.Final[bool]
    keypoint_on: torch.jit.Final[bool]

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_pooler"] = FP32ROIPooler(ret["box_pooler"])
        return ret

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        ret = super()._init_mask_head(cfg, input_shape)
        if ret.get("mask_pooler") is not None:
            ret["mask_pooler"] = FP32ROIPooler(ret["mask_pooler"])
        return ret


@ROI_MASK_HEAD_REGISTRY.register()
class AMPSafeMaskHead(MaskRCNNConvUpsampleHead):
    """
    :class:`MaskRCNNConvUpsampleHead` whose logits are fp32.

    Pasting a mask into an image casts the sampling grid to the mask's dtype, as ROIAlign its boxes.
    """

    def layers(self, x):
        """
        Args:
            x (Tensor): pooled features, (M, C, H, W).

        Returns:
            Tensor: mask logits, (M, num_classes, 2 H, 2 W), fp32.
        """
        for layer in self:
            x = layer(x)
        return x.float()
