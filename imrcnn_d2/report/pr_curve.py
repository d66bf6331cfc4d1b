"""Precision-recall curves as a picture: one model's, or those of several in one."""

import numpy as np
from matplotlib.figure import Figure

from ..data.csv_files import read_rows
from ..evaluation.curves import PRCurve
from .style import STYLES, label_operating_point, legend_label, save_figure, tidy

__all__ = ["draw_pr_curves", "draw_pr_panels", "read_pr_curves"]


def read_pr_curves(path, iou_type="segm"):
    """
    Args:
        path (str or Path): a ``pr_curve.csv`` of :func:`imrcnn_d2.evaluation.files.write_results`.
        iou_type (str): "segm" or "bbox".

    Returns:
        dict[str, PRCurve]: by class name. Classes without ground truth, and without a detection,
        have no curve.
    """
    rows = {}
    for row in read_rows(path, ("iou_type", "class", "score", "tp", "fp", "n_gt")):
        if row["iou_type"] == iou_type and int(row["n_gt"]):
            rows.setdefault(row["class"], []).append(row)
    return {
        name: PRCurve(
            score=np.array([float(row["score"]) for row in own]),
            tp=np.array([int(row["tp"]) for row in own]),
            fp=np.array([int(row["fp"]) for row in own]),
            num_gt=int(own[0]["n_gt"]),
        )
        for name, own in rows.items()
    }


def draw_pr_curves(curves, path, *, tau=0.7):
    """
    Draw each curve as it is (thin) and its envelope, whose area is AP50_voc, with the operating
    point at ``tau`` (dot) and the break-even point, on the diagonal (diamond).

    Args:
        curves (dict[str, PRCurve]): by the name in the legend: classes of a run, or runs.
        path (str or Path): .png, .svg or .pdf.
        tau (float): score threshold of the operating point.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    title = "Precision and recall at IoU 0.5"
    return draw_pr_panels({title: curves}, [path], tau=tau)


def draw_pr_panels(panels, paths, *, tau=0.7):
    """
    Draw several pictures as those of :func:`draw_pr_curves` side by side, such as one a class with
    the curves of all models.

    Args:
        panels (dict[str, dict[str, PRCurve]]): by title.
        paths (list[str or Path]): where to save it, .png, .svg or .pdf.
        tau (float): score threshold of the operating point.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 6.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, title, curves, tau)
    for axes in grid[len(panels) :]:
        axes.remove()
    for path in paths:
        save_figure(figure, path, dpi=200)
    return figure


def _draw_panel(axes, title, curves, tau):
    axes.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1)
    for number, (name, curve) in enumerate(curves.items()):
        colour, style = STYLES[number % len(STYLES)]
        _draw(axes, name, curve, tau, colour, style)
    if not curves:
        axes.text(50, 50, "No detections", ha="center", va="center", fontsize=12)
    dot = label_operating_point(axes, tau)
    axes.plot([], [], marker="D", color="white", label="break-even point (BEP)", **dot)
    axes.set(
        xlabel="Recall (%)",
        ylabel="Precision (%)",
        xlim=(0, 101),
        ylim=(0, 101),
        aspect="equal",
        title=title,
    )
    tidy(axes)
    axes.legend(loc="lower left", fontsize=8.5, framealpha=0.95, handlelength=3.2)


def _draw(axes, name, curve, tau, colour, style):
    even = 100 * curve.break_even_point
    label = f"{legend_label(name)}: AP50_voc {100 * curve.area:.1f}, "
    label += "BEP n/a" if np.isnan(even) else f"BEP {even:.1f}"
    recall, precision, envelope = (
        100 * values for values in (curve.recall, curve.precision, curve.envelope)
    )
    # The envelope holds up to each recall from the one before: steps that fall at its end.
    x = np.concatenate([[0], recall, recall[-1:]])
    y = np.concatenate([envelope[:1], envelope, [0]])
    axes.step(x, y, where="pre", color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.plot(recall, precision, color=colour, linewidth=0.7, alpha=0.45)
    mark = dict(markersize=8, markeredgewidth=1.3, zorder=4)
    at_tau = np.flatnonzero(curve.score >= tau)[-1:]
    axes.plot(recall[at_tau], precision[at_tau], "o", color=colour, markeredgecolor="white", **mark)
    if np.isfinite(curve.break_even_point):
        even = [100 * curve.break_even_point]
        axes.plot(even, even, "D", color="white", markeredgecolor=colour, **mark)
