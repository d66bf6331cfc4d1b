"""IMR-CNN, ResNet-50: the model of imrcnn_R_50.yaml."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from imrcnn_d2.modeling import (
    PAFPN,
    AMPSafeMaskHead,
    EarlyStopRPN,
    FP32SeparableROIPooler,
    SparseGradientRPNHead,
)

from .base import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone._target_ = PAFPN
model.backbone.attention = "cbam"
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator._target_ = EarlyStopRPN
model.proposal_generator.head._target_ = SparseGradientRPNHead
model.roi_heads.num_classes = 1
model.roi_heads.box_pooler = L(FP32SeparableROIPooler)(pooler=model.roi_heads.box_pooler)
model.roi_heads.mask_pooler = L(FP32SeparableROIPooler)(pooler=model.roi_heads.mask_pooler)
model.roi_heads.mask_head._target_ = AMPSafeMaskHead

train.output_dir = "output/${train.dataset}/imrcnn_R_50_lazy"
train.init_checkpoint = (
    "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"
)
