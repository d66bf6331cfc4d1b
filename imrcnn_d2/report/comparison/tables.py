"""The tables of a comparison: the paper's Tables 3, 4 and 5, those of classes, and differences."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.metrics import COUNTS
from imrcnn_d2.report import names
from imrcnn_d2.report.comparison.models import Comparison, Test
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import Table, format_value, p_text
from imrcnn_d2.task import CLASSIFICATION

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
    return row | {"comparable": True, "remarks": ""}


def _published_row(value, **columns):
    row = {"model": value.model, "source": "published", "runs": "", "figure": value.figure}
    row |= {**columns, "value": value.value}
    row["sd_population"] = NAN if value.sd is None else value.sd
    return row | {"comparable": value.comparable, "remarks": " ".join(value.remarks)}


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
    published = names.published_values(comparison.dataset, "3")
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
    published = names.published_values(comparison.dataset, "4")
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
    notes = [OVER_FOLDS, *_remarks(published)]
    return _table("table_4", title, cells, data, notes, text_columns=2)


def fold_table(comparison: Comparison) -> Table:
    """Each fold of classifiers, mean and standard deviation."""
    endpoints = [f"recognition/accuracy_{name}" for name in comparison.settings["classes"]]
    endpoints += [f"recognition/{metric}" for metric in OVERALL]
    number = len(next(iter(comparison.folds.values())))
    title = f"{number}-fold cross-validation, in percent"
    data, cells = _over_folds(comparison, endpoints)
    return _table("folds", title, cells, data, [OVER_FOLDS], text_columns=2)


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
    for label, model in models.items():
        value = f" = {model.taus[0]:.3g}" if len(model.taus) == 1 and model.taus[0] else ""
        thresholds = {"": f"{comparison.settings['tau']:g}", "tau_val.": f"tau_val{value}"}
        for prefix, threshold in thresholds.items():
            for level, name in names.LEVELS.items():
                if (group := prefix + level) not in model.values:
                    continue
                rows = [_metric_row(label, model, group, m, threshold=threshold) for m in TABLE_5]
                data += rows
                texts = {"model": label, "threshold": threshold, "cases": name}
                cells.append({**texts, **_metric_cells(TABLE_5, rows)})
    published = names.published_values(comparison.dataset, "5")
    if published:
        texts = {"model": f"{published[0].model}, published", "threshold": "0.7"}
        texts |= {"cases": "not stated", **dict.fromkeys(TABLE_5, "")}
        for value in published:
            mark = "" if value.comparable else " †"
            texts[value.figure.partition("/")[2]] = f"{value.value:.1f}{mark}"
            data.append(_published_row(value, threshold="0.7"))
        cells.append(texts)
    notes += [
        "Of lesions: TP are detections at the threshold that hit a lesion, FP those that hit none, "
        "FN lesions that no detection hits, TN lesion-free images without a detection; specificity "
        "and accuracy then mix images and detections and are given for comparison with the paper "
        "only.",
        "tau_val is each model's own threshold, chosen on validation data.",
    ]
    for text in _remarks(published):
        notes.append(text.replace("Published: Not comparable", "† Published, not comparable"))
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
    notes = ["Later model given minus earlier one, or model minus baseline; percentage points."]
    if comparison.clustered:
        notes.append(
            "Patients have several images each: McNemar's test takes images for independent and "
            "is too sure; the bootstrap resamples patients."
        )
    title = "Differences between models on the same test images"
    return table_of_tests(comparison.tests, "differences", title, *notes)


def table_of_tests(tests: list[Test], stem: str, title: str, *notes: str) -> Table:
    """Differences with intervals and p-values."""
    cells = [
        {
            "models": f"{test.first} − {test.second}",
            "metric": names.metric_name(test.endpoint) + (" (primary)" if test.primary else ""),
            "test": test.test,
            "difference": format_value("", test.estimate, (test.low, test.high)),
            "p": p_text(test.p),
            "p (Holm)": "" if test.primary else p_text(test.p_holm),
        }
        for test in tests
    ]
    columns = ["models", "metric", "test", "difference", "p", "p (Holm)"]
    cells = pd.DataFrame(cells, columns=columns)
    return Table(stem, title, cells, pd.DataFrame(map(vars, tests)), notes, text_columns=3)
