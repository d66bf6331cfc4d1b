"""The page's curves, drawn by the modules that draw them for the disk, as data in the page."""

import base64
import tempfile
from pathlib import Path

from matplotlib import rc_context

from .pr_curve import draw_pr_curves
from .roc_curve import draw_roc_curves

__all__ = ["pictures"]

POINTS_TO_PIXELS = 96 / 72


def pictures(runs):
    """
    Args:
        runs (list[Run]): of one test set, evaluated at one threshold.

    Returns:
        tuple[list[dict], list[str]]: pictures, with title, caption, alt, source (a data URL), width
        and height in pixels; and why some are missing.
    """
    tau = runs[0].metrics["meta"]["tau"]
    drawn, missing = [], []
    curves = _pr_curves(runs)
    said = "; ".join(f"{name}: {100 * curve.area:.1f}" for name, curve in curves.items())
    drawn.append(
        {
            "title": "Precision and recall",
            "caption": "Thick: the envelope, whose area is AP50_voc. Diamond: break-even point.",
            "alt": f"Precision-recall curves at IoU 0.5. Area in percent: {said or 'no curve'}.",
            **_as_data(draw_pr_curves, curves, tau=tau),
        }
    )
    counts = {run.name: run.results.counts for run in runs}
    positive = runs[0].results.counts.positive
    if positive.any() and not positive.all():
        areas = [(run.name, run.metrics["image"].get("auroc")) for run in runs]
        said = "; ".join(f"{name}: {area:.1f}" for name, area in areas if area is not None)
        drawn.append(
            {
                "title": "Receiver operating characteristic of images",
                "caption": "An image’s score is that of its highest detection, 0 without one.",
                "alt": f"ROC curves. Area in percent: {said}.",
                **_as_data(draw_roc_curves, counts, tau=tau),
            }
        )
    else:
        kind = "without" if positive.any() else "with"
        missing.append(
            f"No ROC curve: the test set has no image {kind} a lesion, so specificity or "
            "sensitivity is undefined."
        )
    return drawn, missing


def _pr_curves(runs):
    """{name: PRCurve}: one a run, or one for each of its classes."""
    curves = {}
    for run in runs:
        kind = "segm" if any(kind == "segm" for kind, _, _ in run.results.curves) else "bbox"
        own = [(name, curve) for of, name, curve in run.results.curves if of == kind]
        for name, curve in own:
            if curve.num_gt and len(curve.score):
                curves[run.name if len(own) == 1 else f"{run.name}, {name}"] = curve
    return curves


def _as_data(draw, *args, **kwargs):
    """What a function that writes a picture to a path would write, as a data URL."""
    # Text as text, not as outlines: smaller, and sharp at any size.
    with tempfile.TemporaryDirectory() as folder, rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "picture.svg"
        figure = draw(*args, path, **kwargs)
        content = base64.b64encode(path.read_bytes()).decode()
    width, height = (round(inches * 72 * POINTS_TO_PIXELS) for inches in figure.get_size_inches())
    return {
        "source": f"data:image/svg+xml;base64,{content}",
        "width": width,
        "height": height,
    }
