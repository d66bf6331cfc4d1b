"""Agreement of annotators: a table, matrices, and the images in which they differ most."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from imrcnn_d2.evaluation.annotator_agreement import (
    PAIR_COLUMNS,
    PAIR_METRICS,
    AnnotatorAgreement,
    pair_name,
)
from imrcnn_d2.report.plots.images import HALO_WIDTH, region_contours, show_tile, tile_grid
from imrcnn_d2.report.plots.style import (
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    legend_label,
    save_figure,
)
from imrcnn_d2.report.tables import format_value, markdown_table

__all__ = ["agreement_table", "plot_agreement", "plot_disagreements"]


# Panels, and what 0 to 1 of their shade are.
PANELS = {
    "f1": ("F1 of lesions (%)", 100),
    "union_dice": ("Dice of images (%)", 100),
    "kappa": ("Cohen's kappa", 1),
}
LINES = [
    (SKY, "-"),
    (VERMILION, (0, (5, 1.5))),
    (YELLOW, (0, (1, 1))),
    (GREEN, (0, (6, 1.5, 1, 1.5))),
    (PURPLE, (0, (3, 1))),
    (ORANGE, (0, (1, 2))),
]
HALO = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="black", alpha=0.55)]


def agreement_table(agreement: AnnotatorAgreement) -> str:
    """A Markdown table with a row for each pair and mean, metrics with their intervals."""
    names = [*PAIR_METRICS, "fleiss_kappa"]
    rows = []
    for group, metrics in agreement.values.items():
        intervals = agreement.intervals.get(group, {})
        cells = [
            format_value(name, metrics[name], intervals.get(name), decimals=_decimals(name))
            if name in metrics
            else ""
            for name in names
        ]
        rows.append([group, *cells])
    cells = pd.DataFrame(rows, columns=["", *names])
    return markdown_table(cells.loc[:, (cells != "").any()])


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
            value = agreement.values[pair_name(a, b)][metric]
            interval = agreement.intervals.get(pair_name(a, b), {}).get(metric)
            text = format_value(metric, value, interval, decimals=_decimals(metric))
            text = text.replace(" [", "\n[")
            dark = value / scale > 0.6
            for row, column in ((names.index(a), names.index(b)), (names.index(b), names.index(a))):
                values[row, column] = value / scale
                style = dict(ha="center", va="center", fontsize=8, color="w" if dark else "k")
                axes.text(column, row, text, **style)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), labels, rotation=25, ha="right")
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=10)
        axes.spines[:].set_visible(False)
    unit = "patients" if agreement.meta["patients"] else "images"
    title = f"{agreement.meta['images']} images"
    if agreement.meta["bootstrap"]:
        title += f"; 95 % intervals by resampling {unit}"
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=170)
    return figure


def plot_disagreements(
    agreement: AnnotatorAgreement, image_root: str | Path, path: str | Path, *, max_images: int = 16
) -> Figure | None:
    """
    Show the images in which two of the annotators differ most, by the Dice of the unions of their
    annotations, with everybody's contours; least agreement first. None where all agree fully.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    dice = agreement.dice()
    worst = np.nanmin(np.where(np.isnan(dice), np.inf, dice), axis=0)
    order = [i for i in np.argsort(worst, kind="stable").tolist() if worst[i] < 1][:max_images]
    if not order:
        return None
    title = f"{len(order)} of {len(agreement.images)} images, those with the least agreement first"
    figure, tiles = tile_grid(len(order), title)
    styles = [
        dict(color=colour, linestyle=line, linewidth=1.7, path_effects=HALO)
        for colour, line in (LINES[i % len(LINES)] for i in range(len(agreement.annotators)))
    ]
    for axes, position in zip(tiles, order, strict=True):
        summary = _summary(agreement, position, int(np.nanargmin(dice[:, position])))
        show_tile(axes, Path(image_root), agreement.images[position]["file_name"], summary)
        for annotator, style in zip(agreement.annotators, styles, strict=True):
            regions = annotator.truth.regions
            for region in np.flatnonzero(regions.image == position):
                for line in region_contours(regions, region):
                    axes.plot(*line.T, **style)
    handles = [
        Line2D([], [], label=legend_label(annotator.name), **style)
        for annotator, style in zip(agreement.annotators, styles, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize=9
    )
    save_figure(figure, path)
    return figure


def _summary(agreement, position, pair):
    """The two annotators who differ most, and how much."""
    (a, b), columns = list(agreement.pairs.items())[pair]
    row = dict(zip(PAIR_COLUMNS, columns[position], strict=True))
    if row["image_only_a"] or row["image_only_b"]:
        return f"{a}, not {b}" if row["image_only_a"] else f"{b}, not {a}"
    text = f"Dice {100 * row['union_dice']:.0f} %"
    return text if len(agreement.pairs) == 1 else f"{text}: {a}, {b}"


def _decimals(metric):
    return 2 if "kappa" in metric else 1
