"""Training from a LazyConfig: what Trainer does for YAML files."""

import hashlib
import json
import os

from detectron2.config import instantiate
from detectron2.engine import TrainerBase, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf

from imrcnn_d2.modeling.memory_format import use_channels_last

from .checkpoint import Checkpointer
from .ema import EMA
from .hooks import BestCheckpointer, EvalHook, SamplePredictions, assemble_hooks
from .provenance import RunRecord
from .train_step import TrainStep, distribute, training_seed
from .weights import last_weights, log_test_evaluations

__all__ = ["LazyTrainer", "build_lazy_model", "evaluate"]


def build_lazy_model(cfg):
    """
    Args:
        cfg (DictConfig): ``model`` and ``train`` are read.

    Returns:
        nn.Module: on ``train.device``, see :func:`use_channels_last` for ``train.channels_last``.
    """
    model = instantiate(cfg.model).to(cfg.train.device)
    return use_channels_last(model) if cfg.train.channels_last else model


def evaluate(cfg, model, split, weights=None):
    """
    Args:
        cfg (DictConfig): ``dataloader.<split>`` and ``train.output_dir`` are read.
        model (nn.Module): to evaluate.
        split (str): "val" or "test".
        weights (Weights or None): what a final evaluation is of; it then has intervals and is noted
            beside the data set.

    Returns:
        dict: as of ``LesionEvaluator``.
    """
    loader_cfg = cfg.dataloader[split]
    evaluator_cfg = cfg.dataloader[f"{split}_evaluator"].copy()
    name = evaluator_cfg.dataset_name
    evaluator_cfg.output_dir = os.path.join(cfg.train.output_dir, "inference", name)
    if weights is not None:
        evaluator_cfg.update(weights.evaluator_arguments())
    results = inference_on_dataset(model, instantiate(loader_cfg), instantiate(evaluator_cfg))
    if weights is not None:
        log_test_evaluations([name], cfg.train.output_dir, weights)
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
        self._record = _run_record(cfg, model)
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        self._ema = EMA(model, cfg.train.ema_decay) if cfg.train.ema_decay else None
        self._evaluated_model = evaluated = self._ema.model if self._ema else model
        model = distribute(model, **cfg.train.ddp)
        self._trainer = TrainStep(
            model,
            instantiate(cfg.dataloader.train),
            optimizer,
            seed=training_seed(cfg.train.seed),
            precision=cfg.train.amp.precision if cfg.train.amp.enabled else "",
            max_skipped=cfg.train.max_skipped_batches,
        )
        self.model, self.optimizer = model, optimizer
        period, output_dir = cfg.train.eval_period, cfg.train.output_dir
        self.checkpointer = Checkpointer(
            model, output_dir, keep=cfg.train.checkpointer.max_to_keep, trainer=self
        )
        evaluator = cfg.dataloader.val_evaluator
        name = evaluator.dataset_name
        validation = EvalHook(period, lambda: evaluate(cfg, evaluated, "val"))
        self.best = BestCheckpointer(
            evaluated, output_dir, validation, tau_rule=evaluator.get("tau_rule"), dataset=name
        )
        hook_list = assemble_hooks(
            record=self._record,
            lr_scheduler=hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ema=self._ema,
            validation=[validation, self.best],
            make_samples=lambda: SamplePredictions(
                evaluated, instantiate(cfg.dataloader.val), name, period, evaluator.tau
            ),
            checkpointer=self.checkpointer,
            checkpoint_period=cfg.train.checkpointer.period,
            make_writers=lambda: default_writers(output_dir, self.max_iter),
            log_period=cfg.train.log_period,
        )
        self.register_hooks(hook_list)

    def resume_or_load(self, resume):
        """
        Args:
            resume (bool): go on from the last checkpoint in ``train.output_dir`` where there is
                one, else load ``train.init_checkpoint``.
        """
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
            if self.start_iter >= self.max_iter:
                self.checkpointer.renew_final(self.iter)

    def train(self):
        """
        Returns:
            dict: the results on ``dataloader.test``.
        """
        super().train(self.start_iter, self.max_iter)
        weights = self.best.load_best() or last_weights(self.checkpointer, self._ema)
        results = evaluate(self.cfg, self._evaluated_model, "test", weights)
        self._record.finish()
        return results

    def run_step(self):
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def _run_record(cfg, model):
    names = cfg.dataloader.train.dataset.names
    evaluators = (cfg.dataloader.val_evaluator, cfg.dataloader.test_evaluator)
    hashed = OmegaConf.to_container(cfg)
    for key in ("output_dir", "device"):
        del hashed["train"][key]
    # Classes and functions by name: the place of a function in memory changes from run to run.
    text = json.dumps(hashed, default=lambda value: getattr(value, "__qualname__", repr(value)))
    return RunRecord(
        cfg.train.output_dir,
        model=model,
        seed=cfg.train.seed,
        config_hash=hashlib.sha256(text.encode()).hexdigest(),
        datasets=[
            *([names] if isinstance(names, str) else names),
            *(evaluator.dataset_name for evaluator in evaluators),
        ],
    )
