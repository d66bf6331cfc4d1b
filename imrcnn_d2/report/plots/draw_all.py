"""The pictures of a training's final evaluation."""

import logging
import os
from pathlib import Path

from detectron2.data import MetadataCatalog

from imrcnn_d2.evaluation import evaluate_classification, evaluate_lesions
from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS, RESULTS
from imrcnn_d2.report.plots.curves import (
    plot_calibration,
    plot_class_roc,
    plot_froc,
    plot_pr_curves,
    plot_thresholds,
)
from imrcnn_d2.report.plots.images import plot_contact_sheet
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix
from imrcnn_d2.report.subgroups import plot_all_groups

__all__ = [
    "plot_curves",
    "plot_run",
    "plot_classification",
    "plot_classification_run",
    "plot_test_results",
]

logger = logging.getLogger(__name__)


def plot_curves(results, folder):
    """
    Draw ``confusion_matrix.png`` and, where the results know scores, ``pr_curve.png`` (a curve for
    each class), ``froc.png``, ``calibration.png`` and ``thresholds.png``; ``by_COLUMN.png`` for
    each column that they are grouped by.

    Args:
        results (LesionResults):
        folder (str or Path):

    Returns:
        list[Path]: the pictures.
    """
    folder = Path(folder)
    tau, classes = results.meta["tau"], results.meta["classes"]
    matrix = {f"IoU ≥ {results.meta['iou_threshold']:g}": results.confusion}
    paths = [folder / "confusion_matrix.png"]
    if results.detections.scored:
        matrix = {f"{name}, score ≥ {tau:g}": own for name, own in matrix.items()}
        kind = results.meta["iou_type"]
        curves = {
            name: curve
            for of, name, curve in results.curves
            if of == kind and curve.num_gt and len(curve.score)
        }
        name = classes[0] if len(classes) == 1 else "all classes"
        plot_pr_curves(curves, folder / "pr_curve.png", tau=tau)
        plot_froc({name: results.metrics.froc}, folder / "froc.png", tau=tau)
        plot_calibration({name: results.metrics.calibration}, folder / "calibration.png")
        plot_thresholds({name: results.thresholds}, folder / "thresholds.png", tau=tau)
        paths += [folder / f"{name}.png" for name in ("pr_curve", "froc", "calibration")]
        paths.append(folder / "thresholds.png")
    plot_confusion_matrix(matrix, paths[0])
    return paths + plot_all_groups(results, folder)


def plot_classification(results, folder, name="this model"):
    """
    Draw ``confusion_matrix.png``, ``roc_curve.png`` and ``calibration.png``; ``by_COLUMN.png`` for
    each column that they are grouped by.

    Args:
        results (ClassificationResults):
        folder (str or Path):
        name (str): of the model, for the legends.

    Returns:
        list[Path]: the pictures.
    """
    stems = ("confusion_matrix", "roc_curve", "calibration")
    paths = [Path(folder) / f"{stem}.png" for stem in stems]
    plot_confusion_matrix({name: results.confusion}, paths[0])
    plot_class_roc({name: results}, paths[1])
    plot_calibration({name: results.metrics.calibration}, paths[2], of=("Right", "Images"))
    return paths + plot_all_groups(results, Path(folder))


def plot_classification_run(folder, gt, name="this model"):
    """
    Draw the pictures of :func:`plot_classification` from the probabilities that
    ``ClassificationEvaluator`` wrote.

    Args:
        folder (str or Path): of the evaluation.
        gt (str or Path): COCO image classification.
        name (str): of the model, for the legends.

    Returns:
        list[Path]: the pictures.
    """
    results = evaluate_classification(gt, Path(folder) / CLASSIFICATION_RESULTS)
    return plot_classification(results, folder, name)


def plot_run(folder, gt, image_root, *, tau=0.7):
    """
    Draw the pictures of :func:`plot_curves` and ``contact_sheet.png`` from the detections that
    ``LesionEvaluator`` wrote.

    Args:
        folder (str or Path): of the evaluation.
        gt (str or Path): COCO ground truth.
        image_root (str or Path): folder that its ``file_name`` is relative to.
        tau (float): score from which on a detection counts.

    Returns:
        list[Path]: the pictures.
    """
    folder = Path(folder)
    pictures = plot_curves(evaluate_lesions(gt, folder / RESULTS, tau=tau), folder)
    sheet = folder / "contact_sheet.png"
    plot_contact_sheet(gt, folder / RESULTS, image_root, sheet, tau=tau)
    return [*pictures, sheet]


def plot_test_results(output_dir, dataset_names, *, tau):
    """
    Draw the pictures beside each evaluation's files.

    Args:
        output_dir (str): OUTPUT_DIR, with ``inference/<dataset>/``.
        dataset_names (iterable of str): sets that were evaluated, in COCO's format.
        tau (float): score from which on a detection counts.
    """
    for name in dataset_names:
        data = MetadataCatalog.get(name)
        folder = os.path.join(output_dir, "inference", name)
        if data.get("evaluator_type") == "recognition":
            pictures = plot_classification_run(folder, data.json_file)
        else:
            pictures = plot_run(folder, data.json_file, data.get("image_root", ""), tau=tau)
        logger.info("Pictures in %s: %s", folder, ", ".join(path.name for path in pictures))
