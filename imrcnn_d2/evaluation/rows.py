"""The rows of tables: image by image, patient by patient, threshold by threshold."""

import numpy as np

from .metrics import divide, image_figures, lesion_figures

__all__ = ["THRESHOLDS", "beside_records", "image_rows", "patient_rows", "threshold_table"]

# 0.05, 0.10 ... 0.95
THRESHOLDS = tuple(n / 20 for n in range(1, 20))


def image_rows(gt, counts, scored):
    """
    Args:
        gt (GroundTruth):
        counts (UnitCounts): per image.
        scored (bool): False if the results know no scores; they are NaN then.

    Returns:
        list[dict]: a row an image by ascending id: image_id and file_name, the other fields of its
        record, and what happened in it.
    """
    columns = _columns(counts, scored, "image_outcome")
    columns["union_iou"] = np.where(counts.positive, 100 * counts.union_iou, np.nan)
    columns["union_dice"] = np.where(counts.positive, 100 * counts.union_dice, np.nan)
    return beside_records(gt.images, columns)


def beside_records(images, columns):
    """
    Args:
        images (list[dict]): COCO image records.
        columns (dict[str, np.ndarray]): (I,) each, what happened in them.

    Returns:
        list[dict]: a row an image: image_id and file_name, the other fields of its record, and the
        columns.
    """
    rows = []
    for record, *values in zip(images, *(c.tolist() for c in columns.values()), strict=True):
        passed = {"image_id": record["id"], "file_name": record.get("file_name"), **record}
        del passed["id"]
        # Fields of the data set that have the name of a figure keep both.
        passed = {(f"images.{k}" if k in columns else k): value for k, value in passed.items()}
        rows.append({**passed, **dict(zip(columns, values, strict=True))})
    return rows


def patient_rows(gt, counts, scored):
    """
    Args:
        gt (GroundTruth): whose images all have a ``patient_id``.
        counts (UnitCounts): per image.
        scored (bool): False if the results know no scores; they are NaN then.

    Returns:
        list[dict]: a row for each patient, in the order of their first images: patient_id, images,
        and what happened in them.
    """
    patients = [record["patient_id"] for record in gt.images]
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    unit = np.array([number[patient] for patient in patients], dtype=int)
    columns = {
        "patient_id": np.array(list(number), dtype=object),
        "images": np.bincount(unit),
        **_columns(counts.merged(unit), scored, "patient_outcome"),
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _columns(counts, scored, outcome):
    """What happened in each unit: counts, its outcome, mean overlaps of the hits in percent."""
    positive, called = counts.positive, counts.called
    return {
        "n_gt": counts.lesions,
        "n_det": counts.tp + counts.fp,
        "TP": counts.tp,
        "FP": counts.fp,
        "FN": counts.fn,
        outcome: np.where(positive, np.where(called, "TP", "FN"), np.where(called, "FP", "TN")),
        "score": counts.score if scored else np.full(len(counts.score), np.nan),
        "iou": 100 * divide(counts.iou, counts.tp),
        "dice": 100 * divide(counts.dice, counts.tp),
        "iou_box": 100 * divide(counts.iou_box, counts.tp),
    }


def threshold_table(results):
    """
    Figures at every threshold of THRESHOLDS; the matching is made once. It is for looking at: a
    threshold that was chosen by it is no longer tested by the same data.

    Args:
        results (LesionResults):

    Returns:
        list[dict[str, float]]: a row a threshold: "tau", the figures of lesions as "lesion_..." and
        those of images as "image_...". No row for results that know no scores.
    """
    if not results.detections.scored:
        return []
    rows = []
    counts = None
    for tau in THRESHOLDS:
        counts = results.counts_at(tau, counts)
        sums = counts.sums()
        groups = {"lesion": lesion_figures(sums), "image": image_figures(sums)}
        row = {f"{group}_{k}": float(v) for group, own in groups.items() for k, v in own.items()}
        rows.append({"tau": tau, **row})
    return rows
