"""A comparison as files: tables, plots, one Markdown page and one JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.report import names
from imrcnn_d2.report.comparison.models import Comparison
from imrcnn_d2.report.comparison.tables import comparison_tables, median_runs
from imrcnn_d2.report.plots.curves import plot_calibration, plot_class_roc, plot_pr_panels
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix
from imrcnn_d2.report.tables import markdown_table, markdown_text, write_table
from imrcnn_d2.task import CLASSIFICATION
from imrcnn_d2.utils.files import strict_json, write_atomically

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
    "McNemar": DEFINITIONS["McNemar"].replace(" at the threshold", ""),
    **{name: DEFINITIONS[name] for name in ("Folds", "Holm")},
}


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write comparison.md, comparison.json, each table as .md, .csv and .tex, and as .png and .svg
    the plots: of detectors Figure 4, of classifiers confusion matrices, ROC curves and
    calibration. Return the files, comparison.md first. Files of the same names are replaced.
    """
    folder = Path(folder)
    tables = comparison_tables(comparison)
    write = _classification if comparison.task is CLASSIFICATION else _detection
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
    meta = comparison.gathered.runs[0][1].results.meta
    test_set = f"{meta['images']} images ({meta['lesion_free_images']} without a lesion), "
    test_set += f"{meta['lesions']} lesions"
    definitions = _definitions(comparison, DEFINITIONS)
    published = any((comparison.dataset or "").startswith(f"{data}_") for data in names.PAPER_DATA)
    citation = names.CITATION if published else None
    content = _document(
        comparison,
        [asdict(row) for row in names.published_values(comparison.dataset, "345")],
        definitions,
        n_train=comparison.n_train,
        n_test=comparison.n_test,
    )
    for label, model in comparison.models.items():
        content["models"][label]["operating_points"] = model.taus
    return plots, _markdown(comparison, test_set, tables, lines, definitions, citation), content


def _classification(comparison, folder, tables):
    plots = _plot_classifiers(comparison, folder)
    meta = comparison.gathered.runs[0][1].results.meta
    sizes = zip(meta["classes"], meta["images_of_class"], strict=True)
    test_set = f"{meta['images']} images ({', '.join(f'{n} {name}' for name, n in sizes)})"
    definitions = _definitions(comparison, CLASSIFICATION_DEFINITIONS)
    published = names.published_accuracy(comparison.dataset, comparison.settings["classes"])
    citation = names.CLASSIFICATION_CITATION if published else None
    lines = ["## Plots", "", *_images(plots)]
    page = _markdown(comparison, test_set, tables, lines, definitions, citation)
    return plots, page, _document(comparison, published, definitions)


def _definitions(comparison, texts):
    settings = {"unit": "image", **comparison.settings}
    settings["regions"] = "masks" if settings.get("iou_type") == "segm" else "boxes"
    return {name: text.format(**settings) for name, text in texts.items()}


def _images(plots, alt=None):
    """Lines of Markdown that show the plots."""
    shown = [path for path in plots if path.suffix == ".png"]
    return [line for path in shown for line in (f"![{alt or path.stem}]({path.name})", "")]


def _document(comparison, published, definitions, **sizes):
    """The content of comparison.json."""
    return {
        "settings": comparison.settings,
        "runs": [_run_facts(label, run) for label, run in comparison.gathered.runs],
        "models": {
            label: {"figures": model.values, "intervals": model.intervals, "runs": model.runs}
            for label, model in comparison.models.items()
        },
        "folds": {
            label: [fold.values for fold in folds] for label, folds in comparison.folds.items()
        },
        **sizes,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": published,
        "remarks": comparison.remarks,
        "definitions": definitions,
    }


def _markdown(comparison, test_set, tables, plots, definitions, citation):
    """The text of comparison.md."""
    runs = comparison.gathered.runs
    patients = runs[0][1].results.meta["patients"]
    if patients:
        test_set += f", {patients} patients"
    lines = [
        f"# {markdown_text(', '.join(dict.fromkeys(label for label, _ in runs)))}",
        "",
        f"Test set: {markdown_text(comparison.dataset or 'not named')}, {markdown_text(test_set)}"
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
    rows = markdown_table(pd.DataFrame([_run_row(label, run) for label, run in runs]), 7)
    return "\n".join([*lines, "", "## Runs", "", rows, ""])


def _run_facts(label, run):
    """A run's place and sources."""
    return {
        "model": label,
        "architecture": run.record.get("model"),
        "backbone": run.backbone,
        "seed": run.seed,
        "fold": run.fold,
        "folder": str(run.folder.resolve()),
        "dataset": run.dataset,
        "ground_truth": str(run.gt_path),
        "gt_sha256": run.meta.get("gt_sha256"),
        "checkpoint_sha256": run.meta.get("checkpoint_sha256"),
        "git": run.record.get("git"),
        "config_sha256": run.record.get("config_sha256"),
    }


def _run_row(label, run):
    git = run.record.get("git") or {}
    changes = " + changes" if git.get("dirty") else ""
    return {
        "model": label,
        "backbone": run.backbone or "",
        "seed": "" if run.seed is None else str(run.seed),
        "fold": f"{run.fold['index']} of {run.fold['of']}" if run.fold else "",
        "checkpoint": (run.meta.get("checkpoint_sha256") or "")[:12],
        "git": (git.get("revision") or "")[:12] + changes,
        "folder": str(run.folder.resolve()),
    }


def _curves(comparison, kind):
    """The curves by class and model: of several seeds that of the run with the median AP50_voc,
    of folds that of all their detections together.
    """
    panels = {name: {} for name in comparison.settings["classes"]}
    shown = median_runs(comparison, lambda run: getattr(run.results, kind)["AP50_voc"])
    for label, run in shown.items():
        for name, curve in _curves_of(run, kind):
            panels[name][label] = curve
    for label, folds in comparison.gathered.folds.items() if not shown else ():
        curves = [pair for seeds in folds for pair in _curves_of(seeds[0], kind)]
        seed = f", seed {folds[0][0].seed}" if len(folds[0]) > 1 else ""
        for name, models in panels.items():
            if of_class := [curve for category, curve in curves if category == name]:
                models[f"{label} ({len(folds)} folds pooled{seed})"] = _pooled(of_class)
    return {name: models for name, models in panels.items() if models}


def _curves_of(run, kind):
    return [(name, curve) for k, name, curve in run.results.curves if k == kind and curve.num_gt]


def _pooled(curves):
    score = np.concatenate([curve.score for curve in curves])
    hit = np.concatenate([np.diff(curve.tp, prepend=0) > 0 for curve in curves])
    return pr_curve(score, hit, sum(curve.num_gt for curve in curves))


def _plot_figure_4(comparison, folder):
    paths = []
    several = len(comparison.settings["classes"]) > 1
    for kind, stem, regions in (("segm", "figure_4", "masks"), ("bbox", "figure_4_boxes", "boxes")):
        title = f"Precision and recall, {regions} at IoU 0.5"
        panels = {
            f"{title}: {name}" if several else title: models
            for name, models in _curves(comparison, kind).items()
        }
        if panels:
            files = [folder / f"{stem}.png", folder / f"{stem}.svg"]
            plot_pr_panels(panels, *files, tau=comparison.settings["tau"])
            paths += files
    return paths


def _plot_classifiers(comparison, folder):
    runs = median_runs(comparison, lambda run: run.results.recognition["balanced_accuracy"])
    shown = {name: run.results for name, run in runs.items()}
    matrices = {name: results.confusion for name, results in shown.items()}
    if not shown:  # each image of a cross-validation was tested once, whatever the seed
        for label, folds in comparison.gathered.folds.items():
            counts = sum(seeds[0].results.confusion.counts for seeds in folds)
            matrix = ConfusionMatrix(comparison.settings["classes"], counts)
            matrices[f"{label} ({len(folds)} folds)"] = matrix
    calibrations = {name: results.metrics.calibration for name, results in shown.items()}
    paths = []
    for suffix in ("png", "svg"):
        paths.append(folder / f"confusion.{suffix}")
        plot_confusion_matrix(matrices, paths[-1])
        if shown:
            paths += [folder / f"{stem}.{suffix}" for stem in ("roc", "calibration")]
            plot_class_roc(shown, paths[-2])
            plot_calibration(calibrations, paths[-1], labels=("Right", "Images"))
    return paths
