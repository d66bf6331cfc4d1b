"""The paper's Tables 3, 4 and 5 for a comparison, and the table of differences."""

import math

import numpy as np
import pandas as pd

from imrcnn_d2.evaluation.detection.counts import named
from imrcnn_d2.evaluation.detection.metrics import COUNTS
from imrcnn_d2.report.names import LEVELS, metric_label, metric_name, published_values
from imrcnn_d2.report.tables import Table, format_value

__all__ = [
    "metric_cell",
    "metric_row",
    "over_folds",
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
    "before figures are made and resampled (AP is averaged itself); ± is the population standard "
    "deviation over the runs, the sample's is in the CSV."
)
OVER_FOLDS = "± is the population standard deviation over folds; the sample's is in the CSV."


def metric_row(label, model, group, figure, **more):
    """
    Args:
        label (str), model (ModelMetrics): the model.
        group (str), figure (str): such as "segm", "AP50_voc".
        **more: further columns.

    Returns:
        dict: a row of a CSV in long form.
    """
    value = model.values.get(group, {}).get(figure, NAN)
    low, high = model.intervals.get(group, {}).get(figure, (NAN, NAN))
    return {
        "model": label,
        "source": "this comparison",
        "runs": len(model.runs),
        "figure": f"{group}/{figure}",
        **more,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "sd_population": model.sd(group, figure) if math.isfinite(value) else NAN,
        "sd_sample": model.sd(group, figure, sample=True) if math.isfinite(value) else NAN,
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


def metric_cell(row):
    """str: a row of :func:`metric_row` as readers see it, with its interval."""
    interval = (row["ci_low"], row["ci_high"])
    name = row["figure"].partition("/")[2]
    return format_value(name, row["value"], interval, sd=row["sd_population"])


def _remarks(published):
    return list(dict.fromkeys(f"Published: {text}" for row in published for text in row.remarks))


def _notes(comparison, *notes):
    several = any(len(model.runs) > 1 for model in comparison.models.values())
    return [INTERVALS, *([SEEDS] if several else []), *notes]


def table_3(comparison):
    """
    Args:
        comparison (Comparison): with models on one split.

    Returns:
        Table: AP and IoU of masks and boxes with intervals, published values below.
    """
    data, cells = [], []
    for label, model in comparison.models.items():
        for regions, (group, iou) in REGIONS.items():
            keys = {"IoU": ("lesion", iou)}
            rows = [
                metric_row(label, model, *keys.get(name, (group, name)), regions=regions)
                for name in TABLE_3
            ]
            data += rows
            texts = dict(zip(TABLE_3, map(metric_cell, rows), strict=True))
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


def table_4(comparison):
    """
    Args:
        comparison (Comparison): with folds.

    Returns:
        Table: each fold, mean and standard deviation.
    """
    data, cells = [], []
    number = len(next(iter(comparison.folds.values())))
    for label, folds in comparison.folds.items():
        for endpoint in TABLE_4:
            values, texts = over_folds(folds, endpoint)
            row = {"model": label, "source": "this comparison", "figure": endpoint, **values}
            data.append(row | {"remarks": ""})
            cells.append({"model": label, "figure": metric_name(endpoint), **texts})
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
        name = metric_name(value.figure).partition(" ")[0]
        cells.append(
            {
                "model": f"{value.model}, published",
                "figure": name,
                **{f"fold {i}": "" for i in range(number)},
                "mean ± sd": format_value(value.figure, value.value, sd=value.sd),
            }
        )
    notes = [OVER_FOLDS]
    return Table(
        "table_4",
        f"Table 4: {number}-fold cross-validation, in percent",
        pd.DataFrame(cells),
        pd.DataFrame(data),
        tuple(notes + _remarks(published)),
        text_columns=2,
    )


def over_folds(folds, endpoint):
    """
    Args:
        folds (list[ModelMetrics]): of a model.
        endpoint (str): such as "segm/AP50_voc".

    Returns:
        tuple[dict, dict]: each fold, mean and standard deviation, as numbers and as texts.
    """
    group, _, figure = endpoint.partition("/")
    values = np.array([one.values[group].get(figure, NAN) for one in folds])
    mean, sd = float(values.mean()), float(values.std())
    numbers = {f"fold_{index}": value for index, value in enumerate(values)}
    numbers |= {"mean": mean, "sd_population": sd, "sd_sample": float(values.std(ddof=1))}
    texts = {f"fold {i}": format_value(figure, value) for i, value in enumerate(values)}
    return numbers, texts | {"mean ± sd": format_value(figure, mean, sd=sd)}


def table_5(comparison):
    """
    Args:
        comparison (Comparison):

    Returns:
        Table: counts and the five figures made of them, at the common threshold and at each
        model's own. Of folds, where no run is on one split, counts are sums over the folds.
    """
    tau = comparison.settings["tau"]
    data, cells = [], []
    models = comparison.models or {
        label: _Pooled(folds) for label, folds in comparison.folds.items()
    }
    for label, model in models.items():
        own = f" = {model.taus[0]:.3g}" if len(model.taus) == 1 and model.taus[0] else ""
        for prefix, threshold in (("", f"{tau:g}"), ("tau_val.", f"tau_val{own}")):
            for level, name in LEVELS.items():
                if prefix + level not in model.values:
                    continue
                rows = [
                    metric_row(label, model, prefix + level, figure, threshold=threshold)
                    for figure in (*COUNTS, *FIVE)
                ]
                data += rows
                texts = dict(zip((*COUNTS, *FIVE), map(metric_cell, rows), strict=True))
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
    title = "Table 5: counts, and figures in percent, at the operating points"
    return Table("table_5", title, frame, pd.DataFrame(data), tuple(notes), text_columns=3)


class _Pooled:
    """The folds of a model as one: each image was tested once. Figures at thresholds only."""

    NOTE = (
        "Counts are sums over the folds, in each of which other images were tested, and figures "
        "are made of the sums. Intervals are left out: the models of different folds differ."
    )

    def __init__(self, folds):
        self.runs, self.intervals, self.taus = [self], {}, []
        self.values = {
            group: formulas(named(sum(one.metrics.columns[group][0].sum(axis=0) for one in folds)))
            for group, (_, formulas, _) in folds[0].metrics.columns.items()
            if all(group in one.metrics.columns for one in folds)
        }

    def sd(self, group, figure, *, sample=False):
        return NAN


def table_of_tests(comparison, tests, stem, title, *notes):
    """
    Args:
        comparison (Comparison):
        tests (list[Test]):
        stem (str), title (str): of the table.
        *notes (str): below it.

    Returns:
        Table: differences with intervals and p-values.
    """
    cells = [
        {
            "models": f"{test.first} − {test.second}",
            "figure": metric_name(test.endpoint) + (" (primary)" if test.primary else ""),
            "test": test.test,
            "difference": format_value("", test.estimate, (test.low, test.high)),
            "p": _p(test.p),
            "p (Holm)": "" if test.primary else _p(test.p_holm),
        }
        for test in tests
    ]
    data = pd.DataFrame([vars(test) for test in tests])
    columns = ["models", "figure", "test", "difference", "p", "p (Holm)"]
    return Table(stem, title, pd.DataFrame(cells, columns=columns), data, notes, text_columns=3)


def _p(p):
    if math.isnan(p):
        return "n/a"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
