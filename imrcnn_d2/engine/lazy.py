"""Training from a LazyConfig: what Trainer does for YAML files."""

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.engine import TrainerBase, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from .hooks import BestCheckpointer, EvalHook
from .train_step import build_train_step, distribute

__all__ = ["LazyTrainer", "build_lazy_model", "evaluate"]


def build_lazy_model(cfg):
    """
    Args:
        cfg (DictConfig): ``model`` and ``train`` are read.

    Returns:
        nn.Module: on ``train.device``, in channels-last format if ``train.channels_last``.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def evaluate(cfg, model, split):
    """
    Args:
        cfg (DictConfig): ``dataloader.<split>`` and ``train.output_dir`` are read.
        model (nn.Module): to evaluate.
        split (str): "val" or "test".

    Returns:
        dict: as of ``LesionEvaluator``.
    """
    loader_cfg = cfg.dataloader[split]
    evaluator_cfg = cfg.dataloader[f"{split}_evaluator"]
    name = evaluator_cfg.dataset_name
    evaluator_cfg.output_dir = os.path.join(cfg.train.output_dir, "inference", name)
    results = inference_on_dataset(model, instantiate(loader_cfg), instantiate(evaluator_cfg))
    if comm.is_main_process():
        print_csv_format(results)
    return results


class LazyTrainer(TrainerBase):
    """
    Trains ``cfg.model`` as :class:`Trainer` trains a YAML file's model: validation on
    ``dataloader.val``, the best weights kept, ``dataloader.test`` evaluated once at the end.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (DictConfig): with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and
                ``train``; see configs/lazy/base.py.
        """
        super().__init__()
        self.cfg = cfg
        self.start_iter, self.max_iter = 0, cfg.train.max_iter
        model = build_lazy_model(cfg)
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        model = distribute(model, **cfg.train.ddp)
        loader = instantiate(cfg.dataloader.train)
        precision = cfg.train.amp.precision if cfg.train.amp.enabled else ""
        self._trainer = build_train_step(model, loader, optimizer, precision)
        self.model, self.optimizer = model, optimizer
        self.checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=self)
        self.best = BestCheckpointer(model, cfg.train.output_dir, cfg.train.eval_period)
        self.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
                EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model, "val")),
                self.best,
            ]
        )
        if comm.is_main_process():
            writers = default_writers(cfg.train.output_dir, self.max_iter)
            self.register_hooks(
                [
                    hooks.PeriodicCheckpointer(self.checkpointer, **cfg.train.checkpointer),
                    hooks.PeriodicWriter(writers, period=cfg.train.log_period),
                ]
            )

    def resume_or_load(self, resume):
        """
        Args:
            resume (bool): go on from the last checkpoint in ``train.output_dir`` where there is
                one, else load ``train.init_checkpoint``.
        """
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self):
        """
        Returns:
            dict: the results on ``dataloader.test``.
        """
        super().train(self.start_iter, self.max_iter)
        self.best.load_best()
        return evaluate(self.cfg, self.model, "test")

    def run_step(self):
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
