"""Figures by the names that readers know them by."""

__all__ = ["LEVELS", "NAMES", "figure_name"]

NAMES = {"f1": "F1", "auroc": "AUROC", "miou": "mIoU", "mdice": "mDice"}
OF_ALL_CLASSES = {
    "top1": "top-1 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1, mean of classes",
    "auroc": "AUROC, mean of classes",
    "cross_entropy": "cross-entropy",
}
LEVELS = {"lesion": "lesions", "image": "images", "patient": "patients"}


def figure_name(endpoint):
    """
    Args:
        endpoint (str): group/figure.

    Returns:
        str: for readers, such as "IoU (masks)".
    """
    group, _, figure = endpoint.partition("/")
    if group == "recognition":
        name, _, of_class = figure.partition("_")
        if figure in OF_ALL_CLASSES:
            return OF_ALL_CLASSES[figure]
        return f"{NAMES.get(name, name)} of {of_class}"
    if group == "cancer":
        figure = "sensitivity" if figure == "recall" else figure
        return f"{NAMES.get(figure, figure)} (cancer against benign)"
    at = " at tau_val" if group.startswith("tau_val.") else ""
    group = group.removeprefix("tau_val.")
    if figure in ("iou", "iou_box"):
        return f"IoU ({'boxes' if figure == 'iou_box' else 'masks'}){at}"
    of = {"segm": "masks", "bbox": "boxes", **LEVELS}.get(group, group)
    return f"{NAMES.get(figure, figure)} ({of}){at}"
