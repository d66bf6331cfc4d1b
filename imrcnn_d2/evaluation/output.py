"""How often a test set was looked at: a line for each evaluation, beside the data set."""

import logging
import math
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imrcnn_d2.evaluation.detection.counts import divide
from imrcnn_d2.evaluation.detection.metrics import image_metrics, lesion_metrics
from imrcnn_d2.utils.files import (
    BadInputError,
    csv_line,
    csv_text,
    file_sha256,
    read_json,
    read_rows,
    strict_json,
    write_atomically,
)
from imrcnn_d2.versions import package_versions

__all__ = [
    "CLASSIFICATION_RESULTS",
    "RESULTS",
    "TEST_LOG",
    "THRESHOLDS",
    "beside_records",
    "check_fields",
    "coco_results",
    "confusion_rows",
    "group_documents",
    "group_rows",
    "image_rows",
    "log_test_evaluation",
    "patient_rows",
    "read_coco_records",
    "read_metrics",
    "read_robustness",
    "read_run_record",
    "read_split_settings",
    "read_test_log",
    "recognition_document",
    "results_document",
    "sources",
    "threshold_table",
    "transposed",
    "with_intervals",
    "write_classification",
    "write_results",
]

logger = logging.getLogger(__name__)


# 0.05, 0.10 ... 0.95
THRESHOLDS = tuple(n / 20 for n in range(1, 20))


def image_rows(gt, counts, scored):
    """
    Args:
        gt (GroundTruth):
        counts (UnitCounts): per image.
        scored (bool): False if the results know no scores; they are NaN then.

    Returns:
        list[dict]: a row an image by ascending id: image_id and file_name, the other fields of its
        record, and what happened in it.
    """
    columns = _columns(counts, scored, "image_outcome")
    columns["union_iou"] = np.where(counts.positive, 100 * counts.union_iou, np.nan)
    columns["union_dice"] = np.where(counts.positive, 100 * counts.union_dice, np.nan)
    return beside_records(gt.images, columns)


def beside_records(images, columns):
    """
    Args:
        images (list[dict]): COCO image records.
        columns (dict[str, np.ndarray]): (I,) each, what happened in them.

    Returns:
        list[dict]: a row an image: image_id and file_name, the other fields of its record, and the
        columns.
    """
    rows = []
    for record, *values in zip(images, *(c.tolist() for c in columns.values()), strict=True):
        passed = {"image_id": record["id"], "file_name": record.get("file_name"), **record}
        del passed["id"]
        # Fields of the data set that have the name of a figure keep both.
        passed = {(f"images.{k}" if k in columns else k): value for k, value in passed.items()}
        rows.append({**passed, **dict(zip(columns, values, strict=True))})
    return rows


def patient_rows(gt, counts, scored):
    """
    Args:
        gt (GroundTruth): whose images all have a ``patient_id``.
        counts (UnitCounts): per image.
        scored (bool): False if the results know no scores; they are NaN then.

    Returns:
        list[dict]: a row for each patient, in the order of their first images: patient_id, images,
        and what happened in them.
    """
    patients = [record["patient_id"] for record in gt.images]
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    unit = np.array([number[patient] for patient in patients], dtype=int)
    columns = {
        "patient_id": np.array(list(number), dtype=object),
        "images": np.bincount(unit),
        **_columns(counts.merged(unit), scored, "patient_outcome"),
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _columns(counts, scored, outcome):
    """What happened in each unit: counts, its outcome, mean overlaps of the hits in percent."""
    positive, called = counts.positive, counts.called
    return {
        "n_gt": counts.lesions,
        "n_det": counts.tp + counts.fp,
        "TP": counts.tp,
        "FP": counts.fp,
        "FN": counts.fn,
        outcome: np.where(positive, np.where(called, "TP", "FN"), np.where(called, "FP", "TN")),
        "score": counts.score if scored else np.full(len(counts.score), np.nan),
        "iou": 100 * divide(counts.iou, counts.tp),
        "dice": 100 * divide(counts.dice, counts.tp),
        "iou_box": 100 * divide(counts.iou_box, counts.tp),
    }


def threshold_table(results):
    """
    Figures at every threshold of THRESHOLDS; the matching is made once. It is for looking at: a
    threshold that was chosen by it is no longer tested by the same data.

    Args:
        results (LesionResults):

    Returns:
        list[dict[str, float]]: a row a threshold: "tau", the figures of lesions as "lesion_..." and
        those of images as "image_...". No row for results that know no scores.
    """
    if not results.detections.scored:
        return []
    rows = []
    counts = None
    for tau in THRESHOLDS:
        counts = results.counts_at(tau, counts)
        sums = counts.sums()
        groups = {"lesion": lesion_metrics(sums), "image": image_metrics(sums)}
        row = {f"{group}_{k}": float(v) for group, own in groups.items() for k, v in own.items()}
        rows.append({"tau": tau, **row})
    return rows


class Kind(NamedTuple):
    """
    What a value must be; null and nothing at all are admitted too, unless it is needed.

    Attributes:
        name (str): of such values.
        admits (callable): of a value, whether it is one.
        needed (bool): it must be there.
    """

    name: str
    admits: Callable
    needed: bool = False

    def always(self):
        """Kind: the same, needed."""
        return self._replace(needed=True)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _range(low, high):
    return Kind(
        f"a whole number from {low:,} to {high:,}", lambda v: _is_whole(v) and low <= v <= high
    )


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a finite number", _is_number)
WHOLE = Kind("a whole number", _is_whole)
COUNT = _range(0, 10**12)
LIST = Kind("a list", lambda value: isinstance(value, list))
ID = Kind("a number or a text", lambda value: isinstance(value, str) or _is_number(value))
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
OVERLAP = Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
REGIONS = Kind("'segm' or 'bbox'", lambda value: value in ("segm", "bbox"))
TASK = Kind("'lesions' or 'recognition'", lambda value: value in ("lesions", "recognition"))
NAME = Kind("a text that is not empty", lambda value: isinstance(value, str) and value.strip())
FIGURE = Kind(
    "a finite number, or two",
    lambda value: all(v is None or _is_number(v) for v in _listed(value)),
)
FIGURES = {str: FIGURE}
FOLDS = 1000
VERSIONS = {str: TEXT}

METRICS = {
    "meta": {
        "task": TASK,
        "dataset": NAME,
        **dict.fromkeys(("gt", "dt", "image_root"), TEXT),
        **dict.fromkeys(("gt_sha256", "checkpoint", "checkpoint_sha256"), TEXT),
        "scored": FLAG,
        "bootstrap": {
            "resamples": _range(1, 100_000).always(),
            "seed": COUNT.always(),
            "all_coco": FLAG,
        },
        "versions": VERSIONS,
    },
    **dict.fromkeys(("bbox", "segm", "lesion", "image", "patient"), FIGURES),
    **dict.fromkeys(("recognition", "cancer"), FIGURES),
}
# What the figures of detections were made with.
LESIONS = {
    "meta": {
        "tau": SHARE.always(),
        "iou_threshold": OVERLAP.always(),
        "iou_type": REGIONS.always(),
    },
    "tau_val": {"tau": SHARE.always(), "rule": TEXT.always(), "dataset": TEXT},
}
RUN = {
    **dict.fromkeys(("model", "backbone"), NAME),
    **dict.fromkeys(("command", "device", "started", "finished"), TEXT),
    **dict.fromkeys(("config_sha256", "splits_sha256"), TEXT),
    "seed": WHOLE,
    "fold": {"index": _range(0, FOLDS - 1).always(), "of": _range(2, FOLDS).always()},
    "input": {"size": COUNT},
    "git": {"revision": TEXT, "dirty": FLAG},
    "versions": VERSIONS,
    "hours": NUMBER,
    "iterations": COUNT,
    "phases": [
        {"name": TEXT.always(), "trainable": TEXT, "iterations": COUNT, "lr": NUMBER.always()}
    ],
    "datasets": {str: {"images": COUNT.always(), "gt_sha256": TEXT}},
}
COCO = {
    "images": [{"id": ID.always(), "file_name": TEXT, "patient_id": ID}],
    "annotations": [{"image_id": ID.always(), "category_id": ID.always()}],
    "categories": [{"id": ID.always(), "name": TEXT.always()}],
    "info": {"description": TEXT},
}
SPLITS = {
    "ratio": [NUMBER],
    **dict.fromkeys(("split_by", "sha256"), TEXT),
    **dict.fromkeys(("seed", "fold", "folds", "test_per_class"), WHOLE),
}
ROBUSTNESS = {
    "meta": {"model": NAME.always(), "dataset_sha256": TEXT, "images": COUNT, "seed": COUNT},
    "rows": [{"distortion": TEXT.always(), "severity": _range(0, 5).always()}],
}


def check_fields(path, value, kinds, where=""):
    """
    Args:
        path (str or Path): the file that is blamed.
        value: what it holds.
        kinds (Kind, dict or list): what ``value`` must be: an object with these fields, one with
            any names of fields ({str: kind}), or a list of such values ([kind]).
        where (str): name of the field in the file.

    Raises:
        BadInputError: it is something else.
    """
    if isinstance(kinds, Kind):
        if value is None and kinds.needed:
            raise BadInputError(path, f"lacks {where}, {kinds.name}")
        if value is not None and not kinds.admits(value):
            raise BadInputError(path, f"{where} is {_shown(value)}; it must be {kinds.name}")
        return
    if value is None:
        return
    is_list = isinstance(kinds, list)
    if not isinstance(value, list if is_list else dict):
        what = "a list" if is_list else "an object"
        raise BadInputError(path, f"{where or 'its content'} is {_shown(value)}; it must be {what}")
    if is_list:
        for place, item in enumerate(value):
            check_fields(path, {} if item is None else item, kinds[0], f"{where}[{place}]")
        return
    if str in kinds:
        kinds = dict.fromkeys(value, kinds[str])
    for name, kind in kinds.items():
        check_fields(path, value.get(name), kind, f"{where}.{name}" if where else name)


def _listed(value):
    return value if isinstance(value, list) and len(value) == 2 else [value]


def _shown(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_metrics(path):
    """
    Args:
        path (Path): a metrics.json.

    Returns:
        dict: what it holds: the settings in ``meta`` and ``tau_val`` can be used; its figures are
        numbers, but may be any.

    Raises:
        BadInputError: it is none.
    """
    content = _read(path, METRICS)
    task = (content.get("meta") or {}).get("task")
    needed = {"recognition"} if task == "recognition" else {"lesion", "image"}
    if missing := sorted(name for name in {"meta"} | needed if content.get(name) is None):
        raise BadInputError(path, f"lacks {', '.join(missing)}: evaluate it again")
    if task != "recognition":
        check_fields(path, content, LESIONS)
    return content


def read_run_record(path):
    """dict: a run.json, checked as :func:`read_metrics` does."""
    record = _read(path, RUN)
    fold = record.get("fold")
    if fold and fold["index"] >= fold["of"]:
        raise BadInputError(path, f"fold.index is {fold['index']}, of {fold['of']} folds")
    return record


def read_coco_records(path):
    """dict: a COCO file whose images, annotations and categories can be counted."""
    content = _read(path, COCO)
    if content.get("images") is None:
        raise BadInputError(path, "lacks images")
    return content


def read_split_settings(path):
    """dict: a splits.json, which says how the splits were made."""
    return _read(path, SPLITS)


def read_robustness(path):
    """dict: a robustness.json, ``meta`` and ``rows``."""
    content = _read(path, ROBUSTNESS)
    if missing := [name for name in ROBUSTNESS if content.get(name) is None]:
        raise BadInputError(path, f"lacks {', '.join(missing)}")
    for row in content["rows"]:
        figures = {name: value for name, value in row.items() if "/" in name}
        check_fields(path, figures, {str: NUMBER}, f"{row['distortion']} {row['severity']}")
    return content


def _read(path, kinds):
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise BadInputError(path, f"its content is {_shown(content)}; it must be an object")
    check_fields(path, content, kinds)
    return content


# The scored detections, as COCOEvaluator names them.
RESULTS = "coco_instances_results.json"


CURVE_COLUMNS = (
    "iou_type",
    "class",
    "score",
    "tp",
    "fp",
    "n_gt",
    "precision",
    "recall",
    "precision_envelope",
)


def write_results(results, folder, **meta):
    """
    Write the files of an evaluation; each replaces its predecessor at once, or not at all. What is
    undefined is null in JSON and empty in CSV; shares are in percent.

    - ``metrics.json``: all figures, each with its interval ``<key>_ci`` if there is one; ``meta``.
    - ``per_image.csv``: a row an image, and ``per_patient.csv``: a row a patient, where known.
    - ``pr_curve.csv``: a row for each detection let through, by IoU type and class, from the
      highest score down: hits and false alarms so far, precision, recall and the best precision
      at this recall or a higher one.
    - ``froc.csv``: a row a score, from the highest down: hits and false alarms so far, sensitivity
      and false alarms per image.
    - ``calibration.csv``: a row for each bin of scores.
    - ``thresholds.csv``: a row for each threshold from 0.05 to 0.95: figures of lesions and images.
    - ``by_size.csv``: a row a stratum, with intervals; ``confusion_matrix.csv``: rows are truth.
    - ``by_group.csv``, where the results have groups: a row a figure of a group.

    Args:
        results (LesionResults):
        folder (str or Path): made if it does not exist.
        **meta: what else to note under ``meta``, such as the data set's name; JSON values.

    Returns:
        dict[str, Path]: file name -> path.
    """
    folder = Path(folder)
    document = results_document(results)
    document["meta"] = {**meta, **results.meta, "versions": package_versions()}
    gt, measures = results.ground_truth, results.measures
    tables = {
        "per_image.csv": (results.per_image, ["image_id"]),
        "pr_curve.csv": (_curve_rows(results.curves), CURVE_COLUMNS),
        "froc.csv": transposed(measures.froc.curve()),
        "calibration.csv": transposed(measures.calibration.diagram()),
        "thresholds.csv": (results.thresholds, ["tau"]),
        "by_size.csv": (_size_rows(results), ["scale", "size"]),
        "confusion_matrix.csv": (confusion_rows(results.confusion), ["truth"]),
    }
    if measures.unit == "patient":
        rows = patient_rows(gt, results.counts, results.detections.scored)
        tables["per_patient.csv"] = (rows, ["patient_id"])
    if results.by_group:
        tables["by_group.csv"] = (group_rows(results.by_group), ["column"])
    texts = {"metrics.json": strict_json(document)}
    texts.update({name: csv_text(*table) for name, table in tables.items()})
    paths = {name: folder / name for name in texts}
    for name, path in paths.items():
        write_atomically(path, texts[name])
    return paths


def results_document(results):
    """
    Args:
        results (LesionResults):

    Returns:
        dict: what metrics.json holds, but for ``meta``.
    """

    def own(figures, group):
        return with_intervals(figures, results.intervals.get(group, {}))

    document = {name: own(figures, name) for name, figures in results.groups().items()}
    if results.tau_val is not None:
        document["tau_val"] = {
            key: own(value, f"tau_val.{key}") if isinstance(value, dict) else value
            for key, value in results.tau_val.items()
        }
    document["froc"] = own(results.froc, "froc")
    document["calibration"] = own(results.calibration, "calibration")
    document["confusion_matrix"] = {
        "classes": results.confusion.classes,
        "counts": results.confusion.rows(),
    }
    document["by_size"] = {
        scale: {name: own(figures, f"by_size.{scale}.{name}") for name, figures in strata.items()}
        for scale, strata in results.by_size.items()
    }
    if results.by_class:
        document["by_class"] = {
            name: own(figures, f"by_class.{name}") for name, figures in results.by_class.items()
        }
    if results.by_group:
        document["by_group"] = group_documents(results.by_group)
    document["undefined_shares"] = results.undefined_shares
    return document


def with_intervals(figures, intervals):
    """
    Args:
        figures (dict[str, float]): by name.
        intervals (dict[str, tuple[float, float]]): of those that have one.

    Returns:
        dict: the figures, each with its interval behind it as ``<name>_ci``.
    """
    beside = {}
    for name, figure in figures.items():
        beside[name] = figure
        if name in intervals:
            beside[f"{name}_ci"] = list(intervals[name])
    return beside


def _curve_rows(curves):
    rows = []
    for iou_type, name, curve in curves:
        columns = (curve.precision, curve.recall, curve.envelope)
        points = zip(curve.score, curve.tp, curve.fp, *columns, strict=True)
        for score, tp, fp, *shares in points:
            values = [iou_type, name, float(score), int(tp), int(fp), curve.num_gt]
            values += [100 * float(share) for share in shares]
            rows.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
    return rows


def _size_rows(results):
    rows = []
    for scale, strata in results.by_size.items():
        for size, figures in strata.items():
            row = {"scale": scale, "size": size}
            intervals = results.intervals.get(f"by_size.{scale}.{size}", {})
            for name, figure in figures.items():
                row[name] = figure
                if name in intervals:
                    row[f"{name}_low"], row[f"{name}_high"] = intervals[name]
            rows.append(row)
    return rows


def group_documents(by_group):
    """
    Args:
        by_group (dict[str, GroupedMetrics]): by column.

    Returns:
        dict: column -> level and groups; group -> n, figures with intervals, undefined_shares.
    """
    return {
        column: {
            "level": grouped.level,
            "groups": {
                name: {
                    "n": group.n,
                    **{
                        level: with_intervals(own, group.intervals.get(level, {}))
                        for level, own in group.figures.items()
                    },
                    "undefined_shares": group.undefined_shares,
                }
                for name, group in grouped.groups.items()
            },
        }
        for column, grouped in by_group.items()
    }


def group_rows(by_group):
    """
    Args:
        by_group (dict[str, GroupedMetrics]): by column.

    Returns:
        list[dict]: a row a figure of a group, with what is in the group.
    """
    rows = []
    for column, grouped in by_group.items():
        for name, group in grouped.groups.items():
            about = {"column": column, "of": grouped.level, "group": name, **group.n}
            for level, figures in group.figures.items():
                for figure, value in figures.items():
                    low, high = group.intervals.get(level, {}).get(figure, (math.nan,) * 2)
                    own = {"level": level, "figure": figure, "value": value}
                    rows.append({**about, **own, "low": low, "high": high})
    return rows


def confusion_rows(confusion):
    """list[dict]: rows of a ConfusionMatrix, by class, with the class under "truth"."""
    return [
        {"truth": truth, **dict(zip(confusion.classes, counts, strict=True))}
        for truth, counts in zip(confusion.classes, confusion.rows(), strict=True)
    ]


def transposed(columns):
    """tuple[list[dict], list[str]]: rows and their names, of a dict of arrays."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values], list(columns)


def sources(gt, dt, image_root, **others):
    """
    What the figures are of, for ``meta`` of :func:`write_results`.

    Args:
        gt, dt (str or Path): ground truth and detections.
        image_root (str, Path or None): folder that ``file_name`` is relative to.
        **others: what else is known: checkpoint, checkpoint_sha256, and more.

    Returns:
        dict: gt, dt and image_root as absolute paths, gt_sha256 of the file's bytes, checkpoint and
        checkpoint_sha256; None where unknown.
    """
    gt = Path(gt).absolute()
    return {
        "gt": str(gt),
        "gt_sha256": file_sha256(gt),
        "image_root": None if image_root is None else str(Path(image_root).absolute()),
        "dt": str(Path(dt).absolute()),
        "checkpoint": None,
        "checkpoint_sha256": None,
        **others,
    }


def coco_results(detections, gt):
    """
    Args:
        detections (Detections):
        gt (GroundTruth): what they are for.

    Returns:
        list[dict]: a COCO results list; ``score`` is None where they know no scores.
    """
    regions = detections.regions
    records = []
    for row, box in enumerate(regions.boxes.tolist()):
        record = {
            "image_id": gt.images[regions.image[row]]["id"],
            "category_id": gt.categories[regions.category[row]]["id"],
            "bbox": box,
            "score": float(detections.score[row]) if detections.scored else None,
        }
        if regions.masks is not None:
            size, counts = regions.masks[row]["size"], regions.masks[row]["counts"]
            text = counts if isinstance(counts, str) else counts.decode()
            record["segmentation"] = {"size": list(size), "counts": text}
        records.append(record)
    return records


# The probabilities of each image.
CLASSIFICATION_RESULTS = "recognition_results.json"


def write_classification(results, folder, **meta):
    """
    Write the files of an evaluation; each replaces its predecessor at once, or not at all. What is
    undefined is null in JSON and empty in CSV; shares are in percent, but probabilities in [0, 1].

    - ``metrics.json``: all figures, each with its interval ``<key>_ci`` if there is one; ``meta``.
    - ``per_image.csv``: a row an image: label, class predicted, right or wrong, probabilities.
    - ``confusion_matrix.csv``: rows are truth; ``calibration.csv``: a row for each bin of scores.
    - ``by_group.csv``, where the results have groups: a row a figure of a group.

    Args:
        results (ClassificationResults):
        folder (str or Path): made if it does not exist.
        **meta: what else to note under ``meta``, such as the data set's name; JSON values.

    Returns:
        dict[str, Path]: file name -> path.
    """
    document = recognition_document(results)
    document["meta"] = {**meta, **results.meta, "versions": package_versions()}
    texts = {
        "metrics.json": strict_json(document),
        "per_image.csv": csv_text(results.per_image, ["image_id"]),
        "confusion_matrix.csv": csv_text(confusion_rows(results.confusion), ["truth"]),
        "calibration.csv": csv_text(*transposed(results.measures.calibration.diagram())),
    }
    if results.by_group:
        texts["by_group.csv"] = csv_text(group_rows(results.by_group), ["column"])
    paths = {name: Path(folder) / name for name in texts}
    for name, path in paths.items():
        write_atomically(path, texts[name])
    return paths


def recognition_document(results):
    """
    Args:
        results (ClassificationResults):

    Returns:
        dict: what metrics.json holds, but for ``meta``.
    """
    groups = {**results.groups(), "calibration": results.calibration}
    document = {
        name: with_intervals(figures, results.intervals.get(name, {}))
        for name, figures in groups.items()
    }
    document["confusion_matrix"] = {
        "classes": results.confusion.classes,
        "counts": results.confusion.rows(),
    }
    if results.by_group:
        document["by_group"] = group_documents(results.by_group)
    document["undefined_shares"] = results.undefined_shares
    return document


TEST_LOG = "test_evaluations.csv"
COLUMNS = ("date", "what", "sha256", "output")


def log_test_evaluation(gt_path, *, what, sha256, output):
    """
    Note that a test set was evaluated. Every look at it is a chance to choose what does well on it,
    so reports say how many there were.

    Appends a line to ``test_evaluations.csv`` beside ``splits.json`` where ``gt_path`` is the
    ``annotations/test.json`` of a prepared data set, and does nothing for any other file. A folder
    that cannot be written to is warned of, not fatal.

    Args:
        gt_path (str or Path or None): ground truth of the evaluation.
        what (str or Path): the checkpoint, or the results, that was evaluated.
        sha256 (str or None): of that file.
        output (str or Path): where the figures went.
    """
    path = _log_of(gt_path)
    if path is None:
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = csv_line((date, Path(what).absolute(), sha256 or "", Path(output).absolute())).encode()
    try:
        with open(path, "ab", buffering=0, opener=_no_link) as file:
            # One write, at the end of the file: lines of evaluations at the same time stay whole.
            file.write(row if file.tell() else csv_line(COLUMNS).encode() + row)
    except OSError as error:
        logger.warning(f"{path}: this evaluation of the test set could not be noted ({error}).")


def read_test_log(gt_path):
    """
    Args:
        gt_path (str or Path): as of :func:`log_test_evaluation`.

    Returns:
        list[dict[str, str]]: date (UTC, ISO 8601), what, sha256 and output of each evaluation, in
            the order of time; empty if none was noted.

    Raises:
        ValueError: the log is no such table.
    """
    path = _log_of(gt_path)
    if path is None or not path.is_file():
        return []
    # Two first evaluations at once may both have written the header.
    return [row for row in read_rows(path, COLUMNS) if tuple(row.values()) != COLUMNS]


def _log_of(gt_path):
    """Path of the log, or None if this is not the test set of a prepared data set."""
    if gt_path is None:
        return None
    path = Path(gt_path).absolute()
    root = path.parent.parent
    is_test = (path.parent.name, path.name) == ("annotations", "test.json")
    return root / TEST_LOG if is_test and (root / "splits.json").is_file() else None


def _no_link(path, flags):
    """Of a data set from elsewhere, the log could be a link to any file, or a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
