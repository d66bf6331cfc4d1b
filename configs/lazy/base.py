"""Data, optimizer and schedule of the LazyConfigs: 3,000 iterations of 4 images."""

import detectron2.data.transforms as T
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

from imrcnn_d2.data.catalog import load_datasets
from imrcnn_d2.data.loader import build_train_loader
from imrcnn_d2.data.mapper import LesionMapper
from imrcnn_d2.engine.schedule import new_layer_lr_factor
from imrcnn_d2.evaluation import LesionEvaluator


def _test_loader(split):
    return L(build_detection_test_loader)(
        dataset=L(load_datasets)(names=f"${{train.dataset}}_{split}"),
        mapper=L(LesionMapper)(
            is_train=False,
            crop_to_view="${dataloader.train.mapper.crop_to_view}",
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
            image_format="${dataloader.train.mapper.image_format}",
        ),
        num_workers=2,
    )


dataloader = OmegaConf.create()
dataloader.train = L(build_train_loader)(
    dataset=L(load_datasets)(names="${train.dataset}_train"),
    mapper=L(LesionMapper)(
        is_train=True,
        crop_to_view=True,  # as INPUT.CROP_TO_VIEW
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length=(640, 672, 704, 736, 768, 800),
                sample_style="choice",
                max_size=1333,
            ),
            L(T.RandomFlip)(horizontal=True),
            L(T.RandomFlip)(horizontal=False, vertical=True),
            L(T.RandomRotation)(angle=[0, 90, 180, 270], sample_style="choice"),
            L(T.RandomBrightness)(intensity_min=0.8, intensity_max=1.2),
            L(T.RandomContrast)(intensity_min=0.8, intensity_max=1.2),
            L(T.RandomSaturation)(intensity_min=0.8, intensity_max=1.2),
        ],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    ),
    total_batch_size=4,
    num_workers=2,
)
dataloader.val = _test_loader("val")
dataloader.test = _test_loader("test")
dataloader.val_evaluator = L(LesionEvaluator)(
    dataset_name="${train.dataset}_val",
    tau=0.5,  # as TEST.SCORE_THRESH
    tau_rule="f1",  # as TEST.TAU_RULE
    suppress_parts="never",  # as TEST.SUPPRESS_PARTS
    best_metric="${train.best_metric}",
)
dataloader.test_evaluator = L(LesionEvaluator)(
    dataset_name="${train.dataset}_test",
    tau="${dataloader.val_evaluator.tau}",
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(
        # params.model is set by the trainer
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        lr_factor_func=L(new_layer_lr_factor)(factor=4.0),
    ),
    lr=0.0025,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=200 / 3000,
    warmup_method="linear",
    warmup_factor=0.001,
)

train = model_zoo.get_config("common/train.py").train
train.device = ""  # "" for the CUDA device if there is one, else the CPU
# A prepared data set, which --data names as well: its folder, or a short name such as "kvasir_seg".
train.dataset = ""
train.max_iter = 3000
train.eval_period = 300
train.best_metric = "tau_val.lesion/selection"  # as TEST.BEST_METRIC
train.log_period = 10
train.checkpointer.period = 300
train.checkpointer.max_to_keep = 2  # as SOLVER.CHECKPOINTS_TO_KEEP
train.amp.enabled = True  # as SOLVER.AMP
train.amp.precision = "auto"
train.channels_last = False
train.ema_decay = 0.0  # as SOLVER.EMA_DECAY
train.max_skipped_batches = 0  # as SOLVER.MAX_SKIPPED_BATCHES
train.seed = 0
