"""Plots of an evaluation of procedures: lesions found against false alarms, and over time."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from imrcnn_d2.evaluation.video import VideoResults, curves, time_to_detection
from imrcnn_d2.report.names import threshold_name
from imrcnn_d2.report.plots.style import DOT, LEGEND, line_style, save_figure, tidy

# Columns of the curves that are shown, and what they are in the legend.
LINES = {
    "lesion_sensitivity": "lesions, in any frame",
    "box_sensitivity": "annotations, frame by frame",
}
LEAST_PER_MINUTE = 1  # what the axis shows at least twice of


def _thresholds(results):
    """Prefix of the groups, τ and marker of each threshold."""
    marks = [("", results.meta["tau"], "o")]
    return marks + ([("tau_val.", results.chosen_tau, "D")] if results.chosen_tau else [])


def plot_video_curves(results: VideoResults, path: str | Path) -> Figure:
    """Plot lesions found against false alarms per minute, and against the share of clean frames
    with an alarm (AFROC), with the 95 % intervals of both at the thresholds."""
    table = curves(results.outcomes)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes_of = {
        "false_alarms_per_minute": "False alarms per minute",
        "fpr": "Clean frames with an alarm (%)",
    }
    values = results.compared()
    for axes, (x, label) in zip(panels, axes_of.items(), strict=True):
        for number, (y, name) in enumerate(LINES.items()):
            axes.plot(table[x], table[y], label=name, linewidth=1.8, **line_style(number))
        for prefix, tau, marker in _thresholds(results):
            group = f"{prefix}video"
            limits = results.intervals.get(group, {})
            place = values[group][x], values[group]["lesion_sensitivity"]
            errors = {}
            for key, value, name in zip("xy", place, (x, "lesion_sensitivity"), strict=True):
                low, high = limits.get(name, (np.nan, np.nan))
                errors[f"{key}err"] = [[max(value - low, 0)], [max(high - value, 0)]]
            label_of = threshold_name(tau, results.outcomes.detections.mapped)
            style = {**DOT, "markeredgecolor": "0.2"}
            axes.errorbar(*place, **errors, color="0.35", elinewidth=1, fmt="none", zorder=3)
            axes.plot(*place, marker, color="0.6", label=label_of, **style)
        axes.set_xlabel(label)
        tidy(axes)
    rates = [
        np.nanmax([values[f"{prefix}video"]["false_alarms_per_minute"], LEAST_PER_MINUTE])
        for prefix, *_ in _thresholds(results)
    ]
    panels[0].set_xlim(0, 2 * max(rates))
    panels[1].set_xlim(-1, 101)
    panels[0].set(ylim=(-1, 102), ylabel="Found (%)", title="Found against false alarms")
    panels[1].set_title("Found against alarms in clean frames (AFROC)")
    panels[1].legend(loc="lower right", **LEGEND)
    return save_figure(figure, path, dpi=170)


def plot_time_to_detection(results: VideoResults, path: str | Path) -> Figure:
    """Plot the share of lesions detected by the time since they were first visible, with 95 %
    intervals, at each threshold."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot(ylim=(-1, 102))
    longest = 1.0
    for number, (prefix, tau, _) in enumerate(_thresholds(results)):
        table, style = time_to_detection(results, prefix), line_style(number)
        seconds = np.append(table["seconds"], 1e6)
        found, low, high = (np.append(table[k], table[k][-1]) for k in ("found", "low", "high"))
        name = threshold_name(tau, results.outcomes.detections.mapped)
        axes.step(seconds, found, where="post", label=name, linewidth=1.8, **style)
        band = dict(step="post", color=style["color"], alpha=0.15, linewidth=0)
        axes.fill_between(seconds, low, high, **band)
        longest = max(longest, 1.15 * table["seconds"][-1])
    axes.set(xlim=(0, longest), xlabel="Seconds since a lesion is first visible")
    axes.set(ylabel="Lesions detected by then (%)", title="Time to detection")
    tidy(axes)
    axes.legend(loc="lower right", **LEGEND)
    return save_figure(figure, path, dpi=170)
