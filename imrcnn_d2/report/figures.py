"""The curves and matrices of one evaluation, each as a PNG."""

from pathlib import Path

from .calibration import draw_calibration
from .confusion_matrix import draw_confusion_matrix
from .froc import draw_froc
from .groups import draw_all_groups
from .pr_curve import draw_pr_curves
from .thresholds import draw_thresholds

__all__ = ["draw_figures"]


def draw_figures(results, folder):
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
        draw_pr_curves(curves, folder / "pr_curve.png", tau=tau)
        draw_froc({name: results.measures.froc}, folder / "froc.png", tau=tau)
        draw_calibration({name: results.measures.calibration}, folder / "calibration.png")
        draw_thresholds({name: results.thresholds}, folder / "thresholds.png", tau=tau)
        paths += [folder / f"{name}.png" for name in ("pr_curve", "froc", "calibration")]
        paths.append(folder / "thresholds.png")
    draw_confusion_matrix(matrix, paths[0])
    return paths + draw_all_groups(results, folder)
