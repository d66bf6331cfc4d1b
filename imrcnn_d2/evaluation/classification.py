"""Score class probabilities of whole images, without a model."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from imrcnn_d2.data.formats.coco import NUMBER, check_records
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix, add_up, divide, number_units
from imrcnn_d2.evaluation.detection.curves import weighted_auroc
from imrcnn_d2.evaluation.detection.inputs import GROUND_TRUTH, by_id
from imrcnn_d2.evaluation.detection.metrics import (
    COUNTS,
    GroupFormulas,
    ResampledMetrics,
    mean_where,
    ratios,
    table_proportions,
)
from imrcnn_d2.evaluation.output import EvaluationResults, rows_per_image
from imrcnn_d2.evaluation.statistics import Bootstrap, add_intervals
from imrcnn_d2.utils.files import read_json

__all__ = [
    "LabelledImages",
    "ClassificationMetrics",
    "ClassificationResults",
    "check_same_images",
    "evaluate_classification",
    "read_labels",
    "read_probabilities",
]


# Of a sum of probabilities: half-precision softmax deviates less.
SUM_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """
    Attributes:
        images (list[dict]): the COCO image records, by ascending id, with all their fields.
        categories (list[dict]): the COCO category records, by ascending id; K of them.
        label (np.ndarray): (N,) int in [0, K), the class of each image.
        cancer (np.ndarray or None): (K,) bool, classes whose ``supercategory`` is "cancer". None
            where there is no such class, or no other.
    """

    images: list
    categories: list
    label: np.ndarray
    cancer: np.ndarray | None

    @property
    def classes(self):
        """list[str]: K names."""
        return [category["name"] for category in self.categories]


def read_labels(gt) -> LabelledImages:
    """
    Args:
        gt (dict, str, Path or LabelledImages): COCO image classification: images, categories and an
            annotation {id, image_id, category_id} for each image; or what was read already.

    Raises:
        ValueError: on anything else, naming the record and the reason.
    """
    if isinstance(gt, LabelledImages):
        return gt
    where = "The ground truth"
    if isinstance(gt, (str, Path)):
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
    known = {image["id"] for image in images}
    label = {}
    for annotation in gt["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in known:
            raise ValueError(f"{where} gives a class to image {image}, which it does not have.")
        if category not in position:
            raise ValueError(
                f"{where}: unknown label {category} of image {image}; there are {list(position)}."
            )
        if image in label:
            raise ValueError(f"{where} gives several classes to image {image}: one is needed.")
        label[image] = position[category]
    for image in images:
        if image["id"] not in label:
            name = image.get("file_name", image["id"])
            raise ValueError(f"{where} gives no class to image {image['id']} ({name}).")
    cancer = np.array([category.get("supercategory") == "cancer" for category in categories])
    return LabelledImages(
        images,
        categories,
        np.array([label[image["id"]] for image in images]),
        cancer if cancer.any() and not cancer.all() else None,
    )


def read_probabilities(results, truth):
    """
    Args:
        results (list[dict], str, Path or np.ndarray): {image_id, scores} for each image; ``scores``
            are K probabilities, of the classes by ascending category id. Or what was read already.
        truth (LabelledImages): of N images.

    Returns:
        np.ndarray: (N, K) float, in the order of ``truth.images``.

    Raises:
        ValueError: images missing, unknown or given twice; scores that are no K probabilities.
    """
    if isinstance(results, np.ndarray):
        return results
    where = "The results"
    if isinstance(results, (str, Path)):
        where, results = str(results), read_json(Path(results))
    check_records(results, "results", where, ("image_id", "scores"), {"scores": list})
    k, ids = len(truth.categories), {image["id"] for image in truth.images}
    scores = {}
    for result in results:
        image, values = result["image_id"], result["scores"]
        if not all(isinstance(score, NUMBER) and type(score) is not bool for score in values):
            raise ValueError(
                f"{where} give image {image} the scores {values}: not all are numbers."
            )
        values = np.array(values, dtype=float)
        if image not in ids:
            raise ValueError(f"{where} have image {image}, which the ground truth lacks.")
        if image in scores:
            raise ValueError(f"{where} have image {image} twice.")
        if values.shape != (k,):
            raise ValueError(
                f"{where} give image {image} {values.size} scores, but there are {k} classes "
                f"({', '.join(truth.classes)}): set MODEL.CLASSIFIER.NUM_CLASSES to that."
            )
        if not (values >= 0).all() or not abs(values.sum() - 1) <= SUM_TOLERANCE:
            raise ValueError(
                f"{where} give image {image} the scores {values.tolist()}, which are no "
                "probabilities that sum to 1."
            )
        scores[image] = values
    missing = [image for image in truth.images if image["id"] not in scores]
    if missing:
        name = missing[0].get("file_name", missing[0]["id"])
        raise ValueError(
            f"{where} lack {len(missing)} of the {len(ids)} images, such as {name}: score all."
        )
    return np.array([scores[image["id"]] for image in truth.images])


# Of the true class; keeps the cross-entropy of a probability of 0 finite, as scikit-learn does.
LEAST = np.finfo(np.float64).eps
CLASS_METRICS = ("precision", "recall", "specificity", "f1")


class ClassificationMetrics(ResampledMetrics):
    """
    The metrics of a classifier, of confusions counted per unit: patients where all images have one,
    else images.

    Attributes:
        predicted (np.ndarray): (N,) int in [0, K), the class predicted.
        calibration (Calibration): of its probability.
    """

    def __init__(self, truth: LabelledImages, probability: np.ndarray):
        """
        Args:
            truth: of N images and K classes.
            probability: (N, K) float.
        """
        super().__init__(*number_units(truth.images))
        self.truth, self.probability = truth, probability
        self.predicted = probability.argmax(axis=1)
        of_truth = probability[np.arange(len(probability)), truth.label]
        self._cross_entropy = -np.log(np.clip(of_truth, LEAST, 1))
        self.calibration = Calibration(
            np.clip(probability.max(axis=1), 0, 1),
            self.predicted == truth.label,
            np.arange(len(probability)),
            len(probability),
        )

    def __call__(self, weights, *, all_coco=False):
        """As of the base class; groups as in ClassificationResults."""
        values = super().__call__(weights)
        areas = []
        for k, name in enumerate(self.truth.classes):
            areas.append(self._auroc(self.truth.label == k, self.probability[:, k], weights))
            values["recognition"][f"auroc_{name}"] = areas[-1]
        values["recognition"]["auroc"] = mean_where(areas, map(np.isfinite, areas), len(weights))
        if self.truth.cancer is not None:
            cancer = self.truth.cancer
            score = self.probability[:, cancer].sum(axis=1)
            values["cancer"]["auroc"] = self._auroc(cancer[self.truth.label], score, weights)
        values["calibration"] = self.calibration.formulas(weights @ self._calibration)
        return values

    @staticmethod
    def named(sums):
        """The sums as they are, whose number depends on that of the classes."""
        return sums

    @property
    def width(self):
        return max(self.num_units, len(self.predicted) * (len(self.truth.classes) + 1))

    @cached_property
    def columns(self):
        """ "recognition" and, with cancer classes, "cancer"."""
        k = len(self.truth.classes)
        columns = np.zeros((len(self.predicted), k * k + 1))
        columns[np.arange(len(self.predicted)), self.truth.label * k + self.predicted] = 1
        columns[:, -1] = self._cross_entropy
        columns = add_up(columns, self.unit_of_image, self.num_units)
        groups = {"recognition": GroupFormulas(columns, self._recognition, self._proportions)}
        if self.truth.cancer is not None:
            groups["cancer"] = GroupFormulas(columns, self._cancer, self._cancer_proportions)
        return groups

    def confusion(self, sums: np.ndarray) -> np.ndarray:
        """(..., K, K) images, rows by truth, of (..., K * K + 1) sums of the columns."""
        k = len(self.truth.classes)
        return sums[..., :-1].reshape(*sums.shape[:-1], k, k)

    def _tables(self, sums):
        """{class: (TP, FP, FN, TN)}, each (...,)."""
        confusion = self.confusion(sums)
        total = confusion.sum(axis=(-2, -1))
        tables = {}
        for k, name in enumerate(self.truth.classes):
            tp = confusion[..., k, k][()]
            fp, fn = confusion[..., k].sum(axis=-1) - tp, confusion[..., k, :].sum(axis=-1) - tp
            tables[name] = (tp, fp, fn, total - tp - fp - fn)
        return tables

    def _recognition(self, sums):
        tables = self._tables(sums)
        by_class = {name: ratios(*table) for name, table in tables.items()}
        present = [tp + fn > 0 for tp, _, fn, _ in tables.values()]
        total = sum(tables[self.truth.classes[0]])
        right = sum(tp for tp, *_ in tables.values())

        def mean(metric):
            values = [of_class[metric] for of_class in by_class.values()]
            return mean_where(values, present, len(total))

        values = {
            "top1": 100 * divide(right, total),
            "balanced_accuracy": mean("recall"),
            "f1": mean("f1"),
            "cross_entropy": divide(sums[..., -1], total),
        }
        for name, of_class in by_class.items():
            values[f"accuracy_{name}"] = of_class["recall"]
            values.update({f"{metric}_{name}": of_class[metric] for metric in CLASS_METRICS})
        return values

    def _proportions(self, sums):
        tables = self._tables(sums)
        total = sum(tables[self.truth.classes[0]])
        shares = {"top1": (sum(tp for tp, *_ in tables.values()), total)}
        for name, table in tables.items():
            of_class = table_proportions(*table)
            shares[f"accuracy_{name}"] = of_class["recall"]
            shares.update({f"{metric}_{name}": of_class[metric] for metric in CLASS_METRICS})
        return shares

    def _cancer_table(self, sums):
        """TP, FP, FN and TN of cancer against all else, each (...,)."""
        confusion, cancer = self.confusion(sums), self.truth.cancer
        return tuple(
            confusion[..., rows, :][..., columns].sum(axis=(-2, -1))
            for rows, columns in (
                (cancer, cancer),
                (~cancer, cancer),
                (cancer, ~cancer),
                (~cancer, ~cancer),
            )
        )

    def _cancer(self, sums):
        table = self._cancer_table(sums)
        return {**dict(zip(COUNTS, table, strict=True)), **ratios(*table)}

    def _cancer_proportions(self, sums):
        return table_proportions(*self._cancer_table(sums))

    def _auroc(self, positive, score, weights):
        return 100 * weighted_auroc(positive, score, self.unit_of_image, weights)

    @cached_property
    def _calibration(self):
        return add_up(self.calibration.columns(), self.unit_of_image, self.num_units)


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

    The class predicted is that of the highest probability, of equal ones the first;
    ``calibration`` is of its probability.
    """

    recognition: dict[str, float]
    cancer: dict[str, float] | None
    ground_truth: LabelledImages
    probability: np.ndarray

    def groups(self):
        groups = {"recognition": self.recognition}
        if self.cancer is not None:
            groups["cancer"] = self.cancer
        return groups

    def part(self, positions, *, operating_point=None, bootstrap=None):
        truth = self.ground_truth
        images = [truth.images[position] for position in positions]
        part = replace(truth, images=images, label=truth.label[positions])
        return evaluate_classification(part, self.probability[positions], bootstrap=bootstrap)

    def right(self, tau_val=False):
        return None if tau_val else self.metrics.predicted == self.ground_truth.label


def check_same_images(first, second, names=("the first", "the second")):
    """
    Raises:
        ValueError: two ClassificationResults are not of the same images and classes.
    """
    one, two = first.ground_truth, second.ground_truth
    same = one.classes == two.classes and np.array_equal(one.label, two.label)
    for field in ("id", "file_name", "patient_id"):
        same = same and [i.get(field) for i in one.images] == [i.get(field) for i in two.images]
    if not same:
        raise ValueError(
            f"The test sets of {names[0]} and {names[1]} differ in images or classes "
            f"({len(one.images)} images of {', '.join(one.classes)}; {len(two.images)} of "
            f"{', '.join(two.classes)}): only models on the same test set can be compared."
        )


def evaluate_classification(
    gt, results, *, bootstrap: Bootstrap | None = None
) -> ClassificationResults:
    """
    Args:
        gt (dict, str, Path or LabelledImages): see :func:`read_labels`.
        results (list[dict], str, Path or np.ndarray): see :func:`read_probabilities`.
        bootstrap: how to resample for ``intervals``; None for none.

    Raises:
        ValueError: on bad input, naming the record and the reason.
    """
    truth = read_labels(gt)
    probability = read_probabilities(results, truth)
    metrics = ClassificationMetrics(truth, probability)
    values = metrics.once()
    classes = truth.classes
    counts = metrics.confusion(metrics.columns["recognition"][0].sum(axis=0))
    scored = ClassificationResults(
        recognition=values["recognition"],
        cancer=values.get("cancer"),
        calibration=values["calibration"],
        confusion=ConfusionMatrix(classes, counts),
        per_image=_image_rows(truth, probability, metrics.predicted),
        meta={
            "task": "recognition",
            "images": len(truth.images),
            "classes": classes,
            "images_of_class": np.bincount(truth.label, minlength=len(classes)).tolist(),
            "cancer_classes": [
                name
                for k, name in enumerate(classes)
                if truth.cancer is not None and truth.cancer[k]
            ],
            "patients": metrics.num_units if metrics.unit == "patient" else None,
            "bootstrap": bootstrap and {**asdict(bootstrap), "unit": metrics.unit},
        },
        ground_truth=truth,
        probability=probability,
        metrics=metrics,
    )
    return add_intervals(scored, bootstrap)


def _image_rows(truth, probability, predicted):
    names = np.array(truth.classes, dtype=object)
    columns = {
        "label": names[truth.label],
        "predicted": names[predicted],
        "outcome": np.where(predicted == truth.label, "right", "wrong"),
        "score": probability.max(axis=1),
        **{f"score_{name}": probability[:, k] for k, name in enumerate(truth.classes)},
    }
    return rows_per_image(truth.images, columns)
