"""Confusion matrices: one model's, or those of several in a row."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.report.plots.style import save_figure


def plot_confusion_matrix(matrices: Mapping[str, ConfusionMatrix], path: str | Path) -> Figure:
    """Plot counts and, in the rows of classes, their share of the row, by which cells are shaded;
    the last row of a detector's is background. The matrices, by title, are of the same classes.
    """
    size = len(next(iter(matrices.values())).classes)
    width = 1.0 + 0.95 * size
    figure = Figure(figsize=(max(width * len(matrices), 3.6), width + 0.5), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        # False alarms are a share of nothing that can be counted: they stay unshaded.
        rows = size - int(np.isnan(matrix.counts[-1, -1]))
        cases = np.nansum(matrix.counts[:rows], axis=1, keepdims=True)
        share = matrix.counts[:rows] / np.where(cases, cases, np.nan)
        shade = np.vstack([np.nan_to_num(share), np.zeros((size - rows, size))])
        axes.imshow(shade, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix.counts):
            if np.isnan(count):
                hatched = dict(fill=False, hatch="///", ec="0.8")
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **hatched))
                continue
            text = f"{count:.0f}"
            if row < rows and count:
                text += f"\n{100 * share[row, column]:.1f} %"
            dark = shade[row, column] > 0.55
            axes.text(column, row, text, ha="center", va="center", color="w" if dark else "k")
        ticks = np.arange(size)
        turned = dict(rotation=30, ha="right") if size > 3 else dict(rotation=0, ha="center")
        axes.set_xticks(ticks, matrix.classes, **turned)
        axes.set_yticks(ticks, matrix.classes)
        axes.set_xticks(ticks[:-1] + 0.5, minor=True)
        axes.set_yticks(ticks[:-1] + 0.5, minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        axes.set(xlabel="Prediction", title=name)
    panels[0].set_ylabel("Truth")
    return save_figure(figure, path, dpi=200)
