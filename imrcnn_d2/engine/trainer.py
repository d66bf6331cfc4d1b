"""DefaultTrainer for lesions: any device, epochs, validation apart from the test set."""

import logging
import os
import weakref

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from imrcnn_d2.data.classification_mapper import ClassificationMapper
from imrcnn_d2.data.loader import build_train_loader
from imrcnn_d2.data.mappers import LesionMapper
from imrcnn_d2.evaluation import LesionEvaluator
from imrcnn_d2.evaluation.recognition_evaluator import RecognitionEvaluator
from imrcnn_d2.modeling.memory_format import use_channels_last

from .checkpoint import Checkpointer
from .ema import EMA
from .hooks import BestCheckpointer, EvalHook, SamplePredictions, assemble_hooks
from .phases import LRScheduler, Phases, read_phases
from .provenance import RunRecord, config_sha256
from .recognition import is_classifier, resolve_class_weights
from .schedule import build_optimizer, phase_solver, resolve_epochs
from .train_step import TrainStep, distribute, training_seed
from .weights import last_weights, log_test_evaluations

__all__ = ["Trainer"]

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
            dict: the results on DATASETS.TEST; {} on other than the main process.
        """
        super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        weights = (self._best and self._best.load_best()) or last_weights(
            self.checkpointer, self._ema
        )
        results = self.final_test(self.cfg, self.evaluated_model, weights)
        self._record.finish()
        return results

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
            dict: as :meth:`test`.
        """
        names = cfg.DATASETS.TEST
        results = cls.test(cfg, model, [cls.build_evaluator(cfg, name, weights) for name in names])
        log_test_evaluations(names, cfg.OUTPUT_DIR, weights)
        return results

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
            LesionEvaluator, or RecognitionEvaluator for a classifier:
        """
        node = cfg.MODEL.IMRCNN
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        if is_classifier(cfg):
            arguments = weights.recognition_arguments() if weights is not None else {}
            return RecognitionEvaluator(dataset_name, output_dir=output_dir, **arguments)
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
    if is_classifier(cfg):
        key, wanted = "MODEL.CLASSIFIER.NUM_CLASSES", cfg.MODEL.CLASSIFIER.NUM_CLASSES
    elif cfg.MODEL.META_ARCHITECTURE.endswith("RCNN"):
        key, wanted = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    else:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL):
        DatasetCatalog.get(name)  # class names are known once the file was read
        classes = MetadataCatalog.get(name).get("thing_classes", [])
        if len(classes) != wanted:
            raise ValueError(
                f"Data set {name} has {len(classes)} classes {classes}, but {key} is {wanted}; "
                f"set it to {len(classes)}"
            )
