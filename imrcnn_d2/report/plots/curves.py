"""What figures do as the score threshold moves: one model's, or those of several."""

import math

import numpy as np
from matplotlib.figure import Figure

from imrcnn_d2.evaluation.detection.curves import RATES, PRCurve
from imrcnn_d2.evaluation.statistics import clopper_pearson
from imrcnn_d2.report.plots.style import (
    STYLES,
    label_operating_point,
    legend_label,
    save_figure,
    tidy,
)
from imrcnn_d2.utils.files import read_rows

__all__ = [
    "plot_calibration",
    "plot_class_roc",
    "plot_froc",
    "plot_pr_curves",
    "plot_pr_panels",
    "plot_roc_curves",
    "plot_thresholds",
    "read_pr_curves",
]


def read_pr_curves(path, iou_type="segm"):
    """
    Args:
        path (str or Path): a ``pr_curve.csv`` of :func:`imrcnn_d2.evaluation.output.write_results`.
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


def plot_pr_curves(curves, path, *, tau=0.7):
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
    return plot_pr_panels({title: curves}, [path], tau=tau)


def plot_pr_panels(panels, paths, *, tau=0.7):
    """
    Draw several pictures as those of :func:`plot_pr_curves` side by side, such as one a class with
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


# False alarms per image at the left edge, where the logarithmic axis begins.
LEAST = 1 / 32


def plot_froc(curves, path, *, tau=0.7):
    """
    Draw sensitivity for lesions against false alarms per image, with the operating point at
    ``tau`` (dot). Past its last detection a curve goes on as a thin line.

    Args:
        curves (dict[str, FROC]): by the name in the legend.
        path (str or Path): .png, .svg or .pdf.
        tau (float): score threshold of the operating point.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axes = figure.add_subplot(xlim=(LEAST, RATES[-1]))
    axes.set_xscale("log", base=2)
    for number, (name, froc) in enumerate(curves.items()):
        colour, style = STYLES[number % len(STYLES)]
        curve = froc.curve()
        x, y = curve["fp_per_image"], curve["sensitivity"]
        mean = froc.values()["mean"]
        label = legend_label(f"{name}: mean {mean:.1f}" if np.isfinite(mean) else f"{name}: n/a")
        steps = dict(color=colour, where="post")
        axes.step([0, *x], [0, *y], label=label, linestyle=style, linewidth=1.8, **steps)
        if len(x):
            axes.step([x[-1], RATES[-1]], [y[-1]] * 2, linewidth=0.8, alpha=0.6, **steps)
        at_tau = np.flatnonzero(curve["score"] >= tau)[-1:]
        # A point left of the axis, without a false alarm, is shown on its edge.
        axes.plot(
            np.maximum(x[at_tau], LEAST),
            y[at_tau],
            "o",
            color=colour,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=1.3,
            zorder=4,
            clip_on=False,
        )
    label_operating_point(axes, tau)
    ticks = [LEAST, LEAST * 2, *RATES]
    axes.set(
        xlabel="False alarms per image (mean)",
        ylabel="Sensitivity for lesions (%)",
        ylim=(-1, 101),
        title="Lesions found against false alarms",
    )
    axes.set_xticks(ticks, [f"1/{1 / t:.0f}" if t < 1 else f"{t:g}" for t in ticks])
    tidy(axes)
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    save_figure(figure, path, dpi=200)
    return figure


def plot_roc_curves(counts, path, *, tau=0.7):
    """
    Draw sensitivity against false alarms on lesion-free images, as the threshold on an image's
    highest score falls, with the operating point at ``tau`` (dot).

    Args:
        counts (dict[str, UnitCounts]): of images, by the name in the legend. There must be images
            with and without a lesion.
        path (str or Path): .png, .svg or .pdf.
        tau (float): score threshold of the operating point.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # three seconds

    figure = Figure(figsize=(6, 6.1), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1)
    for number, (name, own) in enumerate(counts.items()):
        colour, style = STYLES[number % len(STYLES)]
        false, true, threshold = roc_curve(own.positive, own.score, drop_intermediate=False)
        area = 100 * roc_auc_score(own.positive, own.score)
        line = dict(color=colour, linestyle=style, linewidth=1.8)
        axes.plot(100 * false, 100 * true, label=legend_label(f"{name}: AUROC {area:.1f}"), **line)
        at_tau = np.flatnonzero(threshold >= tau)[-1]
        mark = dict(markersize=8, markeredgewidth=1.3, markeredgecolor="white", zorder=4)
        axes.plot(100 * false[at_tau], 100 * true[at_tau], "o", color=colour, **mark)
    label_operating_point(axes, tau)
    axes.set(
        xlabel="1 − specificity (%)",
        ylabel="Sensitivity (%)",
        xlim=(-1, 101),
        ylim=(0, 101),
        aspect="equal",
        title="Is there a lesion in this image?",
    )
    tidy(axes)
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    save_figure(figure, path)
    return figure


MOST_IN_A_ROW = 3


def plot_class_roc(results, path):
    """
    Draw sensitivity against false alarms as the threshold on the probability of a class falls. The
    dot is what the highest probability decides.

    Args:
        results (dict[str, ClassificationResults]): by the name in the legend; of the same classes.
        path (str or Path): .png, .svg or .pdf.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    from sklearn.metrics import roc_curve  # three seconds

    classes = next(iter(results.values())).ground_truth.classes
    columns = min(len(classes), MOST_IN_A_ROW)
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, 4.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(classes) :]:
        axes.set_visible(False)
    for k, (axes, name) in enumerate(zip(panels.flat, classes, strict=False)):
        axes.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1)
        for number, (model, own) in enumerate(results.items()):
            label = legend_label(model)
            colour, style = STYLES[number % len(STYLES)]
            positive, score = own.ground_truth.label == k, own.probability[:, k]
            area = own.recognition[f"auroc_{name}"]
            if not positive.any() or positive.all():
                axes.plot([], [], color=colour, linestyle=style, label=f"{label}: n/a")
                continue
            false, true, _ = roc_curve(positive, score, drop_intermediate=False)
            line = dict(color=colour, linestyle=style, linewidth=1.8)
            axes.plot(100 * false, 100 * true, label=f"{label}: AUROC {area:.1f}", **line)
            called = own.metrics.predicted == k
            point = 100 * called[~positive].mean(), 100 * called[positive].mean()
            mark = dict(markersize=8, markeredgewidth=1.3, markeredgecolor="white", zorder=4)
            axes.plot(*point, "o", color=colour, **mark)
        axes.set(xlim=(-1, 101), ylim=(0, 101), aspect="equal")
        # The lowest panel of a column has the label.
        if k + columns >= len(classes):
            axes.set_xlabel("1 − specificity (%)")
            axes.tick_params(labelbottom=True)
        axes.set_title(f"{name} against all others", fontsize=11)
        tidy(axes)
        axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    for first in panels[:, 0]:
        first.set_ylabel("Sensitivity (%)")
    save_figure(figure, path)
    return figure


MARKERS = "osD^vPX"


def plot_calibration(calibrations, path, *, of=("Hits", "Detections")):
    """
    Draw the share of hits against the mean score of each bin, with exact 95 % intervals, and below
    it the number of detections in each.

    Args:
        calibrations (dict[str, Calibration]): by the name in the legend.
        path (str or Path): .png, .svg or .pdf.
        of (tuple[str, str]): what the two axes count: what is right, and what there is.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    figure = Figure(figsize=(6, 7.2), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3.6, 1))
    top.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1, label="ideal")
    for number, (name, calibration) in enumerate(calibrations.items()):
        colour, style = STYLES[number % len(STYLES)]
        bins, figures = calibration.diagram(), calibration.values()
        filled = bins["detections"] > 0
        x, y = bins["mean_score"][filled], bins["hit_rate"][filled]
        intervals = [
            clopper_pearson(*bin_)
            for bin_ in zip(bins["hits"][filled], bins["detections"][filled], strict=True)
        ]
        low, high = 100 * np.array(intervals).reshape(-1, 2).T
        label = f"{name}: n/a"
        if filled.any():
            label = f"{name}: ECE {figures['ece']:.1f} %, Brier {figures['brier'] / 100:.3f}"
        top.errorbar(
            x,
            y,
            yerr=(np.maximum(y - low, 0), np.maximum(high - y, 0)),
            color=colour,
            linestyle=style,
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            linewidth=1.6,
            elinewidth=0.8,
            capsize=2.5,
            label=legend_label(label),
        )
        edges = 100 * np.append(bins["lower"], 1)
        bottom.stairs(bins["detections"], edges, color=colour, linestyle=style, linewidth=1.6)
        if len(calibrations) == 1:
            bottom.stairs(bins["detections"], edges, color=colour, fill=True, alpha=0.25)
            for centre, count in zip((edges[:-1] + edges[1:]) / 2, bins["detections"], strict=True):
                bottom.annotate(
                    str(count),
                    (centre, count),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                )
    top.set(ylabel=f"{of[0]} (%)", ylim=(-1, 101), title="Do scores mean what they say?")
    bottom.set(xlabel="Score (%)", ylabel=of[1], xlim=(0, 101))
    bottom.margins(y=0.18)
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        tidy(axes)
    top.legend(loc="upper left", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    save_figure(figure, path, dpi=200)
    return figure


# Columns of thresholds.csv.
SHOWN = {
    "lesion_precision": "Precision",
    "lesion_recall": "Recall",
    "lesion_f1": "F1",
    "image_specificity": "Specificity for images",
}


def plot_thresholds(tables, path, *, tau=0.7):
    """
    Draw precision, recall and F1 for lesions and the specificity for images against the threshold:
    in one panel for one model, in a panel a figure for several.

    Args:
        tables (dict[str, list[dict]]): :attr:`LesionResults.thresholds`, by the name in
            the legend.
        path (str or Path): .png, .svg or .pdf.
        tau (float): the threshold to mark.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    alone = len(tables) == 1
    figure = Figure(figsize=(6, 4.8) if alone else (8.4, 7.2), layout="constrained")
    if alone:
        panels = [figure.add_subplot()] * len(SHOWN)
        panels[0].set(title=f"Figures against the threshold: {next(iter(tables))}")
    else:
        panels = [*figure.subplots(2, 2, sharex=True, sharey=True).flat]
    for number, (axes, (column, title)) in enumerate(zip(panels, SHOWN.items(), strict=True)):
        for run, (name, rows) in enumerate(tables.items()):
            defined = [row for row in rows if not math.isnan(row[column])]
            if alone and not defined:  # such as the specificity where every image has a lesion
                continue
            colour, style = STYLES[(number if alone else run) % len(STYLES)]
            axes.plot(
                [row["tau"] for row in defined],
                [row[column] for row in defined],
                color=colour,
                linestyle=style,
                linewidth=1.8,
                label=title if alone else legend_label(name),
            )
        if not alone:
            axes.set_title(title)
            if not any(len(line.get_xdata()) for line in axes.lines):
                axes.text(0.5, 50, "undefined", ha="center", va="center", color="0.4")
    for axes in dict.fromkeys(panels):
        axes.axvline(tau, color="0.55", linewidth=0.9, zorder=1, label=f"threshold {tau:g}")
        axes.set(xlim=(0, 1), ylim=(-1, 101))
        tidy(axes)
    figure.supxlabel("Score threshold", fontsize=10)
    figure.supylabel("%", fontsize=10)
    panels[0].legend(loc="best", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    save_figure(figure, path, dpi=200)
    return figure
