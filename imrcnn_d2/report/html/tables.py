"""The tables of a report: metrics, confusion matrices, sizes, patients, screening, differences."""

import itertools
import math

from imrcnn_d2.evaluation.detection.metrics import is_count, is_percent
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.comparison.models import compare, gather
from imrcnn_d2.report.names import MODEL, metric_name
from imrcnn_d2.report.runs import Run

__all__ = [
    "cell",
    "confusions",
    "differences",
    "metric_rows",
    "metric_tables",
    "key_metrics",
    "patient_table",
    "predictive_values",
    "screening",
    "size_tables",
]


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """
    PPV and NPV in percent by Bayes' theorem, from sensitivity and specificity in percent and a
    prevalence in (0, 1). NaN where one of them is, and where nothing is ever predicted positive, or
    negative.

    Both grow with sensitivity and with specificity. So from the lower 95 % limits of the two follow
    lower limits of both values, and from the upper limits upper ones; these are wider than 95 %,
    since the two would have to be off in the same direction.

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


# (metric, label, hint)
CURVE_METRICS = (
    ("AP50_voc", "AP50_voc", "area under the precision-recall curve at IoU 0.5"),
    ("BEP", "BEP", "where precision equals recall"),
    ("AP50", "AP50", "COCO, at IoU 0.5"),
    ("AP75", "AP75", "COCO, at IoU 0.75"),
    ("AP", "AP", "COCO, mean over IoU 0.5 to 0.95"),
)
LESION_METRICS = (
    ("recall", "sensitivity (recall)", "lesions that were found"),
    ("precision", "precision", "detections that are a lesion"),
    ("f1", "F1", ""),
    ("iou", "IoU", "of the lesions found"),
    ("dice", "Dice", "of the lesions found"),
    ("iou_all", "IoU, all lesions", "a missed one counts 0"),
    ("fp_per_image", "false alarms per image", ""),
    ("TP", "hits", ""),
    ("FP", "false alarms", ""),
    ("FN", "missed lesions", ""),
)
IMAGE_METRICS = (
    ("recall", "sensitivity", ""),
    ("specificity", "specificity", ""),
    ("precision", "precision", "at the test set’s own prevalence"),
    ("f1", "F1", ""),
    ("accuracy", "accuracy", ""),
    ("auroc", "AUROC", ""),
    ("localised_recall", "localised sensitivity", "a detection hits the lesion"),
    ("miou", "mIoU", "all detections against all lesions"),
    ("mdice", "mDice", "likewise"),
)
UNIT_TITLES = {"lesion": "Lesions", "image": "Images", "patient": "Patients"}
KEY_METRICS = (
    ("curve", "AP50_voc", "Average precision", "area under the precision-recall curve at IoU 0.5"),
    ("lesion", "recall", "Sensitivity", "share of the lesions that were found"),
    ("lesion", "precision", "Precision", "share of the detections that are a lesion"),
    ("lesion", "iou", "IoU", "overlap with the lesion where one was found"),
)


def cell(metrics: dict, name: str) -> dict:
    """
    A metric of a group of metrics.json: ``text``, ``interval`` ("" where there is none) and
    ``bar``: None, or the value and the ends of its interval, if it is a share in percent.
    """
    value, interval = metrics.get(name), metrics.get(f"{name}_ci")
    if is_count(name):
        return _text("n/a" if value is None else f"{value:,.0f}")
    return _cell(value, interval, digits=1 if is_percent(name) else 2)


def _cell(value, interval=None, digits=1):
    if value is None or math.isnan(value):
        return _text("n/a")
    known = interval and None not in interval and not any(map(math.isnan, interval))
    low, high = interval if known else (value, value)
    return {
        "text": f"{value:.{digits}f}",
        "interval": f"[{low:.{digits}f}, {high:.{digits}f}]" if known else "",
        "bar": [round(number, 2) for number in (value, low, high)] if digits == 1 else None,
    }


def _text(text):
    return {"text": text, "interval": "", "bar": None}


def key_metrics(runs):
    """list[dict]: title, hint and cells [(run's name, cell)] of the four metrics on top."""
    cards = []
    for group, name, title, hint in KEY_METRICS:
        cells = []
        for run in runs:
            metrics = _curve_group(run)[1] if group == "curve" else run.metrics[group]
            shown = "iou_box" if name == "iou" and metrics.get("iou") is None else name
            cells.append((run.name, cell(metrics, shown)))
        tau = "" if group == "curve" else f", {_at(runs)}"
        cards.append({"title": title, "hint": f"{hint}{tau}", "cells": cells})
    return cards


def _at(runs):
    taus = sorted({run.metrics["meta"]["tau"] for run in runs})
    return "score ≥ " + ", ".join(f"{tau:g}" for tau in taus)


def _curve_group(run):
    """("mask" or "box", its metrics)."""
    segm = run.metrics.get("segm") or {}
    if segm.get("AP50_voc") is not None:
        return "mask", segm
    return "box", run.metrics.get("bbox") or {}


def metric_tables(runs):
    """list[dict]: title, caption and rows (label, hint and a cell for each run)."""
    kinds = " and ".join(dict.fromkeys(_curve_group(run)[0] for run in runs))
    curve = [_curve_group(run)[1] for run in runs]
    tables = [
        {
            "title": "Detection, over all scores",
            "caption": f"Overlap of {kinds}s",
            "rows": metric_rows(CURVE_METRICS, curve),
        }
    ]
    for unit, title in UNIT_TITLES.items():
        if not any(run.metrics.get(unit) for run in runs):
            continue
        names = LESION_METRICS if unit == "lesion" else IMAGE_METRICS
        groups = [run.metrics.get(unit) or {} for run in runs]
        tables.append({"title": title, "caption": _at(runs), "rows": metric_rows(names, groups)})
        chosen = [run.metrics.get("tau_val") or {} for run in runs]
        if not any(chosen):
            continue
        rows = metric_rows(names, [point.get(unit) or {} for point in chosen])
        thresholds = [_text(f"{point['tau']:.3g}" if point else "n/a") for point in chosen]
        rules = ", ".join(sorted({str(point.get("rule")) for point in chosen if point}))
        label = {"label": "score threshold", "hint": f"rule: {rules}", "cells": thresholds}
        caption = "At the threshold that was chosen on validation data"
        tables.append({"title": f"{title}, τ_val", "caption": caption, "rows": [label, *rows]})
    return tables


def metric_rows(names, groups):
    """list[dict]: label, hint and a cell for each group, of the metrics that some group has."""
    return [
        {"label": label, "hint": hint, "cells": [cell(group, name) for group in groups]}
        for name, label, hint in names
        if any(name in group for group in groups)
    ]


def confusions(runs):
    """list[dict]: name, tau, classes and rows [(class, [(count, share of the row)])]."""
    tables = []
    for run in runs:
        matrix = run.results.confusion
        rows = []
        for name, counts in zip(matrix.classes, matrix.rows(), strict=True):
            total = sum(count for count in counts if count) or 1
            # False alarms are a share of nothing that can be counted.
            shaded = name != matrix.classes[-1]
            shares = [(f"{n:,}", round(n / total, 3) * shaded) for n in counts if n is not None]
            rows.append((name, shares + [("–", 0)] * (len(counts) - len(shares))))
        tau = f"{run.metrics['meta']['tau']:g}"
        tables.append({"name": run.name, "tau": tau, "classes": matrix.classes, "rows": rows})
    return tables


def size_tables(runs):
    """list[dict]: caption, columns and rows, for shares of the image and for COCO's sizes."""
    captions = {
        "share_of_image": f"Sensitivity and IoU by share of the image’s area, {_at(runs)}",
        "coco": f"By COCO’s sizes (below 32², below 96² pixels, larger), {_at(runs)}",
    }
    known = [run.metrics["by_size"] for run in runs]
    tables = []
    for key, caption in captions.items():
        if not all(key in sizes for sizes in known):
            continue
        columns = ["size", "lesions"]
        columns += [f"{run.name}: {name}" for run in runs for name in ("sensitivity", "IoU")]
        rows = []
        for size, metrics in known[0][key].items():
            cells = [cell(sizes[key][size], name) for sizes in known for name in ("recall", "iou")]
            rows.append({"label": size, "hint": "", "cells": [cell(metrics, "n"), *cells]})
        tables.append({"caption": caption, "columns": columns, "rows": rows})
    return tables


def patient_table(runs, most=50):
    """dict: caption, columns, rows (patients with most errors first, at most ``most``), notes."""
    scored = [run.results for run in runs]
    if scored[0].metrics.unit != "patient":
        note = "Patients are not known: the images have no patient_id, so that intervals and "
        return {"rows": [], "notes": [note + "metrics take each image as a separate patient."]}
    tables = [results.per_patient for results in scored]
    patients = sorted(
        zip(*tables, strict=True), key=lambda rows: -sum(row["FP"] + row["FN"] for row in rows)
    )
    rows = [
        [str(models[0]["patient_id"]), models[0]["images"], models[0]["n_gt"]]
        + [f"{row['TP']} / {row['FP']} / {row['FN']}" for row in models]
        for models in patients[:most]
    ]
    columns = ["patient", "images", "lesions"]
    columns += [f"{run.name}: hits / false alarms / missed" for run in runs]
    caption = f"{len(rows)} of {len(patients)} patients, most errors first, {_at(runs)}"
    return {"rows": rows, "columns": columns, "caption": caption, "notes": []}


def screening(runs, prevalences):
    """dict: caption, rows, sentences and missing (list[str])."""
    for prevalence in prevalences:  # a wrong one is an error whatever the data
        predictive_values(100, 100, prevalence)
    if not runs[0].results.meta["lesion_free_images"]:
        text = (
            "PPV and NPV are undefined: the test set has no image without a lesion, so it cannot "
            "tell how often a model raises a false alarm on one (specificity is undefined)."
        )
        return {"rows": [], "sentences": [], "missing": [text]}
    points = {_at(runs): [run.metrics["image"] for run in runs]}
    chosen = [(run.metrics.get("tau_val") or {}).get("image") for run in runs]
    if all(chosen):
        points["τ_val"] = chosen
    rows, sentences = [], []
    for at, images in points.items():
        for prevalence in prevalences:
            for which, label in enumerate(("PPV", "NPV")):
                cells = [_predicted(image, prevalence, which) for image in images]
                label = f"{label} at {100 * prevalence:g} %"
                rows.append({"label": label, "hint": at, "cells": cells})
    for run, prevalence in itertools.product(runs, prevalences):
        sentences.append(_in_natural_frequencies(run, prevalence))
    caption = (
        "In brackets: with sensitivity and specificity both at the lower and both at the upper end "
        "of their 95 % intervals, so wider than a 95 % interval"
    )
    return {"rows": rows, "caption": caption, "sentences": sentences, "missing": []}


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


def _in_natural_frequencies(run, prevalence):
    image, ill = run.metrics["image"], 1000 * prevalence
    if image["recall"] is None:
        return f"{run.name}: sensitivity is undefined, as no image shows a lesion."
    hits, alarms = ill * image["recall"] / 100, (1000 - ill) * (1 - image["specificity"] / 100)
    return (
        f"{run.name}, {_at([run])}: of 1,000 images of which {ill:g} show a lesion, "
        f"{hits + alarms:.1f} raise an alarm, {hits:.1f} of them rightly; {ill - hits:.1f} with a "
        "lesion raise none."
    )


CLASSIFICATION_METRICS = (
    ("balanced_accuracy", "balanced accuracy", "mean of the classes’ accuracies"),
    ("top1", "top-1 accuracy", "images predicted rightly"),
    ("f1", "F1", "mean of the classes"),
    ("auroc", "AUROC", "mean of the classes, each against all others"),
    ("cross_entropy", "cross-entropy", "of the probability of the true class; 0 is perfect"),
)
CLASS_METRICS = (
    ("precision", "precision", "of the images predicted as it, those that are"),
    ("specificity", "specificity", "of all others, those not predicted as it"),
    ("f1", "F1", ""),
    ("auroc", "AUROC", "against all others"),
)
CANCER_METRICS = (
    ("recall", "sensitivity", "cancers predicted as cancer"),
    ("specificity", "specificity", "benign images predicted as benign"),
    ("precision", "precision", "at the test set’s own prevalence"),
    ("f1", "F1", ""),
    ("accuracy", "accuracy", ""),
    ("auroc", "AUROC", "of the probability of cancer"),
    ("TP", "cancer predicted as cancer", ""),
    ("FN", "cancer predicted as benign", ""),
    ("FP", "benign predicted as cancer", ""),
    ("TN", "benign predicted as benign", ""),
)
CALIBRATION_METRICS = (
    ("ece", "expected calibration error", ""),
    ("brier", "Brier score", ""),
    ("mean_score", "mean probability", "of the predicted class"),
    ("hit_rate", "share predicted rightly", ""),
)


def class_key_metrics(runs, cancers):
    """list[dict]: as of :func:`key_metrics`."""
    cards = [
        ("recognition", "balanced_accuracy", "Balanced accuracy", "mean accuracy of the classes"),
        ("recognition", "auroc", "AUROC", "each class against all others, mean of the classes"),
    ]
    if cancers:
        cards += [
            ("cancer", "recall", "Sensitivity for cancer", "cancers predicted as cancer"),
            (
                "cancer",
                "specificity",
                "Specificity for cancer",
                "benign images predicted as benign",
            ),
        ]
    else:
        cards.append(("recognition", "top1", "Top-1 accuracy", "images predicted rightly"))
    return [
        {
            "title": title,
            "hint": hint,
            "cells": [(run.name, cell(run.metrics[group], name)) for run in runs],
        }
        for group, name, title, hint in cards
    ]


def class_accuracy(runs, classes, published):
    """dict: columns and rows, a class each, with what was published."""
    rows = []
    for name in classes:
        cells = [cell(run.metrics["recognition"], f"accuracy_{name}") for run in runs]
        if published:
            cells.append(_text(f"{published[name]:.0f}"))
        rows.append({"label": name, "hint": "", "cells": cells})
    columns = ["class", *(run.name for run in runs)]
    return {"columns": columns + [f"{MODEL}, published"] * bool(published), "rows": rows}


def class_metric_tables(runs, classes, cancers):
    """list[dict]: as of :func:`metric_tables`."""

    def table(title, caption, group, metrics, suffix=""):
        named = [(f"{name}{suffix}", label, hint) for name, label, hint in metrics]
        rows = metric_rows(named, [run.metrics[group] for run in runs])
        return {"title": title, "caption": caption, "rows": rows}

    tables = [
        table(
            "All classes",
            "In percent, but for the cross-entropy",
            "recognition",
            CLASSIFICATION_METRICS,
        )
    ]
    if cancers:
        caption = f"Cancer: {', '.join(cancers)}; benign: all else"
        tables.append(table("Cancer against benign", caption, "cancer", CANCER_METRICS))
    tables += [
        table(
            f"Class: {name}",
            "Predicted as it, or as anything else",
            "recognition",
            CLASS_METRICS,
            f"_{name}",
        )
        for name in classes
    ]
    caption = "Of the probability of the predicted class, as that of being right"
    return [*tables, table("Calibration", caption, "calibration", CALIBRATION_METRICS)]


def class_confusions(runs):
    """list[dict]: name, and rows [(class, [(count, share of the row as text, as number)])]."""
    tables = []
    for run in runs:
        matrix = run.results.confusion
        rows = []
        for name, counts in zip(matrix.classes, matrix.rows(), strict=True):
            total = sum(counts) or math.nan
            shares = [(f"{n:,}", f"{100 * n / total:.1f} %", n / total) for n in counts]
            rows.append((name, [(*texts, 0 if math.isnan(s) else s) for *texts, s in shares]))
        tables.append({"name": run.name, "rows": rows})
    return tables


GROUPS = {
    "segm": "masks",
    "bbox": "boxes",
    "lesion": "lesions",
    "image": "images",
    "patient": "patients",
    "tau_val.lesion": "lesions, τ_val",
    "tau_val.image": "images, τ_val",
    "tau_val.patient": "patients, τ_val",
}
LABELS = {"recall": "sensitivity", "iou": "IoU", "iou_box": "IoU", "miou": "mIoU", "f1": "F1"}
AT_A_GLANCE = (
    *("lesion/recall", "lesion/precision", "lesion/iou"),
    *("recognition/top1", "recognition/auroc", "cancer/recall", "cancer/specificity"),
)


def differences(runs: list[Run]) -> dict | None:
    """
    How the models differ, as in a comparison: ``columns``, ``rows`` of the primary endpoint and a
    few others, ``all_rows`` (list[list[str]]), ``caption`` and ``note``. None for less than two
    models; runs that differ by seed only are one.
    """
    settings = [run.metrics["meta"].get("bootstrap") for run in runs]
    known = next(filter(None, settings), {})
    bootstrap = Bootstrap(**{key: known[key] for key in ("resamples", "seed") if key in known})
    gathered = gather(runs)
    if len(gathered.split) < 2:
        return None
    comparison = compare(gathered, bootstrap)
    chosen = (comparison.primary, *AT_A_GLANCE)
    rows = {test: _row(test) for test in comparison.tests}
    return {
        "columns": ["models", "metric", "difference", "95 % interval", "p", "test"],
        "rows": [row for test, row in rows.items() if test.endpoint in chosen],
        "all_rows": list(rows.values()),
        "caption": "First model minus second, in percentage points",
        "note": (
            f"{bootstrap.resamples:,} paired resamples of {comparison.settings['unit']}s. "
            f"Primary endpoint: {_name(comparison.primary)}; the p-values of the other "
            f"{len(rows) - sum(test.primary for test in rows)} tests are adjusted by Holm’s method."
        ),
        "remarks": comparison.remarks,
    }


def _row(test):
    p = test.p if test.primary else test.p_holm
    interval = f"[{_signed(test.low)},\u00a0{_signed(test.high)}]"
    return [
        f"{test.first} − {test.second}",
        _name(test.endpoint) + (" (primary)" if test.primary else ""),
        _signed(test.estimate),
        "n/a" if math.isnan(test.low) else interval,
        "n/a" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
        test.test,
    ]


def _name(endpoint):
    group, _, metric = endpoint.partition("/")
    if group in ("recognition", "cancer"):
        return metric_name(endpoint)
    return f"{LABELS.get(metric, metric)}, {GROUPS.get(group, group)}"


def _signed(value):
    return "n/a" if math.isnan(value) else f"{value:+.1f}".replace("-", "−")
