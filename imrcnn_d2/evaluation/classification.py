"""Score class probabilities of whole images, without a model."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from imrcnn_d2.data.formats.coco import NUMBER, check_records
from imrcnn_d2.data.units import Units
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix, divide
from imrcnn_d2.evaluation.detection.curves import weighted_auroc
from imrcnn_d2.evaluation.detection.inputs import GROUND_TRUTH, by_id
from imrcnn_d2.evaluation.detection.metrics import (
    GroupFormulas,
    ResampledMetrics,
    mean_where,
    ratios,
    table_metrics,
    table_proportions,
)
from imrcnn_d2.evaluation.output import EvaluationResults, rows_per_image
from imrcnn_d2.evaluation.statistics import Bootstrap, add_intervals
from imrcnn_d2.utils.files import read_json

# Of a sum of probabilities: half-precision softmax deviates less.
SUM_TOLERANCE = 0.01
# Of the true class; keeps the cross-entropy of a probability of 0 finite, as scikit-learn does.
LEAST = np.finfo(np.float64).eps
CLASS_METRICS = ("precision", "recall", "specificity", "f1")


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """COCO image classification, N images of K classes."""

    images: list[dict]  # the records, by ascending id, with all their fields
    categories: list[dict]  # the records, by ascending id
    label: np.ndarray  # (N,) int in [0, K), the class of each image
    cancer: np.ndarray | None  # (K,) bool, by ``supercategory``; None where all or none are

    @property
    def classes(self) -> list[str]:
        """K names."""
        return [category["name"] for category in self.categories]


def read_labels(gt) -> LabelledImages:
    """Read COCO image classification (a dict, str or Path, or LabelledImages as they are): images,
    categories and an annotation {id, image_id, category_id} for each image.

    Raises:
        ValueError: on anything else, naming the record and the reason.
    """
    if isinstance(gt, LabelledImages):
        return gt
    where = "The ground truth"
    if isinstance(gt, str | Path):
        where, gt = str(gt), read_json(Path(gt))
    for key, (needed, kinds) in GROUND_TRUTH.items():
        records = gt.get(key) if isinstance(gt, dict) else None
        check_records(records, key, where, needed, kinds)
        if not records:
            raise ValueError(f"{where} has no {key}: it must be COCO image classification.")
    images, categories = (by_id(gt[key], key, where) for key in ("images", "categories"))
    if len(categories) < 2:
        raise ValueError(f"{where} has one class, {categories[0]['name']}: two are needed.")
    position = {category["id"]: k for k, category in enumerate(categories)}
    label = dict.fromkeys(image["id"] for image in images)
    for annotation in gt["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in label:
            raise ValueError(f"{where} gives a class to image {image}, which it does not have.")
        if category not in position:
            raise ValueError(f"{where}: unknown label {category} of image {image}.")
        if label[image] is not None:
            raise ValueError(f"{where} gives several classes to image {image}: one is needed.")
        label[image] = position[category]
    for image in images:
        if label[image["id"]] is None:
            raise ValueError(f"{where} gives no class to image {image['id']} ({_name(image)}).")
    cancer = np.array([category.get("supercategory") == "cancer" for category in categories])
    cancer = cancer if cancer.any() and not cancer.all() else None
    return LabelledImages(images, categories, np.array(list(label.values())), cancer)


def read_probabilities(results, truth: LabelledImages) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a list or JSON file of {image_id, scores}; ``scores`` are K probabilities by ascending
    category id. Where all have ``raw_scores`` too, those are of the network, before a
    :class:`Temperature` mapped them.

    Returns:
        (N, K) float each, in the order of ``truth.images``; None without raw ones.

    Raises:
        ValueError: images missing, unknown or given twice; scores that are no K probabilities.
    """
    where = "The results"
    if isinstance(results, str | Path):
        where, results = str(results), read_json(Path(results))
    check_records(results, "results", where, ("image_id", "scores"), {"scores": list})
    by_image = dict.fromkeys(image["id"] for image in truth.images)
    for result in results:
        image = result["image_id"]
        if image not in by_image:
            raise ValueError(f"{where} have image {image}, which the ground truth lacks.")
        if by_image[image] is not None:
            raise ValueError(f"{where} have image {image} twice.")
        by_image[image] = result
    missing = [image for image in truth.images if by_image[image["id"]] is None]
    if missing:
        number = f"{len(missing)} of the {len(by_image)} images"
        raise ValueError(f"{where} lack {number}, such as {_name(missing[0])}: score all.")
    keys = ("scores", *(["raw_scores"] if any("raw_scores" in r for r in results) else []))
    arrays = [
        np.array([_probabilities(r, key, len(truth.categories), where) for r in by_image.values()])
        for key in keys
    ]
    return arrays[0], arrays[1] if len(arrays) > 1 else None


def _probabilities(result, key, number, where):
    """(K,) float, of a field of a result; ValueError if they are no probabilities."""
    image, values = result["image_id"], result.get(key)
    numbers = isinstance(values, list) and all(
        isinstance(score, NUMBER) and type(score) is not bool for score in values
    )
    if not numbers:
        raise ValueError(f"{where} give image {image} the {key} {values}, not all numbers.")
    values = np.array(values, dtype=float)
    if values.shape != (number,):
        raise ValueError(
            f"{where} give image {image} {values.size} {key}, but there are {number} classes: set "
            "MODEL.CLASSIFIER.NUM_CLASSES to that."
        )
    if not (values >= 0).all() or not abs(values.sum() - 1) <= SUM_TOLERANCE:
        raise ValueError(f"{where} give image {image} {key} {values.tolist()}, no probabilities.")
    return values


def _name(image):
    return image.get("file_name", image["id"])


class ClassificationMetrics(ResampledMetrics):
    """The metrics of a classifier, given (N, K) float probabilities, of confusions counted per
    unit.

    Attributes:
        predicted: (N,) int in [0, K), the class predicted.
        calibration: of its probability.
    """

    def __init__(self, truth: LabelledImages, probability: np.ndarray, raw: np.ndarray | None):
        super().__init__(Units.of(truth.images))
        self.truth, self.probability = truth, probability
        self.predicted = probability.argmax(axis=1)
        self.calibration = self._calibration(probability)
        if raw is not None:
            self.calibration_raw = self._calibration(raw)

    def _calibration(self, probability):
        number = len(probability)
        score, right = np.clip(probability.max(axis=1), 0, 1), self.predicted == self.truth.label
        return Calibration(score, right, np.arange(number), number)

    def __call__(self, weights, *, all_coco=False):
        """As of the base class; groups as in ClassificationResults."""

        def auroc(positive, score):
            return 100 * weighted_auroc(positive, score, self.unit_of_image, weights)

        values = super().__call__(weights)
        areas = []
        for k, name in enumerate(self.truth.classes):
            areas.append(auroc(self.truth.label == k, self.probability[:, k]))
            values["recognition"][f"auroc_{name}"] = areas[-1]
        values["recognition"]["auroc"] = mean_where(areas, map(np.isfinite, areas), len(weights))
        cancer = self.truth.cancer
        if cancer is not None:
            score = self.probability[:, cancer].sum(axis=1)
            values["cancer"]["auroc"] = auroc(cancer[self.truth.label], score)
        return values

    @property
    def width(self):
        return max(self.num_units, len(self.predicted) * (len(self.truth.classes) + 1))

    @cached_property
    def columns(self):
        """ "recognition" and, with cancer classes, "cancer"."""
        label, k, row = self.truth.label, len(self.truth.classes), np.arange(len(self.predicted))
        columns = np.zeros((len(row), k * k + 1))
        columns[row, label * k + self.predicted] = 1
        columns[:, -1] = -np.log(np.clip(self.probability[row, label], LEAST, 1))
        columns = self.per_unit(columns)
        groups = {"recognition": GroupFormulas(columns, self._class_metrics, self._class_shares)}
        if self.truth.cancer is not None:
            groups["cancer"] = GroupFormulas(
                columns,
                lambda sums: table_metrics(*self._cancer_table(sums)),
                lambda sums: table_proportions(*self._cancer_table(sums)),
            )
        return groups

    def confusion(self, sums: np.ndarray) -> np.ndarray:
        """(..., K, K) images, rows by truth, of (..., K * K + 1) sums of the columns."""
        k = len(self.truth.classes)
        return sums[..., :-1].reshape(*sums.shape[:-1], k, k)

    def _tables(self, sums):
        """TP, FP, FN and TN of each class, (..., K) each."""
        confusion = self.confusion(sums)
        tp = np.diagonal(confusion, axis1=-2, axis2=-1)
        fp, fn = confusion.sum(axis=-2) - tp, confusion.sum(axis=-1) - tp
        return tp, fp, fn, confusion.sum(axis=(-2, -1))[..., None] - tp - fp - fn

    def _class_metrics(self, sums):
        tp, _, fn, _ = table = self._tables(sums)
        metrics, present, total = ratios(*table), tp + fn > 0, sum(table)[..., 0]
        return {
            "top1": 100 * divide(tp.sum(axis=-1), total),
            "balanced_accuracy": mean_where(metrics["recall"].T, present.T, len(total)),
            "f1": mean_where(metrics["f1"].T, present.T, len(total)),
            "cross_entropy": divide(sums[..., -1], total),
            **self._by_class(lambda name, k: metrics[name][..., k]),
        }

    def _class_shares(self, sums):
        table = self._tables(sums)
        shares, total = table_proportions(*table), sum(table)[..., 0]
        by_class = self._by_class(lambda name, k: tuple(part[..., k] for part in shares[name]))
        return {"top1": (table[0].sum(axis=-1), total), **by_class}

    def _by_class(self, value):
        """metric_class -> value(metric, k) of each class, the recall also as accuracy_class."""
        values = {}
        for k, name in enumerate(self.truth.classes):
            values[f"accuracy_{name}"] = value("recall", k)
            values.update({f"{metric}_{name}": value(metric, k) for metric in CLASS_METRICS})
        return values

    def _cancer_table(self, sums):
        """TP, FP, FN and TN of cancer against all else, each (...,)."""
        confusion, cancer = self.confusion(sums), self.truth.cancer
        sides = (cancer, cancer), (~cancer, cancer), (cancer, ~cancer), (~cancer, ~cancer)
        return [confusion[..., rows, :][..., columns].sum(axis=(-2, -1)) for rows, columns in sides]


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationResults(EvaluationResults):
    """
    Attributes:
        recognition: top1; balanced_accuracy, f1 and auroc, means over the classes; cross_entropy;
            and of each class, against all others, accuracy_NAME (the share of its images that are
            predicted as it, as the published tables mean accuracy; the same as recall_NAME),
            precision_NAME, recall_NAME, specificity_NAME, f1_NAME, auroc_NAME.
        cancer: cancer against benign: TP FP FN TN precision recall (sensitivity) specificity
            accuracy f1 of the classes predicted, and the auroc of the probability of all cancer
            classes together. None where no class is cancer.
        ground_truth, probability: what was scored; (N, K).
        raw: (N, K), the probabilities before a temperature was applied, None where none was.

    The class predicted is that of the highest probability, of equal ones the first;
    ``calibration`` is of its probability, ``calibration_raw`` of that before a temperature.
    """

    recognition: dict[str, float]
    cancer: dict[str, float] | None
    ground_truth: LabelledImages
    probability: np.ndarray
    raw: np.ndarray | None

    def groups(self):
        groups = {"recognition": self.recognition}
        return groups if self.cancer is None else {**groups, "cancer": self.cancer}

    def part(self, positions, *, operating_point=None, bootstrap=None):
        truth = self.ground_truth
        images = [truth.images[position] for position in positions]
        part = replace(truth, images=images, label=truth.label[positions])
        raw = None if self.raw is None else self.raw[positions]
        return _evaluated(part, self.probability[positions], raw, bootstrap)

    def right(self, tau_val=False):
        return None if tau_val else self.metrics.predicted == self.ground_truth.label

    @cached_property
    def per_image(self):
        truth, predicted = self.ground_truth, self.metrics.predicted
        names = np.array(truth.classes, dtype=object)
        columns = {
            "label": names[truth.label],
            "predicted": names[predicted],
            "outcome": np.where(predicted == truth.label, "right", "wrong"),
            "score": self.probability.max(axis=1),
            **{f"score_{name}": self.probability[:, k] for k, name in enumerate(truth.classes)},
        }
        return rows_per_image(truth.images, columns)

    def _annotations(self):
        return self.ground_truth.classes, self.ground_truth.label.tolist()


def evaluate_classification(
    gt, results, *, bootstrap: Bootstrap | None = None
) -> ClassificationResults:
    """
    Args:
        gt (dict, str, Path or LabelledImages): see :func:`read_labels`.
        results (list[dict], str or Path): see :func:`read_probabilities`.
        bootstrap: how to resample for ``intervals``; None for none.

    Raises:
        ValueError: on bad input, naming the record and the reason.
    """
    truth = read_labels(gt)
    return _evaluated(truth, *read_probabilities(results, truth), bootstrap)


def _evaluated(truth, probability, raw, bootstrap) -> ClassificationResults:
    metrics = ClassificationMetrics(truth, probability, raw)
    values = metrics.once()
    classes = truth.classes
    counts = metrics.confusion(metrics.columns["recognition"].columns.sum(axis=0))
    cancer = np.zeros(len(classes), bool) if truth.cancer is None else truth.cancer
    scored = ClassificationResults(
        recognition=values["recognition"],
        cancer=values.get("cancer"),
        calibration=values["calibration"],
        calibration_raw=values.get("calibration_raw"),
        confusion=ConfusionMatrix(classes, counts),
        meta={
            "task": "recognition",
            "images": len(truth.images),
            "classes": classes,
            "images_of_class": np.bincount(truth.label, minlength=len(classes)).tolist(),
            "cancer_classes": [classes[k] for k in np.flatnonzero(cancer)],
            **metrics.settings(bootstrap),
        },
        ground_truth=truth,
        probability=probability,
        raw=raw,
        metrics=metrics,
    )
    return add_intervals(scored, bootstrap)
