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
    check_rule,
    choose_operating_point,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.output import (
    CLASSIFICATION_RESULTS,
    RESULTS,
    write_evaluation,
)
from imrcnn_d2.utils.files import write_atomically

__all__ = ["LesionEvaluator", "ClassificationEvaluator", "gather_predictions"]

logger = logging.getLogger(__name__)


def gather_predictions(predictions, distributed):
    """
    Args:
        predictions (list[dict]): of this process, each with "image_id".
        distributed (bool): collect from all processes, else these are all.

    Returns:
        list[dict] or None: one prediction per image, on the main process; on others None.
    """
    if distributed:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
        if not comm.is_main_process():
            return None
    # A sampler that pads the last batch repeats some images.
    unique = {}
    for prediction in predictions:
        unique.setdefault(prediction["image_id"], prediction)
    return list(unique.values())


class LesionEvaluator(DatasetEvaluator):
    """
    Evaluate instance segmentation, or detection, of lesions: COCO's metrics, and those that
    clinical readers expect at a score threshold, as :func:`evaluate_lesions` defines them.

    Works for any data set that COCOEvaluator works for. Like it, it collects the predictions of
    all processes on the main one; the others return ``{}``.
    """

    def __init__(
        self,
        dataset_name,
        *,
        tau=0.7,
        output_dir=None,
        distributed=True,
        tau_rule=None,
        operating_point=None,
        bootstrap=None,
        meta=None,
    ):
        """
        Args:
            dataset_name (str): a registered data set, in COCO's format or in Detectron2's.
            tau (float): score threshold (MODEL.IMRCNN.SCORE_THRESH).
            output_dir (str or None): where the files of :func:`write_results` and the predictions
                (``coco_instances_results.json``) go. None writes nothing, and
                is refused for data sets in Detectron2's own format, which are converted there.
            distributed (bool): collect from all processes, else evaluate this one's predictions.
            tau_rule (str or None): for validation sets only: choose a threshold by this rule of
                :func:`choose_operating_point` and return it as the metric ``lesion/tau_val``, NaN
                where there is no lesion or no detection.
            operating_point (OperatingPoint or None), bootstrap (Bootstrap or None): see
                :func:`evaluate_lesions`. For the final evaluation.
            meta (dict or None): what else to record under ``meta`` in metrics.json.
        """
        metadata = MetadataCatalog.get(dataset_name)
        set_by_loader = ("json_file", "thing_dataset_id_to_contiguous_id")
        if not all(hasattr(metadata, key) for key in set_by_loader):
            DatasetCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._tau = tau
        self._output_dir = output_dir
        self._distributed = distributed
        if tau_rule is not None:
            check_rule(tau_rule)
        self._tau_rule = tau_rule
        self._operating_point = operating_point
        self._bootstrap = bootstrap
        self._meta = meta or {}
        self.results = None  # LesionResults of the last evaluation, on the main process
        # It converts foreign data sets into COCO's format and Instances into COCO records. Its
        # evaluate() is not called: it does not expose the predictions collected from the processes,
        # and returns no metrics for a model that detects nothing.
        self._coco = COCOEvaluator(
            dataset_name,
            distributed=False,
            output_dir=output_dir,
            use_fast_impl=False,
            allow_cached_coco=False,  # a stale cache would be used without notice
        )
        self._class_to_id = {
            index: id_
            for id_, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()
        }

    def reset(self):
        self._coco.reset()

    def process(self, inputs, outputs):
        """As COCOEvaluator: ``inputs`` with "image_id", ``outputs`` with "instances"."""
        self._coco.process(inputs, outputs)

    def evaluate(self):
        """
        Returns:
            OrderedDict[str, dict[str, float]]: "bbox", "segm", "lesion", "image" and, where the
            data set knows patients, "patient". Empty for a data set without annotations, and in
            all processes but the main one.
        """
        predictions = gather_predictions(self._coco._predictions, self._distributed)
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
        absent = len({image["id"] for image in dataset["images"]} - seen)
        if absent:
            logger.warning(
                f"{absent} of the {len(dataset['images'])} images of {self._dataset_name} were not "
                "evaluated: they are taken as images without a detection."
            )
        self.results = scored = evaluate_lesions(
            dataset,
            results,
            tau=self._tau,
            operating_point=self._operating_point,
            bootstrap=self._bootstrap,
        )
        if self._output_dir:
            metadata = MetadataCatalog.get(self._dataset_name)
            write_evaluation(
                scored,
                self._output_dir,
                gt=PathManager.get_local_path(metadata.json_file),
                dt=Path(self._output_dir) / RESULTS,
                image_root=metadata.get("image_root"),
                dataset=self._dataset_name,
                **self._meta,
            )
        metrics = OrderedDict(scored.groups())
        if self._tau_rule is not None:
            metrics["lesion"] = {**metrics["lesion"], "tau_val": self._choose_tau(scored)}
        return metrics

    def _choose_tau(self, scored):
        if not scored.ground_truth.lesions.any() or not scored.matching.evaluated.any():
            return math.nan
        return choose_operating_point(scored, self._tau_rule, self._dataset_name).tau

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


class ClassificationEvaluator(DatasetEvaluator):
    """
    Evaluate class probabilities of whole images; see :func:`evaluate_classification`.
    The predictions of all processes are collected on the main one; the others return ``{}``.
    """

    def __init__(
        self, dataset_name, *, output_dir=None, distributed=True, bootstrap=None, meta=None
    ):
        """
        Args:
            dataset_name (str): of a data set that was registered with its JSON file, see
                :func:`imrcnn_d2.data.catalog.register_classification_dataset`.
            output_dir (str or None): where the files of :func:`write_results` and the
                predictions (``recognition_results.json``) go. None writes nothing.
            distributed (bool): collect from all processes, else evaluate this one's predictions.
            bootstrap (Bootstrap or None): how to resample for intervals, for the final evaluation.
            meta (dict or None): what else to record under ``meta`` in metrics.json.

        Raises:
            ValueError: the data set has no JSON file.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            DatasetCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            raise ValueError(
                f"Data set {dataset_name} has no JSON file: register it with imrcnn_d2's "
                "register_classification_dataset."
            )
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        self._bootstrap = bootstrap
        self._meta = meta or {}
        self.results = None  # ClassificationResults of the last evaluation, on the main process
        self._predictions = []

    def reset(self):
        self._predictions = []

    def process(self, inputs, outputs):
        """
        Args:
            inputs (list[dict]): with "image_id".
            outputs (list[dict]): with "scores": (K,) probabilities, by ascending category id.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            scores = output["scores"].double().tolist()
            self._predictions.append({"image_id": sample["image_id"], "scores": scores})

    def evaluate(self):
        """
        Returns:
            OrderedDict[str, dict[str, float]]: "recognition" and, with a cancer class, "cancer".
        """
        predictions = gather_predictions(self._predictions, self._distributed)
        if predictions is None:
            return OrderedDict()
        gt = self._metadata.json_file
        self.results = scored = evaluate_classification(gt, predictions, bootstrap=self._bootstrap)
        if self._output_dir:
            path = Path(self._output_dir) / CLASSIFICATION_RESULTS
            write_atomically(path, json.dumps(predictions) + "\n")
            write_evaluation(
                scored,
                self._output_dir,
                gt=gt,
                dt=path,
                image_root=self._metadata.get("image_root"),
                dataset=self._dataset_name,
                **self._meta,
            )
        return OrderedDict(scored.groups())
