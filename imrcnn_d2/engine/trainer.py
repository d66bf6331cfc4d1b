"""DefaultTrainer for lesions: any device, epochs, validation apart from the test set."""

import logging
import os
import weakref

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, hooks
from detectron2.utils import comm

from imrcnn_d2.data.mappers import LesionMapper
from imrcnn_d2.evaluation import LesionEvaluator

from .hooks import BestCheckpointer, EvalHook, SamplePredictions
from .schedule import build_optimizer, resolve_epochs
from .train_step import build_train_step, distribute

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """
    Detectron2's DefaultTrainer with what lesion detection needs besides.

    - runs on any device, alone or in several processes, with or without mixed precision;
    - schedules in epochs (:func:`resolve_epochs`), SGD or AdamW (:func:`build_optimizer`);
    - validates on DATASETS.VAL and keeps the best weights there; after training these are loaded
      and DATASETS.TEST is evaluated once.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): with the keys of ``add_imrcnn_config``.
        """
        # Not DefaultTrainer.__init__: its DDP and AMP need CUDA. The order of building is its.
        super(DefaultTrainer, self).__init__()
        cfg = resolve_epochs(self.auto_scale_workers(cfg, comm.get_world_size()))
        _check_classes(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = distribute(model)
        precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else ""
        self._trainer = build_train_step(model, data_loader, optimizer, precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self):
        """
        Returns:
            list[HookBase]: validation and the best checkpoint come before the periodic checkpoint,
                so that this one carries their state.
        """
        cfg = self.cfg
        period = cfg.TEST.EVAL_PERIOD
        ret = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.DATASETS.VAL:
            ret += [
                EvalHook(period, self.validate),
                BestCheckpointer(self.model, cfg.OUTPUT_DIR, period),
            ]
        if comm.is_main_process():
            if cfg.DATASETS.VAL:
                ret.append(
                    SamplePredictions(
                        self._bare_model,
                        self.build_test_loader(cfg, cfg.DATASETS.VAL[0]),
                        cfg.DATASETS.VAL[0],
                        period,
                        cfg.MODEL.IMRCNN.SCORE_THRESH,
                    )
                )
            ret += [
                hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
                hooks.PeriodicWriter(self.build_writers(), period=10),
            ]
        return ret

    @property
    def _bare_model(self):
        ddp = isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        return self.model.module if ddp else self.model

    def train(self):
        """
        Train, load the weights that were best on DATASETS.VAL, evaluate DATASETS.TEST once.

        Returns:
            dict: the results on DATASETS.TEST; {} on other than the main process.
        """
        super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        for hook in self._hooks:
            if isinstance(hook, BestCheckpointer):
                hook.load_best()
        return self.test(self.cfg, self.model)

    def validate(self):
        """
        Returns:
            dict: the results on DATASETS.VAL.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = cfg.DATASETS.VAL
        return self.test(cfg, self.model)

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=LesionMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = LesionMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return LesionEvaluator(
            dataset_name,
            tau=cfg.MODEL.IMRCNN.SCORE_THRESH,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
        )


def _check_classes(cfg):
    if not cfg.MODEL.META_ARCHITECTURE.endswith("RCNN"):
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL):
        DatasetCatalog.get(name)  # class names are known once the file was read
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f"Data set {name} has {len(classes)} classes {classes}, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}; "
                f"set it to {len(classes)}"
            )
