"""
Plots of what an evaluation found: curves, matrices, forest plots, contact sheets. ``draw_all``
writes those that go next to its files.
"""

import re
from pathlib import Path

from imrcnn_d2.evaluation import ClassificationResults, LesionResults
from imrcnn_d2.report.plots.curves import (
    plot_calibration,
    plot_class_roc,
    plot_froc,
    plot_groups,
    plot_pr_curves,
    plot_pr_panels,
    plot_robustness,
    plot_roc_curves,
    plot_thresholds,
)
from imrcnn_d2.report.plots.images import (
    plot_contact_sheet,
    plot_distortions,
    plot_grad_cam,
    plot_review_sheets,
    plot_test_grad_cams,
)
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix

__all__ = [
    "draw_all",
    "plot_calibration",
    "plot_class_roc",
    "plot_confusion_matrix",
    "plot_contact_sheet",
    "plot_distortions",
    "plot_froc",
    "plot_grad_cam",
    "plot_groups",
    "plot_pr_curves",
    "plot_pr_panels",
    "plot_review_sheets",
    "plot_robustness",
    "plot_roc_curves",
    "plot_test_grad_cams",
    "plot_thresholds",
]


def draw_all(
    results: LesionResults | ClassificationResults,
    folder: str | Path,
    image_root: str | Path | None = None,
) -> list[Path]:
    """
    Draw all plots of an evaluation, as PNG.

    Always ``confusion_matrix`` and, for each column that the results are grouped by,
    ``by_COLUMN``. Of a detector with scores also ``pr_curve`` (a curve for each class), ``froc``,
    ``calibration`` and ``thresholds``, and with ``image_root``, the folder that ``file_name`` is
    relative to, ``contact_sheet``. Of a classifier also ``roc_curve`` and ``calibration``.

    Raises:
        FileNotFoundError: an image of the contact sheet does not exist.
    """
    folder = Path(folder)
    paths = []

    def path(stem):
        paths.append(folder / f"{stem}.png")
        return paths[-1]

    classifier = results.meta.get("task") == "recognition"
    if classifier:
        name = "this model"
        plot_confusion_matrix({name: results.confusion}, path("confusion_matrix"))
        plot_class_roc({name: results}, path("roc_curve"))
        calibration = {name: results.metrics.calibration}
        plot_calibration(calibration, path("calibration"), of=("Right", "Images"))
    else:
        title = f"IoU ≥ {results.meta['iou_threshold']:g}"
        if results.detections.scored:
            title += f", score ≥ {results.meta['tau']:g}"
        plot_confusion_matrix({title: results.confusion}, path("confusion_matrix"))
        if results.detections.scored:
            _draw_curves(results, path)
    for column in results.by_group:
        plot_groups(results, column, path(f"by_{re.sub('[^A-Za-z0-9.-]', '_', column)}"))
    if image_root is not None and not classifier:
        plot_contact_sheet(results, image_root, path("contact_sheet"))
    return paths


def _draw_curves(results, path):
    tau, classes = results.meta["tau"], results.meta["classes"]
    curves = {
        name: curve
        for kind, name, curve in results.curves
        if kind == results.meta["iou_type"] and curve.num_gt and len(curve.score)
    }
    name = classes[0] if len(classes) == 1 else "all classes"
    plot_pr_curves(curves, path("pr_curve"), tau=tau)
    plot_froc({name: results.metrics.froc}, path("froc"), tau=tau)
    plot_calibration({name: results.metrics.calibration}, path("calibration"))
    plot_thresholds({name: results.thresholds}, path("thresholds"), tau=tau)
