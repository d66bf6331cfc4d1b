"""The curves and the matrix of one evaluation of an image classifier, each as a PNG."""

from pathlib import Path

from ..evaluation import evaluate_recognition
from ..evaluation.recognition_files import RECOGNITION_RESULTS
from .calibration import draw_calibration
from .class_roc import draw_class_roc
from .confusion_matrix import draw_confusion_matrix
from .groups import draw_all_groups

__all__ = ["draw_recognition_figures", "draw_recognition_pictures"]


def draw_recognition_figures(results, folder, name="this model"):
    """
    Draw ``confusion_matrix.png``, ``roc_curve.png`` and ``calibration.png``; ``by_COLUMN.png`` for
    each column that they are grouped by.

    Args:
        results (RecognitionResults):
        folder (str or Path):
        name (str): of the model, for the legends.

    Returns:
        list[Path]: the pictures.
    """
    stems = ("confusion_matrix", "roc_curve", "calibration")
    paths = [Path(folder) / f"{stem}.png" for stem in stems]
    draw_confusion_matrix({name: results.confusion}, paths[0])
    draw_class_roc({name: results}, paths[1])
    draw_calibration({name: results.measures.calibration}, paths[2], of=("Right", "Images"))
    return paths + draw_all_groups(results, Path(folder))


def draw_recognition_pictures(folder, gt, name="this model"):
    """
    Draw the pictures of :func:`draw_recognition_figures` from the probabilities that
    ``RecognitionEvaluator`` wrote.

    Args:
        folder (str or Path): of the evaluation.
        gt (str or Path): COCO image classification.
        name (str): of the model, for the legends.

    Returns:
        list[Path]: the pictures.
    """
    results = evaluate_recognition(gt, Path(folder) / RECOGNITION_RESULTS)
    return draw_recognition_figures(results, folder, name)
