"""The figures of an image classifier, as one of Detectron2's evaluators."""

import json
from collections import OrderedDict
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from .files import sources, write_atomically
from .gathering import gather_predictions
from .recognition import evaluate_recognition
from .recognition_files import RECOGNITION_RESULTS, write_recognition

__all__ = ["RecognitionEvaluator"]


class RecognitionEvaluator(DatasetEvaluator):
    """
    Evaluate class probabilities of whole images; see :func:`evaluate_recognition` for the figures.
    The predictions of all processes are collected on the main one; the others return ``{}``.
    """

    def __init__(
        self, dataset_name, *, output_dir=None, distributed=True, bootstrap=None, meta=None
    ):
        """
        Args:
            dataset_name (str): of a data set that was registered with its JSON file, see
                :func:`imrcnn_d2.data.register.register_classification_dataset`.
            output_dir (str or None): where the files of :func:`write_recognition` and the
                predictions (``recognition_results.json``) go. None writes nothing.
            distributed (bool): collect from all processes, else evaluate this one's predictions.
            bootstrap (Bootstrap or None): how to resample for intervals, for the final evaluation.
            meta (dict or None): what else to note under ``meta`` in metrics.json.

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
        scored = evaluate_recognition(gt, predictions, bootstrap=self._bootstrap)
        if self._output_dir:
            path = Path(self._output_dir) / RECOGNITION_RESULTS
            write_atomically(path, json.dumps(predictions) + "\n")
            known = sources(gt, path, self._metadata.get("image_root"), **self._meta)
            write_recognition(scored, self._output_dir, dataset=self._dataset_name, **known)
        return OrderedDict(scored.groups())
