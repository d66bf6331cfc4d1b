"""Every figure as a function of how often each unit counts.

With each unit counted once that gives the figures of the data set, with the weights of bootstrap
resamples those of the resamples: one implementation for both.
"""

from functools import cached_property
from hashlib import blake2b

import numpy as np

from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.coco_ap import ranked_by_coco
from imrcnn_d2.evaluation.detection.counts import add_up, divide, named, number_units
from imrcnn_d2.evaluation.detection.curves import FROC, RankedDetections, Ranking, weighted_auroc

__all__ = [
    "COUNTS",
    "Measures",
    "image_metrics",
    "lesion_metrics",
    "lesion_proportions",
    "ratios",
    "size_metrics",
    "size_proportions",
    "table_proportions",
    "unit_metrics",
    "unit_proportions",
]


# Figures that are counts.
COUNTS = ("TP", "FP", "FN", "TN")


def ratios(tp, fp, fn, tn):
    """
    The five figures of a two-by-two table.

    Args:
        tp, fp, fn, tn (int or np.ndarray): counts, of one shape.

    Returns:
        dict[str, np.ndarray]: precision, recall (sensitivity), specificity, accuracy, f1 in
        percent.
    """
    shares = table_proportions(tp, fp, fn, tn)
    figures = {name: 100 * divide(part, whole) for name, (part, whole) in shares.items()}
    return {**figures, "f1": 100 * divide(2 * tp, 2 * tp + fp + fn)}


def table_proportions(tp, fp, fn, tn):
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
    """Counts of units: called and positive, called and not, missed, rightly silent."""
    return (
        sums["positive_called"],
        sums["free"] - sums["free_silent"],
        sums["positive"] - sums["positive_called"],
        sums["free_silent"],
    )


def lesion_metrics(sums):
    """
    Figures where each lesion and each detection is a case.

    ``specificity`` and ``accuracy`` mix images (the true negatives) with detections (the false
    positives); they are there for comparison with publications that do so.

    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, see ``UnitCounts.columns``.

    Returns:
        dict[str, np.ndarray]: (...,) TP FP FN TN precision recall specificity accuracy f1 iou
        iou_box dice iou_all fp_per_image fp_per_lesion_free_image.
    """
    tp, fp, fn, _ = table = _lesion_table(sums)
    figures = {**dict(zip(COUNTS, table, strict=True)), **ratios(*table)}
    # Decided from the ground truth: else it is 0 as soon as there is a false alarm, NaN until then.
    figures["specificity"] = np.where(sums["free"] > 0, figures["specificity"], np.nan)[()]
    for name in ("iou", "iou_box", "dice"):
        figures[name] = 100 * divide(sums[name], tp)
    figures["iou_all"] = 100 * divide(sums["iou"], tp + fn)
    figures["fp_per_image"] = divide(fp, sums["units"])
    figures["fp_per_lesion_free_image"] = divide(sums["free_fp"], sums["free"])
    return figures


def unit_metrics(sums):
    """
    Figures where each image, or each patient, is a case: positive if it has a lesion, called
    positive by a detection at the threshold anywhere in it.

    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images or patients, see
            ``UnitCounts.columns``.

    Returns:
        dict[str, np.ndarray]: (...,) TP FP FN TN precision recall specificity accuracy f1
        localised_recall. The last is the share of positive units in which a lesion is hit.
    """
    table = _unit_table(sums)
    return {
        **dict(zip(COUNTS, table, strict=True)),
        **ratios(*table),
        "localised_recall": 100 * divide(sums["positive_hit"], sums["positive"]),
    }


def image_metrics(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, see ``UnitCounts.columns``.

    Returns:
        dict[str, np.ndarray]: (...,) as :func:`unit_metrics`, and miou and mdice: means over the
        images with a lesion.
    """
    return {
        **unit_metrics(sums),
        "miou": 100 * divide(sums["union_iou"], sums["positive"]),
        "mdice": 100 * divide(sums["union_dice"], sums["positive"]),
    }


def lesion_proportions(sums):
    """
    The figures that are a share of a whole number of cases, for exact binomial intervals.

    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, see ``UnitCounts.columns``.

    Returns:
        dict[str, tuple]: figure -> (cases that have it, cases), each (...,). For f1 it is
        s = TP / (TP + FP + FN), of which F1 = 2s / (1 + s) is a monotone function.
    """
    return table_proportions(*_lesion_table(sums))


def unit_proportions(sums):
    """As :func:`lesion_proportions`, where each image, or each patient, is a case."""
    return {
        **table_proportions(*_unit_table(sums)),
        "localised_recall": (sums["positive_hit"], sums["positive"]),
    }


def size_metrics(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over the images of a stratum of :func:`by_size`.

    Returns:
        dict[str, np.ndarray]: (...,) "n" (lesions), and in percent recall, iou, iou_box, iou_all,
        dice, as in :func:`lesion_metrics`.
    """
    figures = lesion_metrics(sums)
    names = ("recall", "iou", "iou_box", "iou_all", "dice")
    return {"n": sums["tp"] + sums["fn"], **{name: figures[name] for name in names}}


def size_proportions(sums):
    """As :func:`lesion_proportions`, of the figures by size."""
    return {"recall": lesion_proportions(sums)["recall"]}


# Read off the precision-recall curve of a class.
CURVE_FIGURES = ("AP50", "AP50_voc", "BEP")


class Measures:
    """
    The figures of a data set under weights of its units: patients where every image has a
    ``patient_id``, else images.

    Attributes:
        unit (str): "patient" or "image".
        unit_of_image (np.ndarray): (number of images,) int in [0, num_units).
        num_units (int):
        froc (FROC), calibration (Calibration): of all detections that count.
    """

    def __init__(self, gt, detections, overlaps, curve_matchings, matching, counts, sizes, classes):
        """
        Args:
            gt (GroundTruth):
            detections (Detections): N of them. Without scores (``scored`` False), figures that
                depend on the order of scores are NaN.
            overlaps (dict[str, Overlaps]): by "bbox" and, where there are masks, by "segm".
            curve_matchings (dict[str, Matching]): at IoU 0.5 by "bbox" and, where there are masks,
                by "segm": for AP and the break-even point.
            matching (Matching): at the IoU and by the masks or boxes asked for.
            counts (dict[str, UnitCounts]): per image at each threshold, by a prefix of its groups
                of figures: "" and, with a second threshold, "tau_val.".
            sizes (dict[str, dict[str, UnitCounts]]): per image, of lesions by size, see
                :func:`by_size`.
            classes (dict[str, UnitCounts]): per image, of each class; empty for a single one.
        """
        self.gt, self.detections, self.overlaps = gt, detections, overlaps
        self.curve_matchings, self.counts = curve_matchings, counts
        self.sizes, self.classes = sizes, classes
        self.froc = FROC.of(gt, detections, matching)
        self.calibration = Calibration.of(gt, detections, matching)
        self.unit, self.unit_of_image, self.num_units = number_units(gt.images)
        self._images = np.bincount(self.unit_of_image, minlength=self.num_units)
        self._rankings = {}
        classes = np.unique(gt.regions.category[~gt.crowd])
        self._curves = {
            kind: {gt.categories[c]["name"]: self._ranked(of_kind, [c]) for c in classes}
            for kind, of_kind in curve_matchings.items()
        }
        self._all = self._ranked(matching, range(len(gt.categories)))

    def __call__(self, weights, *, all_coco=False):
        """
        Args:
            weights (np.ndarray): (B, num_units) int, how often each of B resamples holds each unit.
            all_coco (bool): COCO's AP, AP75, APs, APm and APl too.

        Returns:
            dict[str, dict[str, np.ndarray]]: group -> figure -> (B,), as in LesionResults. Means
            over classes are over those that a resample has ground truth of.
        """
        figures, curves = {}, {}
        drawn = {id(ranking): ranking.draw(weights) for ranking in self._rankings.values()}
        for kind in ("bbox", "segm"):
            curves[kind] = self._class_curves(kind, weights, drawn)
            present, of_class = (
                zip(*curves[kind].values(), strict=True) if curves[kind] else ((), ())
            )
            figures[kind] = {
                name: mean_where([each[name] for each in of_class], present, len(weights))
                for name in CURVE_FIGURES
            }
            if all_coco and kind in self.curve_matchings:
                figures[kind].update(self._coco_figures(kind, weights))
        sums = weights.astype(float) @ self._distinct[0]
        for group, (_, formulas, _) in self.columns.items():
            figures[group] = formulas(named(sums[:, self._distinct[1][group]]))
        nothing = dict.fromkeys(CURVE_FIGURES, np.full(len(weights), np.nan))
        for name in self.classes:
            _, of_class = (curves["segm"] or curves["bbox"]).get(name, (None, nothing))
            figures[f"by_class.{name}"].update(of_class)
        for group, counts, unit in self._score_groups:
            auroc = np.full(len(weights), np.nan)
            if self.detections.scored:
                auroc = 100 * weighted_auroc(counts.positive, counts.score, unit, weights)
            figures[group]["auroc"] = auroc
        curve = self._all.weigh(weights, drawn[id(self._all.ranking)])
        figures["froc"] = self.froc.read_off(curve, weights @ self._images)
        figures["calibration"] = self.calibration.formulas(
            sums[:, self._distinct[1]["calibration"]]
        )
        return figures

    def once(self, *, all_coco=False):
        """
        Args:
            all_coco (bool): as above.

        Returns:
            dict[str, dict[str, float]]: the figures of the data set itself.
        """
        figures = self(np.ones((1, self.num_units), dtype=np.int32), all_coco=all_coco)
        return {
            group: {name: float(value[0]) for name, value in of_group.items()}
            for group, of_group in figures.items()
        }

    named = staticmethod(named)  # sums of columns as the formulas take them

    def proportions(self):
        """
        Returns:
            dict[str, dict[str, tuple]]: group -> figure -> (cases that have it, cases), of the
            figures that are a share of a whole number of cases; see ``lesion_proportions``.
        """
        shares = {
            group: proportions(named(columns.sum(axis=0)))
            for group, (columns, _, proportions) in self.columns.items()
        }
        lesions = int(self.gt.lesions.sum())
        froc = self.once()["froc"]
        del froc["mean"]
        shares["froc"] = {name: (share * lesions / 100, lesions) for name, share in froc.items()}
        return shares

    @cached_property
    def width(self):
        """int: numbers that a resample takes, to size chunks by."""
        return max(self.num_units, len(self.detections.score), 1)

    @cached_property
    def columns(self):
        """
        dict[str, tuple]: what the figures at a threshold are made of, by group: columns
        (num_units, K) whose sums they are formulas over, the formulas, and the proportions.
        """
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
        return groups

    @cached_property
    def _distinct(self):
        """
        (num_units, D) the columns that differ from each other, and for each group (and
        "calibration") where its own are among them: a sum that several need is made once.
        """
        columns = {group: own for group, (own, *_) in self.columns.items()}
        columns["calibration"] = add_up(
            self.calibration.columns(), self.unit_of_image, self.num_units
        )
        distinct, places, where = [], {}, {}
        for group, own in columns.items():
            where[group] = []
            for column in own.T:
                place = places.setdefault(blake2b(column.tobytes()).digest(), len(distinct))
                if place == len(distinct):
                    distinct.append(column)
                where[group].append(place)
        return np.stack(distinct, axis=1), where

    @cached_property
    def _score_groups(self):
        """[(group, UnitCounts, (cases,) unit of each case)]: where there is an AUROC."""
        counts = self.counts[""]
        groups = [("image", counts, self.unit_of_image)]
        if self.unit == "patient":
            merged = counts.merged(self.unit_of_image)
            groups.append(("patient", merged, np.arange(self.num_units)))
        return groups

    def _ranked(self, matching, classes):
        """RankedDetections of some classes."""
        regions, truth = self.detections.regions, self.gt.regions
        own = matching.counts & np.isin(regions.category, classes)
        lesions = ~self.gt.crowd & np.isin(truth.category, classes)
        key = own.tobytes()
        if key not in self._rankings:  # boxes and masks mostly count the same detections
            unit = self.unit_of_image[regions.image[own]]
            self._rankings[key] = Ranking(self.detections.score[own], unit)
        return RankedDetections(
            self._rankings[key],
            matching.hit[own],
            np.bincount(self.unit_of_image[truth.image[lesions]], minlength=self.num_units),
        )

    def _class_curves(self, kind, weights, drawn):
        """{class name: ((B,) bool, there is ground truth; {AP50, AP50_voc, BEP: (B,)})}."""
        if not self.detections.scored:
            return {}
        figures = {}
        for name, ranked in self._curves.get(kind, {}).items():
            curve = ranked.weigh(weights, drawn[id(ranked.ranking)])
            values = curve.sampled_area, curve.area, curve.break_even_point
            of_class = dict(zip(CURVE_FIGURES, (100 * value for value in values), strict=True))
            figures[name] = (curve.num_gt > 0, of_class)
        return figures

    def _coco_figures(self, kind, weights):
        """{AP, AP75, APs, APm, APl: (B,)}."""
        if not self.detections.scored:
            return {}
        figures = {}
        for name, curves in self._coco_curves[kind].items():
            values, present = [], []
            for ranked in curves:
                curve = ranked.weigh(weights)
                present.append(curve.num_gt > 0)
                values.append(curve.sampled_area)
            figures[name] = 100 * mean_where(values, present, len(weights))
        return figures

    @cached_property
    def _coco_curves(self):
        return {
            kind: ranked_by_coco(
                self.gt, self.detections, overlaps, kind, self.unit_of_image, self.num_units
            )
            for kind, overlaps in self.overlaps.items()
        }


def mean_where(values, present, number):
    """
    Args:
        values (list[np.ndarray]): (B,) of each class.
        present (list[np.ndarray]): (B,) bool, the class takes part.
        number (int): B.

    Returns:
        np.ndarray: (B,) mean over the classes that take part; NaN without one, or if one of
        theirs is.
    """
    total, taking_part = np.zeros(number), np.zeros(number)
    for value, there in zip(values, present, strict=True):
        total += np.where(there, value, 0)
        taking_part += there
    return divide(total, taking_part)
