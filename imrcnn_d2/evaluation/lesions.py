"""Score COCO results against COCO ground truth, without a model."""

import logging
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from .coco_ap import coco_average_precision
from .confusion import ConfusionMatrix, confusion_matrix
from .counting import UnitCounts, count_images
from .curves import pr_curve
from .intervals import with_intervals
from .matching import Matching, match, overlaps
from .measures import Measures
from .records import Detections, GroundTruth, read_ground_truth, read_results
from .rows import image_rows, threshold_table
from .selection import selection_score
from .strata import by_class, by_size

__all__ = ["LesionResults", "evaluate_lesions"]

logger = logging.getLogger(__name__)

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
        by_group (dict[str, GroupedFigures]): by column, see :func:`with_groups`; empty without.

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
    return with_intervals(scored, bootstrap)


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
