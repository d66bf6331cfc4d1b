"""The tables of a comparison: the paper's Tables 3, 4 and 5, those of classes, and differences."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.counts import named
from imrcnn_d2.evaluation.detection.metrics import COUNTS
from imrcnn_d2.report.comparison.models import Comparison, Test
from imrcnn_d2.report.names import (
    LEVELS,
    MODEL,
    REMARKS,
    metric_label,
    metric_name,
    published_accuracy,
    published_values,
)
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import Table, format_value

__all__ = [
    "class_table",
    "comparison_tables",
    "difference_table",
    "fold_table",
    "median_runs",
    "table_3",
    "table_4",
    "table_5",
    "table_of_tests",
]


NAN = math.nan
REGIONS = {"masks": ("segm", "iou"), "boxes": ("bbox", "iou_box")}
TABLE_3 = ("AP50_voc", "AP50", "AP", "IoU")
TABLE_4 = ("segm/AP50_voc", "bbox/AP50_voc", "segm/AP", "lesion/iou", "lesion/iou_box")
FIVE = ("precision", "recall", "accuracy", "specificity", "f1")
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
    classifiers = comparison.task == "recognition"
    tables = []
    if comparison.models:
        tables.append((class_table if classifiers else table_3)(comparison))
    if comparison.tests:
        tables.append(difference_table(comparison))
    if comparison.folds:
        tables.append((fold_table if classifiers else table_4)(comparison))
    if comparison.fold_tests and classifiers:
        title = "Differences between models over the folds"
        tables.append(table_of_tests(comparison, comparison.fold_tests, "fold_tests", title))
    elif comparison.fold_tests:
        note = (
            f"n_test / n_train = {comparison.n_test:g} / {comparison.n_train:g}: images for "
            "testing and for fitting the weights, those for validation left out; means over the "
            "folds."
        )
        title = "Table 4, tests: differences between models over the folds"
        tables.append(
            table_of_tests(comparison, comparison.fold_tests, "table_4_tests", title, note)
        )
    return tables if classifiers else [*tables, table_5(comparison)]


def median_runs(comparison: Comparison, key: Callable[[Run], float]) -> dict[str, Run]:
    """
    The one run shown of each model on one split, by its label: of several seeds the median by
    ``key``.
    """
    shown = {}
    for label, runs in comparison.gathered.split.items():
        name = f"{label} (median of {len(runs)} runs)" if len(runs) > 1 else label
        shown[name] = sorted(runs, key=key)[(len(runs) - 1) // 2]
    return shown


def _metric_row(label, model, group, metric, **more):
    """dict: a row of a CSV in long form, of a model's "group/metric"."""
    value = model.values.get(group, {}).get(metric, NAN)
    low, high = model.intervals.get(group, {}).get(metric, (NAN, NAN))
    return {
        "model": label,
        "source": "this comparison",
        "runs": len(model.runs),
        "figure": f"{group}/{metric}",
        **more,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "sd_population": model.sd(group, metric) if math.isfinite(value) else NAN,
        "sd_sample": model.sd(group, metric, sample=True) if math.isfinite(value) else NAN,
        "comparable": True,
        "remarks": "",
    }


def _published_row(value, **more):
    return {
        "model": value.model,
        "source": "published",
        "runs": "",
        "figure": value.figure,
        **more,
        "value": value.value,
        "sd_population": NAN if value.sd is None else value.sd,
        "comparable": value.comparable,
        "remarks": " ".join(value.remarks),
    }


def _metric_cell(row):
    """str: a row of :func:`_metric_row` as readers see it, with its interval."""
    interval = (row["ci_low"], row["ci_high"])
    name = row["figure"].partition("/")[2]
    return format_value(name, row["value"], interval, sd=row["sd_population"])


def _remarks(published):
    return list(dict.fromkeys(f"Published: {text}" for row in published for text in row.remarks))


def _notes(comparison, *notes):
    several = any(len(model.runs) > 1 for model in comparison.models.values())
    return [INTERVALS, *([SEEDS] if several else []), *notes]


def table_3(comparison: Comparison) -> Table:
    """AP and IoU of masks and boxes with intervals, published values below; on one split."""
    data, cells = [], []
    for label, model in comparison.models.items():
        for regions, (group, iou) in REGIONS.items():
            keys = {"IoU": ("lesion", iou)}
            rows = [
                _metric_row(label, model, *keys.get(name, (group, name)), regions=regions)
                for name in TABLE_3
            ]
            data += rows
            texts = dict(zip(TABLE_3, map(_metric_cell, rows), strict=True))
            cells.append({"model": label, "regions": regions, **texts})
    published = published_values(comparison.dataset, "3")
    by_model = {}
    for value in published:
        name = "IoU" if value.figure == "lesion/iou" else "AP50_voc"
        by_model.setdefault(value.model, {})[name] = f"{value.value:.1f}"
        data.append(_published_row(value, regions="not stated"))
    for model, texts in by_model.items():
        blank = dict.fromkeys(TABLE_3, "")
        cells.append({"model": f"{model}, published", "regions": "not stated", **blank, **texts})
    return Table(
        "table_3",
        f"Table 3: average precision and IoU, in percent, on {comparison.dataset}",
        pd.DataFrame(cells),
        pd.DataFrame(data),
        tuple(_notes(comparison, *_remarks(published))),
        text_columns=2,
    )


def table_4(comparison: Comparison) -> Table:
    """Each fold, mean and standard deviation, with published values."""
    data, cells = _over_folds(comparison, TABLE_4, source="this comparison", remarks="")
    number = len(next(iter(comparison.folds.values())))
    published = published_values(comparison.dataset, "4")
    for value in published:
        data.append(
            {
                "model": value.model,
                "source": "published",
                "figure": value.figure,
                "mean": value.value,
                "sd_population": value.sd,
                "remarks": " ".join(value.remarks),
            }
        )
        cells.append(
            {
                "model": f"{value.model}, published",
                "metric": metric_name(value.figure).partition(" ")[0],
                **{f"fold {i}": "" for i in range(number)},
                "mean ± sd": format_value(value.figure, value.value, sd=value.sd),
            }
        )
    return Table(
        "table_4",
        f"Table 4: {number}-fold cross-validation, in percent",
        pd.DataFrame(cells),
        pd.DataFrame(data),
        (OVER_FOLDS, *_remarks(published)),
        text_columns=2,
    )


def fold_table(comparison: Comparison) -> Table:
    """Each fold of classifiers, mean and standard deviation."""
    endpoints = [f"recognition/accuracy_{name}" for name in comparison.settings["classes"]]
    endpoints += [f"recognition/{metric}" for metric in OVERALL]
    data, cells = _over_folds(comparison, endpoints)
    number = len(next(iter(comparison.folds.values())))
    title = f"{number}-fold cross-validation, in percent"
    return Table(
        "folds", title, pd.DataFrame(cells), pd.DataFrame(data), (OVER_FOLDS,), text_columns=2
    )


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
            cells.append({"model": label, "metric": metric_name(endpoint), **texts})
    return data, cells


def table_5(comparison: Comparison) -> Table:
    """
    Counts and the five metrics computed from them, at the common threshold and at each model's
    own. Of folds, where no run is on one split, counts are sums over the folds.
    """
    tau = comparison.settings["tau"]
    data, cells = [], []
    models = comparison.models or {
        label: _Pooled(folds) for label, folds in comparison.folds.items()
    }
    for label, model in models.items():
        value = f" = {model.taus[0]:.3g}" if len(model.taus) == 1 and model.taus[0] else ""
        for prefix, threshold in (("", f"{tau:g}"), ("tau_val.", f"tau_val{value}")):
            for level, name in LEVELS.items():
                if prefix + level not in model.values:
                    continue
                rows = [
                    _metric_row(label, model, prefix + level, metric, threshold=threshold)
                    for metric in (*COUNTS, *FIVE)
                ]
                data += rows
                texts = dict(zip((*COUNTS, *FIVE), map(_metric_cell, rows), strict=True))
                cells.append({"model": label, "threshold": threshold, "cases": name, **texts})
    notes = list(_notes(comparison)) if comparison.models else [_Pooled.NOTE]
    published = published_values(comparison.dataset, "5")
    if published:
        texts = {}
        for value in published:
            mark = "" if value.comparable else " †"
            texts[value.figure.partition("/")[2]] = f"{value.value:.1f}{mark}"
            data.append(_published_row(value, threshold="0.7"))
        blank = dict.fromkeys((*COUNTS, *FIVE), "")
        model = f"{published[0].model}, published"
        cells.append({"model": model, "threshold": "0.7", "cases": "not stated", **blank, **texts})
    notes += [
        "Of lesions: TP are detections at the threshold that hit a lesion, FP those that hit none, "
        "FN lesions that no detection hits, TN lesion-free images without a detection; specificity "
        "and accuracy then mix images and detections and are given for comparison with the paper "
        "only.",
        "tau_val is each model's own threshold, chosen on validation data.",
    ]
    for text in _remarks(published):
        notes.append(text.replace("Published: Not comparable", "† Published, not comparable"))
    frame = pd.DataFrame(cells).rename(columns=metric_label)
    title = "Table 5: counts, and metrics in percent, at the operating points"
    return Table("table_5", title, frame, pd.DataFrame(data), tuple(notes), text_columns=3)


class _Pooled:
    """The folds of a model as one: each image was tested once. Metrics at thresholds only."""

    NOTE = (
        "Counts are sums over the folds, in each of which other images were tested, and metrics "
        "are computed from the sums. Intervals are left out: the models of different folds differ."
    )

    def __init__(self, folds):
        self.runs, self.intervals, self.taus = [self], {}, []
        self.values = {
            group: formulas(
                named(sum(fold.metrics.columns[group][0].sum(axis=0) for fold in folds))
            )
            for group, (_, formulas, _) in folds[0].metrics.columns.items()
            if all(group in fold.metrics.columns for fold in folds)
        }

    def sd(self, group, metric, *, sample=False):
        return NAN


def class_table(comparison: Comparison) -> Table:
    """
    The accuracy of each class, the metrics of all classes, and those of cancer against benign, of
    models on one split, with intervals; published values below.
    """
    classes = comparison.settings["classes"]
    columns = {name: ("recognition", f"accuracy_{name}") for name in classes}
    columns |= {metric_name(f"recognition/{key}"): ("recognition", key) for key in OVERALL}
    if comparison.settings["cancer_classes"]:
        columns |= {f"cancer: {name}": ("cancer", metric) for metric, name in OF_CANCER.items()}
    data, cells = [], []
    for label, model in comparison.models.items():
        rows = [_metric_row(label, model, *place) for place in columns.values()]
        data += rows
        cells.append({"model": label, **dict(zip(columns, map(_metric_cell, rows), strict=True))})
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


def difference_table(comparison: Comparison) -> Table:
    """The tests of models on the same images."""
    notes = ["Later model given minus earlier one, or model minus baseline; percentage points."]
    if comparison.clustered:
        notes.append(
            "Patients have several images each: McNemar's test takes images for independent and "
            "is too sure; the bootstrap resamples patients."
        )
    title = "Differences between models on the same test images"
    return table_of_tests(comparison, comparison.tests, "differences", title, *notes)


def table_of_tests(
    comparison: Comparison, tests: list[Test], stem: str, title: str, *notes: str
) -> Table:
    """Differences with intervals and p-values."""
    cells = [
        {
            "models": f"{test.first} − {test.second}",
            "metric": metric_name(test.endpoint) + (" (primary)" if test.primary else ""),
            "test": test.test,
            "difference": format_value("", test.estimate, (test.low, test.high)),
            "p": _p(test.p),
            "p (Holm)": "" if test.primary else _p(test.p_holm),
        }
        for test in tests
    ]
    data = pd.DataFrame([vars(test) for test in tests])
    columns = ["models", "metric", "test", "difference", "p", "p (Holm)"]
    return Table(stem, title, pd.DataFrame(cells, columns=columns), data, notes, text_columns=3)


def _p(p):
    if math.isnan(p):
        return "n/a"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
