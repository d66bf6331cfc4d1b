"""The evaluators of lesions and of image classes, as Detectron2's."""

import itertools
import json
import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from imrcnn_d2.data.mapper import in_frame
from imrcnn_d2.data.masks import without_parts
from imrcnn_d2.evaluation.calibration import ScoreMap, Temperature
from imrcnn_d2.evaluation.classification import (
    evaluate_classification,
    read_labels,
    read_probabilities,
)
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
from imrcnn_d2.evaluation.detection.matching import match, overlaps
from imrcnn_d2.evaluation.detection.metrics import (
    CURVE_IOU,
    is_percent,
    less_is_better,
    scored_hits,
)
from imrcnn_d2.evaluation.detection.operating_point import (
    DEFAULT_TAU,
    NOT_REACHED,
    OperatingPoint,
    check_rule,
    choose_operating_point,
    score_threshold,
)
from imrcnn_d2.evaluation.detection.results import LesionResults, evaluate_lesions
from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS, RESULTS, write_evaluation
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.utils.files import write_atomically

logger = logging.getLogger(__name__)


# TEST.SUPPRESS_PARTS: whether a validation leaves out the parts of other detections, or tries both.
SUPPRESS_PARTS = {"never": (False,), "always": (True,), "auto": (False, True)}


class _Evaluator(DatasetEvaluator):
    """Collects the predictions of all processes on the main one; the others return ``{}``."""

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | Path | None = None,
        distributed: bool = True,
        bootstrap: Bootstrap | None = None,
        score_map: ScoreMap | Temperature | None = None,
        meta: dict | None = None,
    ):
        self._dataset_name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self._output_dir, self._distributed = output_dir, distributed
        self._bootstrap, self._meta = bootstrap, dict(meta or {})
        self.score_map = score_map  # given, or of the last validation on the main process
        self.results = None  # of the last evaluation, on the main process

    def for_final_test(
        self,
        *,
        operating_point: OperatingPoint | None,
        score_map: ScoreMap | Temperature | None,
        bootstrap: Bootstrap,
        meta: dict,
    ) -> None:
        """Evaluate with what a validation chose, see :meth:`Weights.evaluator_arguments`, and
        choose nothing more, whatever the data set."""
        self._operating_point, self.score_map = operating_point, score_map
        self._bootstrap, self._meta = bootstrap, meta

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
            score_map=self.score_map and vars(self.score_map),
            **self._meta,
        )


def _larger_is_better(groups):
    """Of groups of metrics, those in percent of which more is better, as "group/metric"."""
    return [
        f"{group}/{name}"
        for group, values in groups.items()
        for name in values
        if is_percent(name) and not less_is_better(name)
    ]


class _Scored(NamedTuple):
    records: list[dict]  # with mapped scores
    score_map: ScoreMap | None
    results: LesionResults | None = None
    metrics: OrderedDict | None = None


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
        tau: float = DEFAULT_TAU,
        tau_rule: str | None = None,
        operating_point: OperatingPoint | None = None,
        suppress_parts: str = "never",
        best_metric: str = "tau_val.lesion/selection",
        **options,
    ):
        """
        Args:
            dataset_name: a registered data set, in COCO's format or in Detectron2's.
            tau: score threshold, TEST.SCORE_THRESH: of mapped scores, or as
                :func:`score_threshold` has it.
            tau_rule: for validation sets only: fit a map of scores, the metrics
                ``score_map/slope`` and ``score_map/offset``, where some detections hit a lesion and
                others do not. Then choose a threshold, of the mapped scores, by this rule of
                :func:`choose_operating_point` and return it as the metric ``lesion/tau_val``, NaN
                where there is no lesion or no detection; whether its limit was reached, 1 or 0, as
                ``lesion/tau_rule_reached``; and the metrics at it as the groups ``tau_val.lesion``
                and so on, which are too good by the choice.
            operating_point: for the final evaluation, see :func:`evaluate_lesions`; its
                ``suppress_parts`` are left out.
            suppress_parts: TEST.SUPPRESS_PARTS, of use with a ``tau_rule``: whether to leave out
                detections that are :func:`parts_of_others`, "never", "always" or, with "auto",
                where that makes ``best_metric`` larger. The metric ``lesion/suppress_parts`` is
                then 1, else 0.
            best_metric: of "auto", "group/metric".
            **options: ``score_map``, for the final evaluation: all metrics, and the threshold and
                the operating point, are of the scores that it has mapped. ``output_dir``, where the
                files of :func:`write_results` and the predictions
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
        if suppress_parts not in SUPPRESS_PARTS:
            known = ", ".join(SUPPRESS_PARTS)
            raise ValueError(f"TEST.SUPPRESS_PARTS is {suppress_parts!r}; it is one of {known}")
        self._tau, self._tau_rule, self._operating_point = tau, tau_rule, operating_point
        self._suppress_parts, self._best_metric = suppress_parts, best_metric
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

    def for_final_test(self, **chosen):
        super().for_final_test(**chosen)
        self._tau_rule = None

    def reset(self):
        self._coco.reset()

    def process(self, inputs, outputs):
        """As COCOEvaluator: ``inputs`` with "image_id", ``outputs`` with "instances", which are
        evaluated in the whole frame where the model saw the endoscope's view."""
        framed = [
            {**output, "instances": in_frame(sample, output["instances"])}
            for sample, output in zip(inputs, outputs, strict=True)
        ]
        self._coco.process(inputs, framed)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The groups "bbox", "segm", "lesion", "paper", "image" and, where the data set knows
        patients, "patient". Empty for a data set without annotations, and in all processes but the
        main one.
        """
        predictions = self._gather(self._coco._predictions)
        if predictions is None:
            return OrderedDict()
        by_image = [
            [{**r, "category_id": self._category_id(r["category_id"])} for r in p["instances"]]
            for p in predictions
        ]
        dataset = self._coco._coco_api.dataset
        annotated, validates = "annotations" in dataset, self._tau_rule is not None
        variants = (self._operating_point is not None and self._operating_point.suppress_parts,)
        if annotated and validates:
            variants = SUPPRESS_PARTS[self._suppress_parts]
        scored = [self._score(dataset if annotated else None, by_image, v) for v in variants]
        best = scored[-1]
        if len(scored) > 1:
            group, name = self._best_metric.split("/")
            before, after = (s.metrics[group][name] for s in scored)
            best = scored[after > before]  # never where one is undefined
            logger.info(
                "%s is %.3f with all detections, and %.3f without those inside others: they are %s",
                *(self._best_metric, before, after, "left out" if best is scored[1] else "kept"),
            )
        self.score_map, self.results = best.score_map, best.results
        if self._output_dir:
            write_atomically(Path(self._output_dir) / RESULTS, json.dumps(best.records))
        if not annotated:
            logger.info(f"{self._dataset_name} has no annotations: predictions are not scored.")
            return OrderedDict()
        seen = {prediction["image_id"] for prediction in predictions}
        if absent := len({image["id"] for image in dataset["images"]} - seen):
            logger.warning(
                f"{absent} of the {len(dataset['images'])} images of {self._dataset_name} were not "
                "evaluated: they are taken as images without a detection."
            )
        if self._output_dir:
            self._write(PathManager.get_local_path(self._metadata.json_file), RESULTS)
        return best.metrics

    def metric_names(self) -> list[str]:
        """The metrics that `evaluate` returns of which larger is better, as "group/metric"."""
        results = evaluate_lesions(self._coco._coco_api.dataset, [])
        at_tau_val = results.at(math.nan) if self._tau_rule is not None else {}
        at_tau_val = {f"tau_val.{group}": values for group, values in at_tau_val.items()}
        return _larger_is_better({**results.groups(), **at_tau_val})

    def _score(self, dataset, by_image, suppress_parts) -> _Scored:
        """What is found in each image, with mapped scores, and scored if there is a dataset."""
        records = [
            r for image in by_image for r in (without_parts(image) if suppress_parts else image)
        ]
        validates, score_map = dataset is not None and self._tau_rule is not None, self.score_map
        truth = None if dataset is None else read_ground_truth(dataset)
        if validates:
            score_map = self._fit_map(truth, records)
        if score_map is not None:
            records = score_map.map_records(records)
        if truth is None:
            return _Scored(records, score_map)
        results = evaluate_lesions(
            truth,
            records,
            tau=score_threshold(self._tau, mapped=score_map is not None),
            operating_point=self._operating_point,
            bootstrap=self._bootstrap,
        )
        metrics = OrderedDict(results.groups())
        if validates:
            tau, is_reached = self._choose_tau(results)
            chosen = {"tau_val": tau, "tau_rule_reached": float(is_reached)}
            chosen["suppress_parts"] = float(suppress_parts)
            metrics["lesion"] = {**metrics["lesion"], **chosen}
            metrics.update({f"tau_val.{g}": values for g, values in results.at(tau).items()})
            if score_map is not None:
                metrics["score_map"] = {"slope": score_map.slope, "offset": score_map.offset}
        return _Scored(records, score_map, results, metrics)

    def _fit_map(self, truth, records):
        """The map of the scores of these detections, if any. They are matched as by
        `evaluate_lesions`, but nothing else is computed."""
        detections = read_results(records, truth)
        has_masks = truth.regions.masks is not None and detections.regions.masks is not None
        pairs = overlaps(truth, detections, "segm" if has_masks else "bbox")
        matching = match(truth, detections, pairs, CURVE_IOU)
        scores = scored_hits(truth, detections, matching)
        return ScoreMap.fit(scores.score, scores.hit, self._dataset_name)

    def _choose_tau(self, results):
        if not results.ground_truth.lesions.any() or not results.matching.evaluated.any():
            return math.nan, False
        point = choose_operating_point(results, self._tau_rule, self._dataset_name)
        return point.tau, not point.rule.endswith(NOT_REACHED)

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
        fits_map: for validation sets only: fit a temperature, the metric
            ``score_map/temperature``, where some images are predicted wrongly.
        **options: as of :class:`LesionEvaluator`: score_map, output_dir (the predictions are
            ``recognition_results.json``), distributed, bootstrap, meta.

    Raises:
        ValueError: the data set has no JSON file.
    """

    def __init__(self, dataset_name: str, *, fits_map: bool = False, **options):
        super().__init__(dataset_name, **options)
        self._fits_map = fits_map
        if not hasattr(self._metadata, "json_file"):
            DatasetCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            raise ValueError(
                f"Data set {dataset_name} has no JSON file: register it with imrcnn_d2's "
                "register_classification_dataset."
            )
        self._predictions = []

    def for_final_test(self, **chosen):
        super().for_final_test(**chosen)
        self._fits_map = False

    def reset(self):
        self._predictions = []

    def process(self, inputs, outputs):
        """``inputs`` with "image_id", ``outputs`` with "scores": (K,) probabilities, by ascending
        category id."""
        for sample, output in zip(inputs, outputs, strict=True):
            scores = output["scores"].double().tolist()
            self._predictions.append({"image_id": sample["image_id"], "scores": scores})

    def metric_names(self) -> list[str]:
        """As of :class:`LesionEvaluator`."""
        truth = read_labels(self._metadata.json_file)
        scores = [1 / len(truth.classes)] * len(truth.classes)
        predictions = [{"image_id": image["id"], "scores": scores} for image in truth.images]
        return _larger_is_better(evaluate_classification(truth, predictions).groups())

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The groups "recognition" and, with a cancer class, "cancer"."""
        predictions = self._gather(self._predictions)
        if predictions is None:
            return OrderedDict()
        gt = self._metadata.json_file
        if self._fits_map:
            self.score_map = self._fit_map(gt, predictions)
        if self.score_map is not None:
            predictions = self.score_map.map_records(predictions)
        self.results = evaluate_classification(gt, predictions, bootstrap=self._bootstrap)
        if self._output_dir:
            path = Path(self._output_dir) / CLASSIFICATION_RESULTS
            write_atomically(path, json.dumps(predictions) + "\n")
            self._write(gt, CLASSIFICATION_RESULTS)
        metrics = OrderedDict(self.results.groups())
        if self._fits_map and self.score_map is not None:
            metrics["score_map"] = {"temperature": self.score_map.temperature}
        return metrics

    def _fit_map(self, gt, predictions):
        """The temperature of these probabilities, if any."""
        truth = read_labels(gt)
        probability, _ = read_probabilities(predictions, truth)
        return Temperature.fit(probability, truth.label, self._dataset_name)
