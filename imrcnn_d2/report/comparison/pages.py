"""A comparison as files: tables (the paper's 3, 4 and 5, those of classes, and differences), plots,
one Markdown page and one JSON.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.comparison import Plan
from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.evaluation.detection.metrics import COUNTS
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU
from imrcnn_d2.report import names
from imrcnn_d2.report.cohort import patients_text
from imrcnn_d2.report.comparison.findings import (
    difference_text,
    family_text,
    findings,
    unit_text,
)
from imrcnn_d2.report.comparison.models import Comparison, Test, of_primary
from imrcnn_d2.report.plots.curves import plot_calibration, plot_class_roc, plot_pr_panels
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import (
    Table,
    format_value,
    markdown_table,
    markdown_text,
    p_text,
    plural,
    write_table,
)
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
    "threshold anywhere; AUROC ranks them by their highest score. Without lesion-free ones all but "
    "recall is undefined; McNemar's test is then of recall.",
    "Thresholds": "{threshold} for all models{mapped}, and tau_val, chosen on validation data, "
    "never on the test set.",
    "Intervals": "95 %. Of proportions Clopper and Pearson's on the effective number of cases, "
    "which is smaller where those of one {unit} are alike; F1 by way of TP / (TP + FP + FN). Of "
    "others Student's t with the standard error of {resamples} resamples of {unit}s with seed "
    "{seed}. They are for the choice of test data: another training would differ too.",
    "Differences": "of the means over the runs of each model. SE² = SE²_images + s₁²/n₁ + s₂²/n₂: "
    "SE_images by paired bootstrap (both models on the same resamples), s the standard deviation "
    "over the n runs of a model; interval and p by Student's t with Welch and Satterthwaite's "
    "degrees of freedom. With one run of each SE_images alone, which is about two checkpoints. p "
    "is at least 2 / (resamples + 1). Resamples in which a metric is undefined are left out.",
    "McNemar": "exact test of which images are predicted rightly at the threshold, with the "
    "interval that belongs to it (Fay and Lumbard 2021); given are how many images the first and "
    "the second model alone has right.",
    "Folds": "the difference of the means over seeds in each fold, by the corrected resampled "
    "t-test (Nadeau and Bengio 2003): the variance of the mean of k folds is (1 / k + n_test / "
    "n_train) s², since their training sets overlap. With seeds it is the test of metric ~ model + "
    "(1 | fold) + (1 | fold:model). n/a where all folds differ by the same amount.",
    "Margin": "non-inferiority: the first model is not worse by the margin or more; equivalence: "
    "nor better by it (two one-sided tests, Schuirmann 1987). Each at 5 %, as the 90 % interval "
    "shows. For 2.5 %, which authorities ask for, read the 95 % interval: its unfavourable end "
    "must lie within the margin, for equivalence both ends.",
    "Holm": "the p-values of all tables are adjusted together, but for that of the primary "
    "comparison: the only pair of models, or the one named by --primary FIRST:SECOND METRIC.",
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
    **{name: DEFINITIONS[name] for name in ("Folds", "Margin", "Holm")},
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
    content["plan"] = [row for t in tables if t.stem == "plan" for row in t.data.to_dict("records")]
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
    test_set = f"{plural(meta['images'], 'image')} ({meta['lesion_free_images']:,} without a "
    test_set += f"lesion), {plural(meta['lesions'], 'lesion')}"
    definitions = _definitions(comparison, DEFINITIONS)
    published = names.published_values(comparison.source, "345")
    source = f"its annotations record {comparison.source or 'no source'}"
    if published:
        citation = f"Published values: {names.CITATION}. The test set is of that paper: {source}."
    else:
        citation = (
            "Published values are not given: they are of the data sets "
            f"{' and '.join(names.PAPER_DATA)}, and the test set is not known to be one of them "
            f'("source" of its annotations\' info); {source}.'
        )
    content = _document(
        comparison,
        [asdict(row) for row in published],
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
    classes = ", ".join(f"{number} {name}" for name, number in sizes)
    test_set = f"{plural(meta['images'], 'image')} ({classes})"
    definitions = _definitions(comparison, CLASSIFICATION_DEFINITIONS)
    published = names.published_accuracy(comparison.dataset, comparison.settings["classes"])
    citation = f"Published values: {names.CLASSIFICATION_CITATION}." if published else None
    lines = ["## Plots", "", *_images(plots)]
    page = _markdown(comparison, test_set, tables, lines, definitions, citation)
    return plots, page, _document(comparison, published, definitions)


def _definitions(comparison, texts):
    settings = {"unit": "image", **comparison.settings}
    texts = {k: v for k, v in texts.items() if k != "Margin" or settings["margin"] is not None}
    mapped = ", of scores mapped to the probability of a hit"
    if comparison.task.localises:
        settings["threshold"] = comparison.gathered.threshold()
    settings["mapped"] = mapped if _all_mapped(comparison) else ""
    settings["regions"] = "masks" if settings.get("iou_type") == "segm" else "boxes"
    return {name: text.format(**settings) for name, text in texts.items()}


def _all_mapped(comparison):
    return all(run.maps_scores for _, run in comparison.gathered.runs)


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
        "family": comparison.family,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": published,
        "remarks": comparison.remarks,
        "definitions": definitions,
    }


def _markdown(comparison, test_set, tables, plots, definitions, citation):
    """The text of comparison.md."""
    runs = comparison.gathered.runs
    test_set += f", {patients_text(runs[0][1].results.ground_truth.images)}"
    lines = [
        f"# {markdown_text(', '.join(dict.fromkeys(label for label, _ in runs)))}",
        "",
        f"Test set: {markdown_text(comparison.dataset)}, {markdown_text(test_set)}"
        f"{'' if comparison.models else ' in the first fold'}. "
        f"Primary endpoint: {markdown_text(comparison.primary)}.",
        "",
    ]
    if comparison.tests or comparison.fold_tests:
        lines += ["## What was shown", "", markdown_text(family_text(comparison)), ""]
        lines += [*(f"- {markdown_text(text)}" for text in findings(comparison)), ""]
    if comparison.remarks:
        remarks = [f"- {markdown_text(remark)}" for remark in comparison.remarks]
        lines += ["## What to mind", "", *remarks, ""]
    lines += ["## Tables", ""]
    for table in tables:
        lines += [table.markdown(), ""]
    lines += [*plots, "## How each number is defined", ""]
    lines += [f"- **{name}**: {text}" for name, text in definitions.items()]
    if citation:
        lines += ["", markdown_text(citation)]
    rows = markdown_table(pd.DataFrame([_run_row(label, run) for label, run in runs]), 7)
    return "\n".join([*lines, "", "## Runs", "", rows, ""])


def _run_facts(label, run):
    """A run's place and sources."""
    return {
        "model": label,
        "architecture": run.architecture,
        "backbone": run.backbone,
        "seed": run.seed,
        "fold": run.fold,
        "folder": str(run.folder.resolve()),
        "dataset": run.dataset,
        "ground_truth": str(run.gt_path),
        "gt_sha256": run.meta.get("gt_sha256"),
        "checkpoint_sha256": run.weights_sha256,
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
        "checkpoint": (run.weights_sha256 or "")[:12],
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
        mixed = len({seeds[0].maps_scores for seeds in folds}) > 1
        curves = [pair for seeds in folds for pair in _curves_of(seeds[0], kind, raw=mixed)]
        seed = f", seed {folds[0][0].seed}" if len(folds[0]) > 1 else ""
        for name, models in panels.items():
            if of_class := [curve for category, curve in curves if category == name]:
                models[f"{label} ({len(folds)} folds pooled{seed})"] = _pooled(of_class)
    return {name: models for name, models in panels.items() if models}


def _curves_of(run, kind, raw=False):
    """The curve of each class; ``raw``: with the scores before the run's map, if any."""
    curves = [(name, curve) for k, name, curve in run.results.curves if k == kind and curve.num_gt]
    if not raw:
        return curves
    detections = run.results.detections
    order = np.argsort(detections.score)  # as that of the raw scores
    scores = detections.score[order], detections.raw_score[order]
    return [(name, replace(curve, score=np.interp(curve.score, *scores))) for name, curve in curves]


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
            at = {"tau": comparison.settings["tau"], "mapped": _all_mapped(comparison)}
            plot_pr_panels(panels, *files, **at)
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


NAN = math.nan
REGIONS = {"masks": ("segm", "iou"), "boxes": ("bbox", "iou_box")}
TABLE_3 = ("AP50_voc", "AP50", "AP", "IoU")
TABLE_4 = ("segm/AP50_voc", "bbox/AP50_voc", "segm/AP", "lesion/iou", "lesion/iou_box")
TABLE_5 = (*COUNTS, "precision", "recall", "accuracy", "specificity", "f1")
INTERVALS = "In brackets: 95 % intervals."
SEEDS = (
    "Several runs of a model differ by seed: what happened in each image is averaged over them "
    "before metrics are computed and resampled (AP is averaged itself); ± is the population "
    "standard deviation over the runs, the sample's is in the CSV."
)
OVER_FOLDS = "± is the population standard deviation over folds; the sample's is in the CSV."
OVERALL = ("balanced_accuracy", "top1", "auroc")
OF_CANCER = {"recall": "sensitivity", "specificity": "specificity", "auroc": "AUROC"}


def comparison_tables(comparison: Comparison) -> list[Table]:
    """All tables that the runs allow, of detectors or of classifiers."""
    classifiers = comparison.task is CLASSIFICATION
    tables = []
    if comparison.models:
        tables.append((class_table if classifiers else table_3)(comparison))
    if comparison.tests:
        tables.append(difference_table(comparison))
    if comparison.settings["plan"] is not None:
        tables.append(power_table(comparison))
    if comparison.folds:
        tables.append((fold_table if classifiers else table_4)(comparison))
    if comparison.fold_tests:
        stem, title, notes = "fold_tests", "Differences between models over the folds", ()
        if not classifiers:
            stem, title = "table_4_tests", f"Table 4, tests: {title[0].lower()}{title[1:]}"
            notes = (
                f"n_test / n_train = {comparison.n_test:g} / {comparison.n_train:g}: images for "
                "testing and for fitting the weights, those for validation left out; means over "
                "the folds.",
            )
        tables.append(table_of_tests(comparison.fold_tests, stem, title, *notes))
    return tables if classifiers else [*tables, table_5(comparison)]


def median_runs(comparison: Comparison, key: Callable[[Run], float]) -> dict[str, Run]:
    """The one run shown of each model on one split, by its label: of several seeds the median by
    ``key``.
    """
    shown = {}
    for label, runs in comparison.gathered.split.items():
        name = f"{label} (median of {len(runs)} runs)" if len(runs) > 1 else label
        shown[name] = sorted(runs, key=key)[(len(runs) - 1) // 2]
    return shown


def _metric_row(label, model, group, metric, **columns):
    """A row of a CSV in long form, of a model's "group/metric"."""
    value = model.values.get(group, {}).get(metric, NAN)
    low, high = model.intervals.get(group, {}).get(metric, (NAN, NAN))
    row = {"model": label, "source": "this comparison", "runs": len(model.runs)}
    row |= {"figure": f"{group}/{metric}", **columns}
    row |= {"value": value, "ci_low": low, "ci_high": high}
    for name, sample in (("sd_population", False), ("sd_sample", True)):
        row[name] = model.sd(group, metric, sample=sample) if math.isfinite(value) else NAN
    return row | {"remarks": ""}


def _published_row(value, **columns):
    row = {"model": value.model, "source": "published", "runs": "", "figure": value.figure}
    row |= {**columns, "value": value.value}
    row["sd_population"] = NAN if value.sd is None else value.sd
    return row | {"remarks": " ".join(value.remarks)}


def _metric_cells(columns, rows):
    """Rows of `_metric_row` as readers see them, by the names of their columns."""
    cells = {}
    for name, row in zip(columns, rows, strict=True):
        interval, metric = (row["ci_low"], row["ci_high"]), row["figure"].partition("/")[2]
        cells[name] = format_value(metric, row["value"], interval, sd=row["sd_population"])
    return cells


def _remarks(published):
    return list(dict.fromkeys(f"Published: {text}" for row in published for text in row.remarks))


def _seeds_note(comparison):
    several = any(len(model.runs) > 1 for model in comparison.models.values())
    return [SEEDS] if several else []


def _table(stem, title, cells, data, notes, text_columns=1):
    cells, data = pd.DataFrame(cells), pd.DataFrame(data)
    return Table(stem, title, cells, data, tuple(notes), text_columns)


def table_3(comparison: Comparison) -> Table:
    """AP and IoU of masks and boxes with intervals, published values below; on one split."""
    data, cells = [], []
    for label, model in comparison.models.items():
        for regions, (group, iou) in REGIONS.items():
            keys = [*((group, name) for name in TABLE_3[:-1]), ("lesion", iou)]
            rows = [_metric_row(label, model, *key, regions=regions) for key in keys]
            data += rows
            cells.append({"model": label, "regions": regions, **_metric_cells(TABLE_3, rows)})
    published = names.published_values(comparison.source, "3")
    by_model = {}
    for value in published:
        name = "IoU" if value.figure == "lesion/iou" else "AP50_voc"
        by_model.setdefault(value.model, dict.fromkeys(TABLE_3, ""))[name] = f"{value.value:.1f}"
        data.append(_published_row(value, regions="not stated"))
    for model, texts in by_model.items():
        cells.append({"model": f"{model}, published", "regions": "not stated", **texts})
    title = f"Table 3: average precision and IoU, in percent, on {comparison.dataset}"
    notes = [INTERVALS, *_seeds_note(comparison), *_remarks(published)]
    return _table("table_3", title, cells, data, notes, text_columns=2)


def table_4(comparison: Comparison) -> Table:
    """Each fold, mean and standard deviation, with published values."""
    data, cells = _over_folds(comparison, TABLE_4, source="this comparison", remarks="")
    number = len(next(iter(comparison.folds.values())))
    published = names.published_values(comparison.source, "4")
    for value in published:
        row = {"model": value.model, "source": "published", "figure": value.figure}
        row |= {"mean": value.value, "sd_population": value.sd}
        data.append({**row, "remarks": " ".join(value.remarks)})
        name = names.metric_name(value.figure).partition(" ")[0]
        texts = {"model": f"{value.model}, published", "metric": name}
        texts |= {f"fold {i}": "" for i in range(number)}
        texts["mean ± sd"] = format_value(value.figure, value.value, sd=value.sd)
        cells.append(texts)
    title = f"Table 4: {number}-fold cross-validation, in percent"
    notes = [*_fold_notes(comparison), *_remarks(published)]
    return _table("table_4", title, cells, data, notes, text_columns=2)


def fold_table(comparison: Comparison) -> Table:
    """Each fold of classifiers, mean and standard deviation."""
    endpoints = [f"recognition/accuracy_{name}" for name in comparison.settings["classes"]]
    endpoints += [f"recognition/{metric}" for metric in OVERALL]
    number = len(next(iter(comparison.folds.values())))
    title = f"{number}-fold cross-validation, in percent"
    data, cells = _over_folds(comparison, endpoints)
    return _table("folds", title, cells, data, _fold_notes(comparison), text_columns=2)


def _fold_notes(comparison):
    several = comparison.seeds_of_folds != 1
    return [OVER_FOLDS, *(["The value of a fold is the mean over its seeds."] if several else [])]


def _over_folds(comparison, endpoints, source=None, remarks=None):
    """Each fold, mean and standard deviation of the endpoints: as numbers and as texts."""
    data, cells = [], []
    for label, folds in comparison.folds.items():
        for endpoint in endpoints:
            group, _, metric = endpoint.partition("/")
            values = np.array([fold.values[group].get(metric, NAN) for fold in folds])
            mean, sd = float(values.mean()), float(values.std())
            row = {"model": label, "source": source, "figure": endpoint}
            row |= {f"fold_{index}": value for index, value in enumerate(values)}
            row |= {"mean": mean, "sd_population": sd, "sd_sample": float(values.std(ddof=1))}
            row["remarks"] = remarks
            data.append({key: value for key, value in row.items() if value is not None})
            texts = {f"fold {i}": format_value(metric, value) for i, value in enumerate(values)}
            texts["mean ± sd"] = format_value(metric, mean, sd=sd)
            cells.append({"model": label, "metric": names.metric_name(endpoint), **texts})
    return data, cells


def table_5(comparison: Comparison) -> Table:
    """Counts and the five metrics computed from them, at the common threshold and at each model's
    own. Of folds, where no run is on one split, counts are sums over the folds.
    """
    data, cells = [], []
    models, notes = comparison.models, [INTERVALS, *_seeds_note(comparison)]
    if not models:
        models = {label: _Pooled(folds) for label, folds in comparison.folds.items()}
        notes = [_Pooled.NOTE]
    published = names.published_values(comparison.source, "5")
    paper_tau = f"{PAPER_TAU:.3g}"
    for label, model in models.items():
        value = f" = {model.taus[0]:.3g}" if len(model.taus) == 1 and model.taus[0] else ""
        thresholds = {"": comparison.gathered.threshold(label), "tau_val.": f"tau_val{value}"}
        places = {
            prefix + level: (threshold, name)
            for prefix, threshold in thresholds.items()
            for level, name in names.LEVELS.items()
        }
        if published:
            places["paper"] = (paper_tau, "as the paper")
        for group, (threshold, name) in places.items():
            if group in model.values:
                rows = [_metric_row(label, model, group, m, threshold=threshold) for m in TABLE_5]
                data += rows
                texts = {"model": label, "threshold": threshold, "cases": name}
                cells.append({**texts, **_metric_cells(TABLE_5, rows)})
    if published:
        texts = {"model": f"{published[0].model}, published", "threshold": paper_tau}
        texts |= {"cases": "as the paper", **dict.fromkeys(TABLE_5, "")}
        for value in published:
            texts[value.figure.partition("/")[2]] = f"{value.value:.1f}"
            data.append(_published_row(value, threshold=paper_tau))
        cells.append(texts)
        notes.append(
            f"As the paper: TN are the images without any false alarm, at {paper_tau} of the "
            "scores as the network gives them; compare the published values with these rows only."
        )
    notes += [
        "Of lesions: TP are detections at the threshold that hit a lesion, FP those that hit none, "
        "FN lesions that no detection hits, TN lesion-free images without a detection; specificity "
        "and accuracy then mix images and detections: use those of images.",
        "tau_val is each model's own threshold, chosen on validation data.",
        *_remarks(published),
    ]
    title = "Table 5: counts, and metrics in percent, at the operating points"
    cells = [{names.metric_label(name): text for name, text in row.items()} for row in cells]
    return _table("table_5", title, cells, data, notes, text_columns=3)


class _Pooled:
    """The folds of a model as one: each image was tested once. Metrics at thresholds only."""

    NOTE = (
        "Counts are sums over the folds, in each of which other images were tested, and metrics "
        "are computed from the sums. Intervals are left out: the models of different folds differ."
    )

    def __init__(self, folds):
        self.runs, self.intervals, self.taus = [self], {}, []
        self.values = {
            group: formulas(sum(fold.metrics.columns[group][0].sum(axis=0) for fold in folds))
            for group, (_, formulas, _) in folds[0].metrics.columns.items()
            if all(group in fold.metrics.columns for fold in folds)
        }

    def sd(self, group, metric, *, sample=False):
        return NAN


def class_table(comparison: Comparison) -> Table:
    """The accuracy of each class, the metrics of all classes, and those of cancer against benign,
    of models on one split, with intervals; published values below.
    """
    classes = comparison.settings["classes"]
    columns = {name: ("recognition", f"accuracy_{name}") for name in classes}
    columns |= {names.metric_name(f"recognition/{key}"): ("recognition", key) for key in OVERALL}
    if comparison.settings["cancer_classes"]:
        columns |= {f"cancer: {name}": ("cancer", metric) for metric, name in OF_CANCER.items()}
    data, cells = [], []
    for label, model in comparison.models.items():
        rows = [_metric_row(label, model, *key) for key in columns.values()]
        data += rows
        cells.append({"model": label, **_metric_cells(columns, rows)})
    notes = ["The columns named as a class: accuracy of the class. In brackets: 95 % intervals."]
    notes += _seeds_note(comparison)
    if published := names.published_accuracy(comparison.dataset, classes):
        texts = {name: format_value("", value) for name, value in published.items()}
        cells.append({"model": f"{names.MODEL}, published", **dict.fromkeys(columns, ""), **texts})
        data += [
            {"model": names.MODEL, "source": "published", "figure": f"recognition/accuracy_{name}"}
            | {"value": value, "remarks": " ".join(names.REMARKS)}
            for name, value in published.items()
        ]
        notes += [f"Published: {text}" for text in names.REMARKS]
    title = f"Accuracy of each class, in percent, on {comparison.dataset}"
    return _table("classes", title, cells, data, notes)


def difference_table(comparison: Comparison) -> Table:
    """The tests of models on the same images."""
    notes = ["First model minus second, in percentage points unless the metric has another unit."]
    if comparison.clustered and any(t.test.startswith("McNemar") for t in comparison.tests):
        unit = comparison.settings["unit"]
        notes.append(
            f"Some {unit}s have several images: McNemar's test takes images for independent and "
            f"is too sure; the bootstrap resamples {unit}s."
        )
    title = "Differences between models on the same test images"
    return table_of_tests(comparison.tests, "differences", title, *notes)


POWER = 0.8


def power_table(comparison: Comparison) -> Table:
    """For each pair on one test set, the power to find a difference of ``settings["plan"]`` with
    the present runs and images, and how many runs or images give a power of 80 %."""
    effect, unit = comparison.settings["plan"], comparison.settings["unit"]
    data, cells = [], []
    for test in of_primary(comparison.tests, comparison.primary):
        # Of a single run next to several, those of the other model tell how trainings vary.
        plan, single = Plan.of(test), test.of_checkpoints
        runs = 1 if single else max(2, min(test.runs))
        row = {"first": test.first, "second": test.second, "endpoint": test.endpoint}
        row |= {"effect": effect, "unit": unit, "units": plan.units, "runs": runs}
        row |= {"se_images": plan.se_images, "sd_runs": plan.seed_sd}
        row["power"] = 100 * plan.power(effect, runs)
        needed = {
            "runs_needed": None if single else plan.runs_needed(effect, POWER),
            "units_needed": plan.units_needed(effect, runs, POWER),
            "units_needed_with_10_runs": None if single else plan.units_needed(effect, 10, POWER),
        }
        data.append(row | needed)
        none = "not known" if single or math.isnan(row["power"]) else "none suffices"
        texts = [none if number is None else f"{number:,}" for number in needed.values()]
        cells.append(
            {
                "models": f"{test.first} − {test.second}",
                f"{unit}s": f"{plan.units:,}",
                "runs of each": f"{runs}",
                f"SE of {unit}s": format_value("", plan.se_images, decimals=2),
                "sd over runs": format_value("", plan.seed_sd, decimals=2),
                "power in %": format_value("", row["power"], decimals=0),
                "runs needed": texts[0],
                f"{unit}s needed": texts[1],
                "with 10 runs": texts[2],
            }
        )
    notes = [
        f"Power: the probability that a two-sided test at 5 % finds such a difference with the "
        f"present runs and {unit}s. Needed for a power of {100 * POWER:.0f} %: runs of each model "
        f"on the present {unit}s; {unit}s for the present runs, and for 10 runs of each.",
        f"Assumed: {unit}s and trainings vary as in these runs, and the p-value is not adjusted, "
        "which is so for the primary comparison alone.",
    ]
    if any(row["runs"] == 1 for row in data):
        notes.append(
            "With one run of each, this is about two checkpoints: how trainings vary is not known. "
            "Give at least two runs of each model, which differ by seed."
        )
    if any(len(set(test.runs)) > 1 for test in of_primary(comparison.tests, comparison.primary)):
        notes.append(
            "Where two models have different numbers of runs, the plan has the smaller number of "
            "each, and at least 2."
        )
    name = names.metric_name(comparison.primary)
    title = (
        f"Plan: to find a true difference of {effect:g} {unit_text(comparison.primary)} in {name}"
    )
    return Table("plan", title, pd.DataFrame(cells), pd.DataFrame(data, dtype=object), tuple(notes))


# Columns of the CSV; comparison.json has all that is known of a test.
OF_A_TEST = (
    *("first", "second", "endpoint", "shows", "test", "estimate", "low", "high", "se", "df", "p"),
    *("p_holm", "primary", "undefined_share"),
)


def table_of_tests(tests: list[Test], stem: str, title: str, *notes: str) -> Table:
    """Differences with intervals and p-values."""
    cells = [
        {
            "models": f"{test.first} − {test.second}",
            "metric": names.metric_name(test.endpoint) + (" (primary)" if test.primary else ""),
            "test": test.test,
            "difference": difference_text(test),
            "p": p_text(test.p),
            "p (Holm)": "" if test.primary else p_text(test.p_holm),
        }
        for test in tests
    ]
    columns = ["models", "metric", "test", "difference", "p", "p (Holm)"]
    cells = pd.DataFrame(cells, columns=columns)
    data = pd.DataFrame([vars(test) for test in tests], columns=OF_A_TEST)
    return Table(stem, title, cells, data, notes, text_columns=3)
