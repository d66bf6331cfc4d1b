from imrcnn_d2.modeling.backbones import (
    build_resnet_pafpn_backbone,
    build_retinanet_resnet_pafpn_backbone,
    build_retinanet_timm_pafpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_timm_pafpn_backbone,
)
from imrcnn_d2.modeling.cbam import CBAM
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.modeling.cpu_gradients import SeparableGradientROIAlign, SparseGradientRPNHead
from imrcnn_d2.modeling.pafpn import PAFPN
from imrcnn_d2.modeling.roi_heads import AMPSafeMaskHead, AMPSafeROIHeads, FP32ROIPooler
from imrcnn_d2.modeling.timm_backbone import TimmBackbone

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
