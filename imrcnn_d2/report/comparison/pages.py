"""A comparison of image classifiers as files: tables, pictures, one Markdown page and one JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.report.comparison.tables import (
    OVER_FOLDS,
    SEEDS,
    metric_cell,
    metric_row,
    over_folds,
    table_3,
    table_4,
    table_5,
    table_of_tests,
)
from imrcnn_d2.report.names import (
    CITATION,
    CLASSIFICATION_CITATION,
    MODEL,
    PAPER_DATA,
    REMARKS,
    metric_name,
    published_accuracy,
    published_values,
)
from imrcnn_d2.report.plots.curves import plot_calibration, plot_class_roc, plot_pr_panels
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix
from imrcnn_d2.report.tables import Table, format_value, markdown_table, markdown_text, write_table
from imrcnn_d2.utils.files import strict_json, write_atomically

__all__ = [
    "DEFINITIONS",
    "class_table",
    "difference_table",
    "document",
    "fold_table",
    "markdown_page",
    "median_runs",
    "write_comparison",
    "write_files",
    "write_classification_comparison",
]


def median_runs(comparison, figure):
    """
    Args:
        comparison (Comparison):
        figure (callable): of a Run, what its model's runs are ordered by.

    Returns:
        dict[str, Run]: the one run shown of each model on one split: of several seeds the median.
    """
    shown = {}
    for label, runs in comparison.gathered.split.items():
        name = f"{label} (median of {len(runs)} runs)" if len(runs) > 1 else label
        shown[name] = sorted(runs, key=figure)[(len(runs) - 1) // 2]
    return shown


def difference_table(comparison):
    """
    Args:
        comparison (Comparison): with tests.

    Returns:
        Table: the tests of models on the same images.
    """
    notes = ["Later model given minus earlier one, or model minus baseline; percentage points."]
    if comparison.clustered:
        notes.append(
            "Patients have several images each: McNemar's test takes images for independent and "
            "is too sure; the bootstrap resamples patients."
        )
    title = "Differences between models on the same test images"
    return table_of_tests(comparison, comparison.tests, "differences", title, *notes)


def document(comparison, models, published, definitions, **more):
    """
    Args:
        comparison (Comparison):
        models (dict[str, dict]): what is told of each model, beside its figures.
        published (list or dict), definitions (dict): JSON values.
        **more: what else is told.

    Returns:
        dict: what comparison.json holds.
    """
    return {
        "settings": comparison.settings,
        "runs": [_about_run(label, run) for label, run in comparison.runs],
        "models": {
            label: {
                "figures": model.values,
                "intervals": model.intervals,
                "runs": model.runs,
                **models.get(label, {}),
            }
            for label, model in comparison.models.items()
        },
        "folds": {label: [one.values for one in own] for label, own in comparison.folds.items()},
        **more,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": published,
        "remarks": comparison.remarks,
        "definitions": definitions,
    }


def markdown_page(comparison, test_set, tables, pictures, definitions, citation=None):
    """
    Args:
        comparison (Comparison):
        test_set (str): its images, and what they show.
        tables (list[Table]):
        pictures (list[str]): lines of Markdown that show them.
        definitions (dict[str, str]): how each number is defined.
        citation (str or None): of published values.

    Returns:
        str: comparison.md.
    """
    patients = comparison.runs[0][1].results.meta["patients"]
    labels = dict.fromkeys(label for label, _ in comparison.runs)
    lines = [
        f"# {markdown_text(', '.join(labels))}",
        "",
        f"Test set: {markdown_text(comparison.dataset or 'not named')}, {markdown_text(test_set)}"
        f"{f', {patients} patients' if patients else ''}"
        f"{'' if comparison.models else ' in the first fold'}. "
        f"Primary endpoint: {markdown_text(comparison.primary)}.",
        "",
    ]
    if comparison.remarks:
        remarks = [f"- {markdown_text(remark)}" for remark in comparison.remarks]
        lines += ["**Read first**", "", *remarks, ""]
    lines += ["## Tables", ""]
    for table in tables:
        lines += [table.markdown(), ""]
    lines += [*pictures, "## How each number is defined", ""]
    lines += [f"- **{name}**: {text}" for name, text in definitions.items()]
    if citation:
        lines += ["", f"Published values: {citation}."]
    lines += ["", "## Runs", "", _runs_table(comparison), ""]
    return "\n".join(lines)


def write_files(folder, page, content, tables, pictures):
    """
    Write comparison.md, comparison.json and the files of the tables.

    Args:
        folder (Path): made if it does not exist.
        page (str), content (dict): of :func:`markdown_page` and :func:`document`.
        tables (list[Table]):
        pictures (list[Path]): that are written already.

    Returns:
        list[Path]: all files; the first is comparison.md.
    """
    files = [path for table in tables for path in write_table(table, folder)]
    write_atomically(folder / "comparison.md", page)
    write_atomically(folder / "comparison.json", strict_json(content))
    return [folder / "comparison.md", folder / "comparison.json", *files, *pictures]


def _about_run(label, run):
    """dict: where a run of a model is, and what of."""
    meta, record = run.meta, run.run or {}
    return {
        "model": label,
        "architecture": record.get("model"),
        "backbone": run.backbone,
        "seed": run.seed,
        "fold": run.fold,
        "folder": str(run.folder.resolve()),
        "dataset": run.dataset,
        "ground_truth": str(run.gt_path),
        "gt_sha256": meta.get("gt_sha256"),
        "checkpoint_sha256": meta.get("checkpoint_sha256"),
        "git": record.get("git"),
        "config_sha256": record.get("config_sha256"),
    }


def _runs_table(comparison):
    """str: a Markdown table of the runs."""
    rows = []
    for label, run in comparison.runs:
        about = _about_run(label, run)
        fold = f"{run.fold['index']} of {run.fold['of']}" if run.fold else ""
        git = about["git"] or {}
        rows.append(
            {
                "model": label,
                "backbone": run.backbone or "",
                "seed": "" if run.seed is None else str(run.seed),
                "fold": fold,
                "checkpoint": (about["checkpoint_sha256"] or "")[:12],
                "git": (git.get("revision") or "")[:12]
                + (" + changes" if git.get("dirty") else ""),
                "folder": about["folder"],
            }
        )
    return markdown_table(pd.DataFrame(rows), 7)


DEFINITIONS = {
    "AP50_voc": "area under the all-point precision-recall curve (its envelope) at IoU 0.5, mean "
    "over classes. Threshold-free; stands in for the paper's AP.",
    "AP50, AP": "COCO's average precision: 101 recalls, at IoU 0.5, and the mean over IoU 0.50 to "
    "0.95.",
    "BEP": "break-even point: share of hits among the n highest-scored detections, n being the "
    "number of lesions; there precision equals recall.",
    "IoU": "mean over the detections at the threshold that hit a lesion of their overlap with it; "
    "missed lesions do not count.",
    "Matching": "per image and class, detections by falling score; each takes the free lesion that "
    "it overlaps most, if IoU >= {iou_threshold:g} (of {regions}).",
    "Lesions": "precision TP / (TP + FP), recall TP / (TP + FN), F1 their harmonic mean, "
    "specificity TN / (TN + FP), accuracy (TP + TN) / all. Undefined is n/a, never 0; specificity "
    "is undefined without lesion-free images.",
    "Images, patients": "positive with a lesion, called positive by a detection at the threshold "
    "anywhere; AUROC ranks them by their highest score.",
    "Thresholds": "the paper's {tau:g}, and tau_val, chosen on validation data; never on the test "
    "set.",
    "Intervals": "95 % percentile bootstrap, {resamples} resamples of {unit}s with seed {seed}; "
    "exact binomial (Clopper-Pearson) at 0 and 100 %. They say how much the figures would vary "
    "with other test data, not with another training.",
    "Differences": "paired bootstrap: all models are scored on the same resamples; p = 2 "
    "min(share <= 0, share >= 0), at least 1 / (resamples + 1). Resamples in which a figure is "
    "undefined are left out.",
    "McNemar": "exact test of which images are called rightly at the threshold; given are how many "
    "images the first and the second model alone has right.",
    "Folds": "corrected resampled t-test (Nadeau and Bengio 2003): the variance of the mean of k "
    "folds is (1 / k + n_test / n_train) s^2, since their training sets overlap; n/a where all "
    "folds differ by the same amount.",
    "Holm": "p-values but those of the primary endpoint are adjusted together, within each table. "
    "The primary endpoint is not adjusted: with several pairs of models, judge the one pair that "
    "was meant beforehand (--baseline).",
}


def write_comparison(comparison, folder):
    """
    Write comparison.md, comparison.json, each table as .md, .csv and .tex, and Figure 4 as .png and
    .svg. Files of the same names are replaced.

    Args:
        comparison (Comparison):
        folder (str or Path): made if it does not exist.

    Returns:
        list[Path]: the files; the first is comparison.md.
    """
    folder = Path(folder)
    tables = _tables(comparison)
    pictures = _draw_figure_4(comparison, folder)
    definitions = _definitions(comparison)
    published = any((comparison.dataset or "").startswith(f"{data}_") for data in PAPER_DATA)
    page = markdown_page(
        comparison,
        _test_set(comparison.runs[0][1].results.meta),
        tables,
        _figure_4(comparison, pictures),
        definitions,
        CITATION if published else None,
    )
    content = document(
        comparison,
        {label: {"operating_points": model.taus} for label, model in comparison.models.items()},
        [asdict(row) for table in "345" for row in published_values(comparison.dataset, table)],
        definitions,
        n_train=comparison.n_train,
        n_test=comparison.n_test,
    )
    return write_files(folder, page, content, tables, pictures)


def _tables(comparison):
    tables = []
    if comparison.models:
        tables.append(table_3(comparison))
    if comparison.tests:
        tables.append(difference_table(comparison))
    if comparison.folds:
        tables.append(table_4(comparison))
    if comparison.fold_tests:
        note = (
            f"n_test / n_train = {comparison.n_test:g} / {comparison.n_train:g}: images for "
            "testing and for fitting the weights, those for validation left out; means over the "
            "folds."
        )
        title = "Table 4, tests: differences between models over the folds"
        tables.append(
            table_of_tests(comparison, comparison.fold_tests, "table_4_tests", title, note)
        )
    return [*tables, table_5(comparison)]


def _curves(comparison, kind):
    """{class: {model: PRCurve}}."""
    panels = {name: {} for name in comparison.settings["classes"]}
    # One curve a model: of several seeds the run whose AP50_voc is the median.
    shown = median_runs(comparison, lambda run: getattr(run.results, kind)["AP50_voc"])
    for name, run in shown.items():
        for own_kind, category, curve in run.results.curves:
            if own_kind == kind and curve.num_gt:
                panels[category][name] = curve
    if not shown:
        for label, folds in comparison.gathered.folds.items():
            for category, own in panels.items():
                curves = [
                    curve
                    for seeds in folds
                    for own_kind, name, curve in seeds[0].results.curves
                    if (own_kind, name) == (kind, category) and curve.num_gt
                ]
                seed = f", seed {folds[0][0].seed}" if len(folds[0]) > 1 else ""
                if curves:
                    own[f"{label} ({len(folds)} folds pooled{seed})"] = _pooled(curves)
    return {name: own for name, own in panels.items() if own}


def _pooled(curves):
    """The curve of the detections of all folds together."""
    score = np.concatenate([curve.score for curve in curves])
    hit = np.concatenate([np.diff(curve.tp, prepend=0) > 0 for curve in curves])
    return pr_curve(score, hit, sum(curve.num_gt for curve in curves))


def _draw_figure_4(comparison, folder):
    paths = []
    for kind, stem, of in (("segm", "figure_4", "masks"), ("bbox", "figure_4_boxes", "boxes")):
        curves = _curves(comparison, kind)
        if not curves:
            continue
        several = len(comparison.settings["classes"]) > 1
        panels = {
            f"Precision and recall, {of} at IoU 0.5" + (f": {name}" if several else ""): own
            for name, own in curves.items()
        }
        own_paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
        plot_pr_panels(panels, own_paths, tau=comparison.settings["tau"])
        paths += own_paths
    return paths


def _definitions(comparison):
    settings = comparison.settings
    values = {
        **settings,
        "regions": "masks" if settings["iou_type"] == "segm" else "boxes",
        "unit": settings.get("unit", "image"),
    }
    return {name: text.format(**values) for name, text in DEFINITIONS.items()}


def _test_set(meta):
    images = f"{meta['images']} images ({meta['lesion_free_images']} without a lesion)"
    return f"{images}, {meta['lesions']} lesions"


def _figure_4(comparison, pictures):
    """list[str]: lines of Markdown."""
    lines = []
    if not comparison.models:
        lines += ["Table 3 and tests on one split need runs that are not of folds.", ""]
    lines += ["## Figure 4", ""]
    for path in pictures:
        if path.suffix == ".png":
            lines += [f"![Precision-recall curves]({path.name})", ""]
    text = "No curves: the results know no scores, or there is no lesion."
    if pictures:
        text = (
            "Thin: the curve; thick: its envelope, whose area is AP50_voc. Diamonds: break-even "
            "points, where precision equals recall."
        )
    return [*lines, text, ""]


OVERALL = ("balanced_accuracy", "top1", "auroc")
OF_CANCER = {"recall": "sensitivity", "specificity": "specificity", "auroc": "AUROC"}
CLASSIFICATION_DEFINITIONS = {
    "Accuracy of a class": "share of its images that are called it, as the published table means "
    "accuracy; also its recall. Called is the class of the highest probability.",
    "Balanced accuracy": "mean of the classes' accuracies.",
    "Top-1 accuracy": "share of all images that are called what they are.",
    "AUROC": "of the probability of a class, against all other classes; the mean of the classes.",
    "Cancer against benign": "an image called any cancer class is called cancer; AUROC of the "
    "probability of all cancer classes together.",
    "Calibration": "ECE and Brier score of the probability of the class called, as that of being "
    "right.",
    **{name: DEFINITIONS[name] for name in ("Intervals", "Differences")},
    "McNemar": "exact test of which images are called rightly; given are how many images the first "
    "and the second model alone has right.",
    **{name: DEFINITIONS[name] for name in ("Folds", "Holm")},
}


def write_classification_comparison(comparison, folder):
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
    tables = _classification_tables(comparison)
    pictures = _pictures(comparison, folder)
    settings = {"unit": "image", **comparison.settings}
    definitions = {
        name: text.format(**settings) for name, text in CLASSIFICATION_DEFINITIONS.items()
    }
    published = published_accuracy(comparison.dataset, comparison.settings["classes"])
    lines = ["## Pictures", ""]
    for path in pictures:
        if path.suffix == ".png":
            lines += [f"![{path.stem}]({path.name})", ""]
    test_set = _classification_test_set(comparison.runs[0][1].results.meta)
    citation = CLASSIFICATION_CITATION if published else None
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
    columns |= {metric_name(f"recognition/{key}"): ("recognition", key) for key in OVERALL}
    if comparison.settings["cancer_classes"]:
        columns |= {f"cancer: {name}": ("cancer", figure) for figure, name in OF_CANCER.items()}
    data, cells = [], []
    for label, model in comparison.models.items():
        rows = [metric_row(label, model, *place) for place in columns.values()]
        data += rows
        cells.append({"model": label, **dict(zip(columns, map(metric_cell, rows), strict=True))})
    published = published_accuracy(comparison.dataset, classes)
    notes = ["The columns named as a class: accuracy of the class. In brackets: 95 % intervals."]
    if any(len(model.runs) > 1 for model in comparison.models.values()):
        notes.append(SEEDS)
    if published:
        texts = {name: format_value("", value) for name, value in published.items()}
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
            cells.append({"model": label, "figure": metric_name(endpoint), **texts})
    number = len(next(iter(comparison.folds.values())))
    title = f"{number}-fold cross-validation, in percent"
    return Table(
        "folds", title, pd.DataFrame(cells), pd.DataFrame(data), (OVER_FOLDS,), text_columns=2
    )


def _classification_tables(comparison):
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
        plot_confusion_matrix(matrices, path)
    if shown:
        calibrations = {name: results.metrics.calibration for name, results in shown.items()}
        for suffix in ("png", "svg"):
            paths += [folder / f"{stem}.{suffix}" for stem in ("roc", "calibration")]
            plot_class_roc(shown, paths[-2])
            plot_calibration(calibrations, paths[-1], of=("Right", "Images"))
    return paths


def _classification_test_set(meta):
    sizes = zip(meta["classes"], meta["images_of_class"], strict=True)
    return f"{meta['images']} images ({', '.join(f'{n} {name}' for name, n in sizes)})"
