"""A comparison as files: tables, pictures, one Markdown page and one JSON."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..evaluation.curves import pr_curve
from .compare_page import difference_table, document, markdown_page, median_runs, write_files
from .compare_tables import table_3, table_4, table_5, table_of_tests
from .pr_curve import draw_pr_panels
from .published import CITATION, PAPER_DATA, published_values

__all__ = ["DEFINITIONS", "write_comparison"]

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
