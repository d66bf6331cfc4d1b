"""Metrics against the score threshold, by group and by distortion, of one model or of several.

Every function takes what it plots by its name in the legend, writes it to a .png, .svg or .pdf and
returns the figure that was saved.
"""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES
from imrcnn_d2.evaluation import ClassificationResults, LesionResults
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.counts import UnitCounts
from imrcnn_d2.evaluation.detection.curves import FROC, RATES, PRCurve
from imrcnn_d2.evaluation.detection.metrics import FEW_CASES, is_percent
from imrcnn_d2.evaluation.statistics import clopper_pearson
from imrcnn_d2.evaluation.subgroups import Group
from imrcnn_d2.report.names import metric_name
from imrcnn_d2.report.plots.style import (
    BLUE,
    DOT,
    LEGEND,
    label_operating_point,
    legend_label,
    line_style,
    save_figure,
    tidy,
)
from imrcnn_d2.report.tables import (
    FEW_MARK,
    cases_text,
    group_endpoints,
    groups_and_all,
    value_of,
)


def plot_pr_panels(
    panels: Mapping[str, Mapping[str, PRCurve]],
    *paths: str | Path,
    tau: float | None,
    mapped: bool = False,
) -> Figure:
    """Plot panels, by title, with each curve (thin) and its envelope, whose area is AP50_voc, the
    operating point at ``tau`` (dot) and the break-even point, on the diagonal (diamond). The legend
    says whether scores are ``mapped``. Without a common ``tau`` there are no dots.
    """
    figure, grid = _grid(len(panels), 3, (6, 6.1))
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        square(axes, left=0)
        for number, (name, curve) in enumerate(curves.items()):
            _plot_pr_curve(axes, name, curve, tau, line_style(number))
        if not curves:
            axes.text(50, 50, "No detections", ha="center", va="center", fontsize=12)
        mark = label_operating_point(axes, tau, mapped)
        axes.plot([], [], marker="D", color="white", label="break-even point (BEP)", **mark)
        axes.set(xlabel="Recall (%)", ylabel="Precision (%)", title=title)
        axes.legend(loc="lower left", **LEGEND)
    for path in paths:
        save_figure(figure, path, dpi=200)
    return figure


def _grid(number, most_columns, size, margin=(0, 0), **options):
    """A figure of ``number`` panels of ``size`` inches, and its (rows, columns) axes."""
    columns = max(min(number, most_columns), 1)
    rows = max(math.ceil(number / columns), 1)
    figsize = (margin[0] + size[0] * columns, margin[1] + size[1] * rows)
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat[number:]:
        axes.remove()
    return figure, grid


def square(axes: Axes, left: float = -1):
    """Both axes from 0 to 100, with the diagonal."""
    axes.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1)
    axes.set(xlim=(left, 101), ylim=(0, 101), aspect="equal")
    tidy(axes)


def _plot_operating_point(axes, x, y, score, tau, style, **options):
    last = np.flatnonzero(score >= tau)[-1:]
    axes.plot(x[last], y[last], "o", color=style["color"], **DOT, **options)


def _plot_pr_curve(axes, name, curve, tau, style):
    break_even = 100 * curve.break_even_point
    label = f"{legend_label(name)}: AP50_voc {100 * curve.area:.1f}, "
    label += "BEP n/a" if np.isnan(break_even) else f"BEP {break_even:.1f}"
    recall, precision, envelope = (
        100 * values for values in (curve.recall, curve.precision, curve.envelope)
    )
    # The envelope holds up to each recall from the one before: steps that fall at its end.
    x = np.concatenate([[0], recall, recall[-1:]])
    y = np.concatenate([envelope[:1], envelope, [0]])
    axes.step(x, y, where="pre", linewidth=1.8, label=label, **style)
    axes.plot(recall, precision, color=style["color"], linewidth=0.7, alpha=0.45)
    if tau is not None:
        _plot_operating_point(axes, recall, precision, curve.score, tau, style)
    if np.isfinite(break_even):
        mark = {**DOT, "markeredgecolor": style["color"]}
        axes.plot([break_even], [break_even], "D", color="white", **mark)


PR_TITLE = "Precision and recall at IoU 0.5"
LOWEST_RATE = 1 / 32  # false alarms per image, where the logarithmic axis begins


def plot_froc(
    curves: Mapping[str, FROC], path: str | Path, *, tau: float, mapped: bool = False
) -> Figure:
    """Plot sensitivity for lesions against false alarms per image, with the operating point at
    ``tau`` of scores that are ``mapped`` or not (dot), and the seven values that the mean is of
    (small marks). Past its last detection a curve continues as a thin line.
    """
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axes = figure.add_subplot(xlim=(LOWEST_RATE, RATES[-1]))
    axes.set_xscale("log", base=2)
    for number, (name, froc) in enumerate(curves.items()):
        curve, values, style = froc.curve(), froc.values(), line_style(number)
        mean = values.pop("mean")
        x, y = curve["fp_per_image"], curve["sensitivity"]
        label = legend_label(f"{name}: mean {mean:.1f}" if np.isfinite(mean) else f"{name}: n/a")
        axes.step([0, *x], [0, *y], where="post", label=label, linewidth=1.8, **style)
        if len(x):
            thin = dict(where="post", color=style["color"], linewidth=0.8, alpha=0.6)
            axes.step([x[-1], RATES[-1]], [y[-1]] * 2, **thin)
        axes.plot(RATES, list(values.values()), "|", color=style["color"], markersize=11)
        # A point without a false alarm, left of the axis, is shown on its edge.
        x = np.maximum(x, LOWEST_RATE)
        _plot_operating_point(axes, x, y, curve["score"], tau, style, clip_on=False)
    label_operating_point(axes, tau, mapped)
    axes.set(xlabel="False alarms per image (mean)", ylabel="Sensitivity for lesions (%)")
    axes.set(ylim=(-1, 101), title="Lesions found against false alarms")
    ticks = [LOWEST_RATE, LOWEST_RATE * 2, *RATES]
    axes.set_xticks(ticks, [f"1/{1 / t:.0f}" if t < 1 else f"{t:g}" for t in ticks])
    tidy(axes)
    axes.legend(loc="lower right", **LEGEND)
    return save_figure(figure, path, dpi=200)


def plot_roc_curves(
    counts: Mapping[str, UnitCounts], path: str | Path, *, tau: float, mapped: bool = False
) -> Figure:
    """Plot sensitivity against false alarms on lesion-free images, by an image's highest score,
    with the operating point at ``tau`` of scores that are ``mapped`` or not (dot). There must be
    images with and without a lesion.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # three seconds

    figure = Figure(figsize=(6, 6.1), layout="constrained")
    axes = figure.add_subplot()
    square(axes)
    for number, (name, images) in enumerate(counts.items()):
        style = line_style(number)
        false, true, threshold = roc_curve(images.positive, images.score, drop_intermediate=False)
        label = f"{name}: AUROC {100 * roc_auc_score(images.positive, images.score):.1f}"
        axes.plot(100 * false, 100 * true, linewidth=1.8, label=legend_label(label), **style)
        _plot_operating_point(axes, 100 * false, 100 * true, threshold, tau, style)
    label_operating_point(axes, tau, mapped)
    axes.set(xlabel="1 − specificity (%)", ylabel="Sensitivity (%)")
    axes.set_title("Is there a lesion in this image?")
    axes.legend(loc="lower right", **LEGEND)
    return save_figure(figure, path)


def plot_class_roc(results: Mapping[str, ClassificationResults], path: str | Path) -> Figure:
    """Plot a panel per class: sensitivity against false alarms as the threshold on its probability
    falls. The dot is the decision by the highest probability. All models are of the same classes.
    """
    from sklearn.metrics import roc_curve  # three seconds

    classes = next(iter(results.values())).ground_truth.classes
    figure, grid = _grid(len(classes), 3, (4.4, 4.9), (0.4, 0), sharex=True, sharey=True)
    for k, (axes, name) in enumerate(zip(grid.flat, classes, strict=False)):
        square(axes)
        for number, (model, scored) in enumerate(results.items()):
            label, style = legend_label(model), line_style(number)
            positive, score = scored.ground_truth.label == k, scored.probability[:, k]
            if not positive.any() or positive.all():
                axes.plot([], [], label=f"{label}: n/a", **style)
                continue
            label += f": AUROC {scored.recognition[f'auroc_{name}']:.1f}"
            false, true, _ = roc_curve(positive, score, drop_intermediate=False)
            axes.plot(100 * false, 100 * true, linewidth=1.8, label=label, **style)
            predicted = scored.metrics.predicted == k
            point = 100 * predicted[~positive].mean(), 100 * predicted[positive].mean()
            axes.plot(*point, "o", color=style["color"], **DOT)
        if k + grid.shape[1] >= len(classes):  # the lowest panel of its column
            axes.set_xlabel("1 − specificity (%)")
            axes.tick_params(labelbottom=True)
        axes.set_title(f"{name} against all others", fontsize=11)
        axes.legend(loc="lower right", **LEGEND)
    for axes in grid[:, 0]:
        axes.set_ylabel("Sensitivity (%)")
    return save_figure(figure, path)


MARKERS = "osD^vPX"


def reliability(
    results: Mapping[str, LesionResults | ClassificationResults],
) -> dict[str, Calibration]:
    """The calibration of each model's scores, by its name; where a map was applied to them, that of
    the scores before it and after it."""
    curves = {}
    for name, scored in results.items():
        after, before = scored.metrics.calibration, scored.metrics.calibration_raw
        if before is None:
            curves[name] = after
        else:
            curves |= {f"{name}, before the map": before, f"{name}, after it": after}
    return curves


def plot_calibration(
    calibrations: Mapping[str, Calibration],
    path: str | Path,
    *,
    labels: tuple[str, str] = ("Hits", "Detections"),
) -> Figure:
    """Plot the share of hits against the mean score of each bin, with exact 95 % intervals, and
    below it the number of detections in each. ``labels`` names the hits and the cases.
    """
    figure = Figure(figsize=(6, 7.2), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3.6, 1))
    top.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1, label="ideal")
    for number, (name, calibration) in enumerate(calibrations.items()):
        style = line_style(number)
        values, bins = calibration.values(), calibration.diagram()
        counts, label = bins["detections"], f"{name}: n/a"
        if counts.any():
            label = f"{name}: ECE {values['ece']:.1f} %, Brier {values['brier']:.1f} %"
        marker = MARKERS[number % len(MARKERS)]
        _plot_reliability(top, bins, label=legend_label(label), marker=marker, **style)
        edges = 100 * np.append(bins["lower"], 1)
        bottom.stairs(counts, edges, linewidth=1.6, **style)
        if len(calibrations) == 1:
            bottom.stairs(counts, edges, color=style["color"], fill=True, alpha=0.25)
            above = dict(xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7.5)
            for centre, count in zip((edges[:-1] + edges[1:]) / 2, counts, strict=True):
                bottom.annotate(str(count), (centre, count), **above)
    top.set(ylabel=f"{labels[0]} (%)", ylim=(-1, 101), title="Do scores mean what they say?")
    bottom.set(xlabel="Score (%)", ylabel=labels[1], xlim=(0, 101))
    bottom.margins(y=0.18)
    bottom.set_ylim(bottom=0)
    tidy(top)
    tidy(bottom)
    top.legend(loc="upper left", **LEGEND)
    return save_figure(figure, path, dpi=200)


def _plot_reliability(axes, bins, **style):
    """The share of hits in each bin that has a detection, with its interval."""
    filled = bins["detections"] > 0
    y = bins["hit_rate"][filled]
    cases = zip(bins["hits"][filled], bins["detections"][filled], strict=True)
    low, high = 100 * np.array([clopper_pearson(*pair) for pair in cases]).reshape(-1, 2).T
    lines = dict(markersize=6, linewidth=1.6, elinewidth=0.8, capsize=2.5)
    limits = np.maximum(y - low, 0), np.maximum(high - y, 0)
    axes.errorbar(bins["mean_score"][filled], y, yerr=limits, **lines, **style)


def plot_calibration_panels(calibrations: Mapping[str, Calibration], path: str | Path) -> Figure:
    """Plot one panel per calibration: the share of hits against the mean score of each bin, with
    exact 95 % intervals. The area of a dot is that of its share of the detections."""
    figure, grid = _grid(len(calibrations), 4, (2.7, 3), (0.3, 0.3), sharex=True, sharey=True)
    for axes, (name, calibration) in zip(grid.flat, calibrations.items(), strict=False):
        square(axes)
        bins, values = calibration.diagram(), calibration.values()
        _plot_reliability(axes, bins, color=BLUE, linestyle="none")
        shares = bins["detections"] / max(bins["detections"].sum(), 1)
        axes.scatter(bins["mean_score"], bins["hit_rate"], 12 + 260 * shares, BLUE, zorder=3)
        ece = "n/a" if math.isnan(values["ece"]) else f"{values['ece']:.1f} %"
        axes.set_title(f"{name}\n{values['n']:,.0f} detections, ECE {ece}", fontsize=9)
    figure.supxlabel("Score (%)", fontsize=10)
    figure.supylabel("Hits (%)", fontsize=10)
    return save_figure(figure, path, dpi=170)


# Columns of thresholds.csv.
THRESHOLD_COLUMNS = {
    "lesion_precision": "Precision",
    "lesion_recall": "Recall",
    "lesion_f1": "F1",
    "image_specificity": "Specificity for images",
}


def plot_thresholds(
    tables: Mapping[str, list[dict]], path: str | Path, *, tau: float, mapped: bool = False
) -> Figure:
    """Plot the rows of `LesionResults.thresholds` against the threshold: in one panel for one
    model, in one panel per metric for several. ``tau`` is marked; scores are ``mapped`` or not.
    """
    alone = len(tables) == 1
    figure = Figure(figsize=(6, 4.8) if alone else (8.4, 7.2), layout="constrained")
    if alone:
        title = f"Metrics against the threshold: {next(iter(tables))}"
        panels = [figure.add_subplot(title=title)] * len(THRESHOLD_COLUMNS)
    else:
        panels = [*figure.subplots(2, 2, sharex=True, sharey=True).flat]
    for i, (column, metric) in enumerate(THRESHOLD_COLUMNS.items()):
        for j, (name, rows) in enumerate(tables.items()):
            points = [(row["tau"], row[column]) for row in rows if not math.isnan(row[column])]
            if alone and not points:  # such as the specificity where every image has a lesion
                continue
            label, style = (metric, line_style(i)) if alone else (legend_label(name), line_style(j))
            panels[i].plot(*np.reshape(points, (-1, 2)).T, linewidth=1.8, label=label, **style)
        if not alone:
            panels[i].set_title(metric)
            if not any(len(line.get_xdata()) for line in panels[i].lines):
                panels[i].text(0.5, 50, "undefined", ha="center", va="center", color="0.4")
    for axes in dict.fromkeys(panels):
        axes.axvline(tau, color="0.55", linewidth=0.9, zorder=1, label=f"threshold {tau:.3g}")
        axes.set(xlim=(0, 1), ylim=(-1, 101))
        tidy(axes)
    score = "Mapped score" if mapped else "Score"
    figure.supxlabel(f"{score} threshold", fontsize=10)
    figure.supylabel("%", fontsize=10)
    panels[0].legend(loc="best", **LEGEND)
    return save_figure(figure, path, dpi=200)


# Those of HEADLINE in report.tables that are plotted, all in percent.
PLOTTED = {
    "image": (
        *("{kind}/AP50", "lesion/precision", "lesion/recall", "lesion/iou"),
        "image/specificity",
    ),
    "lesion": ("lesion/recall", "lesion/iou", "lesion/dice"),
    "procedure": (
        *("video/lesion_sensitivity", "video/persistence"),
        *("video/frame_sensitivity", "video/fpr"),
    ),
    "unique_lesion": (*("video/lesion_sensitivity", "video/persistence", "video/persistent_50"),),
    "recognition": (
        *("recognition/top1", "recognition/balanced_accuracy", "recognition/auroc"),
        *("cancer/recall", "cancer/specificity"),
    ),
}


def plot_groups(
    results: LesionResults | ClassificationResults, column: str, path: str | Path
) -> Figure:
    """Plot the headline metrics of each group of a column, those of all as a band, see
    `plot_forest`. Metrics that are undefined for all together are left out.
    """
    groups = groups_and_all(results, column)
    endpoints = group_endpoints(results, column, PLOTTED)
    shown = [e for e in endpoints if not math.isnan(value_of(results.compared(), e))]
    panels = {
        metric_name(endpoint): ("%", [ForestRow.of(group, endpoint) for group in groups.values()])
        for endpoint in shown or endpoints[:1]
    }
    labels = [row_label(name, group.n) for name, group in groups.items()]
    title = f"By {column}, with 95 % intervals"
    if any(endpoint.startswith("tau_val.") for endpoint in shown):
        title += f"; tau_val: {results.chosen_tau:.3g}, chosen on validation data"
    return plot_forest(labels, panels, path, title=title, summary=0)


class ForestRow(NamedTuple):
    """A row of a panel of `plot_forest`."""

    value: float
    interval: tuple[float, float]
    cases: str = ""  # their number, for readers
    few: bool = False

    @classmethod
    def of(cls, group: Group, endpoint: str) -> "ForestRow":
        interval = value_of(group.intervals, endpoint) or (math.nan, math.nan)
        cases = cases_text(group.cases(endpoint)).removeprefix("n ")
        return cls(value_of(group.values, endpoint), interval, cases, group.is_few(endpoint))


PANELS_IN_A_ROW = 5


def plot_forest(
    labels: list[str],
    panels: Mapping[str, tuple[str, list[ForestRow]]],
    path: str | Path,
    *,
    title: str,
    summary: int,
) -> Figure:
    """Plot one panel per metric, by title, with its unit, and one row per label: value, 95 %
    interval and number of cases; hollow, with a thin line, where these are few. The row
    ``summary`` is a diamond, with a band through all rows. An interval without a value is dashed.
    """
    size = 2.35, 0.8 + 0.5 * len(labels)
    figure, grid = _grid(len(panels), PANELS_IN_A_ROW, size, (1.6, 0.3), sharey=True)
    figure.get_layout_engine().set(w_pad=0.1)  # numbers of cases stand next to their own panel
    for axes, (name, (unit, rows)) in zip(grid.flat, panels.items(), strict=False):
        at_edge = dict(transform=axes.get_yaxis_transform(), va="center", fontsize=7, color="0.4")
        for y, row in enumerate(rows):
            axes.text(1.02, y, row.cases, ha="left", **at_edge)
            if math.isnan(row.value) and np.isnan(row.interval).any():
                axes.text(0.5, y, "n/a", ha="center", **at_edge)
                continue
            colour, marker = ("0.25", "D") if y == summary else (BLUE, "o")
            line = dict(color=colour, linewidth=0.8 if row.few else 1.8, solid_capstyle="butt")
            if math.isnan(row.value):
                line |= dict(color="0.25", linewidth=1.2, linestyle=(0, (3, 2)))
            axes.plot(row.interval, [y] * 2, **line)
            dot = dict(color=colour, markersize=7 if marker == "D" else 6, zorder=4)
            edge = dict(markeredgecolor="white")
            if row.few:
                edge = dict(markeredgecolor=colour, markerfacecolor="white")
            axes.plot(row.value, y, marker, **dot, **edge)
            if y == summary:
                axes.axvline(
                    row.value, color="0.25", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1
                )
                if not np.isnan(row.interval).any():
                    axes.axvspan(*row.interval, color="0.93", zorder=0)
        if any(row.cases for row in rows):
            above = {**at_edge, "va": "bottom"}
            axes.text(1.02, -0.5, "n", ha="left", **above)
        # Dashed intervals may be cut: that of a number without an upper limit would hide the rest.
        ends = [end for row in rows if not math.isnan(row.value) for end in (row[0], *row.interval)]
        low, high = axes.get_xlim()
        if unit == "%":
            axes.set_xlim(max(low, -2), min(high, 102))
        elif ends:
            axes.set_xlim(max(low, -0.05 * np.nanmax(ends)), 1.1 * np.nanmax(ends))
        axes.set_title(textwrap.fill(name, 24), fontsize=9)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        tidy(axes)
        axes.grid(axis="y", visible=False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(labels)), labels)
    grid[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    if any(row.few for _, rows in panels.values() for row in rows):
        title += f"; n: cases; hollow, {FEW_MARK}: fewer than {FEW_CASES}"
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path, dpi=170)


def row_label(name: str, n: Mapping[str, int]) -> str:
    """A label of `plot_forest`, of a group and its sizes."""
    return "\n".join([*textwrap.wrap(name, 26, max_lines=2), _sizes(n)])


_UNITS = ("lesion", "image", "procedure", "patient")


def _sizes(n):
    known = [(n[f"{unit}s"], unit) for unit in _UNITS if f"{unit}s" in n]
    return ", ".join(f"{number} {unit}{'s' * (number != 1)}" for number, unit in known)


def plot_robustness(
    documents: Mapping[str, dict], path: str | Path, *, metric: str = "lesion/f1"
) -> Figure:
    """Plot "group/name" of documents of `evaluate_robustness` with a panel for each distortion:
    a line for each model from the undistorted images, at the left, to the highest severity.

    Raises:
        ValueError: no row of a document has this metric, or they are of different images.
    """
    _check_documents(documents, metric)
    group, name = metric.split("/")
    percent = is_percent(name)
    measured = {row["distortion"] for d in documents.values() for row in d["rows"]}
    shown = [distortion for distortion in DISTORTIONS if distortion in measured]
    figure, grid = _grid(len(shown), 4, (2.5, 2.4), (0.6, 0.5), sharey=True)
    for key, axes in zip(shown, grid.flat, strict=False):
        for number, (model, document) in enumerate(documents.items()):
            style = line_style(number)
            points = [r for r in document["rows"] if r["distortion"] == key or not r["severity"]]
            x = [row["severity"] for row in points]
            y = [np.nan if row[metric] is None else row[metric] for row in points]
            axes.plot(x, y, label=legend_label(model), linewidth=1.6, **style)
            axes.plot(x, y, "o", color=style["color"], markersize=3.5)
        distortion = DISTORTIONS[key]
        levels = [f"{abs(level):g}" for level in distortion.levels]
        axes.set_xticks([0, *SEVERITIES], ["none", *levels], fontsize=7.5)
        axes.set_title(distortion.title, fontsize=9.5)
        axes.set_xlabel(distortion.unit, fontsize=8)
        axes.tick_params(axis="y", labelsize=7.5)
        tidy(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{group}: {name}{' (%)' if percent else ''}", fontsize=8)
        if percent:
            axes.set_ylim(-2, 102)
    handles = grid[0, 0].get_legend_handles_labels()
    style = dict(ncols=4, fontsize=9, handlelength=3, frameon=False)
    figure.legend(*handles, loc="outside lower center", **style)
    return save_figure(figure, path, dpi=200)


def _check_documents(documents, metric):
    for key in ("dataset_sha256", "images", "seed"):
        values = {model: document["meta"].get(key) for model, document in documents.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"The results are of different images: {key} is {values}")
    for model, document in documents.items():
        rows = document["rows"]
        if not rows or any(metric not in row for row in rows):
            known = sorted({key for row in rows for key in row if "/" in key})
            raise ValueError(f"{model} has no metric {metric!r}, only {', '.join(known)}")
