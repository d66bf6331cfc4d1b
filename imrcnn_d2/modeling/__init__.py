from .attention import CBAM
from .backbones import (
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
    build_retinanet_timm_pafpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_timm_pafpn_backbone,
)
from .classifier import ImageClassifier
from .cpu_gradients import SeparableGradientROIAlign, SparseGradientRPNHead
from .pafpn import PAFPN
from .roi_heads import AMPSafeMaskHead, AMPSafeROIHeads, FP32ROIPooler
from .timm_backbone import TimmBackbone

__all__ = [
    "AMPSafeMaskHead",
    "AMPSafeROIHeads",
    "CBAM",
    "FP32ROIPooler",
    "ImageClassifier",
    "PAFPN",
    "SeparableGradientROIAlign",
    "SparseGradientRPNHead",
    "TimmBackbone",
    "build_resnet_pafpn_backbone",
    "build_retinanet_resnet_pafpn_backbone",
    "build_retinanet_timm_pafpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_pafpn_backbone",
]
