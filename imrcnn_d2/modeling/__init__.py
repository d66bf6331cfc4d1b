"""Parts of the models; importing this registers them with Detectron2."""

from imrcnn_d2.modeling import backbones
from imrcnn_d2.modeling.cbam import CBAM
from imrcnn_d2.modeling.classifier import ImageClassifier, grad_cam, timm_input
from imrcnn_d2.modeling.cpu_gradients import (
    EarlyStopRPN,
    SeparableGradientROIAlign,
    SparseGradientRPNHead,
)
from imrcnn_d2.modeling.pafpn import PAFPN
from imrcnn_d2.modeling.roi_heads import AMPSafeMaskHead, AMPSafeROIHeads, FP32SeparableROIPooler
from imrcnn_d2.modeling.timm_backbone import TimmBackbone

__all__ = ["CBAM", "PAFPN", "ImageClassifier", "TimmBackbone", "backbones", "grad_cam"]
__all__ += ["AMPSafeMaskHead", "AMPSafeROIHeads", "FP32SeparableROIPooler", "timm_input"]
__all__ += ["EarlyStopRPN", "SeparableGradientROIAlign", "SparseGradientRPNHead"]
