"""Free-response ROC curves as a picture: one model's, or those of several in one."""

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.froc import RATES
from .style import STYLES, label_operating_point, legend_label, save_figure, tidy

__all__ = ["draw_froc"]

# False alarms per image at the left edge, where the logarithmic axis begins.
LEAST = 1 / 32


def draw_froc(curves, path, *, tau=0.7):
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
        mean = froc.figures()["mean"]
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
