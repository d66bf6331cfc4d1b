"""The pictures beside an evaluation's files."""

from pathlib import Path

from .contact_sheet import draw_contact_sheet
from .pr_curve import draw_pr_curves, read_pr_curves

__all__ = ["draw_pictures"]


def draw_pictures(folder, gt, image_root, *, tau=0.7):
    """
    Draw ``pr_curve.png`` and ``contact_sheet.png`` from what ``LesionEvaluator`` wrote.

    Args:
        folder (str or Path): of the evaluation, with pr_curve.csv and COCOEvaluator's results.
        gt (str or Path): COCO ground truth.
        image_root (str or Path): folder that its ``file_name`` is relative to.
        tau (float): score from which on a detection counts.

    Returns:
        list[Path]: the two pictures.
    """
    folder = Path(folder)
    pictures = [folder / "pr_curve.png", folder / "contact_sheet.png"]
    curves = read_pr_curves(folder / "pr_curve.csv") or read_pr_curves(
        folder / "pr_curve.csv", "bbox"
    )
    draw_pr_curves(curves, pictures[0], tau=tau)
    results = folder / "coco_instances_results.json"
    draw_contact_sheet(gt, results, image_root, pictures[1], tau=tau)
    return pictures
