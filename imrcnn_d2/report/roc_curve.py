"""Receiver operating characteristic of "is there a lesion in this image"."""

import numpy as np
from matplotlib.figure import Figure

from .style import STYLES, label_operating_point, legend_label, save_figure, tidy

__all__ = ["draw_roc_curves"]


def draw_roc_curves(counts, path, *, tau=0.7):
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
