"""What figures do as the score threshold moves: one model's, or those of several."""

import math

from matplotlib.figure import Figure

from .style import STYLES, legend_label, save_figure, tidy

__all__ = ["draw_thresholds"]

# Columns of thresholds.csv.
SHOWN = {
    "lesion_precision": "Precision",
    "lesion_recall": "Recall",
    "lesion_f1": "F1",
    "image_specificity": "Specificity for images",
}


def draw_thresholds(tables, path, *, tau=0.7):
    """
    Draw precision, recall and F1 for lesions and the specificity for images against the threshold:
    in one panel for one model, in a panel a figure for several.

    Args:
        tables (dict[str, list[dict]]): rows of :func:`threshold_table`, by the name in the legend.
        path (str or Path): .png, .svg or .pdf.
        tau (float): the threshold to mark.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    alone = len(tables) == 1
    figure = Figure(figsize=(6, 4.8) if alone else (8.4, 7.2), layout="constrained")
    if alone:
        panels = [figure.add_subplot()] * len(SHOWN)
        panels[0].set(title=f"Figures against the threshold: {next(iter(tables))}")
    else:
        panels = [*figure.subplots(2, 2, sharex=True, sharey=True).flat]
    for number, (axes, (column, title)) in enumerate(zip(panels, SHOWN.items(), strict=True)):
        for run, (name, rows) in enumerate(tables.items()):
            defined = [row for row in rows if not math.isnan(row[column])]
            if alone and not defined:  # such as the specificity where every image has a lesion
                continue
            colour, style = STYLES[(number if alone else run) % len(STYLES)]
            axes.plot(
                [row["tau"] for row in defined],
                [row[column] for row in defined],
                color=colour,
                linestyle=style,
                linewidth=1.8,
                label=title if alone else legend_label(name),
            )
        if not alone:
            axes.set_title(title)
            if not any(len(line.get_xdata()) for line in axes.lines):
                axes.text(0.5, 50, "undefined", ha="center", va="center", color="0.4")
    for axes in dict.fromkeys(panels):
        axes.axvline(tau, color="0.55", linewidth=0.9, zorder=1, label=f"threshold {tau:g}")
        axes.set(xlim=(0, 1), ylim=(-1, 101))
        tidy(axes)
    figure.supxlabel("Score threshold", fontsize=10)
    figure.supylabel("%", fontsize=10)
    panels[0].legend(loc="best", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    save_figure(figure, path, dpi=200)
    return figure
