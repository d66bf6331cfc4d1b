"""Score COCO results against COCO ground truth, without a model."""

import logging
import math
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from imrcnn_d2.evaluation.detection.coco_ap import coco_average_precision
from imrcnn_d2.evaluation.detection.counts import (
    ConfusionMatrix,
    UnitCounts,
    by_class,
    by_size,
    confusion_matrix,
    count_images,
)
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.evaluation.detection.inputs import (
    Detections,
    GroundTruth,
    read_ground_truth,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import Matching, match, overlaps
from imrcnn_d2.evaluation.detection.metrics import Measures
from imrcnn_d2.evaluation.output import image_rows, threshold_table
from imrcnn_d2.evaluation.statistics import add_intervals
from imrcnn_d2.utils.files import BadInputError

__all__ = [
    "LesionResults",
    "OperatingPoint",
    "check_rule",
    "choose_operating_point",
    "evaluate_lesions",
    "selection_score",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OperatingPoint:
    """
    Attributes:
        tau (float): score from which on a detection counts.
        rule (str): how it was chosen, see :func:`choose_operating_point`.
        dataset (str or None): what it was chosen on.
    """

    tau: float
    rule: str
    dataset: str | None = None

    @classmethod
    def of_file(cls, value: object, path: str | Path) -> "OperatingPoint":
        """
        The one that a file of weights holds.

        Args:
            value: a dict of the attributes, as it was written; checked.
            path: of the file.

        Raises:
            BadInputError: it is none: with a tau of NaN there would be no detection in any image.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(value, dict) and sorted(value) == sorted(names):
            tau, rule, dataset = (value[name] for name in names)
            texts = isinstance(rule, str) and isinstance(dataset, str | None)
            if isinstance(tau, int | float) and 0 <= tau <= 1 and texts:
                return cls(float(tau), rule, dataset)
        raise BadInputError(
            path,
            f"its operating_point {str(value)[:80]!r} is none: it has tau, from 0 to 1, rule and "
            "dataset. Get the file anew, or export it again (tools/export.py)",
        )


def check_rule(rule):
    """
    Args:
        rule (str): see :func:`choose_operating_point`.

    Returns:
        float or None: the wished recall in percent; None for "f1".

    Raises:
        ValueError: for another rule.
    """
    wished = re.fullmatch(r"recall>=(\d+(?:\.\d+)?)", rule)
    if rule != "f1" and not (wished and 0 < float(wished[1]) <= 100):
        raise ValueError(
            f"The rule for the threshold is {rule!r}; it must be 'f1' or 'recall>=95', for a "
            "sensitivity of 95 %."
        )
    return float(wished[1]) if wished else None


def choose_operating_point(results, rule="f1", dataset=None):
    """
    Choose a threshold among the scores of the detections. Only ever on validation data: figures at
    a threshold chosen on the test set are those of no detector that one could use.

    Args:
        results (LesionResults): of the validation set; the matching is made, whatever its tau.
        rule (str): "f1": the largest lesion-level F1, of equal ones the highest threshold;
            "recall>=95": the highest threshold with a lesion-level recall of at least 95 %.
        dataset (str or None): name of the validation set, to be noted.

    Returns:
        OperatingPoint: where a wished recall is not reached at any score, the highest threshold
        with the largest recall; that is logged as a warning.

    Raises:
        ValueError: for another rule, without a lesion, without a detection, and for results that
            know no scores.
    """
    wished = check_rule(rule)
    detections, matching = results.detections, results.matching
    lesions = int(results.ground_truth.lesions.sum())
    of = f" of {dataset}" if dataset else ""
    if not detections.scored:
        raise ValueError(f"The results{of} know no scores, among which to choose a threshold.")
    if not lesions or not matching.counts.any():
        what = "detection" if lesions else "lesion"
        raise ValueError(f"Without a {what}{of} no threshold can be chosen.")
    score = detections.score[matching.counts]
    candidates, group = np.unique(-score, return_inverse=True)  # from the highest down
    tp = np.cumsum(np.bincount(group, matching.hit[matching.counts]))
    called = np.cumsum(np.bincount(group))
    if rule == "f1":
        best = int(np.argmax(2 * tp / (called + lesions)))  # the first, so the highest threshold
    else:
        # In whole numbers of lesions where that is exact: 95 % of 20 are 19.
        enough = 100 * tp >= wished * lesions
        best = int(np.argmax(enough if enough.any() else tp))
        if not enough.any():
            logger.warning(
                f"The detections{of} reach a recall of {100 * tp[-1] / lesions:.1f} % at most: the "
                f"threshold chosen for {rule!r} gives that."
            )
    return OperatingPoint(float(-candidates[best]), rule, dataset)


def selection_score(lesion, image, *, has_lesions, has_lesion_free_images):
    """
    Mean of lesion-level precision, recall and F1 and image-level specificity, at the threshold.

    The paper chooses "the best weights by a joint look at precision, recall, specificity and F1".
    Which of the four take part is decided from the ground truth alone, so that all checkpoints of
    a run are compared by the same mean: the first three need a lesion in the data set, the last a
    lesion-free image. Precision and F1, where a checkpoint detects nothing, count 0.

    Args:
        lesion, image (dict[str, float]): figures in percent.
        has_lesions, has_lesion_free_images (bool): of the data set.

    Returns:
        float: in percent; NaN for a data set without images.
    """
    taking_part = []
    if has_lesions:
        taking_part += [lesion["precision"], lesion["recall"], lesion["f1"]]
    if has_lesion_free_images:
        taking_part.append(image["specificity"])
    if not taking_part:
        return float("nan")
    return sum(0.0 if math.isnan(figure) else figure for figure in taking_part) / len(taking_part)


# The IoU of AP50_voc, BEP and the PR curves, whatever IoU lesions are matched at.
CURVE_IOU = 0.5


@dataclass(frozen=True, eq=False)
class LesionResults:
    """
    Attributes:
        bbox, segm (dict[str, float]): AP AP50 AP75 APs APm APl AP50_voc BEP.
        lesion (dict[str, float]): TP FP FN TN precision recall specificity accuracy f1 iou iou_box
            iou_all dice fp_per_image fp_per_lesion_free_image selection.
        image (dict[str, float]): TP FP FN TN precision recall specificity accuracy f1 auroc
            localised_recall miou mdice.
        patient (dict[str, float] or None): as ``image``, without the last two. None unless every
            image record has a ``patient_id``.
        froc (dict[str, float]): sensitivity_at_0.125 ... sensitivity_at_8 and mean: the largest
            recall with at most so many false alarms per image (of all images), at any threshold;
            the curve is ``measures.froc``.
        calibration (dict[str, float]): n, ece, brier, mean_score, hit_rate of the scores of all
            detections that count, as probabilities of a hit; the diagram is
            ``measures.calibration``.
        by_size (dict[str, dict[str, dict[str, float]]]): "share_of_image" and "coco" -> stratum ->
            n recall iou iou_box iou_all dice. The former is left out where the size of an image is
            unknown.
        by_class (dict[str, dict[str, float]]): class name -> as ``lesion``, without ``selection``,
            and AP50, AP50_voc and BEP of masks, of boxes where there are none. Empty for a single
            class.
        confusion (ConfusionMatrix): at the threshold.
        tau_val (dict or None): figures at the operating point: its tau, rule and dataset, and
            ``lesion``, ``image`` and, where patients are known, ``patient``, without ``selection``
            and ``auroc``. None without an operating point.
        per_image (list[dict]): a row an image by ascending id, with the fields of its record.
        curves (list[tuple[str, str, PRCurve]]): IoU type ("segm" or "bbox"), class name and curve
            at IoU 0.5 of each class. Empty for results without scores.
        counts (UnitCounts): per image, what ``lesion`` and ``image`` are made of.
        meta (dict): the settings, and the size of the data set.
        ground_truth (GroundTruth), detections (Detections): what was scored; N detections.
        overlaps (dict[str, Overlaps]): by "bbox" and, where there are masks, by "segm".
        matching (Matching): of the N detections.
        counted (np.ndarray): (N,) bool, the detections that count at the threshold.
        measures (Measures): the figures as functions of how often each unit counts.
        intervals (dict[str, dict[str, tuple[float, float]]]): group -> figure -> (low, high), see
            :func:`confidence_intervals`; empty without a bootstrap. Groups as in :meth:`groups`,
            "froc", "calibration", "by_size.SCALE.STRATUM", "by_class.NAME", "tau_val.lesion",
            "tau_val.image" and "tau_val.patient".
        undefined_shares (dict[str, float]): "group.figure" -> share in (0, 1] of the resamples in
            which it is undefined, where there are any.
        by_group (dict[str, GroupedMetrics]): by column, see :func:`with_groups`; empty without.

    All figures are in percent but for counts and fp_per_image; undefined ones are NaN.
    """

    bbox: dict
    segm: dict
    lesion: dict
    image: dict
    patient: dict | None
    froc: dict
    calibration: dict
    by_size: dict
    by_class: dict
    confusion: ConfusionMatrix
    tau_val: dict | None
    per_image: list
    curves: list
    counts: UnitCounts
    meta: dict
    ground_truth: GroundTruth
    detections: Detections
    overlaps: dict
    matching: Matching
    counted: np.ndarray
    measures: Measures
    intervals: dict = field(default_factory=dict)
    undefined_shares: dict = field(default_factory=dict)
    by_group: dict = field(default_factory=dict)

    def groups(self):
        """dict[str, dict[str, float]]: the groups of figures, in the order of a report."""
        groups = {"bbox": self.bbox, "segm": self.segm, "lesion": self.lesion, "image": self.image}
        if self.patient is not None:
            groups["patient"] = self.patient
        return groups

    def compared(self):
        """dict[str, dict[str, float]]: what models are compared by: :meth:`groups`, "froc" and,
        with an operating point, "tau_val.lesion" and so on."""
        figures = {**self.groups(), "froc": self.froc}
        for group in ("lesion", "image", "patient"):
            if self.tau_val and group in self.tau_val:
                figures[f"tau_val.{group}"] = self.tau_val[group]
        return figures

    def part(self, positions, *, operating_point=None, bootstrap=None):
        """
        Args:
            positions (np.ndarray): (M,) int, images, ascending.
            operating_point (OperatingPoint or None), bootstrap (Bootstrap or None): see
                :func:`evaluate_lesions`.

        Returns:
            LesionResults: of these images alone, with the same settings.
        """
        gt, detections = self.ground_truth, self.detections
        rows, regions = gt.regions.of_images(positions)
        part = GroundTruth(
            images=[gt.images[position] for position in positions],
            categories=gt.categories,
            regions=regions,
            annotations=[gt.annotations[row] for row in rows],
            crowd=gt.crowd[rows],
            area=gt.area[rows],
        )
        rows, regions = detections.regions.of_images(positions)
        return evaluate_lesions(
            part,
            Detections(regions, detections.score[rows], detections.scored),
            **{name: self.meta[name] for name in ("tau", "iou_threshold", "iou_type")},
            operating_point=operating_point,
            bootstrap=bootstrap,
        )

    @property
    def own_tau(self):
        """float or None: the operating point."""
        return self.tau_val and self.tau_val["tau"]

    def right(self, tau_val=False):
        """
        Args:
            tau_val (bool): at the operating point instead of the threshold.

        Returns:
            np.ndarray or None: (I,) bool, the images that are called what they are, with a lesion
            or without; None without an operating point where that is asked for.
        """
        counts = self.measures.counts.get("tau_val." if tau_val else "")
        return None if counts is None else counts.called == counts.positive

    @cached_property
    def thresholds(self):
        """list[dict]: see :func:`threshold_table`."""
        return threshold_table(self)

    def counts_at(self, tau, other=None):
        """
        Args:
            tau (float): score from which on a detection counts.
            other (UnitCounts or None): the same at another threshold, which saves time.

        Returns:
            UnitCounts: per image, as ``counts`` at another threshold; the matching is reused.
        """
        gt, detections = self.ground_truth, self.detections
        counted = self.matching.counts & (detections.score >= tau)
        return count_images(gt, detections, self.overlaps, self.matching, counted, other)


def evaluate_lesions(
    gt,
    results,
    *,
    tau=0.7,
    operating_point=None,
    iou_threshold=0.5,
    iou_type="segm",
    bootstrap=None,
):
    """
    Compute every figure for a data set and a model's detections in it.

    With several classes, matching is done class by class and counts are summed; AP, AP50_voc and
    BEP are means over the classes that have ground truth (NaN where one of theirs is). An image is
    lesion-free if it has no lesion of any class, and its score is that of any class.

    Args:
        gt (dict, COCO, str, Path or GroundTruth): see :func:`read_ground_truth`.
        results (list[dict], dict, str, Path or Detections): see :func:`read_results`.
        tau (float): score from which on a detection counts in ``lesion``, ``image`` and
            ``patient``. It plays no part in AP, the curves, BEP and AUROC.
        operating_point (OperatingPoint or None): a second threshold, chosen on another data set,
            whose figures go to ``tau_val``.
        iou_threshold (float): least overlap of a hit, in (0, 1]. AP50_voc, BEP and the curves
            stay at 0.5.
        iou_type (str): overlap of masks ("segm") or of boxes ("bbox") in matching. Where the
            ground truth or the results have boxes only, boxes are used and a warning is logged;
            iou, iou_all, dice, miou and mdice, which are always of masks, are then NaN.
        bootstrap (Bootstrap or None): how to resample for ``intervals``; None for none.

    Returns:
        LesionResults:

    Raises:
        ValueError: on bad input, saying which record is wrong and why.
    """
    if iou_type not in ("segm", "bbox"):
        raise ValueError(f"iou_type is {iou_type!r}; it must be 'segm' or 'bbox'.")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in (0, 1].")
    thresholds = {"": tau}
    if operating_point is not None:
        thresholds["tau_val."] = operating_point.tau
    for threshold in thresholds.values():
        if not 0 <= threshold < math.inf:
            raise ValueError(f"tau is {threshold}; it must be a number that is not negative.")
    gt = read_ground_truth(gt)
    detections = read_results(results, gt)
    has_masks = gt.regions.masks is not None and detections.regions.masks is not None
    if iou_type == "segm" and not has_masks:
        side = "ground truth" if gt.regions.masks is None else "results"
        logger.warning(f"The {side} have no masks: lesions are matched by boxes instead.")
        iou_type = "bbox"

    groups = {"bbox": overlaps(gt, detections, "bbox")}
    if has_masks:
        groups["segm"] = overlaps(gt, detections, "segm")
    curve_matchings = {kind: match(gt, detections, groups[kind], CURVE_IOU) for kind in groups}
    matching = curve_matchings[iou_type]
    if iou_threshold != CURVE_IOU:
        matching = match(gt, detections, groups[iou_type], iou_threshold)
    counted = {
        prefix: matching.counts & (detections.score >= threshold)
        for prefix, threshold in thresholds.items()
    }
    counts = {
        prefix: count_images(gt, detections, groups, matching, chosen)
        for prefix, chosen in counted.items()
    }
    sizes = by_size(gt, detections, groups, matching, counted[""])
    classes = {}
    if len(gt.categories) > 1:
        classes = by_class(gt, detections, groups, matching, counted[""])
    measures = Measures(gt, detections, groups, curve_matchings, matching, counts, sizes, classes)
    figures = measures.once()
    for kind in ("bbox", "segm"):
        coco = coco_average_precision(gt, detections, groups.get(kind), kind)
        figures[kind] = {**coco, **{name: figures[kind][name] for name in ("AP50_voc", "BEP")}}
    positive = counts[""].positive
    figures["lesion"]["selection"] = selection_score(
        figures["lesion"],
        figures["image"],
        has_lesions=bool(positive.any()),
        has_lesion_free_images=bool((~positive).any()),
    )
    tau_val = None
    if operating_point is not None:
        tau_val = {key: getattr(operating_point, key) for key in ("tau", "rule", "dataset")}
        for group in ("lesion", "image", "patient"):
            if f"tau_val.{group}" in figures:
                tau_val[group] = figures[f"tau_val.{group}"]
    scored = LesionResults(
        **{group: figures[group] for group in ("bbox", "segm", "lesion", "image", "froc")},
        patient=figures.get("patient"),
        tau_val=tau_val,
        calibration=figures["calibration"],
        by_size={
            scale: {name: figures[f"by_size.{scale}.{name}"] for name in strata}
            for scale, strata in sizes.items()
        },
        by_class={name: figures[f"by_class.{name}"] for name in classes},
        confusion=confusion_matrix(
            gt, detections, matching, tau=tau, iou_threshold=iou_threshold, iou_type=iou_type
        ),
        per_image=image_rows(gt, counts[""], detections.scored),
        curves=_curves(gt, detections, curve_matchings),
        counts=counts[""],
        meta={
            "tau": tau,
            "iou_threshold": iou_threshold,
            "iou_type": iou_type,
            "images": len(gt.images),
            "lesion_free_images": int((~positive).sum()),
            "lesions": int(counts[""].lesions.sum()),
            "crowds": int(gt.crowd.sum()),
            "detections": len(detections.regions),
            "scored": detections.scored,
            "classes": [category["name"] for category in gt.categories],
            "patients": measures.num_units if measures.unit == "patient" else None,
            "bootstrap": bootstrap and {**asdict(bootstrap), "unit": measures.unit},
        },
        ground_truth=gt,
        detections=detections,
        overlaps=groups,
        matching=matching,
        counted=counted[""],
        measures=measures,
    )
    return add_intervals(scored, bootstrap)


def _curves(gt, detections, matchings):
    """[(kind, class name, PRCurve)] at IoU 0.5."""
    if not detections.scored:
        return []
    num_gt = np.bincount(gt.regions.category[~gt.crowd], minlength=len(gt.categories))
    curves = []
    for kind, matching in matchings.items():
        for position, category in enumerate(gt.categories):
            own = matching.counts & (detections.regions.category == position)
            curve = pr_curve(detections.score[own], matching.hit[own], num_gt[position])
            curves.append((kind, category["name"], curve))
    return curves
