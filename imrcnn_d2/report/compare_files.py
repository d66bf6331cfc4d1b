"""A comparison as files: tables, pictures, one Markdown page and one JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation.curves import pr_curve
from ..evaluation.files import strict_json, write_atomically
from .compare_tables import table_3, table_4, table_5, table_of_tests
from .pr_curve import draw_pr_panels
from .published import CITATION, PAPER_DATA, published_values
from .tables import markdown_table, write_table

__all__ = ["DEFINITIONS", "about_run", "runs_table", "write_comparison"]

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
    files = [path for table in tables for path in write_table(table, folder)]
    pictures = _draw_figure_4(comparison, folder)
    document = _document(comparison)
    page = _page(comparison, tables, pictures, document["definitions"])
    write_atomically(folder / "comparison.md", page)
    write_atomically(folder / "comparison.json", strict_json(document))
    return [folder / "comparison.md", folder / "comparison.json", *files, *pictures]


def _tables(comparison):
    tables = []
    if comparison.models:
        tables.append(table_3(comparison))
    if comparison.tests:
        notes = ["Later model given minus earlier one, or model minus baseline; percentage points."]
        if comparison.clustered:
            notes.append(
                "Patients have several images each: McNemar's test takes images for independent "
                "and is too sure; the bootstrap resamples patients."
            )
        title = "Differences between models on the same test images"
        tables.append(table_of_tests(comparison, comparison.tests, "differences", title, *notes))
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
    for label, runs in comparison.gathered.split.items():
        # One curve a model: of several seeds the run whose AP50_voc is the median.
        order = sorted(runs, key=lambda run: getattr(run.results, kind)["AP50_voc"])
        run = order[(len(order) - 1) // 2]
        name = f"{label} (median of {len(runs)} runs)" if len(runs) > 1 else label
        for own_kind, category, curve in run.results.curves:
            if own_kind == kind and curve.num_gt:
                panels[category][name] = curve
    if not comparison.gathered.split:
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
        draw_pr_panels(panels, own_paths, tau=comparison.settings["tau"])
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


def _document(comparison):
    """What comparison.json holds."""
    models = {}
    for label, model in comparison.models.items():
        models[label] = {
            "figures": model.figures,
            "intervals": model.intervals,
            "runs": model.runs,
            "operating_points": model.taus,
        }
    return {
        "settings": comparison.settings,
        "runs": [about_run(label, run) for label, run in comparison.runs],
        "models": models,
        "folds": {label: [one.figures for one in own] for label, own in comparison.folds.items()},
        "n_train": comparison.n_train,
        "n_test": comparison.n_test,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": [
            asdict(row) for table in "345" for row in published_values(comparison.dataset, table)
        ],
        "remarks": comparison.remarks,
        "definitions": _definitions(comparison),
    }


def about_run(label, run):
    """dict: where a run (Run) of a model is, and what of."""
    meta, record = run.metrics["meta"], run.run or {}
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


def _page(comparison, tables, pictures, definitions):
    meta = comparison.runs[0][1].results.meta
    labels = list(dict.fromkeys(label for label, _ in comparison.runs))
    size = f"{meta['images']} images ({meta['lesion_free_images']} without a lesion)"
    size += f", {meta['lesions']} lesions"
    if meta["patients"]:
        size += f", {meta['patients']} patients"
    if not comparison.models:
        size += " in the first fold"
    lines = [
        f"# {', '.join(labels)}",
        "",
        f"Test set: {comparison.dataset or 'not named'}, {size}. "
        f"Primary endpoint: {comparison.primary}.",
        "",
    ]
    if comparison.remarks:
        lines += ["**Read first**", "", *(f"- {remark}" for remark in comparison.remarks), ""]
    lines += ["## Tables", ""]
    for table in tables:
        lines += [table.markdown(), ""]
    if not comparison.models:
        lines += ["Table 3 and tests on one split need runs that are not of folds.", ""]
    lines += ["## Figure 4", ""]
    for path in pictures:
        if path.suffix == ".png":
            lines += [f"![Precision-recall curves]({path.name})", ""]
    lines += [
        "Thin: the curve; thick: its envelope, whose area is AP50_voc. Diamonds: break-even "
        "points, where precision equals recall."
        if pictures
        else "No curves: the results know no scores, or there is no lesion.",
        "",
    ]
    lines += ["## How each number is defined", ""]
    lines += [f"- **{name}**: {text}" for name, text in definitions.items()]
    if any((comparison.dataset or "").startswith(f"{data}_") for data in PAPER_DATA):
        lines += ["", f"Published values: {CITATION}."]
    lines += ["", "## Runs", "", runs_table(comparison), ""]
    return "\n".join(lines)


def runs_table(comparison):
    """str: a Markdown table of the runs of a Comparison."""
    rows = []
    for label, run in comparison.runs:
        about = about_run(label, run)
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
