"""Builders for MODEL.BACKBONE.NAME."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from imrcnn_d2.modeling.pafpn import PAFPN
from imrcnn_d2.modeling.timm_backbone import TimmBackbone


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A timm model's feature maps, ``res{log2 stride}``."""
    return TimmBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """timm + FPN: the light MR-CNN."""
    return FPN(
        bottom_up=build_timm_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet + PAFPN, p2 to p6: IBMR-CNN and, with MODEL.PAFPN.ATTENTION "cbam", IMR-CNN."""
    return PAFPN(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_timm_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """timm + PAFPN, p2 to p6: the light IBMR-CNN and IMR-CNN."""
    return PAFPN(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet + PAFPN, p3 to p7, for RetinaNet and other one-stage detectors."""
    return _retinanet_pafpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_pafpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """timm + PAFPN, p3 to p7, for RetinaNet and other one-stage detectors."""
    return _retinanet_pafpn(cfg, build_timm_backbone(cfg, input_shape))


def _retinanet_pafpn(cfg, bottom_up):
    channels = bottom_up.output_shape()["res5"].channels
    return PAFPN(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))
