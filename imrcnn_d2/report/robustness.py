"""How figures fall with the severity of distortions, and what the distortions look like."""

import math

import numpy as np
from matplotlib.figure import Figure

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort
from imrcnn_d2.evaluation.detection.metrics import is_percent
from imrcnn_d2.report.plots.style import STYLES, legend_label, save_figure, tidy

__all__ = ["plot_distortions", "plot_robustness"]


COLUMNS = 4


def plot_robustness(documents, path, *, figure="lesion/f1"):
    """
    Draw a panel for each distortion, with a line for each model from the images as they are, at
    the left, to the highest severity.

    Args:
        documents (dict[str, dict]): by the name in the legend: of :func:`evaluate_robustness`.
        path (str or Path): .png, .svg or .pdf.
        figure (str): "group/figure".

    Returns:
        matplotlib.figure.Figure: what was saved.

    Raises:
        ValueError: no row of a document has this figure, or they are of different images.
    """
    _check(documents, figure)
    group, key = figure.split("/")
    percent = is_percent(key)
    label = f"{group}: {key}{' (%)' if percent else ''}"
    shown = [
        name
        for name in DISTORTIONS
        if any(row["distortion"] == name for d in documents.values() for row in d["rows"])
    ]
    columns = min(COLUMNS, max(len(shown), 1))
    rows = max(math.ceil(len(shown) / columns), 1)
    canvas = Figure(figsize=(0.6 + 2.5 * columns, 0.5 + 2.4 * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for name, axes in zip(shown, grid, strict=False):
        for (model, document), (colour, style) in zip(
            documents.items(), _styles(documents), strict=True
        ):
            severity, value = _line(document, name, figure)
            line = dict(color=colour, linestyle=style, linewidth=1.6)
            axes.plot(severity, value, label=legend_label(model), **line)
            axes.plot(severity, value, "o", color=colour, markersize=3.5)
        levels = [f"{abs(level):g}" for level in DISTORTIONS[name].levels]
        axes.set_xticks([0, *SEVERITIES], ["none", *levels], fontsize=7.5)
        axes.set_title(DISTORTIONS[name].title, fontsize=9.5)
        axes.set_xlabel(DISTORTIONS[name].unit, fontsize=8)
        axes.tick_params(axis="y", labelsize=7.5)
        tidy(axes)
    for axes in grid[::columns]:
        axes.set_ylabel(label, fontsize=8)
        if percent:
            axes.set_ylim(-2, 102)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    canvas.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        handlelength=3,
        frameon=False,
    )
    save_figure(canvas, path, dpi=200)
    return canvas


def plot_distortions(image, path, seed=0):
    """
    Show an image under every distortion: a row each, severity rising to the right.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        path (str or Path): .png, .jpg or .pdf.
        seed (int or sequence of int): of directions and places.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    canvas = Figure(figsize=(1.5 * (1 + len(SEVERITIES)), 1.6 * len(DISTORTIONS)))
    grid = canvas.subplots(len(DISTORTIONS), 1 + len(SEVERITIES), squeeze=False)
    for (name, distortion), row in zip(DISTORTIONS.items(), grid, strict=True):
        for severity, axes in enumerate(row):
            axes.imshow(distort(image, name, severity, seed) if severity else image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            level = f"{distortion.levels[severity - 1]:g}" if severity else "none"
            axes.set_title(level, fontsize=7.5, pad=2)
        row[0].set_ylabel(f"{distortion.title}\n{distortion.unit}", fontsize=7.5)
    canvas.subplots_adjust(0.07, 0.01, 0.99, 0.98, wspace=0.03, hspace=0.14)
    save_figure(canvas, path, dpi=110)
    return canvas


def _check(documents, figure):
    for key in ("dataset_sha256", "images", "seed"):
        seen = {model: document["meta"].get(key) for model, document in documents.items()}
        if len(set(seen.values())) > 1:
            raise ValueError(f"The results are of different images: {key} is {seen}")
    for model, document in documents.items():
        rows = document["rows"]
        if not rows or any(figure not in row for row in rows):
            known = sorted({k for row in rows for k in row if "/" in k})
            raise ValueError(f"{model} has no figure {figure!r}: there are {', '.join(known)}")


def _line(document, name, figure):
    """Severities and values; NaN where a figure is undefined."""
    rows = [row for row in document["rows"] if row["distortion"] == name or not row["severity"]]
    values = [np.nan if row[figure] is None else row[figure] for row in rows]
    return [row["severity"] for row in rows], values


def _styles(documents):
    return [STYLES[number % len(STYLES)] for number in range(len(documents))]
