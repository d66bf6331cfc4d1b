"""A comparison of image classifiers as files: tables, pictures, one Markdown page and one JSON."""

from pathlib import Path

import pandas as pd

from ..evaluation.confusion import ConfusionMatrix
from .calibration import draw_calibration
from .class_roc import draw_class_roc
from .compare_files import DEFINITIONS as OF_TESTS
from .compare_page import difference_table, document, markdown_page, median_runs, write_files
from .compare_tables import (
    OVER_FOLDS,
    SEEDS,
    figure_cell,
    figure_row,
    over_folds,
    table_of_tests,
)
from .confusion_matrix import draw_confusion_matrix
from .figure_names import figure_name
from .recognition_published import CITATION, MODEL, REMARKS, published_accuracy
from .tables import Table, format_figure

__all__ = ["class_table", "fold_table", "write_recognition_comparison"]

OVERALL = ("balanced_accuracy", "top1", "auroc")
OF_CANCER = {"recall": "sensitivity", "specificity": "specificity", "auroc": "AUROC"}
DEFINITIONS = {
    "Accuracy of a class": "share of its images that are called it, as the published table means "
    "accuracy; also its recall. Called is the class of the highest probability.",
    "Balanced accuracy": "mean of the classes' accuracies.",
    "Top-1 accuracy": "share of all images that are called what they are.",
    "AUROC": "of the probability of a class, against all other classes; the mean of the classes.",
    "Cancer against benign": "an image called any cancer class is called cancer; AUROC of the "
    "probability of all cancer classes together.",
    "Calibration": "ECE and Brier score of the probability of the class called, as that of being "
    "right.",
    **{name: OF_TESTS[name] for name in ("Intervals", "Differences")},
    "McNemar": "exact test of which images are called rightly; given are how many images the first "
    "and the second model alone has right.",
    **{name: OF_TESTS[name] for name in ("Folds", "Holm")},
}


def write_recognition_comparison(comparison, folder):
    """
    Write comparison.md, comparison.json, each table as .md, .csv and .tex, and as .png and .svg the
    confusion matrices, ROC curves and calibration of the models. Files of the same names are
    replaced.

    Args:
        comparison (Comparison): of classifiers.
        folder (str or Path): made if it does not exist.

    Returns:
        list[Path]: the files; the first is comparison.md.
    """
    folder = Path(folder)
    tables = _tables(comparison)
    pictures = _pictures(comparison, folder)
    settings = {"unit": "image", **comparison.settings}
    definitions = {name: text.format(**settings) for name, text in DEFINITIONS.items()}
    published = published_accuracy(comparison.dataset, comparison.settings["classes"])
    lines = ["## Pictures", ""]
    for path in pictures:
        if path.suffix == ".png":
            lines += [f"![{path.stem}]({path.name})", ""]
    test_set = _test_set(comparison.runs[0][1].results.meta)
    citation = CITATION if published else None
    page = markdown_page(comparison, test_set, tables, lines, definitions, citation)
    content = document(comparison, {}, published, definitions)
    return write_files(folder, page, content, tables, pictures)


def class_table(comparison):
    """
    Args:
        comparison (Comparison): with models on one split.

    Returns:
        Table: the accuracy of each class, the figures of all classes, and those of cancer against
        benign, with intervals; published values below.
    """
    classes = comparison.settings["classes"]
    columns = {name: ("recognition", f"accuracy_{name}") for name in classes}
    columns |= {figure_name(f"recognition/{key}"): ("recognition", key) for key in OVERALL}
    if comparison.settings["cancer_classes"]:
        columns |= {f"cancer: {name}": ("cancer", figure) for figure, name in OF_CANCER.items()}
    data, cells = [], []
    for label, model in comparison.models.items():
        rows = [figure_row(label, model, *place) for place in columns.values()]
        data += rows
        cells.append({"model": label, **dict(zip(columns, map(figure_cell, rows), strict=True))})
    published = published_accuracy(comparison.dataset, classes)
    notes = ["The columns named as a class: accuracy of the class. In brackets: 95 % intervals."]
    if any(len(model.runs) > 1 for model in comparison.models.values()):
        notes.append(SEEDS)
    if published:
        texts = {name: format_figure("", value) for name, value in published.items()}
        blank = dict.fromkeys(columns, "")
        cells.append({"model": f"{MODEL}, published", **blank, **texts})
        data += [
            {"model": MODEL, "source": "published", "figure": f"recognition/accuracy_{name}"}
            | {"value": value, "remarks": " ".join(REMARKS)}
            for name, value in published.items()
        ]
        notes += [f"Published: {text}" for text in REMARKS]
    title = f"Accuracy of each class, in percent, on {comparison.dataset}"
    return Table("classes", title, pd.DataFrame(cells), pd.DataFrame(data), tuple(notes))


def fold_table(comparison):
    """
    Args:
        comparison (Comparison): with folds.

    Returns:
        Table: each fold, mean and standard deviation.
    """
    data, cells = [], []
    endpoints = [f"recognition/accuracy_{name}" for name in comparison.settings["classes"]]
    endpoints += [f"recognition/{figure}" for figure in OVERALL]
    for label, folds in comparison.folds.items():
        for endpoint in endpoints:
            values, texts = over_folds(folds, endpoint)
            data.append({"model": label, "figure": endpoint, **values})
            cells.append({"model": label, "figure": figure_name(endpoint), **texts})
    number = len(next(iter(comparison.folds.values())))
    title = f"{number}-fold cross-validation, in percent"
    return Table(
        "folds", title, pd.DataFrame(cells), pd.DataFrame(data), (OVER_FOLDS,), text_columns=2
    )


def _tables(comparison):
    tables = [class_table(comparison)] if comparison.models else []
    if comparison.tests:
        tables.append(difference_table(comparison))
    if comparison.folds:
        tables.append(fold_table(comparison))
    if comparison.fold_tests:
        title = "Differences between models over the folds"
        tables.append(table_of_tests(comparison, comparison.fold_tests, "fold_tests", title))
    return tables


def _pictures(comparison, folder):
    runs = median_runs(comparison, lambda run: run.results.recognition["balanced_accuracy"])
    shown = {name: run.results for name, run in runs.items()}
    matrices = {name: results.confusion for name, results in shown.items()}
    if not shown:  # each image of a cross-validation was tested once, whatever the seed
        matrices = {
            f"{label} ({len(folds)} folds)": ConfusionMatrix(
                comparison.settings["classes"],
                sum(seeds[0].results.confusion.counts for seeds in folds),
            )
            for label, folds in comparison.gathered.folds.items()
        }
    paths = [folder / f"confusion.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        draw_confusion_matrix(matrices, path)
    if shown:
        calibrations = {name: results.measures.calibration for name, results in shown.items()}
        for suffix in ("png", "svg"):
            paths += [folder / f"{stem}.{suffix}" for stem in ("roc", "calibration")]
            draw_class_roc(shown, paths[-2])
            draw_calibration(calibrations, paths[-1], of=("Right", "Images"))
    return paths


def _test_set(meta):
    sizes = zip(meta["classes"], meta["images_of_class"], strict=True)
    return f"{meta['images']} images ({', '.join(f'{n} {name}' for name, n in sizes)})"
