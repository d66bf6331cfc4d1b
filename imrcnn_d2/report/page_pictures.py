"""The page's curves, drawn by the functions that draw them for the disk, as data in the page."""

import base64
import math
import tempfile
from pathlib import Path

from matplotlib import rc_context

from .calibration import draw_calibration
from .froc import draw_froc
from .pr_curve import draw_pr_curves
from .roc_curve import draw_roc_curves
from .thresholds import draw_thresholds

__all__ = ["as_data", "picture", "pictures"]

PIXELS = 96  # CSS's in an inch


def pictures(runs):
    """
    Args:
        runs (list[Run]): of one test set, evaluated at one threshold.

    Returns:
        tuple[list[dict], list[str]]: pictures, with title, caption, alt, source (a data URL), width
        and height in pixels; and why some are missing.
    """
    missing = [
        f"{run.name} gives no scores, so it has no curves."
        for run in runs
        if not run.results.detections.scored
    ]
    results = {run.name: run.results for run in runs if run.results.detections.scored}
    if not results:
        return [], missing
    tau = {"tau": runs[0].metrics["meta"]["tau"]}
    measures = {name: own.measures for name, own in results.items()}
    drawn = [
        picture(
            "Precision and recall",
            "Thick: the envelope, whose area is AP50_voc. Diamond: break-even point.",
            {name: 100 * curve.area for name, curve in _pr_curves(results).items()},
            "area under the precision-recall curve in percent",
            as_data(draw_pr_curves, _pr_curves(results), **tau),
        ),
        picture(
            "Free-response ROC",
            "Lesions found against false alarms an image. Mean: of the seven marked rates.",
            {name: own.froc["mean"] for name, own in results.items()},
            "mean sensitivity in percent",
            as_data(draw_froc, {name: own.froc for name, own in measures.items()}, **tau),
        ),
    ]
    counts = {name: own.counts for name, own in results.items()}
    positive = runs[0].results.counts.positive
    if positive.any() and not positive.all():
        drawn.append(
            picture(
                "ROC of images",
                "An image’s score is that of its highest detection, 0 without one.",
                {name: own.image["auroc"] for name, own in results.items()},
                "area under the ROC curve in percent",
                as_data(draw_roc_curves, counts, **tau),
            )
        )
    else:
        kind = "without" if positive.any() else "with"
        missing.append(f"No ROC curve: the test set has no image {kind} a lesion.")
    drawn += [
        picture(
            "Calibration",
            "Do 80 % of the detections scored 0.8 hit a lesion? Below: how many there are.",
            {name: own.calibration["ece"] for name, own in results.items()},
            "expected calibration error in percent",
            as_data(draw_calibration, {name: own.calibration for name, own in measures.items()}),
        ),
        picture(
            "Figures over the threshold",
            "To look at. A threshold that is chosen here is no longer tested by these data.",
            {},
            "precision, recall, F1 and specificity at score thresholds from 0.05 to 0.95",
            as_data(
                draw_thresholds,
                {name: own.thresholds for name, own in results.items()},
                **tau,
            ),
        ),
    ]
    return drawn, missing


def picture(title, caption, values, what, data):
    """
    Args:
        title (str), caption (str):
        values (dict[str, float]), what (str): for who cannot see it: figures by model, and of what.
        data (dict): of :func:`as_data`.

    Returns:
        dict: as of :func:`pictures`.
    """
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    said = "; ".join(f"{name}: {value:.1f}" for name, value in known.items())
    alt = f"{title}: {what}{f'. {said}' if said else ''}."
    return {"title": title, "caption": caption, "alt": alt, **data}


def _pr_curves(results):
    """{name: PRCurve}: one a run, or one for each of its classes."""
    curves = {}
    for run, own in results.items():
        kind = "segm" if any(kind == "segm" for kind, _, _ in own.curves) else "bbox"
        of_run = [(name, curve) for of, name, curve in own.curves if of == kind]
        for name, curve in of_run:
            if curve.num_gt and len(curve.score):
                curves[run if len(of_run) == 1 else f"{run}, {name}"] = curve
    return curves


def as_data(draw, *args, **kwargs):
    """dict: what a function that writes a picture to a path would write, as a data URL."""
    # Text as text, not as outlines: smaller, and sharp at any size.
    with tempfile.TemporaryDirectory() as folder, rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "picture.svg"
        figure = draw(*args, path, **kwargs)
        content = base64.b64encode(path.read_bytes()).decode()
    width, height = (round(PIXELS * inches) for inches in figure.get_size_inches())
    return {"source": f"data:image/svg+xml;base64,{content}", "width": width, "height": height}
