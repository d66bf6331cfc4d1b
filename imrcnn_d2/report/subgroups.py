"""Figures by group: the headline ones as a table, and as a forest plot."""

import math
import re
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from imrcnn_d2.report.names import metric_name
from imrcnn_d2.report.plots.style import BLUE, save_figure, tidy
from imrcnn_d2.report.tables import format_value, markdown_table

__all__ = ["plot_all_groups", "plot_groups", "groups_table"]


# "group/figure" in the order of a table; those of a picture are fewer, and all in percent.
HEADLINE = {
    "image": (
        "{kind}/AP",
        "{kind}/AP50",
        "lesion/precision",
        "lesion/recall",
        "lesion/f1",
        "lesion/iou",
        "lesion/dice",
        "lesion/fp_per_image",
        "image/recall",
        "image/specificity",
        "image/auroc",
        "image/mdice",
    ),
    "lesion": ("lesion/recall", "lesion/iou", "lesion/iou_box", "lesion/iou_all", "lesion/dice"),
    "recognition": (
        "recognition/top1",
        "recognition/balanced_accuracy",
        "recognition/f1",
        "recognition/auroc",
        "recognition/cross_entropy",
        "cancer/recall",
        "cancer/specificity",
        "cancer/auroc",
    ),
}
DRAWN = {
    "image": (
        "{kind}/AP50",
        "lesion/precision",
        "lesion/recall",
        "lesion/iou",
        "image/specificity",
    ),
    "lesion": ("lesion/recall", "lesion/iou", "lesion/dice"),
    "recognition": (
        "recognition/top1",
        "recognition/balanced_accuracy",
        "recognition/auroc",
        "cancer/recall",
        "cancer/specificity",
    ),
}
ALL = "all"
CENTRED = {"ha": "center", "va": "center"}


def groups_table(results, column):
    """
    Args:
        results (LesionResults or ClassificationResults): with groups.
        column (str): of them.

    Returns:
        str: a Markdown table with a column for all and one for each group: what is in it, and its
        headline figures with their intervals.
    """
    endpoints = _endpoints(results, column, HEADLINE)
    rows = list(_groups(results, column))
    # Patients may be known of some groups only.
    sizes = list(dict.fromkeys(size for _, n, *_ in rows for size in n))
    table = {"": [*sizes, *(endpoint.replace("/", " ") for endpoint in endpoints)]}
    for name, n, figures, intervals in rows:
        table[name] = [str(n.get(size, "")) for size in sizes]
        for endpoint in endpoints:
            value = _of(figures, endpoint)
            interval = _of(intervals, endpoint)
            table[name].append(format_value(endpoint, value, interval, decimals=2))
    return markdown_table(pd.DataFrame(table))


def plot_all_groups(results, folder):
    """
    Args:
        results (LesionResults or ClassificationResults): with groups, or without.
        folder (Path):

    Returns:
        list[Path]: a picture ``by_COLUMN.png`` for each column, see :func:`plot_groups`.
    """
    paths = []
    for column in results.by_group:
        paths.append(folder / f"by_{re.sub('[^A-Za-z0-9.-]', '_', column)}.png")
        plot_groups(results, column, paths[-1])
    return paths


def plot_groups(results, column, path):
    """
    Draw the headline figures of each group with their 95 % intervals, those of all as a band
    behind them. Figures that all together do not define are left out.

    Args:
        results (LesionResults or ClassificationResults): with groups.
        column (str): of them.
        path (str or Path): .png, .svg or .pdf.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    rows = list(_groups(results, column))
    wished = _endpoints(results, column, DRAWN)
    shown = [e for e in wished if not math.isnan(_of(results.compared(), e))] or wished[:1]
    labels = ["\n".join([*textwrap.wrap(name, 26, max_lines=2), _sizes(n)]) for name, n, *_ in rows]
    figure = Figure(figsize=(1.6 + 2.1 * len(shown), 1.1 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, endpoint in zip(panels, shown, strict=True):
        for place, (_, _, figures, intervals) in enumerate(rows):
            value = _of(figures, endpoint)
            if math.isnan(value):
                across = axes.get_yaxis_transform()
                axes.text(0.5, place, "n/a", color="0.5", fontsize=8, transform=across, **CENTRED)
                continue
            colour, marker = ("0.25", "D") if place == 0 else (BLUE, "o")
            interval = _of(intervals, endpoint) or (math.nan, math.nan)
            axes.plot(interval, [place] * 2, color=colour, linewidth=1.8, solid_capstyle="butt")
            style = dict(color=colour, markersize=6, markeredgecolor="white", zorder=4)
            axes.plot(value, place, marker, **style)
            if place == 0:
                axes.axvline(value, color="0.25", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
                if not np.isnan(interval).any():
                    axes.axvspan(*interval, color="0.93", zorder=0)
        low, high = axes.get_xlim()
        axes.set(xlim=(max(low, -2), min(high, 102)))
        axes.set_title(metric_name(endpoint), fontsize=9)
        axes.set_xlabel("%", fontsize=8)
        axes.tick_params(labelsize=8)
        tidy(axes)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"By {column}, with 95 % intervals", fontsize=10)
    save_figure(figure, path, dpi=170)
    return figure


def _groups(results, column):
    """[(name, n, figures, intervals)]: all first."""
    yield ALL, _size(results), results.compared(), results.intervals
    for name, group in results.by_group[column].groups.items():
        yield name, group.n, group.values, group.intervals


def _size(results):
    """{images, lesions, patients: how many}, the last where known."""
    names = ("images", "lesions", "patients")
    return {name: results.meta[name] for name in names if results.meta.get(name) is not None}


def _endpoints(results, column, endpoints):
    """Those of the endpoints that there are."""
    if results.meta.get("task") == "recognition":
        groups = results.groups()
        return [e for e in endpoints["recognition"] if e.partition("/")[0] in groups]
    level, kind = results.by_group[column].level, results.meta["iou_type"]
    return [endpoint.format(kind=kind) for endpoint in endpoints[level]]


def _of(groups, endpoint):
    """The value of "group/figure"; None where there is none."""
    group, _, figure = endpoint.partition("/")
    return groups.get(group, {}).get(figure)


def _sizes(n):
    words = {"lesions": "lesion", "images": "image", "patients": "patient"}
    return ", ".join(f"{n[k]} {one}{'s' * (n[k] != 1)}" for k, one in words.items() if k in n)
