"""Readers with and without AI: a table, and each reader's points next to the model's curves."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imrcnn_d2.evaluation.comparison import non_inferiority
from imrcnn_d2.evaluation.readers import PERCENT, ReaderMetric, ReaderStudy
from imrcnn_d2.report.plots.curves import square
from imrcnn_d2.report.plots.style import BLACK, BLUE, LEGEND, VERMILION, save_figure, tidy
from imrcnn_d2.report.tables import format_value, markdown_table, p_text
from imrcnn_d2.utils.files import BadInputError, few, read_rows

LABELS = {
    "auc": "AUC (%)",
    "sensitivity": "sensitivity (%)",
    "specificity": "specificity (%)",
    "lesion_sensitivity": "sensitivity for lesions (%)",
    "false_marks": "false marks per case",
}
_COLOURS = BLUE, VERMILION  # of the baseline, and of the other modality


def readers_table(
    study: ReaderStudy, metrics: dict[str, ReaderMetric], margin: float | None = None
) -> str:
    """A Markdown table with one row per metric: means over the readers, and their difference."""
    rows = []
    for name, metric in metrics.items():
        means = zip(study.modalities, metric.means, metric.intervals, strict=True)
        difference, decimals = metric.difference, 2 if name == "false_marks" else 1
        interval = difference.low, difference.high
        row = {"": LABELS[name]}
        row |= {m: format_value(name, mean, ends, decimals) for m, mean, ends in means}
        row["difference"] = format_value(name, difference.estimate, interval, decimals)
        row["p"] = p_text(difference.p)
        if margin is not None:
            known = name in PERCENT
            text = p_text(non_inferiority(difference, margin)) if known else ""
            row[f"p, not worse by {margin:g}"] = text
        rows.append(row)
    return markdown_table(pd.DataFrame(rows))


def plot_readers(
    study: ReaderStudy,
    metrics: dict[str, ReaderMetric],
    path: str | Path,
    model: Path | None = None,
) -> Figure:
    """Plot the ROC curve of each reader or, where only positive and negative is known, a point; the
    points at the threshold of `reader_metrics`, joined by an arrow from the baseline to the other
    modality; and the same of lesions where marks are known.

    Args:
        model: a folder of `imrcnn evaluate` on the same cases, whose curves are added: its
            per_image.csv has the cases as file_name.

    Raises:
        BadInputError: the model's images are not the cases.
    """
    panels = 2 if "lesion_sensitivity" in metrics else 1
    figure = Figure(figsize=(6 * panels, 6.1), layout="constrained")
    first, *rest = figure.subplots(1, panels, squeeze=False)[0]
    _plot_roc(first, study, metrics)
    if rest:
        _plot_points(rest[0], metrics["false_marks"].values, metrics["lesion_sensitivity"].values)
        rest[0].set(xlabel="False marks per case", ylabel="Sensitivity for lesions (%)")
        rest[0].set(ylim=(-1, 101), title="Lesions found against false marks")
        tidy(rest[0])
    if model is not None:
        _plot_model(first, rest, study, model)
    for axes in (first, *rest):
        for modality, colour in zip(study.modalities, _COLOURS, strict=True):
            axes.plot([], [], "o-", color=colour, label=f"readers, {modality}")
        axes.legend(loc="lower right", **LEGEND)
    return save_figure(figure, path)


def _plot_roc(axes: Axes, study: ReaderStudy, metrics: dict[str, ReaderMetric]) -> None:
    from sklearn.metrics import roc_curve  # three seconds

    square(axes)
    axes.set(xlabel="1 − specificity (%)", ylabel="Sensitivity (%)", title="Is there a lesion?")
    for ratings, colour in zip(study.rating, _COLOURS, strict=True):
        for rating in ratings:
            false, true, _ = roc_curve(study.positive, rating, drop_intermediate=False)
            axes.plot(100 * false, 100 * true, color=colour, linewidth=0.9, alpha=0.45)
    if "sensitivity" in metrics:
        _plot_points(axes, 100 - metrics["specificity"].values, metrics["sensitivity"].values)


def _plot_points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """(2, J) points of each modality and reader, and arrows between a reader's."""
    for (x0, x1), (y0, y1) in zip(x.T, y.T, strict=True):
        style = dict(arrowstyle="->", color="0.35", linewidth=1)
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=style)
    for *place, colour in zip(x, y, _COLOURS, strict=True):
        axes.plot(*place, "o", color=colour, markersize=7, markeredgecolor="white", zorder=4)


def _plot_model(roc: Axes, froc: list[Axes], study: ReaderStudy, folder: Path) -> None:
    from sklearn.metrics import roc_curve

    path = folder / "per_image.csv"
    score = {row["file_name"]: row["score"] for row in read_rows(path, ("file_name", "score"))}
    if others := sorted(score.keys() ^ set(study.cases)):
        raise BadInputError(
            path,
            f"its images are not the {len(study.cases)} cases (differing: {few(others)}): evaluate "
            "the model on the images that the readers rated, named as in the column case",
        )
    scores = [float(score[case] or "nan") for case in study.cases]
    if np.isnan(scores).any():
        raise BadInputError(path, "its images have no scores: evaluate detections, not masks")
    false, true, _ = roc_curve(study.positive, scores, drop_intermediate=False)
    style = dict(color=BLACK, linewidth=1.8, label="model alone")
    roc.plot(100 * false, 100 * true, **style)
    if froc:
        points = read_rows(folder / "froc.csv", ("fp_per_image", "sensitivity"))
        x, y = (
            [0.0, *(float(p[name]) for p in points)] for name in ("fp_per_image", "sensitivity")
        )
        froc[0].step(x, y, where="post", **style)
