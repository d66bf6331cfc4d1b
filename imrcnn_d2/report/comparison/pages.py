"""A comparison as files: tables, plots, one Markdown page and one JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.report.comparison.models import Comparison
from imrcnn_d2.report.comparison.tables import comparison_tables, median_runs
from imrcnn_d2.report.names import (
    CITATION,
    CLASSIFICATION_CITATION,
    PAPER_DATA,
    published_accuracy,
    published_values,
)
from imrcnn_d2.report.plots import (
    plot_calibration,
    plot_class_roc,
    plot_confusion_matrix,
    plot_pr_panels,
)
from imrcnn_d2.report.tables import markdown_table, markdown_text, write_table
from imrcnn_d2.utils.files import strict_json, write_atomically

__all__ = ["CLASSIFICATION_DEFINITIONS", "DEFINITIONS", "write_comparison"]


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
    "Images, patients": "positive with a lesion, predicted positive by a detection at the "
    "threshold anywhere; AUROC ranks them by their highest score.",
    "Thresholds": "the paper's {tau:g}, and tau_val, chosen on validation data; never on the test "
    "set.",
    "Intervals": "95 % percentile bootstrap, {resamples} resamples of {unit}s with seed {seed}; "
    "exact binomial (Clopper-Pearson) at 0 and 100 %. They say how much the metrics would vary "
    "with other test data, not with another training.",
    "Differences": "paired bootstrap: all models are scored on the same resamples; p = 2 "
    "min(share <= 0, share >= 0), at least 1 / (resamples + 1). Resamples in which a metric is "
    "undefined are left out.",
    "McNemar": "exact test of which images are predicted rightly at the threshold; given are how "
    "many images the first and the second model alone has right.",
    "Folds": "corrected resampled t-test (Nadeau and Bengio 2003): the variance of the mean of k "
    "folds is (1 / k + n_test / n_train) s^2, since their training sets overlap; n/a where all "
    "folds differ by the same amount.",
    "Holm": "p-values but those of the primary endpoint are adjusted together, within each table. "
    "The primary endpoint is not adjusted: with several pairs of models, judge the one pair that "
    "was meant beforehand (--baseline).",
}


CLASSIFICATION_DEFINITIONS = {
    "Accuracy of a class": "share of its images that are predicted as it, as the published "
    "table means accuracy; also its recall. Predicted is the class of the highest probability.",
    "Balanced accuracy": "mean of the classes' accuracies.",
    "Top-1 accuracy": "share of all images that are predicted rightly.",
    "AUROC": "of the probability of a class, against all other classes; the mean of the classes.",
    "Cancer against benign": "an image predicted as any cancer class is predicted as cancer; "
    "AUROC of the probability of all cancer classes together.",
    "Calibration": "ECE and Brier score of the probability of the predicted class, as that of "
    "being right.",
    **{name: DEFINITIONS[name] for name in ("Intervals", "Differences")},
    "McNemar": "exact test of which images are predicted rightly; given are how many images the "
    "first and the second model alone has right.",
    **{name: DEFINITIONS[name] for name in ("Folds", "Holm")},
}


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """
    Write comparison.md, comparison.json, each table as .md, .csv and .tex, and as .png and .svg
    the plots: of detectors Figure 4, of classifiers confusion matrices, ROC curves and
    calibration. Files of the same names are replaced.

    Args:
        folder: made if it does not exist.

    Returns:
        the files; the first is comparison.md.
    """
    folder = Path(folder)
    tables = comparison_tables(comparison)
    write = _classification if comparison.task == "recognition" else _detection
    plots, page, content = write(comparison, folder, tables)
    files = [path for table in tables for path in write_table(table, folder)]
    write_atomically(folder / "comparison.md", page)
    write_atomically(folder / "comparison.json", strict_json(content))
    return [folder / "comparison.md", folder / "comparison.json", *files, *plots]


def _detection(comparison, folder, tables):
    plots = _plot_figure_4(comparison, folder)
    lines = []
    if not comparison.models:
        lines += ["Table 3 and tests on one split need runs that are not of folds.", ""]
    text = "No curves: the results know no scores, or there is no lesion."
    if plots:
        text = (
            "Thin: the curve; thick: its envelope, whose area is AP50_voc. Diamonds: break-even "
            "points, where precision equals recall."
        )
    lines += ["## Figure 4", "", *_images(plots, "Precision-recall curves"), text, ""]
    settings = {"unit": "image", **comparison.settings}
    regions = "masks" if settings["iou_type"] == "segm" else "boxes"
    definitions = {
        name: text.format(**settings, regions=regions) for name, text in DEFINITIONS.items()
    }
    meta = comparison.runs[0][1].results.meta
    test_set = f"{meta['images']} images ({meta['lesion_free_images']} without a lesion), "
    test_set += f"{meta['lesions']} lesions"
    published = any((comparison.dataset or "").startswith(f"{data}_") for data in PAPER_DATA)
    citation = CITATION if published else None
    content = _document(
        comparison,
        {label: {"operating_points": model.taus} for label, model in comparison.models.items()},
        [asdict(row) for table in "345" for row in published_values(comparison.dataset, table)],
        definitions,
        n_train=comparison.n_train,
        n_test=comparison.n_test,
    )
    return plots, _markdown(comparison, test_set, tables, lines, definitions, citation), content


def _classification(comparison, folder, tables):
    plots = _plot_classifiers(comparison, folder)
    lines = ["## Plots", "", *_images(plots)]
    settings = {"unit": "image", **comparison.settings}
    definitions = {
        name: text.format(**settings) for name, text in CLASSIFICATION_DEFINITIONS.items()
    }
    meta = comparison.runs[0][1].results.meta
    sizes = zip(meta["classes"], meta["images_of_class"], strict=True)
    test_set = f"{meta['images']} images ({', '.join(f'{n} {name}' for name, n in sizes)})"
    published = published_accuracy(comparison.dataset, comparison.settings["classes"])
    citation = CLASSIFICATION_CITATION if published else None
    page = _markdown(comparison, test_set, tables, lines, definitions, citation)
    return plots, page, _document(comparison, {}, published, definitions)


def _images(plots, alt=None):
    """list[str]: lines of Markdown that show the plots."""
    shown = [path for path in plots if path.suffix == ".png"]
    return [line for path in shown for line in (f"![{alt or path.stem}]({path.name})", "")]


def _document(comparison, models, published, definitions, **more):
    """dict: comparison.json; ``models`` holds more of each than its metrics."""
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
        "folds": {
            label: [fold.values for fold in folds] for label, folds in comparison.folds.items()
        },
        **more,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": published,
        "remarks": comparison.remarks,
        "definitions": definitions,
    }


def _markdown(comparison, test_set, tables, plots, definitions, citation):
    """str: comparison.md."""
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
    lines += [*plots, "## How each number is defined", ""]
    lines += [f"- **{name}**: {text}" for name, text in definitions.items()]
    if citation:
        lines += ["", f"Published values: {citation}."]
    lines += ["", "## Runs", "", _runs_table(comparison), ""]
    return "\n".join(lines)


def _about_run(label, run):
    """dict: a run's place and sources."""
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


def _curves(comparison, kind):
    """{class: {model: PRCurve}}."""
    panels = {name: {} for name in comparison.settings["classes"]}
    # One curve per model: of several seeds the run whose AP50_voc is the median.
    shown = median_runs(comparison, lambda run: getattr(run.results, kind)["AP50_voc"])
    for name, run in shown.items():
        for k, category, curve in run.results.curves:
            if k == kind and curve.num_gt:
                panels[category][name] = curve
    if not shown:
        for label, folds in comparison.gathered.folds.items():
            for category, models in panels.items():
                curves = [
                    curve
                    for seeds in folds
                    for k, name, curve in seeds[0].results.curves
                    if (k, name) == (kind, category) and curve.num_gt
                ]
                seed = f", seed {folds[0][0].seed}" if len(folds[0]) > 1 else ""
                if curves:
                    models[f"{label} ({len(folds)} folds pooled{seed})"] = _pooled(curves)
    return {name: models for name, models in panels.items() if models}


def _pooled(curves):
    """The curve of the detections of all folds together."""
    score = np.concatenate([curve.score for curve in curves])
    hit = np.concatenate([np.diff(curve.tp, prepend=0) > 0 for curve in curves])
    return pr_curve(score, hit, sum(curve.num_gt for curve in curves))


def _plot_figure_4(comparison, folder):
    paths = []
    for kind, stem, regions in (("segm", "figure_4", "masks"), ("bbox", "figure_4_boxes", "boxes")):
        curves = _curves(comparison, kind)
        if not curves:
            continue
        several = len(comparison.settings["classes"]) > 1
        panels = {
            f"Precision and recall, {regions} at IoU 0.5" + (f": {name}" if several else ""): models
            for name, models in curves.items()
        }
        files = [folder / f"{stem}.png", folder / f"{stem}.svg"]
        plot_pr_panels(panels, files, tau=comparison.settings["tau"])
        paths += files
    return paths


def _plot_classifiers(comparison, folder):
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
