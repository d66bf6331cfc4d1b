"""The pictures beside an evaluation's files."""

from pathlib import Path

from ..evaluation import evaluate_lesions
from ..evaluation.files import RESULTS
from .contact_sheet import draw_contact_sheet
from .figures import draw_figures

__all__ = ["draw_pictures"]


def draw_pictures(folder, gt, image_root, *, tau=0.7):
    """
    Draw the pictures of :func:`draw_figures` and ``contact_sheet.png`` from the detections that
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
    pictures = draw_figures(evaluate_lesions(gt, folder / RESULTS, tau=tau), folder)
    sheet = folder / "contact_sheet.png"
    draw_contact_sheet(gt, folder / RESULTS, image_root, sheet, tau=tau)
    return [*pictures, sheet]
