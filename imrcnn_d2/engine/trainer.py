"""Training from a LazyConfig: what Trainer does for YAML files."""

import functools
import hashlib
import json
import logging
import os
import weakref

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf

from imrcnn_d2.data.loader import build_train_loader
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper
from imrcnn_d2.engine.checkpoint import Checkpointer, last_weights, log_test_evaluations
from imrcnn_d2.engine.config import is_classifier, num_classes_key, resolve_class_weights
from imrcnn_d2.engine.hooks import (
    EMA,
    BestCheckpointer,
    EvalHook,
    SamplePredictions,
    assemble_hooks,
)
from imrcnn_d2.engine.run_record import RunRecord, config_sha256
from imrcnn_d2.engine.schedule import (
    LRScheduler,
    Phases,
    build_optimizer,
    phase_solver,
    read_phases,
    resolve_epochs,
)
from imrcnn_d2.engine.train_step import TrainStep, distribute, training_seed, use_channels_last
from imrcnn_d2.evaluation import LesionEvaluator
from imrcnn_d2.evaluation.evaluators import ClassificationEvaluator

__all__ = ["LazyTrainer", "Trainer", "build_lazy_model", "evaluate"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """
    Detectron2's DefaultTrainer with what lesion detection and image recognition need besides.

    - runs on any device, alone or in several processes, with or without mixed precision;
    - schedules in epochs (:func:`resolve_epochs`) and phases (:class:`Phases`), SGD or AdamW
      (:func:`build_optimizer`);
    - validates on DATASETS.VAL, keeps the best weights there and the operating point chosen on the
      first of these sets; after training both are loaded and DATASETS.TEST is evaluated once, with
      confidence intervals;
    - leaves ``run.json``, see :class:`RunRecord`, and notes each final evaluation beside the data
      set, see :func:`log_test_evaluation`.

    ``evaluated_model`` is the one that is validated and tested: the model, or its average.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg (CfgNode): with the keys of ``add_imrcnn_config``.
        """
        # Not DefaultTrainer.__init__: its DDP and AMP need CUDA. The order of building is its.
        super(DefaultTrainer, self).__init__()
        self._config_hash = config_sha256(cfg)
        scaled = self.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.PHASES and scaled is not cfg:
            raise ValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE}, but the "
                "learning rates in SOLVER.PHASES are not scaled: set it to 0"
            )
        cfg = resolve_epochs(scaled)
        cfg = resolve_class_weights(cfg)
        _check_classes(cfg)
        model = self.build_model(cfg)
        self._phases = self._build_phases(cfg, model)
        if self._phases:
            optimizer, scheduler = self._phases.optimizer, self._phases.scheduler
        else:
            optimizer = self.build_optimizer(cfg, model)
            scheduler = self.build_lr_scheduler(cfg, optimizer)
        data_loader = self.build_train_loader(cfg)
        self._ema = EMA(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.evaluated_model = self._ema.model if self._ema else model
        model = distribute(model)
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            seed=training_seed(cfg.SEED),
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
            max_skipped=cfg.SOLVER.MAX_SKIPPED_BATCHES,
        )
        self.scheduler = scheduler
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def _build_phases(cls, cfg, model):
        phases = read_phases(cfg.SOLVER.PHASES)
        if not phases:
            return None

        def build_solver(phase):
            own = phase_solver(cfg, phase)
            optimizer = cls.build_optimizer(own, model)
            return optimizer, cls.build_lr_scheduler(own, optimizer)

        return Phases(phases, model, build_solver)

    def build_hooks(self):
        """
        Returns:
            list[HookBase]: see :func:`assemble_hooks`.
        """
        cfg = self.cfg
        validation, make_samples = [], None
        if cfg.DATASETS.VAL:
            if is_classifier(cfg):
                criterion = {"metric": "recognition/balanced_accuracy"}
            else:
                criterion = {
                    "tau_rule": cfg.MODEL.IMRCNN.TAU_RULE,
                    "dataset": cfg.DATASETS.VAL[0],
                }
                make_samples = self._sample_predictions
            evaluation = EvalHook(cfg.TEST.EVAL_PERIOD, self.validate)
            best = BestCheckpointer(self.evaluated_model, cfg.OUTPUT_DIR, evaluation, **criterion)
            validation = [evaluation, best]
        self._best = validation[-1] if validation else None
        self._record = RunRecord(
            cfg.OUTPUT_DIR,
            model=self.model,
            seed=cfg.SEED,
            config_hash=self._config_hash,
            datasets=[*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL, *cfg.DATASETS.TEST],
            phases=self._phases.describe() if self._phases else None,
        )
        return assemble_hooks(
            phases=self._phases,
            record=self._record,
            lr_scheduler=LRScheduler(),
            ema=self._ema,
            validation=validation,
            make_samples=make_samples,
            checkpointer=self.checkpointer,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            make_writers=self.build_writers,
            log_period=10,
        )

    def _sample_predictions(self):
        cfg = self.cfg
        name = cfg.DATASETS.VAL[0]
        loader = self.build_test_loader(cfg, name)
        tau = cfg.MODEL.IMRCNN.SCORE_THRESH
        return SamplePredictions(self.evaluated_model, loader, name, cfg.TEST.EVAL_PERIOD, tau)

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        if self.start_iter and self.start_iter >= self.max_iter:
            self.checkpointer.renew_final(self.iter)

    def load_state_dict(self, state_dict):
        if self._phases:  # the optimizer's state is that of the phase it was saved in
            self._phases.start_at(state_dict["iteration"])
        super().load_state_dict(state_dict)

    def train(self):
        """
        Train, load the weights that were best on DATASETS.VAL, evaluate DATASETS.TEST once.

        Returns:
            dict: the metrics on DATASETS.TEST; {} on other than the main process.
            ``test_results`` then holds the results by data set, as of :meth:`final_test`.
        """
        super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        weights = (self._best and self._best.load_best()) or last_weights(
            self.checkpointer, self._ema
        )
        metrics, self.test_results = self.final_test(self.cfg, self.evaluated_model, weights)
        self._record.finish()
        return metrics

    def validate(self):
        """
        Returns:
            dict: the results on DATASETS.VAL.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = cfg.DATASETS.VAL
        return self.test(cfg, self.evaluated_model)

    @classmethod
    def final_test(cls, cfg, model, weights):
        """
        Evaluate DATASETS.TEST with intervals and, where the weights have one, at their operating
        point; each evaluation is noted beside its data set.

        Args:
            cfg (CfgNode):
            model (nn.Module): with ``weights`` loaded.
            weights (Weights): see :func:`load_weights`.

        Returns:
            tuple[dict, dict[str, LesionResults or ClassificationResults]]: the metrics, as
            :meth:`test`, and the results by data set; empty on other than the main process.
        """
        names = cfg.DATASETS.TEST
        evaluators = [cls.build_evaluator(cfg, name, weights) for name in names]
        metrics = cls.test(cfg, model, evaluators)
        log_test_evaluations(names, cfg.OUTPUT_DIR, weights)
        return metrics, _results_by_name(names, evaluators)

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        return use_channels_last(model) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = (ClassificationMapper if is_classifier(cfg) else LesionMapper)(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, weights=None):
        """
        Args:
            cfg (CfgNode):
            dataset_name (str):
            weights (Weights or None): what a final evaluation is of. None during training, where an
                operating point is chosen on the sets of DATASETS.VAL, and never on others.

        Returns:
            LesionEvaluator, or ClassificationEvaluator for a classifier:
        """
        node = cfg.MODEL.IMRCNN
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        if is_classifier(cfg):
            arguments = weights.classification_arguments() if weights is not None else {}
            return ClassificationEvaluator(dataset_name, output_dir=output_dir, **arguments)
        if weights is not None:
            arguments = weights.evaluator_arguments()
        else:
            arguments = {"tau_rule": node.TAU_RULE if dataset_name in cfg.DATASETS.VAL else None}
        return LesionEvaluator(
            dataset_name,
            tau=node.SCORE_THRESH,
            output_dir=output_dir,
            **arguments,
        )


def _check_classes(cfg):
    key = num_classes_key(cfg)
    if key is None:
        return
    wanted = functools.reduce(getattr, key.split("."), cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL):
        DatasetCatalog.get(name)  # class names are known once the file was read
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if len(classes) != wanted:
            raise ValueError(
                f"Data set {name} has {len(classes)} classes {classes}, but {key} is {wanted}; "
                f"set it to {len(classes)}"
            )


def _results_by_name(names, evaluators):
    """Evaluators of other projects keep no results."""
    results = {n: getattr(e, "results", None) for n, e in zip(names, evaluators, strict=True)}
    return {name: result for name, result in results.items() if result is not None}


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
        tuple[dict, dict[str, LesionResults]]: the metrics, as of ``LesionEvaluator``, and the
        results by data set; empty on other than the main process.
    """
    loader_cfg = cfg.dataloader[split]
    evaluator_cfg = cfg.dataloader[f"{split}_evaluator"].copy()
    name = evaluator_cfg.dataset_name
    evaluator_cfg.output_dir = os.path.join(cfg.train.output_dir, "inference", name)
    if weights is not None:
        evaluator_cfg.update(weights.evaluator_arguments())
    evaluator = instantiate(evaluator_cfg)
    metrics = inference_on_dataset(model, instantiate(loader_cfg), evaluator)
    if weights is not None:
        log_test_evaluations([name], cfg.train.output_dir, weights)
    if comm.is_main_process():
        print_csv_format(metrics)
    return metrics, _results_by_name([name], [evaluator])


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
        validation = EvalHook(period, lambda: evaluate(cfg, evaluated, "val")[0])
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
            dict: the metrics on ``dataloader.test``; ``test_results`` then holds the results.
        """
        super().train(self.start_iter, self.max_iter)
        weights = self.best.load_best() or last_weights(self.checkpointer, self._ema)
        metrics, self.test_results = evaluate(self.cfg, self._evaluated_model, "test", weights)
        self._record.finish()
        return metrics

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
