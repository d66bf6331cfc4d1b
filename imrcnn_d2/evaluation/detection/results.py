"""Score COCO results against COCO ground truth, without a model."""

import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from imrcnn_d2.evaluation.detection.coco_ap import coco_average_precision
from imrcnn_d2.evaluation.detection.counts import LesionCounter, UnitCounts, divide
from imrcnn_d2.evaluation.detection.curves import PRCurve
from imrcnn_d2.evaluation.detection.inputs import (
    Detections,
    GroundTruth,
    check_iou_threshold,
    check_tau,
    read_ground_truth,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import Matching
from imrcnn_d2.evaluation.detection.metrics import (
    DetectionMetrics,
    image_metrics,
    lesion_metrics,
    unit_metrics,
)
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU, OperatingPoint
from imrcnn_d2.evaluation.output import EvaluationResults, rows_per_image, transposed
from imrcnn_d2.evaluation.statistics import Bootstrap, add_intervals

logger = logging.getLogger(__name__)

# By how many points AP50_voc must depend on the order of equal scores for a warning.
TIES_MATTER = 0.1
THRESHOLDS = tuple(n / 20 for n in range(1, 20))  # 0.05, 0.10 ... 0.95
_CURVE_COLUMNS = "iou_type class score tp fp n_gt precision recall precision_envelope".split()


@dataclass(frozen=True, eq=False, kw_only=True)
class LesionResults(EvaluationResults):
    """
    Attributes:
        bbox, segm: COCO's metrics, AP50_voc and BEP.
        lesion: see :func:`lesion_metrics`, and ``selection``.
        paper: see :func:`paper_metrics`, at 0.7 of the scores as the network gives them.
        image: see :func:`image_metrics`, and ``auroc``.
        patient: see :func:`unit_metrics`, and ``auroc``, of the images whose patient is known; None
            without any.
        unique_lesion: see :func:`unique_lesion_metrics`; None without a lesion, and unless every
            lesion has a ``lesion_id`` and its image a patient or a ``sequence_id``.
        froc: sensitivity_at_0.125 ... sensitivity_at_8 and mean: the largest recall with at most so
            many false alarms per image (of all images), at any threshold; the curve is
            ``metrics.froc``.
        by_size: "share_of_image" and "coco" -> stratum -> see :func:`stratum_metrics`. The former
            is left out where the size of an image is unknown.
        by_class: class name -> as ``lesion``, without ``selection``, and AP50, AP50_voc and BEP of
            masks, of boxes where there are none. Empty for a single class.
        tau_val: the operating point's tau, rule and dataset, and ``lesion``, ``image`` and, where
            known, ``patient`` and ``unique_lesion`` at it, without ``selection`` and ``auroc``.
        curves: IoU type ("segm" or "bbox"), class name and curve at IoU 0.5 of each class. Empty
            for results without scores.
        counts: per image, what ``lesion`` and ``image`` are made of.
        counter: of the ground truth, its N detections and their matching.
        above_threshold: (N,) bool, the evaluated detections at or above tau.

    ``calibration`` is of the scores of all evaluated detections, ``confusion`` at the threshold.
    Groups of ``intervals`` are as in ``groups()``, "froc", "calibration", "by_size.SCALE.STRATUM",
    "by_class.NAME", "tau_val.lesion" and so on.
    """

    bbox: dict[str, float]
    segm: dict[str, float]
    lesion: dict[str, float]
    paper: dict[str, float]
    image: dict[str, float]
    patient: dict[str, float] | None
    unique_lesion: dict[str, float] | None
    froc: dict[str, float]
    by_size: dict[str, dict[str, dict[str, float]]]
    by_class: dict[str, dict[str, float]]
    tau_val: dict | None
    curves: list[tuple[str, str, PRCurve]]
    counts: UnitCounts
    counter: LesionCounter
    above_threshold: np.ndarray

    @property
    def ground_truth(self) -> GroundTruth:
        return self.counter.gt

    @property
    def detections(self) -> Detections:
        return self.counter.detections

    @property
    def matching(self) -> Matching:
        return self.counter.matching

    @property
    def has_masks(self) -> bool:
        """Whether metrics of masks are defined: the ground truth and the detections have some."""
        return "segm" in self.counter.overlaps

    @property
    def chosen_tau(self):
        return self.tau_val and self.tau_val["tau"]

    def groups(self):
        names = ("bbox", "segm", "lesion", "paper", "image", "patient", "unique_lesion")
        groups = {name: getattr(self, name) for name in names}
        return {name: values for name, values in groups.items() if values is not None}

    def compared(self):
        """``groups()``, "froc" and, with an operating point, "tau_val.lesion" and so on."""
        at_point = {
            f"tau_val.{name}": values
            for name, values in (self.tau_val or {}).items()
            if isinstance(values, dict)
        }
        return {**self.groups(), "froc": self.froc, **at_point}

    def part(self, positions, *, operating_point=None, bootstrap=None):
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
        unmapped = detections.unmapped[rows] if detections.mapped else None
        detections = replace(
            detections, regions=regions, score=detections.score[rows], unmapped=unmapped, notes={}
        )
        return evaluate_lesions(
            part,
            detections,
            **{name: self.meta[name] for name in ("tau", "iou_threshold", "iou_type")},
            operating_point=operating_point,
            bootstrap=bootstrap,
        )

    def right(self, tau_val=False):
        counts = self.metrics.counts.get("tau_val." if tau_val else "")
        return None if counts is None else counts.predicted_positive == counts.positive

    def _annotations(self):
        gt = self.ground_truth
        arrays = gt.regions.image, gt.regions.category, gt.regions.boxes, gt.area, gt.crowd
        return [c["name"] for c in gt.categories], *(array.tolist() for array in arrays)

    def at(self, tau: float) -> dict[str, dict[str, float]]:
        """The groups "lesion", "image" and, where patients are known, "patient" at another
        threshold, without AUROC, which needs none; NaN is a threshold that no score reaches."""
        counts = self.counter.per_image(self.counter.above(tau))
        groups = _level_metrics(counts)
        groups["lesion"]["selection"] = _selection(*groups.values(), counts.positive)
        if self.patient is not None:
            patients = self._of_patients(counts).columns()
            groups["patient"] = unit_metrics(patients.sum(axis=0))
        return {g: {k: float(v) for k, v in group.items()} for g, group in groups.items()}

    @cached_property
    def thresholds(self) -> list[dict[str, float]]:
        """Metrics at every threshold of THRESHOLDS, for display: a threshold that was chosen by it
        is no longer tested by the same data. One row per threshold: "tau", the metrics of lesions
        as "lesion_..." and those of images as "image_..."; none for results without scores."""
        rows, counts = [], None
        for tau in THRESHOLDS if self.detections.scored else ():
            # The matching is reused, and the unions at the threshold before.
            counts = self.counter.per_image(self.counter.above(tau), counts)
            groups = _level_metrics(counts).items()
            values = {f"{name}_{k}": float(v) for name, group in groups for k, v in group.items()}
            rows.append({"tau": tau, **values})
        return rows

    def _of_patients(self, counts):
        """Counts per image summed over those of each known patient."""
        return counts.merged(self.metrics.unit_of_image).take(self.metrics.units.patients)

    @cached_property
    def per_image(self):
        counts = self.counts
        columns = _outcomes(counts, self.detections.scored, "image_outcome")
        for name in ("union_iou", "union_dice"):
            columns[name] = np.where(counts.positive, 100 * getattr(counts, name), np.nan)
        return rows_per_image(self.ground_truth.images, columns)

    @property
    def per_patient(self) -> list[dict]:
        """One row per known patient, in the order of their first images: patient_id, images, and
        what happened in them."""
        units, counts = self.metrics.units, self._of_patients(self.counts)
        patients = units.patient_ids(self.ground_truth.images)
        columns = {
            "patient_id": np.array([patients[unit] for unit in units.patients], dtype=object),
            "images": np.bincount(units.of_image)[units.patients],
            **_outcomes(counts, self.detections.scored, "patient_outcome"),
        }
        return transposed(columns)[0]

    @property
    def per_lesion(self) -> list[dict]:
        """One row per unique lesion, where known: patient_id, lesion_id, frames, frames_found."""
        lesions = self.counter.unique_lesions
        patients, ids = zip(*lesions.ids, strict=True)
        columns = {
            "patient_id": np.array(patients, dtype=object),
            "lesion_id": np.array(ids, dtype=object),
            "frames": lesions.frames,
            "frames_found": self.counter.frames_found(self.above_threshold),
        }
        return transposed(columns)[0]

    def _further_groups(self):
        tau_val = {} if self.tau_val is None else {"tau_val": self.tau_val}
        return {**tau_val, "froc": self.froc}

    def _strata(self):
        by_class = {"by_class": self.by_class} if self.by_class else {}
        return {"by_size": self.by_size, **by_class}

    def tables(self):
        tables = {
            **super().tables(),
            "pr_curve.csv": (self._curve_rows(), _CURVE_COLUMNS),
            "froc.csv": transposed(self.metrics.froc.curve()),
            "thresholds.csv": (self.thresholds, ["tau"]),
            "by_size.csv": (self._size_rows(), ["scale", "size"]),
        }
        if self.patient is not None:
            tables["per_patient.csv"] = (self.per_patient, ["patient_id"])
        if self.unique_lesion is not None:
            tables["per_lesion.csv"] = (self.per_lesion, ["patient_id"])
        return tables

    def _curve_rows(self):
        rows = []
        for iou_type, name, curve in self.curves:
            shares = (100 * curve.precision, 100 * curve.recall, 100 * curve.envelope)
            columns = [values.tolist() for values in (curve.score, curve.tp, curve.fp, *shares)]
            for score, tp, fp, *shares in zip(*columns, strict=True):
                values = (iou_type, name, score, tp, fp, curve.num_gt, *shares)
                rows.append(dict(zip(_CURVE_COLUMNS, values, strict=True)))
        return rows

    def _size_rows(self):
        rows = []
        for scale, strata in self.by_size.items():
            for size, values in strata.items():
                row = {"scale": scale, "size": size}
                intervals = self.intervals.get(f"by_size.{scale}.{size}", {})
                for name, value in values.items():
                    row[name] = value
                    if name in intervals:
                        row[f"{name}_low"], row[f"{name}_high"] = intervals[name]
                rows.append(row)
        return rows


def _level_metrics(counts):
    sums = counts.columns().sum(axis=0)
    return {"lesion": lesion_metrics(sums), "image": image_metrics(sums)}


def _outcomes(counts, scored, outcome):
    """What happened in each unit: counts, its outcome, means over the hits."""
    names = np.array([["TN", "FP"], ["FN", "TP"]])
    return {
        **{"n_gt": counts.lesions, "n_det": counts.tp + counts.fp},
        **{"TP": counts.tp, "FP": counts.fp, "FN": counts.fn},
        outcome: names[counts.positive.astype(int), counts.predicted_positive.astype(int)],
        "score": counts.score if scored else np.full(len(counts.score), np.nan),
        **{m: 100 * divide(getattr(counts, m), counts.tp) for m in ("iou", "dice", "iou_box")},
        "hd95": divide(counts.hd95, counts.tp),
        "nsd": 100 * divide(counts.nsd, counts.tp),
    }


def evaluate_lesions(
    gt,
    results,
    *,
    tau: float = 0.7,
    operating_point: OperatingPoint | None = None,
    iou_threshold: float = 0.5,
    iou_type: str = "segm",
    bootstrap: Bootstrap | None = None,
    ignore_extra_images: bool = False,
) -> LesionResults:
    """Compute every metric for a data set and a model's detections in it.

    With several classes, matching is done class by class and counts are summed; AP, AP50_voc and
    BEP are means over the classes that have ground truth (NaN where one of theirs is). An image is
    lesion-free if it has no lesion of any class, and its score is that of any class.

    Args:
        gt (dict, COCO, str, Path or GroundTruth): see :func:`read_ground_truth`.
        results (list[dict], dict, str, Path or Detections): see :func:`read_results`.
        tau: score threshold of ``lesion``, ``image`` and ``patient``. It plays no part in AP, the
            curves, BEP and AUROC.
        operating_point: a second threshold, chosen on another data set, whose metrics go to
            ``tau_val``.
        iou_threshold: least overlap of a hit, in (0, 1]. AP50_voc, BEP and the curves stay at 0.5.
        iou_type: overlap of masks ("segm") or of boxes ("bbox") in matching. Where the ground truth
            or the results have boxes only, boxes are used, with a warning if the other has masks;
            iou, iou_all, dice, miou and mdice, which are always of masks, are then NaN.
        bootstrap: how to resample for ``intervals``; None for none.
        ignore_extra_images: leave out detections in images that the ground truth lacks.

    Raises:
        ValueError: on bad input, naming the record and the reason.
    """
    if iou_type not in ("segm", "bbox"):
        raise ValueError(f"iou_type is {iou_type!r}; it must be 'segm' or 'bbox'.")
    check_iou_threshold(iou_threshold)
    thresholds = {"": check_tau(tau)}
    if operating_point is not None:
        thresholds["tau_val."] = check_tau(operating_point.tau)
    gt = read_ground_truth(gt)
    detections = read_results(results, gt, ignore_extra_images=ignore_extra_images)
    have_masks = [regions.masks is not None for regions in (gt.regions, detections.regions)]
    if iou_type == "segm" and not all(have_masks):
        if gt.regions.masks or detections.regions.masks:
            side = "results have" if have_masks[0] else "ground truth has"
            logger.warning(f"The {side} no masks: lesions are matched by boxes instead.")
        iou_type = "bbox"

    counter = LesionCounter(gt, detections, iou_type, iou_threshold)
    above = {prefix: counter.above(threshold) for prefix, threshold in thresholds.items()}
    all_counts = {prefix: counter.per_image(selected) for prefix, selected in above.items()}
    counts = all_counts[""]
    sizes = counter.by_size(above[""])
    classes = counter.by_class(above[""]) if len(gt.categories) > 1 else {}
    confusion = counter.confusion_matrix(tau)
    paper = counter.matching.evaluated & (detections.raw_score >= PAPER_TAU)
    metrics = DetectionMetrics(counter, above, all_counts, paper, sizes, classes)
    sizes = {scale: [*strata] for scale, strata in sizes.items()}  # counts of all images are large
    values, curves = metrics.once(), metrics.curves()
    for kind in ("bbox", "segm"):
        coco = coco_average_precision(counter, kind)
        values[kind] = {**coco, **{name: values[kind][name] for name in ("AP50_voc", "BEP")}}
    values["lesion"]["selection"] = _selection(values["lesion"], values["image"], counts.positive)
    tied = {
        kind: (low, high)
        for kind, (low, high) in metrics.tied_ranges().items()
        if high - low > TIES_MATTER
    }
    # Not of each group of a data set, whose detections were read before.
    if tied and not isinstance(results, Detections):
        ranges = ", ".join(f"{low:.1f} to {high:.1f} ({k})" for k, (low, high) in tied.items())
        logger.warning(
            f"Many detections have equal scores: by their order, AP50_voc is from {ranges}. They "
            "are taken by image id, then as in the file. Give scores with more digits."
        )
    tau_val = None
    if operating_point is not None:
        groups = ("lesion", "image", "patient", "unique_lesion")
        at_point = {g: values[f"tau_val.{g}"] for g in groups if f"tau_val.{g}" in values}
        tau_val = {**asdict(operating_point), **at_point}
    lesion_results = LesionResults(
        **{group: values[group] for group in ("bbox", "segm", "lesion", "paper", "image", "froc")},
        patient=values.get("patient"),
        unique_lesion=values.get("unique_lesion"),
        tau_val=tau_val,
        calibration=values["calibration"],
        calibration_raw=values.get("calibration_raw"),
        by_size={
            scale: {name: values[f"by_size.{scale}.{name}"] for name in strata}
            for scale, strata in sizes.items()
        },
        by_class={name: values[f"by_class.{name}"] for name in classes},
        confusion=confusion,
        curves=curves,
        counts=counts,
        meta={
            "tau": tau,
            "iou_threshold": iou_threshold,
            "iou_type": iou_type,
            "images": len(gt.images),
            "lesion_free_images": int((~counts.positive).sum()),
            "lesions": int(counts.lesions.sum()),
            "crowds": int(gt.crowd.sum()),
            "detections": len(detections.regions),
            "scored": detections.scored,
            "classes": [category["name"] for category in gt.categories],
            **detections.notes,
            **({"tied_AP50_voc": tied} if tied else {}),
            **metrics.settings(bootstrap),
        },
        counter=counter,
        above_threshold=above[""],
        metrics=metrics,
    )
    return add_intervals(lesion_results, bootstrap)


def _selection(lesion, image, positive):
    """Mean of lesion-level precision, recall and F1 and image-level specificity, in percent.

    The paper chooses "the best weights by a joint look at precision, recall, specificity and F1".
    Which of the four take part is decided from the ground truth alone, so that all checkpoints of
    a run are compared by the same mean: the first three need a lesion in the data set, the last a
    lesion-free image. Precision counts 0 where a checkpoint detects nothing.
    """
    taking_part = [lesion[name] for name in ("precision", "recall", "f1") if positive.any()]
    if not positive.all():
        taking_part.append(image["specificity"])
    return float(np.mean(np.nan_to_num(taking_part))) if taking_part else math.nan
