"""The figures at a score threshold, made of the counts per image or patient.

They are in percent but for counts and fp_per_image; undefined ones are NaN.
"""

from sklearn.metrics import roc_auc_score

__all__ = ["lesion_figures", "ratios", "unit_figures"]

NAN = float("nan")


def ratios(tp, fp, fn, tn):
    """
    The five figures of a two-by-two table.

    Args:
        tp, fp, fn, tn (int): counts.

    Returns:
        dict[str, float]: precision, recall (sensitivity), specificity, accuracy, f1 in percent.
    """
    return {
        "precision": _percent(tp, tp + fp),
        "recall": _percent(tp, tp + fn),
        "specificity": _percent(tn, tn + fp),
        "accuracy": _percent(tp + tn, tp + fp + fn + tn),
        "f1": _percent(2 * tp, 2 * tp + fp + fn),
    }


def lesion_figures(images):
    """
    Figures where each lesion and each detection is a case.

    ``specificity`` and ``accuracy`` mix images (the true negatives) with detections (the false
    positives); they are there for comparison with publications that do so.

    Args:
        images (UnitCounts): per image.

    Returns:
        dict[str, float]: TP FP FN TN precision recall specificity accuracy f1 iou iou_box iou_all
        dice fp_per_image fp_per_lesion_free_image.
    """
    tp, fp, fn = int(images.tp.sum()), int(images.fp.sum()), int(images.fn.sum())
    free = ~images.positive
    tn = int((free & ~images.called).sum())
    figures = {"TP": float(tp), "FP": float(fp), "FN": float(fn), "TN": float(tn)}
    figures.update(ratios(tp, fp, fn, tn))
    if not free.any():  # otherwise 0 as soon as there is a false alarm, and NaN until then
        figures["specificity"] = NAN
    for name in ("iou", "iou_box", "dice"):
        figures[name] = _percent(getattr(images, name).sum(), tp)
    figures["iou_all"] = _percent(images.iou.sum(), tp + fn)
    figures["fp_per_image"] = _divide(fp, len(images.fp))
    figures["fp_per_lesion_free_image"] = _divide(images.fp[free].sum(), free.sum())
    return figures


def unit_figures(units):
    """
    Figures where each image, or each patient, is a case: positive if it has a lesion, called
    positive by a detection at the threshold anywhere in it.

    Args:
        units (UnitCounts): per image or per patient.

    Returns:
        dict[str, float]: TP FP FN TN precision recall specificity accuracy f1 auroc
        localised_recall. The last is the share of positive units in which a lesion is hit.
    """
    positive, called = units.positive, units.called
    counts = {
        "TP": int((positive & called).sum()),
        "FP": int((~positive & called).sum()),
        "FN": int((positive & ~called).sum()),
        "TN": int((~positive & ~called).sum()),
    }
    figures = {name: float(count) for name, count in counts.items()}
    figures.update(ratios(*counts.values()))
    both = positive.any() and not positive.all()
    figures["auroc"] = 100 * float(roc_auc_score(positive, units.score)) if both else NAN
    figures["localised_recall"] = _percent((units.tp > 0).sum(), positive.sum())
    return figures


def _percent(part, whole):
    return 100 * _divide(part, whole)


def _divide(part, whole):
    return float(part) / float(whole) if whole else NAN
