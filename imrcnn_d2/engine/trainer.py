"""The trainers of YAML configs and of LazyConfigs."""

import difflib
import functools
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace

from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data import training_images
from imrcnn_d2.data.loader import build_train_loader
from imrcnn_d2.engine.checkpoint import (
    Checkpointer,
    Weights,
    checkpoint_metadata,
    last_weights,
    log_test_evaluations,
)
from imrcnn_d2.engine.config import resolve_class_weights
from imrcnn_d2.engine.hooks import EMA, BestCheckpointer, EvalHook, Interruption, SamplePredictions
from imrcnn_d2.engine.plan import plan_record
from imrcnn_d2.engine.run_record import RunRecord, config_sha256, describe_model
from imrcnn_d2.engine.schedule import (
    LRScheduler,
    Phases,
    build_optimizer,
    phase_solver,
    read_phases,
    resolve_epochs,
)
from imrcnn_d2.engine.train_step import (
    TrainStep,
    distribute,
    share_buffers,
    training_seed,
    use_channels_last,
)
from imrcnn_d2.task import Task

logger = logging.getLogger(__name__)


class _Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer on any device, alone or in several processes: validates, keeps
    the best weights and their operating point, loads both after training and evaluates the test
    sets once, with intervals. A subclass builds the parts from its kind of config.

    `evaluated_model` is what is validated and tested: the model, or its average. After `train`,
    `test_results` are by data set, and `final_weights` those that were tested.

    Args:
        cfg: with the settings of the training, in iterations.
        given: the config that `evaluate` takes.
        config_text: the config as YAML, which checkpoints carry; None for a LazyConfig.
    """

    best: BestCheckpointer | None = None  # without validation
    _phases: Phases | None = None
    _plan: dict | None = None
    _log_period = 10  # iterations

    def __init__(
        self,
        cfg: CfgNode,
        given: CfgNode | DictConfig,
        config_hash: str,
        model: nn.Module,
        optimizer: Optimizer,
        data_loader: Iterable,
        config_text: str | None = None,
        **ddp,
    ):
        # Not DefaultTrainer.__init__: its DDP and AMP need CUDA.
        super(DefaultTrainer, self).__init__()
        if earlier := getattr(getattr(model, "backbone", None), "earlier_option", ""):
            raise ValueError(
                f"{earlier} is of version 0.1.0, to predict with its weights, and is not trained: "
                "set MODEL.PAFPN.FORM panet and MODEL.CBAM.GATE sigmoid, as the shipped configs do"
            )
        self.cfg, self._given, self._config_hash = cfg, given, config_hash
        _check_data_sets(cfg)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._ema = EMA(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.evaluated_model = self._ema.model if self._ema else model
        model = distribute(model, **ddp)
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            seed=training_seed(cfg.SEED),
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
            max_skipped=cfg.SOLVER.MAX_SKIPPED_BATCHES,
        )
        keep, state = cfg.SOLVER.CHECKPOINTS_TO_KEEP, weakref.proxy(self)
        metadata = checkpoint_metadata(cfg.DATASETS.TRAIN[0], config_text)
        self.checkpointer = Checkpointer(
            model, cfg.OUTPUT_DIR, keep=keep, metadata=metadata, trainer=state
        )
        self.register_hooks(self.build_hooks())

    @classmethod
    def output_dir(cls, given: CfgNode | DictConfig) -> str:
        raise NotImplementedError

    @classmethod
    def evaluate(
        cls,
        given: CfgNode | DictConfig,
        model: nn.Module,
        split: str,
        weights: Weights | None = None,
    ) -> tuple[dict, dict[str, DatasetEvaluator]]:
        """The metrics of the split "val" or "test", and its evaluators by data set; `weights` are
        those of a final evaluation.
        """
        raise NotImplementedError

    def _validation_evaluators(self) -> list[DatasetEvaluator]:
        raise NotImplementedError

    def _validation_loader(self) -> DataLoader:
        """Of the first validation set."""
        raise NotImplementedError

    def _lr_hook(self) -> HookBase:
        return LRScheduler()

    @classmethod
    def final_test(cls, given: CfgNode | DictConfig, model: nn.Module, weights: Weights):
        """Evaluate the test sets with intervals, at the weights' operating point, and log each
        evaluation next to the data set. Return the metrics and the results by data set; both are
        empty on other than the main process, and without test images.
        """
        described = replace(weights, model=describe_model(model))
        metrics, evaluators = cls.evaluate(given, model, "test", described)
        log_test_evaluations(evaluators, cls.output_dir(given), weights)
        # Evaluators of other projects keep no results.
        results = {name: getattr(e, "results", None) for name, e in evaluators.items()}
        return metrics, {name: scored for name, scored in results.items() if scored is not None}

    def state_dict(self):
        return {**super().state_dict(), "images_per_batch": self.cfg.SOLVER.IMS_PER_BATCH}

    def load_state_dict(self, state_dict):
        """Raises ValueError for a training with batches of another size, whose iterations and
        learning rates mean something else."""
        now = self.cfg.SOLVER.IMS_PER_BATCH
        before = state_dict.get("images_per_batch", now)  # earlier checkpoints do not say
        if before != now:
            raise ValueError(
                f"The training to resume has {before} images in a batch, not {now}: resume it with "
                "SOLVER.IMS_PER_BATCH, SOLVER.REFERENCE_WORLD_SIZE and as many processes as "
                "before, or train anew in another OUTPUT_DIR"
            )
        super().load_state_dict(state_dict)

    def build_hooks(self):
        """Validation and the best checkpoint come before the periodic checkpoint, which carries
        their state.
        """
        cfg, task, period = self.cfg, Task.of(self.cfg), self.cfg.TEST.EVAL_PERIOD
        phases = self._phases.describe() if self._phases else None
        self._record = RunRecord(cfg, self._trainer, self._config_hash, phases, self._plan)
        ret = [hooks.IterationTimer(), self._phases, self._lr_hook(), self._ema, self._record]
        if cfg.DATASETS.VAL:
            validation = EvalHook(period, self.validate)
            options = {**task.best_checkpoint(cfg), "metadata": self.checkpointer.metadata}
            self._check_best_metric(options["metric"])
            self.best = BestCheckpointer(
                self.evaluated_model, cfg.OUTPUT_DIR, validation, **options
            )
            ret += [validation, self.best]
        if comm.is_main_process():
            if cfg.DATASETS.VAL and task.localises:
                sampled = self._validation_loader(), cfg.DATASETS.VAL[0], period
                tau = cfg.TEST.SCORE_THRESH
                ret.append(SamplePredictions(self.evaluated_model, *sampled, tau))
            # 0: after the last iteration alone, as TEST.EVAL_PERIOD.
            every = cfg.SOLVER.CHECKPOINT_PERIOD or self.max_iter + 1
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, every))
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=self._log_period))
        ret.append(Interruption(self.checkpointer))
        return [hook for hook in ret if hook is not None]

    def _check_best_metric(self, metric):
        for evaluator in self._validation_evaluators():
            # Evaluators of other projects do not say what they give.
            names = evaluator.metric_names() if hasattr(evaluator, "metric_names") else [metric]
            if metric not in names:
                near = difflib.get_close_matches(metric, names, cutoff=0)
                raise ValueError(
                    f"TEST.BEST_METRIC is {metric!r}, which this validation lacks, or has not in "
                    f"percent: choose one such as {', '.join(near)}"
                )

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter and self.start_iter >= self.max_iter:
            self.checkpointer.renew_final(self.iter)

    def train(self) -> dict:
        """Train, load the best weights, test them once and return the metrics."""
        resumed_with_images = self.start_iter and training_images.KEY in self.checkpointer.metadata
        if comm.is_main_process() and not resumed_with_images:
            names = (*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.VAL)
            records = (record for name in names for record in DatasetCatalog.get(name))
            self.checkpointer.note_images(r["file_name"] for r in records if "file_name" in r)
        learning = self._phases.of_longest() if self._phases else None
        try:
            self._trainer.choose_precision(self.start_iter, self.max_iter, learning)
            super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        finally:
            self._trainer.stop_loading()
        share_buffers(self.evaluated_model)
        best = self.best.load_best() if self.best else None
        weights = best or last_weights(self.checkpointer, self._ema)
        metrics, self.test_results = self.final_test(self._given, self.evaluated_model, weights)
        self.final_weights = weights
        self._record.finish()
        return metrics

    def validate(self) -> dict:
        """The metrics on the validation sets."""
        share_buffers(self.evaluated_model)
        return self.evaluate(self._given, self.evaluated_model, "val")[0]


class Trainer(_Trainer):
    """Trains what a YAML config names, with the keys of `add_imrcnn_config`.

    Schedules are in iterations, epochs (`resolve_epochs`) or phases (`Phases`). Validates on
    DATASETS.VAL; the operating point is chosen on the first of these sets.
    """

    def __init__(self, cfg: CfgNode):
        config_hash, carried = config_sha256(cfg), cfg.clone()
        carried.defrost()
        carried.OUTPUT_DIR = "./output"  # the same training gives the same files, wherever it is
        self._plan = plan_record(cfg)
        cfg = resolve_epochs(cfg)  # before scaling, which rounds periods
        scaled = self.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.PHASES and scaled is not cfg:
            raise ValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE}, but the "
                "learning rates in SOLVER.PHASES are not scaled: set it to 0"
            )
        cfg = resolve_class_weights(scaled)
        key = Task.of(cfg).num_classes_key(cfg)
        _check_classes(cfg, key, key and functools.reduce(getattr, key.split("."), cfg))
        model = self.build_model(cfg)

        def build_solver(cfg):
            optimizer = self.build_optimizer(cfg, model)
            return optimizer, self.build_lr_scheduler(cfg, optimizer)

        if phases := read_phases(cfg.SOLVER.PHASES):
            self._phases = Phases(phases, model, lambda p: build_solver(phase_solver(cfg, p)))
            optimizer, self.scheduler = self._phases.optimizer, self._phases.scheduler
        else:
            optimizer, self.scheduler = build_solver(cfg)
            if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
                text = (
                    "The warm-up takes all %d iterations: lower SOLVER.WARMUP_ITERS (%d) to learn"
                )
                logger.warning(text, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS)
        loader = self.build_train_loader(cfg)
        super().__init__(cfg, cfg, config_hash, model, optimizer, loader, carried.dump())

    def load_state_dict(self, state_dict):
        if self._phases:  # the optimizer's state is that of the phase it was saved in
            self._phases.start_at(state_dict["iteration"])
        super().load_state_dict(state_dict)

    def _validation_loader(self):
        return self.build_test_loader(self.cfg, self.cfg.DATASETS.VAL[0])

    def _validation_evaluators(self):
        return [self.build_evaluator(self.cfg, name) for name in self.cfg.DATASETS.VAL]

    @classmethod
    def output_dir(cls, given):
        return given.OUTPUT_DIR

    @classmethod
    def evaluate(cls, given, model, split, weights=None):
        cfg = given.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = _with_images(cfg.DATASETS[split.upper()])
        evaluators = {name: cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST}
        _use(weights, evaluators.values())
        return cls.test(cfg, model, list(evaluators.values())), evaluators

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        return use_channels_last(model) if cfg.MODEL.CHANNELS_LAST else model

    build_optimizer = staticmethod(build_optimizer)
    build_train_loader = staticmethod(build_train_loader)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = Task.of(cfg).mapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """The task's evaluator, also for a config without our keys. Its files go to a folder, by
        default OUTPUT_DIR/inference/DATASET.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return Task.of(cfg).evaluator(cfg, dataset_name, folder)


def _use(weights, evaluators):
    """Let the evaluators of a final evaluation have what these weights' validation chose."""
    if weights is None:
        return
    for evaluator in evaluators:
        for each in getattr(evaluator, "_evaluators", [evaluator]):  # of DatasetEvaluators
            if hasattr(each, "for_final_test"):  # those of other projects lack it
                each.for_final_test(**weights.evaluator_arguments())


def _with_images(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if len(DatasetCatalog.get(name)))


def _check_data_sets(cfg):
    """Refuse validation sets without images or annotations: by specificity alone, weights that
    detect nothing would be the best; warn of training sets without a lesion."""
    for name in cfg.DATASETS.VAL:
        records = DatasetCatalog.get(name)
        if not any(record.get("annotations", True) for record in records):
            lacks = f"annotation in any of its {len(records)} images" if len(records) else "images"
            raise ValueError(
                f"Data set {name} ({MetadataCatalog.get(name).get('json_file')}) has no {lacks}, "
                "by which the best weights and their threshold are chosen: prepare it with others "
                "in --ratio, such as 12:3:5; or, with a YAML config, train without and keep the "
                'last weights: DATASETS.VAL "()"'
            )
    training = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    if not any(record.get("annotations", True) for data_set in training for record in data_set):
        names = ", ".join(cfg.DATASETS.TRAIN)
        text = "None of the %d images of %s has an annotation: the model learns to find nothing"
        logger.warning(text, sum(map(len, training)), names)


def _check_classes(cfg, key, expected):
    """Refuse data sets with another number of classes than `expected`, if that is not None, or with
    the classes of the first in another order."""
    first, *others = cfg.DATASETS.TRAIN
    names = {name: class_names(name) for name in (first, *others, *cfg.DATASETS.VAL)}
    for name, classes in names.items() if expected is not None else ():
        if len(classes) != expected:
            raise ValueError(
                f"Data set {name} has {len(classes)} classes {classes}, but {key} is {expected}; "
                f"set it to {len(classes)}"
            )
    if len(names[first]) > 1:  # else there is no order, for which test sets need not be read
        names |= {name: class_names(name) for name in cfg.DATASETS.TEST if name not in names}
    for name, classes in names.items():
        check_class_order(name, classes, names[first], f"data set {first}")


def class_names(data_set: str) -> list[str]:
    """Of a registered data set, by class index."""
    DatasetCatalog.get(data_set)  # they are known once the file was read
    return list(MetadataCatalog.get(data_set).get("thing_classes", []))


def check_class_order(
    data_set: str, names: Sequence[str], expected: Sequence[str], owner: str
) -> None:
    """Raises ValueError where the classes of a data set are the expected, of `owner`, in another
    order: a model knows a class by its position alone. Other names are taken by position, with a
    warning."""
    names, expected = [*names], [*expected]
    if len(names) == len(expected) > 1 and sorted(names) != sorted(expected):
        text = "Data set %s has the classes %s, %s has %s: they are taken by position"
        logger.warning(text, data_set, names, owner, expected)
    elif names != expected and sorted(names) == sorted(expected):
        raise ValueError(
            f"Data set {data_set} has the classes {names}, {owner} has them in another order, "
            f"{expected}: prepare it again with that order (--classes, or the ids in COCO files)"
        )


class LazyTrainer(_Trainer):
    """Trains a LazyConfig with `model`, `dataloader`, `optimizer`, `lr_multiplier` and `train`, see
    configs/lazy/base.py. Validates on `dataloader.val`.
    """

    def __init__(self, lazy: DictConfig):
        self._log_period = lazy.train.log_period
        config_hash = _lazy_config_sha256(lazy)
        settings, expected = _settings(lazy), OmegaConf.select(lazy, "model.roi_heads.num_classes")
        _check_classes(settings, "model.roi_heads.num_classes", expected)
        lazy.optimizer.params.model = model = self.build_model(lazy)
        optimizer, loader = instantiate(lazy.optimizer), instantiate(lazy.dataloader.train)
        ddp = lazy.train.ddp
        super().__init__(settings, lazy, config_hash, model, optimizer, loader, **ddp)

    def _lr_hook(self):
        return hooks.LRScheduler(scheduler=instantiate(self._given.lr_multiplier))

    def _validation_loader(self):
        return instantiate(self._given.dataloader.val)

    def _validation_evaluators(self):
        return [self._build_evaluator(self._given, "val")]

    @classmethod
    def output_dir(cls, given):
        return given.train.output_dir

    @classmethod
    def build_model(cls, lazy):
        model = instantiate(lazy.model).to(lazy.train.device)
        return use_channels_last(model) if lazy.train.channels_last else model

    @classmethod
    def evaluate(cls, given, model, split, weights=None):
        name = given.dataloader[f"{split}_evaluator"].dataset_name
        if not _with_images([name]):
            return {}, {}
        evaluator = cls._build_evaluator(given, split)
        _use(weights, [evaluator])
        metrics = inference_on_dataset(model, instantiate(given.dataloader[split]), evaluator)
        if comm.is_main_process():
            print_csv_format(metrics)
        return metrics, {name: evaluator}

    @classmethod
    def _build_evaluator(cls, given, split):
        evaluator_cfg = given.dataloader[f"{split}_evaluator"].copy()
        name = evaluator_cfg.dataset_name
        evaluator_cfg.output_dir = os.path.join(given.train.output_dir, "inference", name)
        return instantiate(evaluator_cfg)


def _settings(lazy):
    """What a YAML config would give for `train` and the data sets of a LazyConfig."""
    cfg, train, data = get_cfg(), lazy.train, lazy.dataloader
    add_imrcnn_config(cfg)
    cfg.OUTPUT_DIR, cfg.SEED = train.output_dir, train.seed
    names = data.train.dataset.names
    cfg.DATASETS.TRAIN = (names,) if isinstance(names, str) else tuple(names)
    cfg.DATASETS.VAL = (data.val_evaluator.dataset_name,)
    cfg.DATASETS.TEST = (data.test_evaluator.dataset_name,)
    cfg.MODEL.WEIGHTS = train.init_checkpoint
    cfg.TEST.TAU_RULE = data.val_evaluator.get("tau_rule")
    cfg.TEST.SCORE_THRESH = data.val_evaluator.get("tau", cfg.TEST.SCORE_THRESH)
    cfg.SOLVER.IMS_PER_BATCH = data.train.total_batch_size
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.EMA_DECAY = train.max_iter, train.ema_decay
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = train.amp.enabled, train.amp.precision
    cfg.SOLVER.MAX_SKIPPED_BATCHES = train.max_skipped_batches
    cfg.SOLVER.CHECKPOINT_PERIOD = train.checkpointer.period
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = train.checkpointer.max_to_keep
    cfg.TEST.EVAL_PERIOD = train.eval_period
    cfg.TEST.BEST_METRIC = train.get("best_metric", "")
    return cfg


def _lazy_config_sha256(lazy):
    hashed = OmegaConf.to_container(lazy)
    del hashed["train"]["output_dir"], hashed["train"]["device"]
    # Classes and functions by name: the place of a function in memory changes from run to run.
    text = json.dumps(hashed, default=lambda value: getattr(value, "__qualname__", repr(value)))
    return hashlib.sha256(text.encode()).hexdigest()
