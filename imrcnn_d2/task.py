"""What differs between detecting lesions and classifying whole images: `DETECTION` and
`CLASSIFICATION`. What is asked of a `Task` needs no `if` elsewhere.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from imrcnn_d2.config import get_node
from imrcnn_d2.data.catalog import labels_of, register_data_set
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper
from imrcnn_d2.evaluation import (
    ClassificationEvaluator,
    ClassificationResults,
    LesionEvaluator,
    LesionResults,
    OperatingPoint,
    evaluate_classification,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.detection.metrics import ENDPOINTS, endpoints_in
from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS, RESULTS


class Task:
    """One of `DETECTION` and `CLASSIFICATION`, see `of` and `named`."""

    name: str  # `meta.task` of metrics.json
    localises: bool  # whether predictions have a place in the image; otherwise Grad-CAM shows one
    predictions_file: str  # next to metrics.json
    mapper: type[LesionMapper] | type[ClassificationMapper]  # dataset dict -> the model's input
    primary: str  # the endpoint by which two models are compared if nobody names one
    best_metric: str  # of validation, by which the best weights are chosen if nobody names one
    headline: tuple[str, ...]  # "group/metric" of a short summary

    @staticmethod
    def of(cfg: CfgNode) -> "Task":
        """The task of MODEL.META_ARCHITECTURE."""
        is_classifier = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
        return CLASSIFICATION if is_classifier else DETECTION

    @staticmethod
    def named(name: str | None) -> "Task":
        """The task "lesions" or "recognition"; files older than the key name none: lesions."""
        return {task.name: task for task in (DETECTION, CLASSIFICATION)}[name or DETECTION.name]

    def num_classes_key(self, cfg: CfgNode) -> str | None:
        """The config key of the number of classes; None for models whose key is not known here."""
        raise NotImplementedError

    def best_checkpoint(self, cfg: CfgNode) -> dict:
        """Arguments of `BestCheckpointer`: which metric of the validation it compares."""
        metric = cfg.TEST.BEST_METRIC or self.best_metric
        return {"metric": metric, "dataset": cfg.DATASETS.VAL[0]}

    def evaluator(self, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """The evaluator of a data set, whose files go to `output_dir`. On the sets of DATASETS.VAL,
        and never on others, it fits a map of scores and chooses an operating point.
        """
        raise NotImplementedError

    def score(
        self, gt: str | Path, predictions: str | Path, recorded: Mapping
    ) -> LesionResults | ClassificationResults:
        """Score predictions again; `recorded` is the content of their metrics.json."""
        raise NotImplementedError

    def endpoints(
        self, classes: Sequence[str] = (), cancer_classes: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """What is tested between models, "group/metric", for the classes of a data set."""
        raise NotImplementedError

    def register(self, data: str | os.PathLike) -> None:
        """Register the splits of a prepared data set: its folder or a short name."""
        raise NotImplementedError

    def dataset_facts(self, records: Sequence[dict], classes: Sequence[str]) -> dict:
        """What run.json records of a data set's annotations."""
        raise NotImplementedError


class _Detection(Task):
    name = "lesions"
    localises = True
    predictions_file = RESULTS
    mapper = LesionMapper
    primary = "segm/AP50_voc"
    best_metric = "tau_val.lesion/selection"
    headline = ("segm/AP50_voc", "lesion/iou", "lesion/f1")

    def num_classes_key(self, cfg):
        architecture = cfg.MODEL.META_ARCHITECTURE
        if architecture == "RetinaNet":
            return "MODEL.RETINANET.NUM_CLASSES"
        return "MODEL.ROI_HEADS.NUM_CLASSES" if architecture.endswith("RCNN") else None

    def best_checkpoint(self, cfg):
        if (parts := cfg.TEST.SUPPRESS_PARTS) != "never" and not cfg.MODEL.MASK_ON:
            raise ValueError(
                f"TEST.SUPPRESS_PARTS is {parts!r}, but MODEL.MASK_ON is False: only "
                "masks are compared; set it to never"
            )
        return {**super().best_checkpoint(cfg), "tau_rule": cfg.TEST.TAU_RULE}

    def evaluator(self, cfg, dataset_name, output_dir):
        options = {"tau": get_node(cfg, "TEST.SCORE_THRESH"), "output_dir": output_dir}
        if dataset_name in get_node(cfg, "DATASETS.VAL"):
            for key in ("tau_rule", "suppress_parts", "best_metric"):
                options[key] = get_node(cfg, f"TEST.{key.upper()}")
            options["best_metric"] = options["best_metric"] or self.best_metric
        return LesionEvaluator(dataset_name, **options)

    def score(self, gt, predictions, recorded):
        settings = {key: recorded["meta"][key] for key in ("tau", "iou_threshold", "iou_type")}
        chosen = OperatingPoint.of_results(recorded.get("tau_val"))
        return evaluate_lesions(gt, predictions, operating_point=chosen, **settings)

    def endpoints(self, classes=(), cancer_classes=()):
        return ENDPOINTS

    def register(self, data):
        register_data_set(data)

    def dataset_facts(self, records, classes):
        lesions = [sum(not a.get("iscrowd", 0) for a in r.get("annotations", ())) for r in records]
        return {"lesion_free_images": lesions.count(0), "lesions": sum(lesions)}


class _Classification(Task):
    name = "recognition"
    localises = False
    predictions_file = CLASSIFICATION_RESULTS
    mapper = ClassificationMapper
    primary = best_metric = "recognition/balanced_accuracy"
    headline = ("recognition/top1", "recognition/balanced_accuracy")

    def num_classes_key(self, cfg):
        return "MODEL.CLASSIFIER.NUM_CLASSES"

    def evaluator(self, cfg, dataset_name, output_dir):
        validates = dataset_name in get_node(cfg, "DATASETS.VAL")
        return ClassificationEvaluator(dataset_name, output_dir=output_dir, fits_map=validates)

    def score(self, gt, predictions, recorded):
        return evaluate_classification(gt, predictions)

    def endpoints(self, classes=(), cancer_classes=()):
        cancer = endpoints_in("cancer")
        if len(cancer_classes) < 2:
            # Of a single cancer class sensitivity is its accuracy: no reason to test it twice.
            cancer = tuple(name for name in cancer if name != "cancer/recall")
        of_class = tuple(f"recognition/accuracy_{name}" for name in classes)
        return (*endpoints_in("recognition"), *of_class, *cancer)

    def register(self, data):
        register_data_set(data, classification=True)

    def dataset_facts(self, records, classes):
        counts = np.bincount(labels_of(records), minlength=len(classes)).tolist()
        return {"classes": dict(zip(classes, counts, strict=True))}


DETECTION, CLASSIFICATION = _Detection(), _Classification()
