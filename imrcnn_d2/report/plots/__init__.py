"""Plots of an evaluation: curves, matrices, metrics by group, contact sheets. `draw_all` writes
those that go next to its files.
"""

import re
from pathlib import Path

from imrcnn_d2.evaluation import ClassificationResults, LesionResults
from imrcnn_d2.evaluation.video import VideoResults
from imrcnn_d2.report.names import threshold_name
from imrcnn_d2.report.plots import curves, images, matrices, video
from imrcnn_d2.report.plots.curves import plot_pr_panels, plot_robustness
from imrcnn_d2.report.plots.images import (
    plot_distortions,
    plot_review_sheets,
    plot_test_grad_cams,
)

__all__ = [
    "draw_all",
    "plot_distortions",
    "plot_pr_panels",
    "plot_review_sheets",
    "plot_robustness",
    "plot_test_grad_cams",
]


def draw_all(
    results: LesionResults | ClassificationResults | VideoResults,
    folder: str | Path,
    image_root: str | Path | None = None,
) -> list[Path]:
    """Draw all plots of an evaluation as PNG: those of its task, and ``by_COLUMN`` for each column
    that the results are grouped by. Contact sheets, of typical images and of the worst, need
    ``image_root``, the folder that ``file_name`` is relative to; curves need scores.

    Raises:
        FileNotFoundError: an image of a contact sheet does not exist.
    """
    paths = []

    def path(stem):
        paths.append(Path(folder) / f"{stem}.png")
        return paths[-1]

    detector = isinstance(results, LesionResults)
    if isinstance(results, VideoResults):
        video.plot_video_curves(results, path("video_curves"))
        video.plot_time_to_detection(results, path("time_to_detection"))
    else:
        (_draw_detector if detector else _draw_classifier)(results, path)
    for column in results.by_group:
        curves.plot_groups(results, column, path(f"by_{re.sub('[^A-Za-z0-9.-]', '_', column)}"))
    if image_root is not None and detector:
        images.plot_contact_sheet(results, image_root, path("contact_sheet"))
        images.plot_contact_sheet(results, image_root, path("contact_sheet_worst"), worst=True)
    return paths


def _draw_classifier(results, path):
    name = "this model"
    matrices.plot_confusion_matrix({name: results.confusion}, path("confusion_matrix"))
    curves.plot_class_roc({name: results}, path("roc_curve"))
    calibration = curves.reliability({name: results})
    curves.plot_calibration(calibration, path("calibration"), labels=("Right", "Images"))


def _draw_detector(results, path):
    classes, scored = results.meta["classes"], results.detections.scored
    at = {"tau": results.meta["tau"], "mapped": results.detections.mapped}
    title = f"IoU ≥ {results.meta['iou_threshold']:g}"
    if scored:
        title += f", {threshold_name(**at)}"
    matrices.plot_confusion_matrix({title: results.confusion}, path("confusion_matrix"))
    if not scored:
        return
    pr_curves = {
        name: curve
        for kind, name, curve in results.curves
        if kind == results.meta["iou_type"] and curve.num_gt and len(curve.score)
    }
    name = classes[0] if len(classes) == 1 else "all classes"
    plot_pr_panels({curves.PR_TITLE: pr_curves}, path("pr_curve"), **at)
    curves.plot_froc({name: results.metrics.froc}, path("froc"), **at)
    curves.plot_calibration(curves.reliability({name: results}), path("calibration"))
    curves.plot_thresholds({name: results.thresholds}, path("thresholds"), **at)
