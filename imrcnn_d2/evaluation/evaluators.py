"""The evaluators of lesions and of image classes, as Detectron2's."""

import itertools
import json
import logging
import math
from collections import OrderedDict
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from imrcnn_d2.evaluation.classification import evaluate_classification
from imrcnn_d2.evaluation.detection.results import (
    OperatingPoint,
    check_rule,
    choose_operating_point,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS, RESULTS, write_evaluation
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.utils.files import write_atomically

logger = logging.getLogger(__name__)


class _Evaluator(DatasetEvaluator):
    """Collects the predictions of all processes on the main one; the others return ``{}``."""

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | Path | None = None,
        distributed: bool = True,
        bootstrap: Bootstrap | None = None,
        meta: dict | None = None,
    ):
        self._dataset_name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self._output_dir, self._distributed = output_dir, distributed
        self._bootstrap, self._meta = bootstrap, meta or {}
        self.results = None  # of the last evaluation, on the main process

    def _gather(self, predictions):
        """One prediction per image, on the main process; on others None."""
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return None
        # A sampler that pads the last batch repeats some images.
        unique = {}
        for prediction in predictions:
            unique.setdefault(prediction["image_id"], prediction)
        return list(unique.values())

    def _write(self, gt, results_name):
        write_evaluation(
            self.results,
            self._output_dir,
            gt=gt,
            dt=Path(self._output_dir) / results_name,
            image_root=self._metadata.get("image_root"),
            dataset=self._dataset_name,
            **self._meta,
        )


class LesionEvaluator(_Evaluator):
    """Evaluate instance segmentation, or detection, of lesions: COCO's metrics, and those that
    clinical readers expect at a score threshold, as :func:`evaluate_lesions` defines them.

    Works for any data set that COCOEvaluator works for. Like it, it collects the predictions of
    all processes on the main one; the others return ``{}``.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        tau: float = 0.7,
        tau_rule: str | None = None,
        operating_point: OperatingPoint | None = None,
        **options,
    ):
        """
        Args:
            dataset_name: a registered data set, in COCO's format or in Detectron2's.
            tau: score threshold (TEST.SCORE_THRESH).
            tau_rule: for validation sets only: choose a threshold by this rule of
                :func:`choose_operating_point` and return it as the metric ``lesion/tau_val``, NaN
                where there is no lesion or no detection.
            operating_point: for the final evaluation, see :func:`evaluate_lesions`.
            **options: ``output_dir``, where the files of :func:`write_results` and the predictions
                (``coco_instances_results.json``) go; None writes nothing, and is refused for data
                sets in Detectron2's own format, which are converted there. ``distributed``: collect
                from all processes, else evaluate this one's predictions. ``bootstrap``: for
                intervals. ``meta``: what else to record under ``meta`` in metrics.json.
        """
        super().__init__(dataset_name, **options)
        set_by_loader = ("json_file", "thing_dataset_id_to_contiguous_id")
        if not all(hasattr(self._metadata, key) for key in set_by_loader):
            DatasetCatalog.get(dataset_name)
        if tau_rule is not None:
            check_rule(tau_rule)
        self._tau, self._tau_rule, self._operating_point = tau, tau_rule, operating_point
        # It converts foreign data sets into COCO's format and Instances into COCO records. Its
        # evaluate() is not called: it does not expose the predictions collected from the processes,
        # and returns no metrics for a model that detects nothing.
        self._coco = COCOEvaluator(
            dataset_name,
            distributed=False,
            output_dir=self._output_dir,
            use_fast_impl=False,
            allow_cached_coco=False,  # a stale cache would be used without notice
        )
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._class_to_id = {index: id_ for id_, index in ids.items()}

    def reset(self):
        self._coco.reset()

    def process(self, inputs, outputs):
        """As COCOEvaluator: ``inputs`` with "image_id", ``outputs`` with "instances"."""
        self._coco.process(inputs, outputs)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The groups "bbox", "segm", "lesion", "image" and, where the data set knows patients,
        "patient". Empty for a data set without annotations, and in all processes but the main one.
        """
        predictions = self._gather(self._coco._predictions)
        if predictions is None:
            return OrderedDict()
        results = [
            {**result, "category_id": self._category_id(result["category_id"])}
            for prediction in predictions
            for result in prediction["instances"]
        ]
        if self._output_dir:
            write_atomically(Path(self._output_dir) / RESULTS, json.dumps(results))
        dataset = self._coco._coco_api.dataset
        if "annotations" not in dataset:
            logger.info(f"{self._dataset_name} has no annotations: predictions are not scored.")
            return OrderedDict()
        seen = {prediction["image_id"] for prediction in predictions}
        if absent := len({image["id"] for image in dataset["images"]} - seen):
            logger.warning(
                f"{absent} of the {len(dataset['images'])} images of {self._dataset_name} were not "
                "evaluated: they are taken as images without a detection."
            )
        self.results = evaluate_lesions(
            dataset,
            results,
            tau=self._tau,
            operating_point=self._operating_point,
            bootstrap=self._bootstrap,
        )
        if self._output_dir:
            self._write(PathManager.get_local_path(self._metadata.json_file), RESULTS)
        metrics = OrderedDict(self.results.groups())
        if self._tau_rule is not None:
            metrics["lesion"] = {**metrics["lesion"], "tau_val": self._choose_tau()}
        return metrics

    def _choose_tau(self):
        evaluated = self.results.matching.evaluated
        if not self.results.ground_truth.lesions.any() or not evaluated.any():
            return math.nan
        return choose_operating_point(self.results, self._tau_rule, self._dataset_name).tau

    def _category_id(self, index):
        """The data set's id of a model's class."""
        if not self._class_to_id:  # ids and classes are the same, as in convert_to_coco_json
            return index
        if index not in self._class_to_id:
            raise ValueError(
                f"The model predicts class {index}, but {self._dataset_name} has only "
                f"{len(self._class_to_id)}: set MODEL.ROI_HEADS.NUM_CLASSES to that."
            )
        return self._class_to_id[index]


class ClassificationEvaluator(_Evaluator):
    """Evaluate class probabilities of whole images; see :func:`evaluate_classification`.
    The predictions of all processes are collected on the main one; the others return ``{}``.

    Args:
        dataset_name: of a data set that was registered with its JSON file, see
            :func:`imrcnn_d2.data.catalog.register_classification_dataset`.
        **options: as of :class:`LesionEvaluator`: output_dir (the predictions are
            ``recognition_results.json``), distributed, bootstrap, meta.

    Raises:
        ValueError: the data set has no JSON file.
    """

    def __init__(self, dataset_name: str, **options):
        super().__init__(dataset_name, **options)
        if not hasattr(self._metadata, "json_file"):
            DatasetCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            raise ValueError(
                f"Data set {dataset_name} has no JSON file: register it with imrcnn_d2's "
                "register_classification_dataset."
            )
        self._predictions = []

    def reset(self):
        self._predictions = []

    def process(self, inputs, outputs):
        """``inputs`` with "image_id", ``outputs`` with "scores": (K,) probabilities, by ascending
        category id."""
        for sample, output in zip(inputs, outputs, strict=True):
            scores = output["scores"].double().tolist()
            self._predictions.append({"image_id": sample["image_id"], "scores": scores})

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The groups "recognition" and, with a cancer class, "cancer"."""
        predictions = self._gather(self._predictions)
        if predictions is None:
            return OrderedDict()
        gt = self._metadata.json_file
        self.results = evaluate_classification(gt, predictions, bootstrap=self._bootstrap)
        if self._output_dir:
            path = Path(self._output_dir) / CLASSIFICATION_RESULTS
            write_atomically(path, json.dumps(predictions) + "\n")
            self._write(gt, CLASSIFICATION_RESULTS)
        return OrderedDict(self.results.groups())
