"""Score COCO results against COCO ground truth, without a model."""

import logging
from dataclasses import dataclass

import numpy as np

from .coco_ap import coco_average_precision
from .counting import UnitCounts, count_images, union_overlaps
from .curves import pr_curve
from .matching import Matching, match, overlaps
from .metrics import lesion_figures, unit_figures
from .records import Detections, GroundTruth, read_ground_truth, read_results
from .selection import selection_score

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
        per_image (list[dict]): a row an image by ascending id, with the fields of its record.
        curves (list[tuple[str, str, PRCurve]]): IoU type ("segm" or "bbox"), class name and curve
            at IoU 0.5 of each class.
        counts (UnitCounts): per image, what ``lesion`` and ``image`` are made of.
        meta (dict): the settings, and the size of the data set.
        ground_truth (GroundTruth), detections (Detections): what was scored; N detections.
        matching (Matching): of the N detections.
        counted (np.ndarray): (N,) bool, the detections that count at the threshold.

    All figures are in percent but for counts and fp_per_image; undefined ones are NaN.
    """

    bbox: dict
    segm: dict
    lesion: dict
    image: dict
    patient: dict | None
    per_image: list
    curves: list
    counts: UnitCounts
    meta: dict
    ground_truth: GroundTruth
    detections: Detections
    matching: Matching
    counted: np.ndarray

    def groups(self):
        """dict[str, dict[str, float]]: the groups of figures, in the order of a report."""
        groups = {"bbox": self.bbox, "segm": self.segm, "lesion": self.lesion, "image": self.image}
        if self.patient is not None:
            groups["patient"] = self.patient
        return groups


def evaluate_lesions(gt, results, *, tau=0.7, iou_threshold=0.5, iou_type="segm"):
    """
    Compute every figure for a data set and a model's detections in it.

    With several classes, matching is done class by class and counts are summed; AP, AP50_voc and
    BEP are means over the classes that have ground truth (NaN where one of theirs is). An image is
    lesion-free if it has no lesion of any class, and its score is that of any class.

    Args:
        gt (dict, COCO, str or Path): see :func:`read_ground_truth`.
        results (list[dict], dict, str or Path): see :func:`read_results`.
        tau (float): score from which on a detection counts in ``lesion``, ``image`` and
            ``patient``. It plays no part in AP, the curves, BEP and AUROC.
        iou_threshold (float): least overlap of a hit, in (0, 1]. AP50_voc, BEP and the curves
            stay at 0.5.
        iou_type (str): overlap of masks ("segm") or of boxes ("bbox") in matching. Where the
            ground truth or the results have boxes only, boxes are used and a warning is logged;
            iou, iou_all, dice, miou and mdice, which are always of masks, are then NaN.

    Returns:
        LesionResults:

    Raises:
        ValueError: on bad input, saying which record is wrong and why.
    """
    if iou_type not in ("segm", "bbox"):
        raise ValueError(f"iou_type is {iou_type!r}; it must be 'segm' or 'bbox'.")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in (0, 1].")
    if not tau >= 0:
        raise ValueError(f"tau is {tau}; it must be a number that is not negative.")
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
    figures = {}
    curves = []
    for kind in ("bbox", "segm"):
        own = _curves(gt, detections, groups[kind]) if kind in groups else []
        curves += [(kind, category["name"], curve) for category, curve in own]
        defined = [curve for _, curve in own if curve.num_gt]
        figures[kind] = {
            **coco_average_precision(gt, detections, kind),
            "AP50_voc": _mean_percent([curve.area for curve in defined]),
            "BEP": _mean_percent([curve.break_even_point for curve in defined]),
        }

    matching = match(gt, detections, groups[iou_type], iou_threshold)
    counted = matching.counts & (detections.score >= tau)
    counts = count_images(gt, detections, groups, matching, counted)
    lesion, image = lesion_figures(counts), unit_figures(counts)
    positive = counts.positive
    lesion["selection"] = selection_score(
        lesion,
        image,
        has_lesions=bool(positive.any()),
        has_lesion_free_images=bool((~positive).any()),
    )
    union = union_overlaps(gt, detections, counted)
    for name, overlap in union.items():
        image[f"m{name}"] = _mean_percent(overlap[positive])

    patients = [record.get("patient_id") for record in gt.images]
    known = bool(patients) and None not in patients
    return LesionResults(
        **figures,
        lesion=lesion,
        image=image,
        patient=_patient_figures(counts, patients) if known else None,
        per_image=_rows(gt, counts, union),
        curves=curves,
        counts=counts,
        meta={
            "tau": tau,
            "iou_threshold": iou_threshold,
            "iou_type": iou_type,
            "images": len(gt.images),
            "lesion_free_images": int((~positive).sum()),
            "lesions": int(counts.lesions.sum()),
            "crowds": int(gt.crowd.sum()),
            "detections": len(detections.regions),
            "classes": [category["name"] for category in gt.categories],
            "patients": len(set(patients)) if known else None,
        },
        ground_truth=gt,
        detections=detections,
        matching=matching,
        counted=counted,
    )


def _curves(gt, detections, groups):
    """[(category, PRCurve)] at IoU 0.5."""
    matching = match(gt, detections, groups, CURVE_IOU)
    num_gt = np.bincount(gt.regions.category[~gt.crowd], minlength=len(gt.categories))
    curves = []
    for position, category in enumerate(gt.categories):
        own = matching.counts & (detections.regions.category == position)
        curve = pr_curve(detections.score[own], matching.hit[own], num_gt[position])
        curves.append((category, curve))
    return curves


def _mean_percent(values):
    return 100 * float(np.mean(values)) if len(values) else float("nan")


def _patient_figures(counts, patients):
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    return unit_figures(counts.merged(np.array([number[patient] for patient in patients])))


def _rows(gt, counts, union):
    """One dict an image for per_image.csv."""
    positive, called = counts.positive, counts.called
    outcome = np.where(positive, np.where(called, "TP", "FN"), np.where(called, "FP", "TN"))
    rows = []
    for i, record in enumerate(gt.images):
        tp = int(counts.tp[i])
        figures = {
            "n_gt": int(counts.lesions[i]),
            "n_det": tp + int(counts.fp[i]),
            "TP": tp,
            "FP": int(counts.fp[i]),
            "FN": int(counts.fn[i]),
            "image_outcome": str(outcome[i]),
            "score": float(counts.score[i]),
            "iou": _mean_percent([counts.iou[i] / tp] if tp else []),
            "dice": _mean_percent([counts.dice[i] / tp] if tp else []),
            "iou_box": _mean_percent([counts.iou_box[i] / tp] if tp else []),
            "union_iou": 100 * float(union["iou"][i]),
            "union_dice": 100 * float(union["dice"][i]),
        }
        passed = {"image_id": record["id"], "file_name": record.get("file_name"), **record}
        del passed["id"]
        # Fields of the data set that have the name of a figure keep both.
        passed = {(f"images.{k}" if k in figures else k): value for k, value in passed.items()}
        rows.append({**passed, **figures})
    return rows
