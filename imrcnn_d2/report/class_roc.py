"""ROC curves of image classification: each class against all others, a panel a class."""

import math

from matplotlib.figure import Figure

from .style import STYLES, legend_label, save_figure, tidy

__all__ = ["draw_class_roc"]

MOST_IN_A_ROW = 3


def draw_class_roc(results, path):
    """
    Draw sensitivity against false alarms as the threshold on the probability of a class falls. The
    dot is what the highest probability decides.

    Args:
        results (dict[str, RecognitionResults]): by the name in the legend; of the same classes.
        path (str or Path): .png, .svg or .pdf.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    from sklearn.metrics import roc_curve  # three seconds

    classes = next(iter(results.values())).ground_truth.classes
    columns = min(len(classes), MOST_IN_A_ROW)
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.4, 4.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(classes) :]:
        axes.set_visible(False)
    for k, (axes, name) in enumerate(zip(panels.flat, classes, strict=False)):
        axes.plot([0, 100], [0, 100], color="0.75", linewidth=0.8, zorder=1)
        for number, (model, own) in enumerate(results.items()):
            label = legend_label(model)
            colour, style = STYLES[number % len(STYLES)]
            positive, score = own.ground_truth.label == k, own.probability[:, k]
            area = own.recognition[f"auroc_{name}"]
            if not positive.any() or positive.all():
                axes.plot([], [], color=colour, linestyle=style, label=f"{label}: n/a")
                continue
            false, true, _ = roc_curve(positive, score, drop_intermediate=False)
            line = dict(color=colour, linestyle=style, linewidth=1.8)
            axes.plot(100 * false, 100 * true, label=f"{label}: AUROC {area:.1f}", **line)
            called = own.measures.called == k
            point = 100 * called[~positive].mean(), 100 * called[positive].mean()
            mark = dict(markersize=8, markeredgewidth=1.3, markeredgecolor="white", zorder=4)
            axes.plot(*point, "o", color=colour, **mark)
        axes.set(xlim=(-1, 101), ylim=(0, 101), aspect="equal")
        # The lowest panel of a column has the label.
        if k + columns >= len(classes):
            axes.set_xlabel("1 − specificity (%)")
            axes.tick_params(labelbottom=True)
        axes.set_title(f"{name} against all others", fontsize=11)
        tidy(axes)
        axes.legend(loc="lower right", fontsize=8.5, framealpha=0.95, handlelength=3.2)
    for first in panels[:, 0]:
        first.set_ylabel("Sensitivity (%)")
    save_figure(figure, path)
    return figure
