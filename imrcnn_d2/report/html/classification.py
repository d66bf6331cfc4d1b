"""The report of image classifiers: one HTML page that needs nothing else."""

import math

from imrcnn_d2.data.images import image_inside
from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.html.gallery import classification_gallery, embed
from imrcnn_d2.report.html.page import (
    as_data,
    check_runs,
    gallery_metrics,
    missing_records,
    named_runs,
    picture,
    uncertainty,
    undefined_rows,
    write_page,
)
from imrcnn_d2.report.html.tables import cell, differences, metric_rows
from imrcnn_d2.report.names import CLASSIFICATION_CITATION, MODEL, REMARKS, published_accuracy
from imrcnn_d2.report.plots.curves import plot_calibration, plot_class_roc

__all__ = ["render_classification_report"]


GRAD_CAM = "grad_cam.png"  # of grad_cam.py, beside metrics.json
GRAD_CAM_SIDE = 1600  # pixels, at most
OVERALL = (
    ("balanced_accuracy", "balanced accuracy", "mean of the classes’ accuracies"),
    ("top1", "top-1 accuracy", "images that are called what they are"),
    ("f1", "F1", "mean of the classes"),
    ("auroc", "AUROC", "mean of the classes, each against all others"),
    ("cross_entropy", "cross-entropy", "of the probability of the true class; 0 is perfect"),
)
OF_CLASS = (
    ("precision", "precision", "of the images called it, those that are"),
    ("specificity", "specificity", "of all others, those not called it"),
    ("f1", "F1", ""),
    ("auroc", "AUROC", "against all others"),
)
OF_CANCER = (
    ("recall", "sensitivity", "cancers that are called cancer"),
    ("specificity", "specificity", "benign images that are called benign"),
    ("precision", "precision", "at the test set’s own prevalence"),
    ("f1", "F1", ""),
    ("accuracy", "accuracy", ""),
    ("auroc", "AUROC", "of the probability of cancer"),
    ("TP", "cancer called cancer", ""),
    ("FN", "cancer called benign", ""),
    ("FP", "benign called cancer", ""),
    ("TN", "benign called benign", ""),
)
OF_CALIBRATION = (
    ("ece", "expected calibration error", ""),
    ("brier", "Brier score", ""),
    ("mean_score", "mean probability", "of the class called"),
    ("hit_rate", "share called rightly", ""),
)


def render_classification_report(runs, output, *, max_images=300):
    """
    Args:
        runs (list[Run]): of classifiers, on one test set.
        output (str or Path): the page to write; replaced at once, or not at all.
        max_images (int): in the gallery; of a larger test set, the worst half and an even choice of
            the rest.

    Returns:
        Path: the page.

    Raises:
        FileNotFoundError: ground truth or predictions are gone.
        ValueError: different test sets, two runs of one name.
    """
    check_runs(runs)
    runs = named_runs(runs)
    meta = runs[0].results.meta
    classes = meta["classes"]
    published = published_accuracy(runs[0].dataset, classes)
    told = "their class and the probabilities that each model gives"
    return write_page(
        "recognition",
        runs,
        output,
        cohort=cohort(runs[0]),
        lead=_lead(runs, meta),
        lines={},
        classes=classes,
        key_metrics=_key_figures(runs, meta["cancer_classes"]),
        uncertainty=uncertainty(runs),
        notes=missing_records(runs),
        comparison=differences(runs),
        accuracy=_accuracy(runs, classes, published),
        published_notes=[*REMARKS, f"Published: {CLASSIFICATION_CITATION}."] if published else [],
        metric_tables=_figure_tables(runs, classes, meta["cancer_classes"]),
        undefined=undefined_rows(runs),
        pictures=_pictures(runs),
        confusions=_confusions(runs),
        grad_cams=_grad_cams(runs),
        **gallery_metrics(classification_gallery, runs, max_images, told),
    )


def _lead(runs, meta):
    models = f"{len(runs)} models" if len(runs) > 1 else "1 model"
    sizes = zip(meta["images_of_class"], meta["classes"], strict=True)
    lead = f"{models} on {meta['images']:,} images"
    if meta["patients"]:
        lead += f" of {meta['patients']:,} patients"
    return f"{lead}: {', '.join(f'{number:,} {name}' for number, name in sizes)}."


def _key_figures(runs, cancers):
    """list[dict]: as of page_tables.key_metrics."""
    cards = [
        (
            "recognition",
            "balanced_accuracy",
            "Balanced accuracy",
            "mean accuracy of the classes",
        ),
        ("recognition", "auroc", "AUROC", "each class against all others, mean of the classes"),
    ]
    if cancers:
        cards += [
            ("cancer", "recall", "Sensitivity for cancer", "cancers that are called cancer"),
            ("cancer", "specificity", "Specificity for cancer", "benign images called benign"),
        ]
    else:
        cards.append(("recognition", "top1", "Top-1 accuracy", "images called what they are"))
    return [
        {
            "title": title,
            "hint": hint,
            "cells": [(run.name, cell(run.metrics[group], name)) for run in runs],
        }
        for group, name, title, hint in cards
    ]


def _accuracy(runs, classes, published):
    """dict: columns and rows, a class each, with what was published."""
    rows = []
    for name in classes:
        cells = [cell(run.metrics["recognition"], f"accuracy_{name}") for run in runs]
        if published:
            cells.append({"text": f"{published[name]:.0f}", "interval": "", "bar": None})
        rows.append({"label": name, "hint": "", "cells": cells})
    columns = ["class", *(run.name for run in runs)]
    return {"columns": columns + [f"{MODEL}, published"] * bool(published), "rows": rows}


def _figure_tables(runs, classes, cancers):
    """list[dict]: title, caption and rows (label, hint and a cell for each run)."""

    def table(title, caption, group, wanted, suffix=""):
        named = [(f"{name}{suffix}", label, hint) for name, label, hint in wanted]
        rows = metric_rows(named, [run.metrics[group] for run in runs])
        return {"title": title, "caption": caption, "rows": rows}

    tables = [table("All classes", "In percent, but for the cross-entropy", "recognition", OVERALL)]
    if cancers:
        caption = f"Cancer: {', '.join(cancers)}; benign: all else"
        tables.append(table("Cancer against benign", caption, "cancer", OF_CANCER))
    tables += [
        table(f"Class: {name}", "Called it, or anything else", "recognition", OF_CLASS, f"_{name}")
        for name in classes
    ]
    caption = "Of the probability of the class called, as that of being right"
    return [*tables, table("Calibration", caption, "calibration", OF_CALIBRATION)]


def _pictures(runs):
    results = {run.name: run.results for run in runs}
    return [
        picture(
            "ROC of each class",
            "Each class against all others. Dot: where the highest probability decides.",
            {name: own.recognition["auroc"] for name, own in results.items()},
            "area under the ROC curve in percent, mean of the classes",
            as_data(plot_class_roc, results),
        ),
        picture(
            "Calibration",
            "Are 80 % of the images called with a probability of 0.8 called rightly?",
            {name: own.calibration["ece"] for name, own in results.items()},
            "expected calibration error in percent",
            as_data(
                plot_calibration,
                {name: own.metrics.calibration for name, own in results.items()},
                of=("Right", "Images"),
            ),
        ),
    ]


def _confusions(runs):
    """list[dict]: name, and rows [(class, [(count, share of the row as text, as number)])]."""
    tables = []
    for run in runs:
        matrix = run.results.confusion
        rows = []
        for name, counts in zip(matrix.classes, matrix.rows(), strict=True):
            total = sum(counts) or math.nan
            shares = [(f"{n:,}", f"{100 * n / total:.1f} %", n / total) for n in counts]
            rows.append((name, [(*texts, 0 if math.isnan(s) else s) for *texts, s in shares]))
        tables.append({"name": run.name, "rows": rows})
    return tables


def _grad_cams(runs):
    """list[dict]: run's name and its picture of where the model looks, of runs that have one."""
    pictures = []
    for run in runs:
        path = run.folder / GRAD_CAM
        if path.is_file():
            path = image_inside(run.folder, GRAD_CAM, run.folder)
            jpeg, (width, height), _ = embed(path, GRAD_CAM_SIDE)
            pictures.append({"name": run.name, "jpeg": jpeg, "width": width, "height": height})
    return pictures
