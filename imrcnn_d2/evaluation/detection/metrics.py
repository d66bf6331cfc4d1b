"""The table of metrics, their formulas, and every metric as a function of how often each unit
counts: with weights of 1 that gives the metrics of the data set, with the weights of bootstrap
resamples those of the resamples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.coco_ap import ranked_by_coco
from imrcnn_d2.evaluation.detection.counts import add_up, divide, named, number_units
from imrcnn_d2.evaluation.detection.curves import FROC, RankedDetections, Ranking, weighted_auroc

__all__ = [
    "COUNTS",
    "ENDPOINTS",
    "METRICS",
    "PRIMARY",
    "DetectionMetrics",
    "GroupFormulas",
    "Metric",
    "ResampledMetrics",
    "endpoints_of",
    "image_metrics",
    "is_count",
    "is_percent",
    "lesion_metrics",
    "lesion_proportions",
    "mean_where",
    "ratios",
    "size_metrics",
    "size_proportions",
    "table_proportions",
    "unit_metrics",
    "unit_proportions",
]


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        name: key in metrics.json.
        label: for readers.
        unit: "%", "count", or what else the value is in.
        formula: or the source of the definition.
        endpoint_of: groups in which models are compared by it.
    """

    name: str
    label: str
    unit: str
    formula: str
    endpoint_of: tuple[str, ...] = ()


_CURVES, _UNITS = ("segm", "bbox"), ("image", "patient", "cancer")
_LESIONS = ("lesion", "tau_val.lesion")

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
        Metric("balanced_accuracy", "balanced accuracy", "%", "mean recall", ("recognition",)),
        Metric("top1", "top-1 accuracy", "%", "images predicted rightly", ("recognition",)),
        Metric("precision", "precision", "%", "TP / (TP + FP)", _LESIONS),
        Metric("recall", "recall", "%", "TP / (TP + FN)", (*_LESIONS, *_UNITS)),
        Metric("f1", "F1", "%", "2 TP / (2 TP + FP + FN)", _LESIONS),
        Metric("specificity", "specificity", "%", "TN / (TN + FP)", _UNITS),
        Metric("accuracy", "accuracy", "%", "(TP + TN) / cases"),
        Metric("auroc", "AUROC", "%", "Hanley and McNeil 1982", (*_UNITS, "recognition")),
        Metric("localised_recall", "localised_recall", "%", "units with a lesion hit / positive"),
        Metric("miou", "mIoU", "%", "IoU of unions, mean over positive images", ("image",)),
        Metric("mdice", "mDice", "%", "Dice of unions, mean over positive images"),
        Metric("fp_per_image", "fp_per_image", "per image", "FP / images"),
        Metric(
            "fp_per_lesion_free_image",
            "fp_per_lesion_free_image",
            "per image",
            "FP in lesion-free images / lesion-free images",
        ),
        Metric("selection", "selection", "%", "mean of precision, recall, F1 and specificity"),
        Metric("cross_entropy", "cross-entropy", "nats", "-ln p of the true class, mean"),
        Metric("ece", "ece", "%", "expected calibration error, 10 bins"),
        Metric("brier", "brier", "%", "mean squared difference of score and hit"),
        Metric("mean_score", "mean_score", "%", "mean score"),
        Metric("hit_rate", "hit_rate", "%", "hits / cases"),
    )
}
# The two-by-two table, in the order of its formulas.
COUNTS = ("TP", "FP", "FN", "TN")


def is_count(name: str) -> bool:
    """Whether a metric is a count, which has no interval and no decimals."""
    return name in METRICS and METRICS[name].unit == "count"


def is_percent(name: str) -> bool:
    """Whether a metric is in percent, as all are that the table does not know (of one class)."""
    return name not in METRICS or METRICS[name].unit == "%"


def _endpoints(*groups: str) -> tuple[str, ...]:
    """Endpoints of these groups, "group/metric", metric by metric."""
    return tuple(
        f"{group}/{metric.name}"
        for metric in METRICS.values()
        for group in groups
        if group in metric.endpoint_of
    )


# The primary endpoint by task.
PRIMARY = {"lesions": "segm/AP50_voc", "recognition": "recognition/balanced_accuracy"}
# What is tested, fixed before any value is seen: the more tests, the weaker each. As group/metric;
# those that a comparison does not have are left out.
ENDPOINTS = (
    *_endpoints("segm", "bbox"),
    *_endpoints("lesion"),
    *_endpoints("tau_val.lesion"),
    *_endpoints("image"),
    *_endpoints("patient"),
)


def endpoints_of(task: str, classes=(), cancer_classes=()) -> tuple[str, ...]:
    """
    Args:
        task: "lesions" or "recognition".
        classes, cancer_classes (list[str]): of a classification data set.

    Returns:
        What is tested, group/metric.
    """
    if task == "lesions":
        return ENDPOINTS
    cancer = _endpoints("cancer")
    if len(cancer_classes) < 2:
        # Of a single cancer class sensitivity is its accuracy: no reason to test it twice.
        cancer = tuple(name for name in cancer if name != "cancer/recall")
    of_class = tuple(f"recognition/accuracy_{name}" for name in classes)
    return (*_endpoints("recognition"), *of_class, *cancer)


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


def _lesion_table(sums):
    return sums["tp"], sums["fp"], sums["fn"], sums["free_silent"]


def _unit_table(sums):
    return (
        sums["positive_predicted"],
        sums["free"] - sums["free_silent"],
        sums["positive"] - sums["positive_predicted"],
        sums["free_silent"],
    )


def lesion_metrics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """
    Metrics where each lesion and each detection is a case.

    ``specificity`` and ``accuracy`` mix images (the true negatives) with detections (the false
    positives); they are there for comparison with publications that do so.

    Args:
        sums: (...,) sums over images, see ``UnitCounts.columns``.

    Returns:
        (...,) TP FP FN TN precision recall specificity accuracy f1 iou iou_box dice iou_all
        fp_per_image fp_per_lesion_free_image.
    """
    tp, fp, fn, _ = table = _lesion_table(sums)
    values = {**dict(zip(COUNTS, table, strict=True)), **ratios(*table)}
    # Decided from the ground truth: else it is 0 as soon as there is a false alarm, NaN until then.
    values["specificity"] = np.where(sums["free"] > 0, values["specificity"], np.nan)[()]
    for name in ("iou", "iou_box", "dice"):
        values[name] = 100 * divide(sums[name], tp)
    values["iou_all"] = 100 * divide(sums["iou"], tp + fn)
    values["fp_per_image"] = divide(fp, sums["units"])
    values["fp_per_lesion_free_image"] = divide(sums["free_fp"], sums["free"])
    return values


def unit_metrics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """
    Metrics where each image, or each patient, is a case: positive if it has a lesion, predicted
    positive by a detection above the threshold anywhere in it.

    Args:
        sums: (...,) sums over images or patients, see ``UnitCounts.columns``.

    Returns:
        (...,) TP FP FN TN precision recall specificity accuracy f1 localised_recall. The last is
        the share of positive units in which a lesion is hit.
    """
    table = _unit_table(sums)
    return {
        **dict(zip(COUNTS, table, strict=True)),
        **ratios(*table),
        "localised_recall": 100 * divide(sums["positive_hit"], sums["positive"]),
    }


def image_metrics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As :func:`unit_metrics`, and miou and mdice, means over the images with a lesion."""
    return {
        **unit_metrics(sums),
        "miou": 100 * divide(sums["union_iou"], sums["positive"]),
        "mdice": 100 * divide(sums["union_dice"], sums["positive"]),
    }


def lesion_proportions(sums: dict[str, np.ndarray]) -> dict[str, tuple]:
    """
    The metrics that are a share of a whole number of cases, for exact binomial intervals.

    Returns:
        metric -> (cases that have it, cases), each (...,). For f1 it is s = TP / (TP + FP + FN), of
        which F1 = 2s / (1 + s) is a monotone function.
    """
    return table_proportions(*_lesion_table(sums))


def unit_proportions(sums: dict[str, np.ndarray]) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, where each image, or each patient, is a case."""
    return {
        **table_proportions(*_unit_table(sums)),
        "localised_recall": (sums["positive_hit"], sums["positive"]),
    }


def size_metrics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(...,) "n" (lesions), recall, iou, iou_box, iou_all and dice of a stratum of lesions, whose
    false alarms are unknown."""
    values = lesion_metrics(sums)
    names = ("recall", "iou", "iou_box", "iou_all", "dice")
    return {"n": sums["tp"] + sums["fn"], **{name: values[name] for name in names}}


def size_proportions(sums: dict[str, np.ndarray]) -> dict[str, tuple]:
    """As :func:`lesion_proportions`, of :func:`size_metrics`."""
    return {"recall": lesion_proportions(sums)["recall"]}


class GroupFormulas(NamedTuple):
    """
    What a group of metrics is made of.

    Attributes:
        columns: (num_units, K) float.
        formulas: of the (..., K) sums of the columns, as ``ResampledMetrics.named`` gives them.
        proportions: of the same, see :func:`lesion_proportions`.
    """

    columns: np.ndarray
    formulas: Callable
    proportions: Callable


class ResampledMetrics:
    """
    The metrics of a data set as functions of how often each of its units counts.

    Attributes:
        unit (str): "patient" or "image".
        unit_of_image (np.ndarray): (number of images,) int in [0, num_units).
        num_units (int):
        columns (dict[str, GroupFormulas]): the groups that are formulas over sums.
    """

    columns: dict[str, GroupFormulas]

    def __init__(self, unit: str, unit_of_image: np.ndarray, num_units: int):
        self.unit, self.unit_of_image, self.num_units = unit, unit_of_image, num_units

    def __call__(self, weights: np.ndarray, *, all_coco=False) -> dict[str, dict[str, np.ndarray]]:
        """
        Args:
            weights: (B, num_units) int, how often each of B resamples holds each unit.
            all_coco: COCO's AP, AP75, APs, APm and APl too, where there are detections.

        Returns:
            group -> metric -> (B,).
        """
        return {
            group: formulas(self.named(weights @ columns))
            for group, (columns, formulas, _) in self.columns.items()
        }

    @staticmethod
    def named(sums: np.ndarray):
        """(..., K) sums of columns as the formulas take them."""
        return named(sums)

    @property
    def width(self) -> int:
        """Numbers that a resample takes, to size chunks by."""
        return self.num_units

    def once(self, *, all_coco=False) -> dict[str, dict[str, float]]:
        """The metrics of the data set itself."""
        values = self(np.ones((1, self.num_units), dtype=np.int32), all_coco=all_coco)
        return {
            group: {name: float(value[0]) for name, value in of_group.items()}
            for group, of_group in values.items()
        }

    def proportions(self) -> dict[str, dict[str, tuple]]:
        """group -> metric -> (cases that have it, cases), of the metrics that are a share of a
        whole number of cases; see :func:`lesion_proportions`."""
        return {
            group: proportions(self.named(columns.sum(axis=0)))
            for group, (columns, _, proportions) in self.columns.items()
        }


# Read off the precision-recall curve of a class.
_CURVE_METRICS = ("AP50", "AP50_voc", "BEP")


class DetectionMetrics(ResampledMetrics):
    """
    The metrics of a detector; units are patients where every image has a ``patient_id``, else
    images.

    Attributes:
        froc (FROC), calibration (Calibration): of all evaluated detections.
    """

    def __init__(self, counter, curve_matchings, counts, sizes, classes):
        """
        Args:
            counter (LesionCounter): of the ground truth and N detections. Without scores, metrics
                that depend on their order are NaN.
            curve_matchings (dict[str, Matching]): at IoU 0.5 by "bbox" and, where there are masks,
                by "segm": for AP and the break-even point.
            counts (dict[str, UnitCounts]): per image at each threshold, by a prefix of its groups
                of metrics: "" and, with a second threshold, "tau_val.".
            sizes (dict[str, dict[str, UnitCounts]]): per image, of lesions by size.
            classes (dict[str, UnitCounts]): per image, of each class; empty for a single one.
        """
        self.gt, self.detections, self.overlaps = counter.gt, counter.detections, counter.overlaps
        super().__init__(*number_units(self.gt.images))
        self.curve_matchings, self.counts = curve_matchings, counts
        self.sizes, self.classes = sizes, classes
        gt, matching = self.gt, counter.matching
        score, image = self.detections.score, self.detections.regions.image
        evaluated = matching.evaluated
        columns = score[evaluated], matching.hit[evaluated], image[evaluated]
        self.froc = FROC.by_score(*columns, gt.lesions, self.detections.scored)
        self.calibration = Calibration.of_scores(
            *columns, len(gt.images), scored=self.detections.scored
        )
        self._images = np.bincount(self.unit_of_image, minlength=self.num_units)
        self._rankings = {}
        classes = np.unique(gt.regions.category[~gt.crowd])
        self._curves = {
            kind: {gt.categories[c]["name"]: self._ranked(of_kind, [c]) for c in classes}
            for kind, of_kind in curve_matchings.items()
        }
        self._all = self._ranked(matching, range(len(gt.categories)))

    def __call__(self, weights, *, all_coco=False):
        """As of the base class; groups as in LesionResults. Means over classes are over those that
        a resample has ground truth of."""
        values, curves = {}, {}
        copies = {id(ranking): ranking.copies(weights) for ranking in self._rankings.values()}
        for kind in ("bbox", "segm"):
            curves[kind] = self._class_curves(kind, weights, copies)
            present, of_class = (
                zip(*curves[kind].values(), strict=True) if curves[kind] else ((), ())
            )
            values[kind] = {
                name: mean_where([each[name] for each in of_class], present, len(weights))
                for name in _CURVE_METRICS
            }
            if all_coco and kind in self.curve_matchings:
                values[kind].update(self._coco_metrics(kind, weights))
        columns, places = self._distinct
        sums = weights.astype(float) @ columns
        for group, (_, formulas, _) in self.columns.items():
            values[group] = formulas(named(sums[:, places[group]]))
        undefined = dict.fromkeys(_CURVE_METRICS, np.full(len(weights), np.nan))
        for name in self.classes:
            _, of_class = (curves["segm"] or curves["bbox"]).get(name, (None, undefined))
            values[f"by_class.{name}"].update(of_class)
        for group, counts, unit in self._score_groups:
            auroc = np.full(len(weights), np.nan)
            if self.detections.scored:
                auroc = 100 * weighted_auroc(counts.positive, counts.score, unit, weights)
            values[group]["auroc"] = auroc
        curve = self._all.weigh(weights, copies[id(self._all.ranking)])
        values["froc"] = self.froc.read_off(curve, weights @ self._images)
        values["calibration"] = self.calibration.formulas(sums[:, places["calibration"]])
        return values

    def proportions(self):
        shares = super().proportions()
        lesions = int(self.gt.lesions.sum())
        froc = self.once()["froc"]
        del froc["mean"]
        shares["froc"] = {name: (share * lesions / 100, lesions) for name, share in froc.items()}
        return shares

    @property
    def width(self):
        return max(self.num_units, len(self.detections.score), 1)

    @cached_property
    def columns(self):
        groups = {}
        for prefix, counts in self.counts.items():
            columns = add_up(counts.columns(), self.unit_of_image, self.num_units)
            groups[f"{prefix}lesion"] = (columns, lesion_metrics, lesion_proportions)
            groups[f"{prefix}image"] = (columns, image_metrics, unit_proportions)
            if self.unit == "patient":
                merged = counts.merged(self.unit_of_image).columns()
                groups[f"{prefix}patient"] = (merged, unit_metrics, unit_proportions)
        subsets = {
            f"by_size.{scale}.{name}": (counts, size_metrics, size_proportions)
            for scale, strata in self.sizes.items()
            for name, counts in strata.items()
        }
        for name, counts in self.classes.items():
            subsets[f"by_class.{name}"] = (counts, lesion_metrics, lesion_proportions)
        for group, (counts, *formulas) in subsets.items():
            columns = add_up(counts.columns(), self.unit_of_image, self.num_units)
            groups[group] = (columns, *formulas)
        return {group: GroupFormulas(*parts) for group, parts in groups.items()}

    @cached_property
    def _distinct(self):
        """(num_units, D) the columns that differ from each other, and the places of each group's
        columns (and those of "calibration") among them: a sum that several need is made once."""
        columns = {group: parts.columns for group, parts in self.columns.items()}
        columns["calibration"] = add_up(
            self.calibration.columns(), self.unit_of_image, self.num_units
        )
        distinct, known, places = [], {}, {}
        for group, of_group in columns.items():
            places[group] = []
            for column in of_group.T:
                place = known.setdefault(blake2b(column.tobytes()).digest(), len(distinct))
                if place == len(distinct):
                    distinct.append(column)
                places[group].append(place)
        return np.stack(distinct, axis=1), places

    @cached_property
    def _score_groups(self):
        """[(group, UnitCounts, (cases,) unit of each case)] that have an AUROC."""
        counts = self.counts[""]
        groups = [("image", counts, self.unit_of_image)]
        if self.unit == "patient":
            merged = counts.merged(self.unit_of_image)
            groups.append(("patient", merged, np.arange(self.num_units)))
        return groups

    def _ranked(self, matching, classes):
        """RankedDetections of some classes."""
        regions, truth = self.detections.regions, self.gt.regions
        of_classes = matching.evaluated & np.isin(regions.category, classes)
        lesions = ~self.gt.crowd & np.isin(truth.category, classes)
        key = of_classes.tobytes()
        if key not in self._rankings:  # mostly shared by boxes and masks
            unit = self.unit_of_image[regions.image[of_classes]]
            self._rankings[key] = Ranking(self.detections.score[of_classes], unit)
        return RankedDetections(
            self._rankings[key],
            matching.hit[of_classes],
            np.bincount(self.unit_of_image[truth.image[lesions]], minlength=self.num_units),
        )

    def _class_curves(self, kind, weights, copies):
        """{class name: ((B,) bool, there is ground truth; {AP50, AP50_voc, BEP: (B,)})}."""
        if not self.detections.scored:
            return {}
        values = {}
        for name, ranked in self._curves.get(kind, {}).items():
            curve = ranked.weigh(weights, copies[id(ranked.ranking)])
            shares = curve.sampled_area, curve.area, curve.break_even_point
            of_class = dict(zip(_CURVE_METRICS, (100 * share for share in shares), strict=True))
            values[name] = (curve.num_gt > 0, of_class)
        return values

    def _coco_metrics(self, kind, weights):
        """{AP, AP75, APs, APm, APl: (B,)}."""
        if not self.detections.scored:
            return {}
        values = {}
        for name, ranked in self._coco_curves[kind].items():
            curves = [detections.weigh(weights) for detections in ranked]
            areas, present = [c.sampled_area for c in curves], [c.num_gt > 0 for c in curves]
            values[name] = 100 * mean_where(areas, present, len(weights))
        return values

    @cached_property
    def _coco_curves(self):
        return {
            kind: ranked_by_coco(
                self.gt, self.detections, overlaps, kind, self.unit_of_image, self.num_units
            )
            for kind, overlaps in self.overlaps.items()
        }


def mean_where(values, present, number: int) -> np.ndarray:
    """
    Args:
        values (list[np.ndarray]): (B,) of each class.
        present (list[np.ndarray]): (B,) bool, the class takes part.
        number: B.

    Returns:
        (B,) mean over the classes that take part; NaN without one, or if one of theirs is.
    """
    total, taking_part = np.zeros(number), np.zeros(number)
    for value, takes_part in zip(values, present, strict=True):
        total += np.where(takes_part, value, 0)
        taking_part += takes_part
    return divide(total, taking_part)
