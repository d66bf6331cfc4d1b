"""Score class probabilities of whole images, without a model."""

from dataclasses import asdict, dataclass, field, replace
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
    Measures,
    mean_where,
    ratios,
    table_proportions,
)
from imrcnn_d2.evaluation.output import beside_records
from imrcnn_d2.evaluation.statistics import add_intervals
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


# Of a sum of probabilities: half-precision softmax is off by less.
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


def read_labels(gt):
    """
    Args:
        gt (dict, str, Path or LabelledImages): COCO image classification: images, categories and an
            annotation {id, image_id, category_id} for each image; or what was read already.

    Returns:
        LabelledImages:

    Raises:
        ValueError: on anything else, saying which record is wrong and why.
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
        raise ValueError(f"{where} has one class, {categories[0]['name']}: nothing to tell apart.")
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
        image, own = result["image_id"], result["scores"]
        if not all(isinstance(score, NUMBER) and type(score) is not bool for score in own):
            raise ValueError(f"{where} give image {image} the scores {own}: not all are numbers.")
        own = np.array(own, dtype=float)
        if image not in ids:
            raise ValueError(f"{where} have image {image}, which the ground truth lacks.")
        if image in scores:
            raise ValueError(f"{where} have image {image} twice.")
        if own.shape != (k,):
            raise ValueError(
                f"{where} give image {image} {own.size} scores, but there are {k} classes "
                f"({', '.join(truth.classes)}): set MODEL.CLASSIFIER.NUM_CLASSES to that."
            )
        if not (own >= 0).all() or not abs(own.sum() - 1) <= SUM_TOLERANCE:
            raise ValueError(
                f"{where} give image {image} the scores {own.tolist()}, which are no probabilities "
                "that sum to 1."
            )
        scores[image] = own
    missing = [image for image in truth.images if image["id"] not in scores]
    if missing:
        name = missing[0].get("file_name", missing[0]["id"])
        raise ValueError(
            f"{where} lack {len(missing)} of the {len(ids)} images, such as {name}: score all."
        )
    return np.array([scores[image["id"]] for image in truth.images])


# Of the true class; keeps the cross-entropy of a probability of 0 finite, as scikit-learn does.
LEAST = np.finfo(np.float64).eps
OF_CLASS = ("precision", "recall", "specificity", "f1")


class ClassificationMetrics:
    """
    Confusions are counted per unit (patients where all images have one, else images), so that
    figures are formulas over sums of columns, the AUROCs aside.
    """

    def __init__(self, truth, probability):
        """
        Args:
            truth (LabelledImages): of N images and K classes.
            probability (np.ndarray): (N, K) float.
        """
        self.truth, self.probability = truth, probability
        self.called = probability.argmax(axis=1)
        self.unit, self.unit_of_image, self.num_units = number_units(truth.images)
        own = probability[np.arange(len(probability)), truth.label]
        self._cross_entropy = -np.log(np.clip(own, LEAST, 1))
        self.calibration = Calibration(
            np.clip(probability.max(axis=1), 0, 1),
            self.called == truth.label,
            np.arange(len(probability)),
            len(probability),
        )

    def __call__(self, weights, *, all_coco=False):
        """
        Args:
            weights (np.ndarray): (B, num_units) int, how often each of B resamples holds each unit.
            all_coco (bool): of lesions; here it changes nothing.

        Returns:
            dict[str, dict[str, np.ndarray]]: group -> figure -> (B,), as in ClassificationResults.
        """
        figures = {
            group: formulas(weights @ columns)
            for group, (columns, formulas, _) in self.columns.items()
        }
        of_class = {}
        for k, name in enumerate(self.truth.classes):
            area = self._auroc(self.truth.label == k, self.probability[:, k], weights)
            of_class[name] = figures["recognition"][f"auroc_{name}"] = area
        areas = list(of_class.values())
        figures["recognition"]["auroc"] = mean_where(areas, map(np.isfinite, areas), len(weights))
        if self.truth.cancer is not None:
            cancer = self.truth.cancer
            score = self.probability[:, cancer].sum(axis=1)
            area = self._auroc(cancer[self.truth.label], score, weights)
            figures["cancer"]["auroc"] = area
        figures["calibration"] = self.calibration.formulas(weights @ self._calibration)
        return figures

    once = Measures.once
    named = staticmethod(lambda sums: sums)  # what the formulas take

    def proportions(self):
        """As of Measures."""
        return {
            group: proportions(columns.sum(axis=0))
            for group, (columns, _, proportions) in self.columns.items()
        }

    @property
    def width(self):
        """int: numbers that a resample takes, to size chunks by."""
        return max(self.num_units, len(self.called) * (len(self.truth.classes) + 1))

    @cached_property
    def columns(self):
        """As of Measures: "recognition" and, with cancer classes, "cancer"."""
        k = len(self.truth.classes)
        columns = np.zeros((len(self.called), k * k + 1))
        columns[np.arange(len(self.called)), self.truth.label * k + self.called] = 1
        columns[:, -1] = self._cross_entropy
        columns = add_up(columns, self.unit_of_image, self.num_units)
        groups = {"recognition": (columns, self._recognition, self._proportions)}
        if self.truth.cancer is not None:
            groups["cancer"] = (columns, self._cancer, self._cancer_proportions)
        return groups

    def confusion(self, sums):
        """
        Args:
            sums (np.ndarray): (..., K * K + 1) sums of the columns.

        Returns:
            np.ndarray: (..., K, K) images, rows by truth, columns by what they are called.
        """
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
        """Of (B, K * K + 1) sums."""
        tables = self._tables(sums)
        by_class = {name: ratios(*table) for name, table in tables.items()}
        present = [tp + fn > 0 for tp, _, fn, _ in tables.values()]
        total = sum(tables[self.truth.classes[0]])
        right = sum(tp for tp, *_ in tables.values())

        def mean(figure):
            values = [own[figure] for own in by_class.values()]
            return mean_where(values, present, len(total))

        figures = {
            "top1": 100 * divide(right, total),
            "balanced_accuracy": mean("recall"),
            "f1": mean("f1"),
            "cross_entropy": divide(sums[..., -1], total),
        }
        for name, own in by_class.items():
            figures[f"accuracy_{name}"] = own["recall"]
            figures.update({f"{figure}_{name}": own[figure] for figure in OF_CLASS})
        return figures

    def _proportions(self, sums):
        tables = self._tables(sums)
        total = sum(tables[self.truth.classes[0]])
        shares = {"top1": (sum(tp for tp, *_ in tables.values()), total)}
        for name, table in tables.items():
            own = table_proportions(*table)
            shares[f"accuracy_{name}"] = own["recall"]
            shares.update({f"{figure}_{name}": own[figure] for figure in OF_CLASS})
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


@dataclass(frozen=True, eq=False)
class ClassificationResults:
    """
    Attributes:
        recognition (dict[str, float]): top1; balanced_accuracy, f1 and auroc, means over the
            classes; cross_entropy; and of each class, against all others, accuracy_NAME (the share
            of its images that are called it, as the published tables mean accuracy; the same as
            recall_NAME), precision_NAME, recall_NAME, specificity_NAME, f1_NAME, auroc_NAME.
        cancer (dict[str, float] or None): cancer against benign: TP FP FN TN precision recall
            (sensitivity) specificity accuracy f1 of the classes called, and the auroc of the
            probability of all cancer classes together. None where no class is cancer.
        calibration (dict[str, float]): n, ece, brier, mean_score, hit_rate of the probability of
            the class called, as that of being right; the diagram is ``measures.calibration``.
        confusion (ConfusionMatrix): of the K classes.
        per_image (list[dict]): a row an image by ascending id, with the fields of its record.
        meta (dict): the size of the data set, and how was resampled.
        ground_truth (LabelledImages), probability (np.ndarray): what was scored; (N, K).
        measures (ClassificationMetrics): the figures as functions of how often each unit counts.
        intervals (dict[str, dict[str, tuple[float, float]]]), undefined_shares (dict[str, float]):
            as in :class:`LesionResults`.
        by_group (dict[str, GroupedMetrics]): by column, see :func:`with_groups`; empty without.

    All figures are in percent but for counts and cross_entropy; undefined ones are NaN. The class
    called is that of the highest probability, of equal ones the first.
    """

    recognition: dict
    cancer: dict | None
    calibration: dict
    confusion: ConfusionMatrix
    per_image: list
    meta: dict
    ground_truth: LabelledImages
    probability: np.ndarray
    measures: ClassificationMetrics
    intervals: dict = field(default_factory=dict)
    undefined_shares: dict = field(default_factory=dict)
    by_group: dict = field(default_factory=dict)

    def groups(self):
        """dict[str, dict[str, float]]: the groups of figures, in the order of a report."""
        groups = {"recognition": self.recognition}
        if self.cancer is not None:
            groups["cancer"] = self.cancer
        return groups

    compared = groups
    own_tau = None  # there is no threshold

    def part(self, positions, *, operating_point=None, bootstrap=None):
        """
        Args:
            positions (np.ndarray): (M,) int, images, ascending.
            operating_point (None): there is no threshold.
            bootstrap (Bootstrap or None): see :func:`evaluate_classification`.

        Returns:
            ClassificationResults: of these images alone.
        """
        truth = self.ground_truth
        images = [truth.images[position] for position in positions]
        part = replace(truth, images=images, label=truth.label[positions])
        return evaluate_classification(part, self.probability[positions], bootstrap=bootstrap)

    def right(self, tau_val=False):
        """(N,) bool array, the images that are called what they are; None at a ``tau_val``."""
        return None if tau_val else self.measures.called == self.ground_truth.label


def check_same_images(first, second, names=("the first", "the second")):
    """
    Raises:
        ValueError: two ClassificationResults are not of the same images and classes.
    """
    one, two = first.ground_truth, second.ground_truth
    same = one.classes == two.classes and np.array_equal(one.label, two.label)
    for field_ in ("id", "file_name", "patient_id"):
        same = same and [i.get(field_) for i in one.images] == [i.get(field_) for i in two.images]
    if not same:
        raise ValueError(
            f"The test sets of {names[0]} and {names[1]} differ in images or classes "
            f"({len(one.images)} images of {', '.join(one.classes)}; {len(two.images)} of "
            f"{', '.join(two.classes)}): only models on the same test set can be compared."
        )


def evaluate_classification(gt, results, *, bootstrap=None):
    """
    Args:
        gt (dict, str, Path or LabelledImages): see :func:`read_labels`.
        results (list[dict], str, Path or np.ndarray): see :func:`read_probabilities`.
        bootstrap (Bootstrap or None): how to resample for ``intervals``; None for none.

    Returns:
        ClassificationResults:

    Raises:
        ValueError: on bad input, saying which record is wrong and why.
    """
    truth = read_labels(gt)
    probability = read_probabilities(results, truth)
    measures = ClassificationMetrics(truth, probability)
    figures = measures.once()
    classes = truth.classes
    counts = measures.confusion(measures.columns["recognition"][0].sum(axis=0))
    scored = ClassificationResults(
        recognition=figures["recognition"],
        cancer=figures.get("cancer"),
        calibration=figures["calibration"],
        confusion=ConfusionMatrix(classes, counts),
        per_image=_image_rows(truth, probability, measures.called),
        meta={
            "task": "recognition",
            "images": len(truth.images),
            "classes": classes,
            "images_of_class": np.bincount(truth.label, minlength=len(classes)).tolist(),
            "cancer_classes": [
                name for name, is_cancer in zip(classes, truth.cancer, strict=True) if is_cancer
            ]
            if truth.cancer is not None
            else [],
            "patients": measures.num_units if measures.unit == "patient" else None,
            "bootstrap": bootstrap and {**asdict(bootstrap), "unit": measures.unit},
        },
        ground_truth=truth,
        probability=probability,
        measures=measures,
    )
    return add_intervals(scored, bootstrap)


def _image_rows(truth, probability, called):
    names = np.array(truth.classes, dtype=object)
    columns = {
        "label": names[truth.label],
        "predicted": names[called],
        "outcome": np.where(called == truth.label, "right", "wrong"),
        "score": probability.max(axis=1),
        **{f"score_{name}": probability[:, k] for k, name in enumerate(truth.classes)},
    }
    return beside_records(truth.images, columns)
