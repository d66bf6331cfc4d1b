"""Agreement of annotators: a table, matrices, and the images in which they differ most."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from imrcnn_d2.evaluation.annotator_agreement import (
    PAIR_COLUMNS,
    PAIR_METRICS,
    AnnotatorAgreement,
    pair_name,
)
from imrcnn_d2.report.plots import images
from imrcnn_d2.report.plots.style import CONTOUR_LINES, legend_label, save_figure
from imrcnn_d2.report.tables import format_value, markdown_table

# Panels, and what 0 to 1 of their shade are.
PANELS = {
    "f1": ("F1 of lesions (%)", 100),
    "union_dice": ("Dice of images (%)", 100),
    "kappa": ("Cohen's kappa", 1),
}


def agreement_table(agreement: AnnotatorAgreement) -> str:
    """A Markdown table with one row per pair and mean, metrics with their intervals."""
    names = [*PAIR_METRICS, "fleiss_kappa"]
    rows = [
        [group, *(_text(agreement, group, name) if name in metrics else "" for name in names)]
        for group, metrics in agreement.values.items()
    ]
    cells = pd.DataFrame(rows, columns=["", *names])
    return markdown_table(cells.loc[:, (cells != "").any()])


def _text(agreement, group, metric):
    interval = agreement.intervals.get(group, {}).get(metric)
    decimals = 2 if "kappa" in metric else 1
    return format_value(metric, agreement.values[group][metric], interval, decimals)


def plot_agreement(agreement: AnnotatorAgreement, path: str | Path) -> Figure:
    """Plot lesion F1, union Dice and Cohen's kappa of every two annotators, each as a matrix."""
    names = [annotator.name for annotator in agreement.annotators]
    labels = [textwrap.shorten(name, 22, placeholder="…") for name in names]
    side = 1.2 + 0.95 * len(names)
    figure = Figure(figsize=(1 + side * len(PANELS), side + 0.6), layout="compressed")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (metric, (title, scale)) in zip(panels, PANELS.items(), strict=True):
        values = np.full((len(names),) * 2, np.nan)
        axes.set_facecolor("0.93")
        for a, b in agreement.pairs:
            value = agreement.values[pair_name(a, b)][metric] / scale
            text = _text(agreement, pair_name(a, b), metric).replace(" [", "\n[")
            style = dict(ha="center", va="center", fontsize=8, color="w" if value > 0.6 else "k")
            i, j = names.index(a), names.index(b)
            for row, column in ((i, j), (j, i)):
                values[row, column] = value
                axes.text(column, row, text, **style)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), labels, rotation=25, ha="right")
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=10)
        axes.spines[:].set_visible(False)
    title = f"{agreement.meta['images']} images"
    if bootstrap := agreement.meta["bootstrap"]:
        title += f"; 95 % intervals over {bootstrap['unit']}s"
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path, dpi=170)


def plot_disagreements(
    agreement: AnnotatorAgreement, image_root: str | Path, path: str | Path, *, max_images: int = 16
) -> Figure | None:
    """Show the images in which two of the annotators differ most, by the Dice of the unions of
    their annotations, with everybody's contours; least agreement first. None where all agree fully.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    dice = agreement.dice()
    worst = np.nanmin(np.where(np.isnan(dice), np.inf, dice), axis=0)
    order = [i for i in np.argsort(worst, kind="stable").tolist() if worst[i] < 1][:max_images]
    if not order:
        return None
    title = f"{len(order)} of {len(agreement.images)} images, those with the least agreement first"
    styles = {}
    for i, annotator in enumerate(agreement.annotators):
        colour, line = CONTOUR_LINES[i % len(CONTOUR_LINES)]
        style = dict(color=colour, linestyle=line, linewidth=1.7)
        styles[legend_label(annotator.name)] = style
    tiles = []
    for position in order:
        summary = _summary(agreement, position, int(np.nanargmin(dice[:, position])))
        tiles.append((image_root, agreement.images[position]["file_name"], summary))
    figure, grid = images.tile_sheet(title, tiles, styles)
    for axes, position in zip(grid, order, strict=True):
        for annotator, style in zip(agreement.annotators, styles.values(), strict=True):
            regions = annotator.truth.regions
            for row in np.flatnonzero(regions.image == position):
                images.plot_contours(axes, regions, row, style)
    return save_figure(figure, path)


def _summary(agreement, position, pair):
    """The two annotators who differ most, and how much."""
    (a, b), columns = list(agreement.pairs.items())[pair]
    row = dict(zip(PAIR_COLUMNS, columns[position], strict=True))
    if row["image_only_a"] or row["image_only_b"]:
        return f"{a}, not {b}" if row["image_only_a"] else f"{b}, not {a}"
    text = f"Dice {100 * row['union_dice']:.0f} %"
    return text if len(agreement.pairs) == 1 else f"{text}: {a}, {b}"
