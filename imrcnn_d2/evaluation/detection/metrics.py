"""The table of metrics, their formulas, and every metric as a function of how often each unit
counts: with weights of 1 that gives the metrics of the data set, with the weights of bootstrap
resamples those of the resamples."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from imrcnn_d2.data.units import Units
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.coco_ap import coco_curves
from imrcnn_d2.evaluation.detection.counts import (
    LesionCounter,
    UnitCounts,
    divide,
    named,
)
from imrcnn_d2.evaluation.detection.curves import (
    FROC,
    PRCurve,
    RankedDetections,
    Ranking,
    pr_curve,
    weighted_auroc,
)
from imrcnn_d2.evaluation.detection.inputs import Detections, GroundTruth
from imrcnn_d2.evaluation.detection.matching import Matching, match


@dataclass(frozen=True)
class Metric:
    name: str  # key in metrics.json
    label: str  # for readers
    unit: str  # "%", "count", or what else the value is in
    formula: str  # or the source of the definition
    endpoint_of: tuple[str, ...] = ()  # groups in which models are compared by it


_CURVES, _UNITS = ("segm", "bbox"), ("image", "patient", "cancer")
_LESIONS, _FREE = ("lesion", "tau_val.lesion"), "fp_per_lesion_free_image"
_VIDEO = ("video", "tau_val.video")

# In the order in which models are compared.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("AP50_voc", "AP50_voc", "%", "area under the PR envelope at IoU 0.5", _CURVES),
        Metric("AP", "AP", "%", "COCO, mean over IoU 0.5 to 0.95", _CURVES),
        Metric("AP50", "AP50", "%", "COCO, at IoU 0.5"),
        Metric("AP75", "AP75", "%", "COCO, at IoU 0.75"),
        Metric("APs", "APs", "%", "COCO, area below 32² pixels"),
        Metric("APm", "APm", "%", "COCO, area from 32² to 96² pixels"),
        Metric("APl", "APl", "%", "COCO, area from 96² pixels"),
        Metric("AP_per_image", "AP per image", "%", "mean of the AP of each image with a lesion"),
        Metric("BEP", "BEP", "%", "precision where it equals recall"),
        Metric("TP", "TP", "count", "true positives"),
        Metric("FP", "FP", "count", "false positives"),
        Metric("FN", "FN", "count", "false negatives"),
        Metric("TN", "TN", "count", "true negatives"),
        Metric("n", "n", "count", "cases"),
        Metric("iou", "IoU", "%", "mean IoU of the masks of matched pairs", ("lesion",)),
        Metric("iou_box", "IoU", "%", "mean IoU of the boxes of matched pairs", ("lesion",)),
        Metric("iou_all", "iou_all", "%", "sum of iou / (TP + FN)"),
        Metric("dice", "dice", "%", "mean Dice of the masks of matched pairs"),
        Metric("hd95", "HD95", "px", "95 % of boundary distances, mean of matched pairs"),
        Metric("nsd", "NSD", "%", "share of boundaries that agree, mean of matched pairs"),
        Metric("balanced_accuracy", "balanced accuracy", "%", "mean recall", ("recognition",)),
        Metric("top1", "top-1 accuracy", "%", "images predicted rightly", ("recognition",)),
        Metric("precision", "precision", "%", "TP / (TP + FP)", _LESIONS),
        Metric("recall", "recall", "%", "TP / (TP + FN)", (*_LESIONS, *_UNITS)),
        Metric("f1", "F1", "%", "2 TP / (2 TP + FP + FN)", _LESIONS),
        Metric("specificity", "specificity", "%", "TN / (TN + FP)", _UNITS),
        Metric("accuracy", "accuracy", "%", "(TP + TN) / cases"),
        Metric("auroc", "AUROC", "%", "Hanley and McNeil 1982", (*_UNITS, "recognition")),
        Metric("frame_recall", "frame recall", "%", "share of a lesion's frames, mean"),
        Metric("localised_recall", "localised_recall", "%", "units with a lesion hit / positive"),
        Metric("miou", "mIoU", "%", "IoU of unions, mean over positive images", ("image",)),
        Metric("mdice", "mDice", "%", "Dice of unions, mean over positive images"),
        Metric("fp_per_image", "fp_per_image", "per image", "FP / images"),
        Metric(_FREE, _FREE, "per image", "FP in lesion-free images / lesion-free images"),
        Metric("selection", "selection", "%", "mean of precision, recall, F1 and specificity"),
        Metric("cross_entropy", "cross-entropy", "nats", "-ln p of the true class, mean"),
        Metric("ece", "ece", "%", "expected calibration error, 10 bins, debiased"),
        Metric("brier", "brier", "%", "mean squared difference of score and hit"),
        Metric("mean_score", "mean_score", "%", "mean score"),
        Metric("hit_rate", "hit_rate", "%", "hits / cases"),
        # Of procedures, see evaluation/video.py:
        Metric("procedures", "procedures", "count", "videos"),
        Metric("minutes", "minutes", "count", "duration of the evaluated frames"),
        Metric("lesions", "lesions", "count", "lesions, each in all of its frames"),
        Metric("lesion_sensitivity", "lesions found", "%", "hit in a frame / lesions", _VIDEO),
        Metric("persistence", "persistence", "%", "share of a lesion's frames with a hit", _VIDEO),
        Metric("persistent_25", "hit in ≥ 25 % of frames", "%", "lesions with that persistence"),
        Metric("persistent_50", "hit in ≥ 50 % of frames", "%", "lesions with that persistence"),
        Metric("within_1s", "stable within 1 s", "%", "lesions with 15 hits in the first second"),
        Metric("within_3s", "stable within 3 s", "%", "lesions with 15 hits in the first 3 s"),
        Metric("within_5s", "stable within 5 s", "%", "lesions with 15 hits in the first 5 s"),
        Metric("frames_to_detection", "frames to detection", "frames", "mean of lesions found"),
        Metric("seconds_to_detection", "seconds to detection", "s", "mean of those found", _VIDEO),
        Metric("frame_sensitivity", "lesion frames with a hit", "%", "/ lesion frames", _VIDEO),
        Metric("fpr", "clean frames with an alarm", "%", "/ clean frames", _VIDEO),
        Metric("false_alarms", "false alarms", "count", "groups of overlapping false detections"),
        Metric("lasting_false_alarms", "lasting false alarms", "count", "those of 0.5 s or more"),
        Metric("lesion_frames", "lesion frames", "count", "frames with a lesion"),
        Metric("lesion_frames_hit", "lesion frames hit", "count", "lesion frames with a hit"),
        Metric("clean_frames", "clean frames", "count", "frames without an annotation"),
        Metric("clean_frames_with_alarm", "with an alarm", "count", "clean frames with an alarm"),
        *(
            Metric(f"{kind}_per_{time}", f"{label} per {time}", f"per {time}", f"/ {time}s", groups)
            for kind, label, time, groups in (
                ("false_alarms", "false alarms", "minute", _VIDEO),
                ("lasting_false_alarms", "lasting false alarms", "minute", ()),
                ("false_alarms", "false alarms", "procedure", ()),
            )
        ),
    )
}
# Of all others more is better, but for counts of cases, which are neither.
_LESS_IS_BETTER = {
    *("FP", "FN", "hd95", "fp_per_image", _FREE, "cross_entropy", "ece", "brier"),
    *("frames_to_detection", "seconds_to_detection", "fpr", "clean_frames_with_alarm"),
    *(name for name in METRICS if name.startswith(("false_alarms", "lasting_false_alarms"))),
}
# The two-by-two table, in the order of its formulas.
COUNTS = ("TP", "FP", "FN", "TN")
# Of fewer cases a metric says next to nothing, and is marked.
FEW_CASES = 5
_POSITIVE, _FREE_UNITS = ("TP", "FN"), ("TN", "FP")
# The counts of that table that add up to the denominator of a metric.
_DENOMINATORS = {
    "precision": ("TP", "FP"),
    **dict.fromkeys(("recall", "iou_all", "localised_recall", "miou", "mdice"), _POSITIVE),
    "f1": ("TP", "FP", "FN"),
    "specificity": _FREE_UNITS,
    "accuracy": COUNTS,
    **dict.fromkeys(("iou", "iou_box", "dice", "hd95", "nsd"), ("TP",)),
}
# The count that is the denominator of a metric of procedures.
_VIDEO_CASES = {
    **dict.fromkeys(("lesion_sensitivity", "persistence"), "lesions"),
    **dict.fromkeys(("persistent_25", "persistent_50"), "lesions"),
    **dict.fromkeys(("within_1s", "within_3s", "within_5s"), "lesions"),
    "frame_sensitivity": "lesion_frames",
    "fpr": "clean_frames",
}
# What a denominator consists of: by level and counts.
_CASES = {
    ("lesion", ("TP", "FP")): "detections",
    ("lesion", _POSITIVE): "lesions",
    ("lesion", ("TP", "FP", "FN")): "lesions and false alarms",
    ("lesion", ("TP",)): "lesions found",
    **{
        (unit, counts): name.format(unit)
        for unit in ("image", "patient")
        for counts, name in {
            ("TP", "FP"): "{}s predicted positive",
            _POSITIVE: "{}s with a lesion",
            ("TP", "FP", "FN"): "{}s positive or predicted so",
            _FREE_UNITS: "lesion-free {}s",
            COUNTS: "{}s",
        }.items()
    },
}


def denominator(values: Mapping[str, Mapping[str, float]], endpoint: str) -> tuple[int, str] | None:
    """The number of cases that "group/metric" is a share or a mean of, and what they are, given the
    values of the groups of one evaluation; None where that is not known. AUROC compares images with
    a lesion and images without: its cases are those of which there are fewer."""
    group, _, metric = endpoint.partition("/")
    prefix, level = "tau_val." * group.startswith("tau_val."), group.removeprefix("tau_val.")

    def total(level, counts):
        table = values.get(prefix + level, {})
        return int(sum(table[name] for name in counts)) if "TP" in table else None

    if level in ("calibration", "calibration_raw"):
        return int(values[group]["n"]), "detections"
    if level == "video":
        cases = _VIDEO_CASES.get(metric)
        return cases and (int(values[group][cases]), cases.replace("_", " "))
    if metric in ("APs", "APm", "APl"):  # of lesions of a size, which are not counted here
        return None
    if level in ("bbox", "segm", "froc"):
        level, counts = "lesion", _POSITIVE
    elif metric.startswith("fp_per_"):
        level, counts = "image", _FREE_UNITS if metric == _FREE else COUNTS
    elif metric == "auroc":
        counts = min((_POSITIVE, _FREE_UNITS), key=lambda counts: total(level, counts) or 0)
    else:
        counts = _DENOMINATORS.get(metric)
    number, name = total(level, counts or ()), _CASES.get((level, counts))
    return None if number is None or name is None else (number, name)


def is_count(name: str) -> bool:
    """Whether a metric is a count, which has no interval and no decimals."""
    return name in METRICS and METRICS[name].unit == "count"


def is_percent(name: str) -> bool:
    """Whether a metric is in percent, as all are that the table does not know (of one class)."""
    return name not in METRICS or METRICS[name].unit == "%"


def less_is_better(name: str) -> bool:
    """Whether of two models the one with the smaller value of a metric is the better one."""
    return name in _LESS_IS_BETTER


def endpoints_in(*groups: str) -> list[str]:
    """Endpoints of these groups, "group/metric", metric by metric."""
    return [
        f"{group}/{metric.name}"
        for metric in METRICS.values()
        for group in groups
        if group in metric.endpoint_of
    ]


# Metrics of masks that have no like of boxes.
_OF_MASKS = ("iou_all", "dice", "miou", "mdice", "hd95", "nsd")


def without_masks(endpoints: Iterable[str]) -> list[str]:
    """Those that there are without masks: of boxes instead of masks, where a metric is of both."""
    stand_ins = {"lesion/iou": "lesion/iou_box"}
    names = (stand_ins.get(name, name.replace("segm/", "bbox/")) for name in endpoints)
    return [name for name in dict.fromkeys(names) if name.partition("/")[2] not in _OF_MASKS]


# What is tested of detectors, fixed before any value is seen: the more tests, the weaker each. As
# group/metric; those that a comparison does not have are left out.
ENDPOINTS = tuple(
    endpoint
    for groups in (("segm", "bbox"), ("lesion",), ("tau_val.lesion",), ("image",), ("patient",))
    for endpoint in endpoints_in(*groups)
)


def ratios(tp, fp, fn, tn) -> dict[str, np.ndarray]:
    """Precision, recall (sensitivity), specificity, accuracy and f1 in percent, of counts of one
    shape."""
    shares = table_proportions(tp, fp, fn, tn)
    values = {name: 100 * divide(part, whole) for name, (part, whole) in shares.items()}
    return {**values, "f1": 100 * divide(2 * tp, 2 * tp + fp + fn)}


def table_proportions(tp, fp, fn, tn) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, of a two-by-two table."""
    return {
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "f1": (tp, tp + fp + fn),
    }


def lesion_table(sums: dict[str, np.ndarray]) -> tuple:
    """TP, FP, FN and TN of lesions and detections, of sums by COLUMNS."""
    return sums["tp"], sums["fp"], sums["fn"], sums["free_silent"]


def paper_table(sums: dict[str, np.ndarray]) -> tuple:
    """As :func:`lesion_table`, but with TN the images without a false alarm, with a lesion or
    without one. Under this reading the paper's Table 5 follows from whole counts."""
    return sums["tp"], sums["fp"], sums["fn"], sums["no_alarm"]


def unit_table(sums: dict[str, np.ndarray]) -> tuple:
    """TP, FP, FN and TN of images or patients, of sums by COLUMNS."""
    predicted, silent = sums["positive_predicted"], sums["free_silent"]
    return predicted, sums["free"] - silent, sums["positive"] - predicted, silent


def table_metrics(tp, fp, fn, tn) -> dict[str, np.ndarray]:
    """The counts, and :func:`ratios` of them."""
    return {"TP": tp, "FP": fp, "FN": fn, "TN": tn, **ratios(tp, fp, fn, tn)}


def lesion_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics, (...,) each, where each lesion and each detection is a case, of (..., K) sums of
    ``UnitCounts.columns``.

    ``specificity`` and ``accuracy`` mix images (the true negatives) with detections (the false
    positives); they are there for comparison with publications that do so. Without lesion-free
    images ``specificity`` is NaN.
    """
    sums = named(sums)
    tp, fp, fn, _ = table = lesion_table(sums)
    values = table_metrics(*table)
    # Decided from the ground truth: else it is 0 as soon as there is a false alarm, NaN until then.
    values["specificity"] = np.where(sums["free"] > 0, values["specificity"], np.nan)[()]
    for name in ("iou", "iou_box", "dice"):
        values[name] = 100 * divide(sums[name], tp)
    values["iou_all"] = 100 * divide(sums["iou"], tp + fn)
    values["hd95"] = divide(sums["hd95"], tp)
    values["nsd"] = 100 * divide(sums["nsd"], tp)
    values["fp_per_image"] = divide(fp, sums["units"])
    values["fp_per_lesion_free_image"] = divide(sums["free_fp"], sums["free"])
    return values


def paper_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics, (...,) each, as we read Table 5 of the paper, see :func:`paper_table`, and
    ``AP_per_image``, of (..., K + 1) sums: of ``UnitCounts.columns`` and, last, of the average
    precision of each image."""
    by_name = named(sums[..., :-1])
    average_precision = 100 * divide(sums[..., -1], by_name["positive"])
    return {**table_metrics(*paper_table(by_name)), "AP_per_image": average_precision}


def unit_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics where each image, or each patient, is a case: positive if it has a lesion, predicted
    positive by a detection above the threshold anywhere in it. ``localised_recall`` is the share of
    positive units in which a lesion is hit. Without lesion-free units all but the two recalls are
    NaN: a model could not be wrong about them."""
    sums = named(sums)
    values = table_metrics(*unit_table(sums))
    for name in ("precision", "specificity", "accuracy", "f1"):
        values[name] = np.where(sums["free"] > 0, values[name], np.nan)[()]
    return {**values, "localised_recall": 100 * divide(sums["positive_hit"], sums["positive"])}


def image_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """As :func:`unit_metrics`, and miou and mdice, means over the images with a lesion."""
    by_name = named(sums)
    return {
        **unit_metrics(sums),
        "miou": 100 * divide(by_name["union_iou"], by_name["positive"]),
        "mdice": 100 * divide(by_name["union_dice"], by_name["positive"]),
    }


def lesion_proportions(sums: np.ndarray) -> dict[str, tuple]:
    """The metrics that are a share of cases, or a number per case, for their intervals: metric ->
    (cases that have it, or number; cases), each (...,). For f1 it is s = TP / (TP + FP + FN), of
    which F1 = 2s / (1 + s) is a monotone function."""
    sums = named(sums)
    return {
        **table_proportions(*lesion_table(sums)),
        "fp_per_image": (sums["fp"], sums["units"]),
        "fp_per_lesion_free_image": (sums["free_fp"], sums["free"]),
    }


def paper_proportions(sums: np.ndarray) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, of the sums of :func:`paper_metrics`."""
    return table_proportions(*paper_table(named(sums[..., :-1])))


def unique_lesion_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics, (...,) each, where each unique lesion is a case, of (..., 3) sums over lesions: 1,
    whether it is found in a frame, and the share of its frames in which it is."""
    n, found, shares = np.moveaxis(sums, -1, 0)
    return {"n": n, "recall": 100 * divide(found, n), "frame_recall": 100 * divide(shares, n)}


def unique_lesion_proportions(sums: np.ndarray) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, of the sums of :func:`unique_lesion_metrics`."""
    return {"recall": (sums[..., 1], sums[..., 0])}


def unit_proportions(sums: np.ndarray) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, where each image, or each patient, is a case."""
    sums = named(sums)
    shares = table_proportions(*unit_table(sums))
    return {**shares, "localised_recall": (sums["positive_hit"], sums["positive"])}


def stratum_columns(counts: UnitCounts) -> np.ndarray:
    """(U, 5) float, what :func:`stratum_metrics` are made of."""
    columns = counts.tp, counts.fn, counts.iou, counts.iou_box, counts.dice
    return np.stack(columns, axis=1).astype(float)


def stratum_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(...,) "n" (lesions), recall, iou, iou_box, iou_all and dice of a stratum of lesions, whose
    false alarms are unknown, of (..., 5) sums of :func:`stratum_columns`."""
    tp, fn, iou, iou_box, dice = np.moveaxis(sums, -1, 0)
    shares = {"recall": (tp, tp + fn), "iou": (iou, tp), "iou_box": (iou_box, tp)}
    shares |= {"iou_all": (iou, tp + fn), "dice": (dice, tp)}
    return {"n": tp + fn, **{name: 100 * divide(*share) for name, share in shares.items()}}


def stratum_proportions(sums: np.ndarray) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, of such sums."""
    return {"recall": (sums[..., 0], sums[..., 0] + sums[..., 1])}


class GroupFormulas(NamedTuple):
    """What a group of metrics is made of: functions of (..., K) sums of the columns."""

    columns: np.ndarray  # (num_units, K) float
    formulas: Callable[[np.ndarray], dict[str, np.ndarray]]
    proportions: Callable[[np.ndarray], dict[str, tuple]]  # see lesion_proportions


class ResampledMetrics:
    """The metrics of a data set as functions of how often each of its units counts.

    Attributes:
        units: of the images; ``unit_of_image`` (number of images,) int in [0, num_units).
        columns: the groups that are formulas over sums.
        calibration: of the scores; ``calibration_raw`` of the same before they were mapped, None
            where they were not.
    """

    columns: dict[str, GroupFormulas]
    calibration: Calibration | None = None
    calibration_raw: Calibration | None = None

    def __init__(self, units: Units):
        self.units, self.unit_of_image, self.num_units = units, units.of_image, len(units)

    def __call__(self, weights: np.ndarray, *, all_coco=False) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: (B, num_units) int, how often each of B resamples holds each unit.
            all_coco: COCO's AP, AP75, APs, APm and APl too, where there are detections.

        Returns:
            group -> metric -> (B,).
        """
        columns, places = self._distinct
        sums = weights.astype(float) @ columns
        values = {
            group: formulas(sums[:, places[group]])
            for group, (_, formulas, _) in self.columns.items()
        }
        for group in [group for group in places if group not in self.columns]:
            values[group] = Calibration.formulas(sums[:, places[group]])
        return values

    @cached_property
    def _distinct(self):
        """(num_units, K) float, the columns of all groups, each once; {group: (k,) places of its
        columns}."""
        groups = {group: columns for group, (columns, *_) in self.columns.items()}
        distinct, places = {}, {}
        names = ("calibration", "calibration_raw")
        scores = {name: getattr(self, name) for name in names}
        calibrations = {k: self.per_unit(v.columns()) for k, v in scores.items() if v is not None}
        for group, columns in {**groups, **calibrations}.items():
            keys = [hashlib.sha256(column.tobytes()).digest() for column in columns.T]
            for key, column in zip(keys, columns.T, strict=True):
                distinct.setdefault(key, column)
            places[group] = [list(distinct).index(key) for key in keys]
        return np.stack([*distinct.values()], axis=1), places

    @property
    def width(self) -> int:
        """Numbers that a resample takes, to size chunks by."""
        return self.num_units

    def once(self, *, all_coco=False) -> dict[str, dict[str, float]]:
        """The metrics of the data set itself."""
        values = self(np.ones((1, self.num_units), dtype=np.int32), all_coco=all_coco)
        return {
            group: {name: float(value[0]) for name, value in group_values.items()}
            for group, group_values in values.items()
        }

    def proportions(self) -> dict[str, dict[str, tuple]]:
        """group -> metric -> (cases that have it, cases) of each unit, (num_units,) each, see
        :func:`lesion_proportions`."""
        return {
            group: proportions(columns) for group, (columns, _, proportions) in self.columns.items()
        }

    def limits(self, group: str, name: str) -> tuple[float, float]:
        """The least and the largest value that a metric can have."""
        return (0, 100) if is_percent(name) else (0, math.inf)

    def settings(self, bootstrap) -> dict:
        """What ``meta`` records: the number of patients, None where all are unknown, the number of
        images of unknown patients, and the Bootstrap."""
        return {
            "patients": len(self.units.patients) or None,
            "images_of_unknown_patients": self.units.unknown,
            "bootstrap": bootstrap and {**asdict(bootstrap), "unit": self.units.kind},
        }

    def per_unit(self, columns: np.ndarray) -> np.ndarray:
        """(num_units, K) sums of the (I, K) columns of the images of each unit."""
        total = np.zeros((self.num_units, columns.shape[1]))
        np.add.at(total, self.unit_of_image, columns)
        return total


# The IoU of AP50_voc, BEP and the PR curves, whatever IoU lesions are matched at.
CURVE_IOU = 0.5
# Read off the precision-recall curve of a class.
CURVE_METRICS = ("AP50", "AP50_voc", "BEP")


def scored_hits(gt: GroundTruth, detections: Detections, matching: Matching) -> Calibration:
    """The scores of all evaluated detections as probabilities of a hit."""
    columns = _evaluated(detections, matching)
    return Calibration.of_scores(*columns, len(gt.images), detections.scored)


def _evaluated(detections: Detections, matching: Matching) -> list[np.ndarray]:
    """Score, hit and image of all evaluated detections."""
    columns = detections.score, matching.hit, detections.regions.image
    return [column[matching.evaluated] for column in columns]


class DetectionMetrics(ResampledMetrics):
    """The metrics of a detector. Without scores, metrics that depend on their order are NaN.

    Args:
        counter: of the ground truth and N detections.
        above: (N,) bool, the detections at each threshold, by a prefix of its groups of metrics: ""
            and, with a second threshold, "tau_val.".
        counts: per image, likewise.
        paper: (N,) bool, the detections at PAPER_TAU of the raw scores.
        sizes, classes: per image, of lesions by size and of each class; empty for a single one.

    Attributes:
        froc (FROC), calibration: of all evaluated detections.
    """

    def __init__(
        self,
        counter: LesionCounter,
        above: dict[str, np.ndarray],
        counts: dict[str, UnitCounts],
        paper: np.ndarray,
        sizes: dict[str, dict[str, UnitCounts]],
        classes: dict[str, UnitCounts],
    ):
        super().__init__(Units.of(counter.gt.images))
        self.counter, self.counts, self.classes = counter, counts, classes
        self.gt, self.detections = gt, detections = counter.gt, counter.detections
        columns = _evaluated(detections, counter.matching)
        self.froc = FROC(*columns, gt.lesions, detections.scored)
        self.calibration = scored_hits(gt, detections, counter.matching)
        if detections.mapped:
            raw = detections.raw_score[counter.matching.evaluated], *columns[1:]
            self.calibration_raw = Calibration.of_scores(*raw, len(gt.images), True)
        # Groups that have an AUROC: UnitCounts, and the unit of each case.
        self._score_groups = {"image": (counts[""], self.unit_of_image)}
        if len(patients := self.units.patients):
            merged = counts[""].merged(self.unit_of_image)
            self._score_groups["patient"] = (merged.take(patients), patients)
        self.columns = self._columns(above, paper, sizes)
        units = self.unit_of_image[detections.regions.image]
        self._ranking = Ranking(detections.score, units)
        self._matchings = {
            kind: match(gt, detections, pairs, CURVE_IOU)
            for kind, pairs in counter.overlaps.items()
        }
        present = np.unique(gt.regions.category[~gt.crowd])
        self._curves = {
            kind: {gt.categories[c]["name"]: self._ranked(matching, [c]) for c in present}
            for kind, matching in self._matchings.items()
        }
        ranked = self._ranked(counter.matching, range(len(gt.categories)))
        # With one class those are mostly the same detections and hits, weighed once.
        known = [r for by_class in self._curves.values() for r in by_class.values()]
        self._all = next((r for r in known if r.is_same(ranked)), ranked)

    def _columns(self, above, paper, sizes):
        groups = {"paper": (self._paper_columns(paper), paper_metrics, paper_proportions)}
        if self.counter.unique_lesions is not None:
            formulas = unique_lesion_metrics, unique_lesion_proportions
            for prefix, selected in above.items():
                groups[f"{prefix}unique_lesion"] = (self._unique_lesions(selected), *formulas)
        for prefix, counts in self.counts.items():
            columns = self.per_unit(counts.columns())
            groups[f"{prefix}lesion"] = (columns, lesion_metrics, lesion_proportions)
            groups[f"{prefix}image"] = (columns, image_metrics, unit_proportions)
            if len(patients := self.units.patients):
                known = np.zeros_like(columns)  # units of unknown patients are no case
                known[patients] = counts.merged(self.unit_of_image).take(patients).columns()
                groups[f"{prefix}patient"] = (known, unit_metrics, unit_proportions)
        for scale, strata in sizes.items():
            for name, counts in strata.items():
                columns = self.per_unit(stratum_columns(counts))
                formulas = stratum_metrics, stratum_proportions
                groups[f"by_size.{scale}.{name}"] = (columns, *formulas)
        for name, counts in self.classes.items():
            columns = self.per_unit(counts.columns())
            groups[f"by_class.{name}"] = (columns, lesion_metrics, lesion_proportions)
        return {group: GroupFormulas(*parts) for group, parts in groups.items()}

    def _paper_columns(self, selected):
        """(num_units, K + 1), see :func:`paper_metrics`."""
        detections, matching = self.detections, self.counter.matching
        image, rows = detections.regions.image, np.flatnonzero(selected)
        # By image, from the highest score down.
        rows = rows[np.lexsort((-detections.raw_score[rows], image[rows]))]
        hits = np.flatnonzero(matching.hit[rows])
        first = np.searchsorted(image[rows], image[rows[hits]])
        tp = np.arange(1, len(hits) + 1) - np.searchsorted(hits, first)
        precision, image = tp / (hits - first + 1), image[rows[hits]]
        step = 1  # the best precision of each hit and those after it in its image
        while step <= tp.max(initial=0):
            after = np.where(image[step:] == image[:-step], precision[step:], 0)
            precision[:-step] = np.maximum(precision[:-step], after)
            step *= 2
        areas = np.bincount(image, precision, minlength=len(self.gt.images))
        areas = areas / np.maximum(self.gt.lesions, 1)
        if not detections.scored:
            areas[:] = np.nan
        counts = self.counter.count(~self.gt.crowd, selected)
        return self.per_unit(np.column_stack([counts.columns(), areas]))

    def _unique_lesions(self, selected):
        """(num_units, 3), see :func:`unique_lesion_metrics`."""
        lesions = self.counter.unique_lesions
        share = self.counter.frames_found(selected) / lesions.frames
        columns = np.stack([np.ones(len(share)), share > 0, share], axis=1)
        total = np.zeros((self.num_units, 3))
        np.add.at(total, lesions.unit, columns)
        return total

    def _ranked(self, matching, classes):
        """RankedDetections of some classes."""
        regions, truth = self.detections.regions, self.gt.regions
        in_classes = matching.evaluated & np.isin(regions.category, classes)
        lesions = ~self.gt.crowd & np.isin(truth.category, classes)
        return RankedDetections(
            self._ranking.part(in_classes[self._ranking.order]),
            matching.hit,
            np.bincount(self.unit_of_image[truth.image[lesions]], minlength=self.num_units),
        )

    def __call__(self, weights, *, all_coco=False):
        """As of the base class; groups as in LesionResults. Means over classes are over those that
        a resample has ground truth of."""
        values, number = {"bbox": {}, "segm": {}, **super().__call__(weights)}, len(weights)
        every = [self._all, *(r for by_class in self._curves.values() for r in by_class.values())]
        weighed = {ranked: ranked.weigh(weights) for ranked in dict.fromkeys(every)}
        curves = {kind: self._class_curves(kind, weighed) for kind in ("bbox", "segm")}
        for kind, by_class in curves.items():
            present = [takes_part for takes_part, _ in by_class.values()]
            values[kind] = {
                name: mean_where(
                    [metrics[name] for _, metrics in by_class.values()], present, number
                )
                for name in CURVE_METRICS
            }
            if all_coco and kind in self._curves and self.detections.scored:
                for name, ranked in self._coco_curves[kind].items():
                    coco = [detections.weigh(weights) for detections in ranked]
                    areas, present = [c.sampled_area for c in coco], [c.num_gt > 0 for c in coco]
                    values[kind][name] = 100 * mean_where(areas, present, number)
        undefined = np.full(number, np.nan)
        without = (None, dict.fromkeys(CURVE_METRICS, undefined))
        for name in self.classes:
            _, metrics = (curves["segm"] or curves["bbox"]).get(name, without)
            values[f"by_class.{name}"].update(metrics)
        for group, (counts, unit) in self._score_groups.items():
            auroc = undefined
            if self.detections.scored:
                auroc = 100 * weighted_auroc(counts.positive, counts.score, unit, weights)
            values[group]["auroc"] = auroc
        images = sum(values["image"][name] for name in COUNTS)  # each image is one of the four
        values["froc"] = self.froc.read_off(weighed[self._all], images)
        return values

    def _class_curves(self, kind, weighed):
        """{class name: ((B,) bool, there is ground truth; {AP50, AP50_voc, BEP: (B,)})}."""
        values = {}
        for name, ranked in self._curves.get(kind, {}).items() if self.detections.scored else ():
            curve = weighed[ranked]
            shares = curve.sampled_area, curve.area, curve.break_even_point
            metrics = dict(zip(CURVE_METRICS, (100 * share for share in shares), strict=True))
            values[name] = (curve.num_gt > 0, metrics)
        return values

    @cached_property
    def _coco_curves(self):
        """{kind: {metric: RankedDetections over which it is a mean}}."""
        curves = {kind: defaultdict(list) for kind in self._curves}
        for kind, by_name in curves.items():
            units = self.unit_of_image, self.num_units
            for names, ranked in coco_curves(self.counter, kind, *units):
                for name in set(names) - set(CURVE_METRICS):
                    by_name[name].append(ranked)
        return curves

    def tied_ranges(self) -> dict[str, tuple[float, float]]:
        """IoU type -> least and largest AP50_voc over all orders of detections of equal scores,
        given the matching; none without scores."""
        ranges = {}
        for kind, by_class in self._curves.items() if self.detections.scored else ():
            areas = [ranked.tied_areas() for ranked in by_class.values()]
            ranges[kind] = tuple(100 * np.mean(areas, axis=0)) if areas else (np.nan, np.nan)
        return ranges

    def curves(self) -> list[tuple[str, str, PRCurve]]:
        """IoU type, class name and curve at IoU 0.5 of each class; none without scores."""
        gt, detections = self.gt, self.detections
        num_gt = np.bincount(gt.regions.category[~gt.crowd], minlength=len(gt.categories))
        curves = []
        for kind, matching in self._matchings.items() if detections.scored else ():
            for k, category in enumerate(gt.categories):
                selected = matching.evaluated & (detections.regions.category == k)
                curve = pr_curve(detections.score[selected], matching.hit[selected], num_gt[k])
                curves.append((kind, category["name"], curve))
        return curves

    def proportions(self):
        shares = super().proportions()
        lesions = self._all.lesions
        hits = self._all.ranking.unit[self._all.hits]
        every = np.ones((1, self.num_units), dtype=np.int32)
        froc = self.froc.read_off(self._all.weigh(every), np.array([len(self.gt.images)]))
        del froc["mean"]
        for name, (share,) in froc.items():
            # The hits above the threshold at which it is read off.
            number = 0 if math.isnan(share) else round(share * lesions.sum() / 100)
            part = np.bincount(hits[:number], minlength=self.num_units)
            shares.setdefault("froc", {})[name] = part, lesions
        curves = self._curves if self.detections.scored else {}
        for kind, by_class in curves.items():
            if by_class:
                shares[kind] = curve_proportions([*by_class.values()])
        for name, ranked in (curves.get("segm") or curves.get("bbox") or {}).items():
            if name in self.classes:
                shares[f"by_class.{name}"].update(curve_proportions([ranked]))
        return shares

    @property
    def width(self):
        return max(self.num_units, len(self.detections.score), 1)


def curve_proportions(by_class: list[RankedDetections]) -> dict[str, tuple]:
    """The curve metrics of some classes, or their mean, as :func:`lesion_proportions` has others:
    the area is the mean over lesions of the envelope's precision where a lesion is hit, 0 if it
    never is (AP50 samples the same curve); the break-even point is the share of lesions hit by as
    many detections as there are lesions.
    """
    area = break_even = whole = 0
    total = sum(ranked.lesions.sum() for ranked in by_class)
    for ranked in by_class:
        lesions, units = ranked.lesions, len(ranked.lesions)
        each = total / lesions.sum() / len(by_class)  # classes weigh the same
        unit = ranked.ranking.unit[ranked.hits]
        curve = ranked.weigh(np.ones((1, units), dtype=np.int32))
        area += each * np.bincount(unit, curve.envelope[0], minlength=units)
        break_even += each * np.bincount(unit[ranked.hits < lesions.sum()], minlength=units)
        whole += each * lesions
    return {"AP50": (area, whole), "AP50_voc": (area, whole), "BEP": (break_even, whole)}


def mean_where(values: Iterable, present: Iterable, number: int) -> np.ndarray:
    """(B,) mean of the (B,) values of each class over the classes that are (B,) present; NaN
    without one, or if one of theirs is. ``number`` is B."""
    values, present = (np.reshape([*rows], (-1, number)) for rows in (values, present))
    return divide(np.where(present, values, 0).sum(axis=0), present.sum(axis=0))
