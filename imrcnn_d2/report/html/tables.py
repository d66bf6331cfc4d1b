"""The tables of a report: metrics, confusion matrices, sizes, patients, screening, differences."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from imrcnn_d2.evaluation import Bootstrap, LesionResults
from imrcnn_d2.evaluation.detection.metrics import FEW_CASES, is_count, is_percent, without_masks
from imrcnn_d2.evaluation.pooling import Pooled
from imrcnn_d2.evaluation.subgroups import Group
from imrcnn_d2.report.comparison import compare, family_text, gather
from imrcnn_d2.report.names import (
    MODEL,
    PAPER_THRESHOLD,
    metric_label,
    metric_name,
    threshold_name,
)
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import (
    cases_text,
    centre_metrics,
    decimals_of,
    few_notes,
    p_text,
    plural,
    value_of,
)


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """PPV and NPV in percent by Bayes' theorem, from sensitivity and specificity in percent and a
    prevalence in (0, 1). NaN where nothing is ever predicted positive, or negative.

    Both grow with sensitivity and specificity: from the lower 95 % limits of the two follow lower
    limits of both values, which are wider than 95 %.

    Raises:
        ValueError: the prevalence is not between 0 and 1.
    """
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence is {prevalence}; it must lie between 0 and 1.")
    ill, healthy = prevalence, 1 - prevalence
    hits, alarms = ill * sensitivity / 100, healthy * (1 - specificity / 100)
    misses, cleared = ill * (1 - sensitivity / 100), healthy * specificity / 100
    return _percent(hits, hits + alarms), _percent(cleared, cleared + misses)


def _percent(part, whole):
    return 100 * part / whole if whole > 0 else math.nan


# Metric, hint and, where it is not that of METRICS, label.
CURVE_METRICS = (
    ("AP50_voc", "area under the precision-recall curve at IoU 0.5"),
    ("BEP", "where precision equals recall"),
    ("AP50", "COCO, at IoU 0.5"),
    ("AP75", "COCO, at IoU 0.75"),
    ("AP", "COCO, mean over IoU 0.5 to 0.95"),
)
LESION_METRICS = (
    ("recall", "lesions that were found", "sensitivity (recall)"),
    ("precision", "detections that are a lesion"),
    ("f1", ""),
    ("iou", "of the lesions found"),
    ("dice", "of the lesions found", "Dice"),
    ("iou_all", "a missed one counts 0", "IoU, all lesions"),
    ("nsd", "boundaries that agree within 1 % of the image’s diagonal"),
    ("hd95", "95 % of boundary distances, in pixels"),
    ("fp_per_image", "", "false alarms per image"),
    *(("TP", "", "hits"), ("FP", "", "false alarms"), ("FN", "", "missed lesions")),
)
IMAGE_METRICS = (
    *(("recall", "", "sensitivity"), ("specificity", "")),
    ("precision", "at the test set’s own prevalence"),
    *(("f1", ""), ("accuracy", ""), ("auroc", "")),
    ("localised_recall", "a detection hits the lesion", "localised sensitivity"),
    ("miou", "all detections against all lesions"),
    ("mdice", "likewise"),
)
UNIQUE_LESION_METRICS = (
    ("recall", "found in at least one frame", "sensitivity"),
    ("frame_recall", "share of a lesion’s frames in which it is found", "sensitivity by frame"),
)
PAPER = "As the paper’s Table 5"
PAPER_METRICS = (
    *(("precision", ""), ("recall", ""), ("specificity", "TN: images without a false alarm")),
    *(("accuracy", ""), ("f1", "")),
    ("AP_per_image", "mean over the images with a lesion"),
    *(("TP", ""), ("FP", ""), ("FN", ""), ("TN", "")),
)
UNIT_METRICS = {
    "lesion": ("Lesions", LESION_METRICS),
    "image": ("Images", IMAGE_METRICS),
    "patient": ("Patients", IMAGE_METRICS),
    "unique_lesion": ("Unique lesions", UNIQUE_LESION_METRICS),
}
# Of the scores of detections, and of the probabilities of a predicted class.
CALIBRATION_METRICS = (
    *(("ece", "", "expected calibration error"), ("brier", "", "Brier score")),
    *(("mean_score", "", "mean score"), ("hit_rate", "", "share of hits")),
)
OF_CLASS = ("AP50_voc", "recall", "precision", "f1", "iou", "TP", "FP", "FN")
# Of images and patients, undefined where none is free of lesions.
OF_LESION_FREE = ("precision", "specificity", "accuracy", "f1", "auroc")
# Group, metric, title and hint of the values on top.
KEY_METRICS = (
    ("curve", "AP50_voc", "Average precision", "area under the precision-recall curve at IoU 0.5"),
    ("lesion", "recall", "Sensitivity", "share of the lesions that were found"),
    ("image", "specificity", "Specificity", "share of the lesion-free images without a detection"),
    ("lesion", "precision", "Precision", "share of the detections that are a lesion"),
    ("lesion", "fp_per_image", "False alarms", "per image, with or without a lesion"),
    ("lesion", "iou", "IoU", "overlap with the lesion where one was found"),
)


def cell(metrics: dict, name: str) -> dict:
    """A metric of a group of metrics.json: ``text``, "–" if it is undefined, ``interval`` (""
    where there is none) and ``bar``: None, or the value and the ends of its interval, if it is a
    share in percent.
    """
    value, interval = metrics.get(name), metrics.get(f"{name}_ci")
    if is_count(name):
        return _text("–" if value is None else f"{value:,.0f}")
    return _cell(value, interval, digits=1 if is_percent(name) else 2)


def _cell(value, interval=None, digits=1):
    if value is None or math.isnan(value):
        return _text("–")
    known = interval and None not in interval and not any(map(math.isnan, interval))
    low, high = interval if known else (value, value)
    return {
        "text": f"{value:.{digits}f}",
        "interval": f"[{low:.{digits}f}, {high:.{digits}f}]" if known else "",
        "bar": [round(number, 2) for number in (value, low, high)] if digits == 1 else None,
    }


def _text(text):
    return {"text": text, "interval": "", "bar": None}


def group_table(column: str, groups: Mapping[str, Group], metrics: Mapping[str, str]) -> dict:
    """Caption, columns and rows of the groups of a column: cells have ``cases``, the number of
    cases, and ``few``. ``metrics`` are "group/metric" with their headings."""
    rows = []
    for name, group in groups.items():
        cells = []
        for endpoint in metrics:
            metric, interval = endpoint.partition("/")[2], value_of(group.intervals, endpoint)
            value, digits = value_of(group.values, endpoint), decimals_of(metric)
            cell = _cell(value, interval, digits)
            if not is_percent(metric):
                cell["bar"] = None
            few = group.is_few(endpoint)
            cells.append({**cell, "cases": cases_text(group.cases(endpoint)), "few": few})
        sizes = ", ".join(plural(number, size[:-1]) for size, number in group.n.items())
        rows.append({"label": name, "hint": sizes, "cells": cells})
    columns = [column, *metrics.values()]
    return {"title": column, "caption": f"By {column}", "columns": columns, "rows": rows}


def centre_table(run: Run, results: LesionResults) -> dict:
    """The `group_table` of a run's results by centre, at the threshold that is stored in its
    weights where it has one."""
    groups = results.by_group["centre"].groups
    metrics = centre_metrics(groups)
    tau = run.meta["tau"] if results.tau_val is None else results.tau_val["tau"]
    caption = f"{run.name}, {threshold_name(tau, run.maps_scores, run.has_scores)}"
    table = group_table("centre", groups, metrics)
    return {**table, "caption": caption, "notes": few_notes(groups, metrics)}


def pooled_cell(summary: Pooled, cases: int) -> dict:
    """A cell of a share over centres, and their number of cases."""
    few = cases < FEW_CASES
    return {**_cell(summary.value, summary.interval), "cases": f"n {cases:,}", "few": few}


def _cards(cards, runs, groups):
    """Title, hint and cells (run's name, cell) of the values on top."""
    columns = [(run.name, of_run) for run, of_run in zip(runs, groups, strict=True)]
    return [
        {
            "title": title,
            "hint": hint,
            "cells": [(run_name, cell(of_run[group], name)) for run_name, of_run in columns],
        }
        for group, name, title, hint in cards
    ]


def key_metrics(runs):
    """The values on top of the page of detectors, at the threshold of the evaluation."""
    groups = []
    for run in runs:
        lesion, image = dict(run.metrics["lesion"]), run.metrics["image"]
        if lesion.get("iou") is None:
            lesion |= {"iou": lesion.get("iou_box"), "iou_ci": lesion.get("iou_box_ci")}
        groups.append({"curve": curve_group(run)[1], "lesion": lesion, "image": image})
    cards = _cards(KEY_METRICS, runs, groups)
    for card, (group, name, *_) in zip(cards, KEY_METRICS, strict=True):
        cells = [cell for _, cell in card["cells"]]
        card["hint"] = _hint(card["hint"], cells, group, name, runs)
    return cards


def key_threshold(runs):
    """The threshold of the values on top, of matrices and of test images, as text, and those that
    were chosen on validation data, which are those of a training's summary."""
    points = [point for run in runs if (point := run.metrics.get("tau_val"))]
    text = at_threshold(runs)
    if any(run.has_scores for run in runs):
        text += " (fixed: TEST.SCORE_THRESH or --tau)"
    if not points:
        return text
    chosen = ", ".join(dict.fromkeys(f"{point['tau']:.3g}" for point in points))
    return (
        f"{text}. The threshold chosen on validation data (τ_val) is {chosen}: the summary of a "
        "training and the tables “τ_val” are at that one"
    )


def at_threshold(runs):
    """The threshold of the evaluation of runs; where some have mapped scores and others raw ones,
    with the names of the runs."""
    names = {}
    for run in runs:
        name = threshold_name(run.meta["tau"], run.maps_scores, run.has_scores)
        names.setdefault(name, []).append(run.name)
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} ({', '.join(of)})" for name, of in names.items())


def _chosen(runs):
    """The metrics of each model at its operating point; None unless all have one."""
    points = [run.metrics.get("tau_val") for run in runs]
    return points if all(points) else None


def curve_group(run: Run) -> tuple[str, dict]:
    """ "mask" or "box", and the metrics of its curve."""
    if run.results.has_masks:
        return "mask", run.metrics.get("segm") or {}
    return "box", run.metrics.get("bbox") or {}


def of_boxes(unit: str, metrics: tuple) -> tuple:
    """Those metrics of a table of UNIT_METRICS that there are without masks."""
    return tuple(
        (endpoint.partition("/")[2], *texts)
        for name, *texts in metrics
        for endpoint in without_masks([f"{unit}/{name}"])
    )


def of_classes(runs: Sequence[Run]) -> list[tuple[str, tuple, list[dict]]]:
    """Title, metrics and a group for each run of each class of detectors that have several."""
    names = [category["name"] for category in runs[0].results.ground_truth.categories]
    metrics = tuple(row for row in (*CURVE_METRICS, *LESION_METRICS) if row[0] in OF_CLASS)
    if not any(run.results.has_masks for run in runs):
        metrics = of_boxes("lesion", metrics)
    if len(names) < 2:
        return []
    every = [run.metrics.get("by_class") or {} for run in runs]
    return [(f"Class: {name}", metrics, [run.get(name) or {} for run in every]) for name in names]


def metric_tables(runs):
    """Title, caption and rows (label, hint and a cell for each run) of each table."""
    kinds, curves = zip(*map(curve_group, runs), strict=True)
    regions = {"mask": "masks", "box": "boxes"}
    caption = f"Overlap of {' and '.join(regions[kind] for kind in dict.fromkeys(kinds))}"
    title = "Detection, over all scores"
    tables = [_metric_table(title, caption, CURVE_METRICS, curves, runs=runs)]
    chosen = [run.metrics.get("tau_val") or {} for run in runs]
    for unit, (title, metrics) in UNIT_METRICS.items():
        groups = [run.metrics.get(unit) or {} for run in runs]
        if not any(groups):
            continue
        if "mask" not in kinds:
            metrics = of_boxes(unit, metrics)
        tables.append(_metric_table(title, at_threshold(runs), metrics, groups, unit, runs))
        if any(chosen):
            points = [point.get(unit) or {} for point in chosen]
            thresholds = [_text(f"{point['tau']:.3g}" if point else "–") for point in chosen]
            rules = ", ".join(sorted({str(point.get("rule")) for point in chosen if point}))
            row = {"label": "score threshold", "hint": f"rule: {rules}", "cells": thresholds}
            caption = "At the threshold that was chosen on validation data"
            table = _metric_table(f"{title}, τ_val", caption, metrics, points, unit, runs)
            tables.append({**table, "rows": [row, *table["rows"]]})
    for title, metrics, groups in of_classes(runs):
        tables.append(_metric_table(title, at_threshold(runs), metrics, groups, runs=runs))
    caption = "Of all scores, as probabilities of a hit; in percent"
    tables.append(_calibration_table(caption, CALIBRATION_METRICS, runs))
    paper = [run.metrics["paper"] for run in runs]
    return [*tables, _metric_table(PAPER, PAPER_THRESHOLD, PAPER_METRICS, paper, "paper", runs)]


def _calibration_table(caption, metrics, runs):
    """Of the scores; where a map was applied to them, of those before it and after it."""
    groups = [run.metrics["calibration"] for run in runs]
    table = _metric_table("Calibration", caption, metrics, groups, runs=runs)
    raw = [run.metrics.get("calibration_raw") or {} for run in runs]
    if any(raw):
        pairs = zip(metric_rows(metrics, raw, runs=runs), table["rows"], strict=True)
        whens = "before the map", "after it"
        table["rows"] = [
            {**row, "hint": ", ".join(filter(None, (row["hint"], when)))}
            for pair in pairs
            for row, when in zip(pair, whens, strict=True)
        ]
    return table


def metric_rows(
    metrics: tuple, groups: list[dict], unit: str = "", runs: Sequence[Run] = (), suffix: str = ""
) -> list[dict]:
    """Label, hint and a cell for each group, of the metrics that some group has; ``suffix`` follows
    on their names there. Cells of groups without it are empty. Of those that are undefined in all
    groups the hint says why, given the ``runs``, of detectors; ``unit`` is the name of the groups
    in metrics.json.
    """
    rows = []
    for name, hint, *label in metrics:
        if any(name + suffix in group for group in groups):
            key = name + suffix
            cells = [cell(group, key) if key in group else _text("") for group in groups]
            title = label[0] if label else metric_label(name)
            hint = _hint(hint, cells, unit, name, runs)
            rows.append({"label": title, "hint": hint, "cells": cells})
    return rows


def _hint(hint, cells, unit, name, runs):
    """The hint of a metric; where it is undefined in all cells of detectors, the reason."""
    if not runs or any(cell["text"] not in ("–", "") for cell in cells):
        return hint
    if unit in ("image", "patient") and name in OF_LESION_FREE:
        outcomes = runs[0].metrics[unit]
        if not outcomes["TN"] + outcomes["FP"]:
            return f"undefined: the test set has no {unit} without a lesion"
    if not runs[0].results.meta.get("lesions", 1):
        return "undefined: the test set has no lesion"
    return "undefined: too few detections, or none with a score"


def _metric_table(title, caption, metrics, groups, unit="", runs=(), suffix=""):
    rows = metric_rows(metrics, groups, unit, runs, suffix)
    return {"title": title, "caption": caption, "rows": rows}


def confusions(runs, with_threshold=False):
    """Name and rows (class, cells (count, share of the row as text and number)) of each matrix."""
    tables = []
    for run in runs:
        matrix, rows = run.results.confusion, []
        for name, counts in zip(matrix.classes, matrix.rows(), strict=True):
            # False alarms are a share of nothing that can be counted.
            total = 0 if None in counts else sum(counts)
            shares = [n / total if total else 0 for n in counts]
            texts = [(f"{n:,}" if n is not None else "–") for n in counts]
            percents = [f"{100 * share:.1f} %" if total else "–" for share in shares]
            rows.append((name, list(zip(texts, percents, shares, strict=True))))
        name = f"{run.name}, {at_threshold([run])}" if with_threshold else run.name
        tables.append({"name": name, "classes": matrix.classes, "rows": rows})
    return tables


def size_tables(runs):
    """Caption, columns and rows, for shares of the image and for COCO's sizes."""
    captions = {
        "share_of_image": f"Sensitivity and IoU by share of the image’s area, {at_threshold(runs)}",
        "coco": f"By COCO’s sizes (below 32², below 96² pixels, larger), {at_threshold(runs)}",
    }
    iou = "iou" if any(curve_group(run)[0] == "mask" for run in runs) else "iou_box"
    columns = ["size", "lesions"]
    columns += [f"{run.name}: {name}" for run in runs for name in ("sensitivity", "IoU")]
    tables = []
    for key, caption in captions.items():
        strata = [run.metrics["by_size"].get(key) for run in runs]
        if None in strata:
            continue
        rows = []
        for size, metrics in strata[0].items():
            cells = [cell(sizes[size], name) for sizes in strata for name in ("recall", iou)]
            rows.append({"label": size, "hint": "", "cells": [cell(metrics, "n"), *cells]})
        tables.append({"caption": caption, "columns": columns, "rows": rows})
    return tables


def patient_table(runs, most=50):
    """Caption, columns and rows (patients with most errors first, at most ``most``); None where
    patients are not known.
    """
    if runs[0].results.patient is None:
        return None
    patients = sorted(
        zip(*(run.results.per_patient for run in runs), strict=True),
        key=lambda rows: -sum(row["FP"] + row["FN"] for row in rows),
    )
    rows = [
        [str(models[0]["patient_id"]), models[0]["images"], models[0]["n_gt"]]
        + [f"{row['TP']} / {row['FP']} / {row['FN']}" for row in models]
        for models in patients[:most]
    ]
    columns = ["patient", "images", "lesions"]
    columns += [f"{run.name}: hits / false alarms / missed" for run in runs]
    caption = f"{len(rows)} of {len(patients)} patients, most errors first, {at_threshold(runs)}"
    if unknown := runs[0].results.metrics.units.unknown:
        caption += f"; {plural(unknown, 'image')} of unknown patients left out"
    return {"rows": rows, "columns": columns, "caption": caption}


def screening(runs, prevalences):
    """Rows and sentences of PPV and NPV; None where there is no lesion-free image."""
    for prevalence in prevalences:  # a wrong one is an error whatever the data
        predictive_values(100, 100, prevalence)
    if not runs[0].results.meta["lesion_free_images"]:
        return None
    points = {at_threshold(runs): [run.metrics["image"] for run in runs]}
    if chosen := _chosen(runs):
        points["τ_val"] = [point["image"] for point in chosen]
    rows = []
    for (at, images), prevalence in itertools.product(points.items(), prevalences):
        for which, label in enumerate(("PPV", "NPV")):
            cells = [_predicted(image, prevalence, which) for image in images]
            label = f"{label} at {100 * prevalence:g} %"
            rows.append({"label": label, "hint": at, "cells": cells})
    first = next(iter(points.items()))
    triples = [
        (run.name, point, prevalence)
        for run, point in zip(runs, first[1], strict=True)
        for prevalence in prevalences
    ]
    sentences = [_in_natural_frequencies(first[0], *triple) for triple in triples]
    return {"rows": rows, "sentences": sentences}


def _predicted(image, prevalence, which):
    """The cell of PPV (0) or NPV (1), of the metrics of images."""
    if image["specificity"] is None or image["recall"] is None:
        return _cell(None)
    value = predictive_values(image["recall"], image["specificity"], prevalence)[which]
    limits = image.get("recall_ci"), image.get("specificity_ci")
    interval = None
    if all(limits) and None not in (*limits[0], *limits[1]):
        ends = zip(*limits, strict=True)
        interval = [predictive_values(*end, prevalence)[which] for end in ends]
    return _cell(value, interval)


def _in_natural_frequencies(at, name, image, prevalence):
    ill = 1000 * prevalence
    if image["recall"] is None:
        return f"{name}: sensitivity is undefined, as no image shows a lesion."
    hits, alarms = ill * image["recall"] / 100, (1000 - ill) * (1 - image["specificity"] / 100)
    return (
        f"{name}, {at}: of 1,000 images of which {ill:g} show a lesion, "
        f"{hits + alarms:.1f} raise an alarm, {hits:.1f} of them rightly; {ill - hits:.1f} with a "
        "lesion raise none."
    )


CLASSIFICATION_METRICS = (
    ("balanced_accuracy", "mean of the classes’ accuracies"),
    ("top1", "images predicted rightly"),
    ("f1", "mean of the classes"),
    ("auroc", "mean of the classes, each against all others"),
    ("cross_entropy", "of the probability of the true class; 0 is perfect"),
)
CLASS_METRICS = (
    ("precision", "of the images predicted as it, those that are"),
    ("specificity", "of all others, those not predicted as it"),
    *(("f1", ""), ("auroc", "against all others")),
)
CANCER_METRICS = (
    ("recall", "cancers predicted as cancer", "sensitivity"),
    ("specificity", "benign images predicted as benign"),
    ("precision", "at the test set’s own prevalence"),
    *(("f1", ""), ("accuracy", ""), ("auroc", "of the probability of cancer")),
    *(("TP", "", "cancer predicted as cancer"), ("FN", "", "cancer predicted as benign")),
    *(("FP", "", "benign predicted as cancer"), ("TN", "", "benign predicted as benign")),
)
CLASS_CALIBRATION_METRICS = (
    *CALIBRATION_METRICS[:2],
    ("mean_score", "of the predicted class", "mean probability"),
    ("hit_rate", "", "share predicted rightly"),
)
CLASSIFICATION_KEY_METRICS = (
    ("recognition", "balanced_accuracy", "Balanced accuracy", "mean accuracy of the classes"),
    ("recognition", "auroc", "AUROC", "each class against all others, mean of the classes"),
)
CANCER_KEY_METRICS = (
    ("cancer", "recall", "Sensitivity for cancer", "cancers predicted as cancer"),
    ("cancer", "specificity", "Specificity for cancer", "benign images predicted as benign"),
)
TOP_1 = (("recognition", "top1", "Top-1 accuracy", "images predicted rightly"),)


def class_key_metrics(runs, cancers):
    """The values on top of the page of classifiers."""
    cards = CLASSIFICATION_KEY_METRICS + (CANCER_KEY_METRICS if cancers else TOP_1)
    return _cards(cards, runs, [run.metrics for run in runs])


def class_accuracy(runs, classes, published):
    """Columns and rows, a class each, with what was published."""
    rows = []
    for name in classes:
        cells = [cell(run.metrics["recognition"], f"accuracy_{name}") for run in runs]
        if published:
            cells.append(_text(f"{published[name]:.0f}"))
        rows.append({"label": name, "hint": "", "cells": cells})
    columns = ["class", *(run.name for run in runs)]
    return {"columns": columns + [f"{MODEL}, published"] * bool(published), "rows": rows}


def class_metric_tables(runs, classes, cancers):
    """As `metric_tables`."""

    def table(title, caption, metrics, group="recognition", suffix=""):
        groups = [run.metrics[group] for run in runs]
        return _metric_table(title, caption, metrics, groups, suffix=suffix)

    tables = [table("All classes", "In percent, but for the cross-entropy", CLASSIFICATION_METRICS)]
    if cancers:
        caption = f"Cancer: {', '.join(cancers)}; benign: all else"
        tables.append(table("Cancer against benign", caption, CANCER_METRICS, "cancer"))
    caption = "Predicted as it, or as anything else"
    for name in classes:
        tables.append(table(f"Class: {name}", caption, CLASS_METRICS, suffix=f"_{name}"))
    caption = "Of the probability of the predicted class, as that of being right"
    return [*tables, _calibration_table(caption, CLASS_CALIBRATION_METRICS, runs)]


AT_A_GLANCE = (
    *("recognition/top1", "recognition/auroc", "cancer/recall", "cancer/specificity"),
    *("lesion/iou", "lesion/recall", "lesion/precision"),
)


def differences(runs: list[Run]) -> dict | None:
    """How the models differ, as in a comparison: ``columns``, ``rows`` of the primary endpoint and
    a few others, ``all_rows``, ``caption``, ``note`` and ``remarks``. None for less than two
    models; runs that differ by seed only are one. All have one test set, which may be a fold's.
    """
    gathered = gather(
        [replace(r, record={**r.record, "fold": None}) if r.fold else r for r in runs]
    )
    if len(gathered.split) < 2:
        return None
    known = next(filter(None, (run.metrics["meta"].get("bootstrap") for run in runs)), {})
    bootstrap = Bootstrap(**{key: known[key] for key in ("resamples", "seed") if key in known})
    comparison = compare(gathered, bootstrap)
    primary, tests = comparison.primary, comparison.tests
    caption = "First model minus second, in percentage points"
    if runs[0].task.localises:
        caption += f"; where nothing else is named: {at_threshold(runs)}"
    return {
        "columns": ["models", "metric", "difference", "95 % interval", "p", "test"],
        "rows": [_row(test) for test in tests if test.endpoint in (primary, *AT_A_GLANCE)],
        "all_rows": [_row(test) for test in tests],
        "caption": caption,
        "note": (
            f"{bootstrap.resamples:,} paired resamples of {comparison.settings['unit']}s. "
            f"{family_text(comparison)}"
        ),
        "remarks": comparison.remarks,
    }


def _row(test):
    interval = f"[{_signed(test.low)},\u00a0{_signed(test.high)}]"
    return [
        f"{test.first} − {test.second}",
        metric_name(test.endpoint) + (" (primary)" if test.primary else ""),
        _signed(test.estimate),
        "–" if math.isnan(test.low) else interval,
        p_text(test.judged_p).replace("<", "< "),
        test.test,
    ]


def _signed(value):
    return "–" if math.isnan(value) else f"{value:+.1f}".replace("-", "−")
