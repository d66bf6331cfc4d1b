"""The figures at a score threshold: formulas over sums of the columns of UnitCounts.

They broadcast: of the sums over all units they make the figures, of (B,) sums over B resamples the
B resampled figures. In percent but for counts and fp_per_image; undefined ones are NaN.
"""

import numpy as np

__all__ = [
    "COUNTS",
    "divide",
    "image_figures",
    "lesion_figures",
    "lesion_proportions",
    "ratios",
    "table_proportions",
    "unit_figures",
    "unit_proportions",
]

# Figures that are counts.
COUNTS = ("TP", "FP", "FN", "TN")


def divide(part, whole):
    """
    Args:
        part, whole (np.ndarray): of one shape, or scalars.

    Returns:
        np.ndarray or np.float64: part / whole, NaN where ``whole`` is 0.
    """
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)[()]


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


def lesion_figures(sums):
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


def unit_figures(sums):
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


def image_figures(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, see ``UnitCounts.columns``.

    Returns:
        dict[str, np.ndarray]: (...,) as :func:`unit_figures`, and miou and mdice: means over the
        images with a lesion.
    """
    return {
        **unit_figures(sums),
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
