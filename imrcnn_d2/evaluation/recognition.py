"""Score class probabilities of whole images, without a model."""

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .confusion import ConfusionMatrix
from .intervals import with_intervals
from .recognition_measures import RecognitionMeasures
from .recognition_records import LabelledImages, read_labels, read_probabilities
from .rows import beside_records

__all__ = ["RecognitionResults", "check_same_images", "evaluate_recognition"]


@dataclass(frozen=True, eq=False)
class RecognitionResults:
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
        measures (RecognitionMeasures): the figures as functions of how often each unit counts.
        intervals (dict[str, dict[str, tuple[float, float]]]), undefined_shares (dict[str, float]):
            as in :class:`LesionResults`.
        by_group (dict[str, GroupedFigures]): by column, see :func:`with_groups`; empty without.

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
    measures: RecognitionMeasures
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
            bootstrap (Bootstrap or None): see :func:`evaluate_recognition`.

        Returns:
            RecognitionResults: of these images alone.
        """
        truth = self.ground_truth
        images = [truth.images[position] for position in positions]
        part = replace(truth, images=images, label=truth.label[positions])
        return evaluate_recognition(part, self.probability[positions], bootstrap=bootstrap)

    def right(self, tau_val=False):
        """(N,) bool array, the images that are called what they are; None at a ``tau_val``."""
        return None if tau_val else self.measures.called == self.ground_truth.label


def check_same_images(first, second, names=("the first", "the second")):
    """
    Raises:
        ValueError: two RecognitionResults are not of the same images and classes.
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


def evaluate_recognition(gt, results, *, bootstrap=None):
    """
    Args:
        gt (dict, str, Path or LabelledImages): see :func:`read_labels`.
        results (list[dict], str, Path or np.ndarray): see :func:`read_probabilities`.
        bootstrap (Bootstrap or None): how to resample for ``intervals``; None for none.

    Returns:
        RecognitionResults:

    Raises:
        ValueError: on bad input, saying which record is wrong and why.
    """
    truth = read_labels(gt)
    probability = read_probabilities(results, truth)
    measures = RecognitionMeasures(truth, probability)
    figures = measures.once()
    classes = truth.classes
    counts = measures.confusion(measures.columns["recognition"][0].sum(axis=0))
    scored = RecognitionResults(
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
    return with_intervals(scored, bootstrap)


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
