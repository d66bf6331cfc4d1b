"""Reliability diagrams: one model's, or those of several in one."""

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.bootstrap import clopper_pearson
from .style import STYLES, legend_label, save_figure, tidy

__all__ = ["draw_calibration"]

MARKERS = "osD^vPX"


def draw_calibration(calibrations, path, *, of=("Hits", "Detections")):
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
        bins, figures = calibration.diagram(), calibration.figures()
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
