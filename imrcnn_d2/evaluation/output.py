"""The files of an evaluation: written, read with every field checked, and the log of evaluations
of a test set."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

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
    "EvaluationResults",
    "check_fields",
    "coco_results",
    "confusion_rows",
    "interleave_intervals",
    "log_test_evaluation",
    "read_coco_records",
    "read_metrics",
    "read_robustness",
    "read_run_record",
    "read_split_settings",
    "read_test_log",
    "rows_per_image",
    "transposed",
    "write_evaluation",
    "write_results",
]

logger = logging.getLogger(__name__)


def rows_per_image(images: list[dict], columns: dict[str, np.ndarray]) -> list[dict]:
    """
    Args:
        images: I COCO image records.
        columns: (I,) each, what happened in them.

    Returns:
        One row per image: image_id and file_name, the other fields of its record, and the columns.
    """
    rows = []
    for record, *values in zip(images, *(c.tolist() for c in columns.values()), strict=True):
        fields = {"image_id": record["id"], "file_name": record.get("file_name"), **record}
        del fields["id"]
        # Fields of the data set that have the name of a column keep both.
        fields = {(f"images.{k}" if k in columns else k): value for k, value in fields.items()}
        rows.append({**fields, **dict(zip(columns, values, strict=True))})
    return rows


class Kind(NamedTuple):
    """
    What a value must be; null and an absent field are admitted too, unless it is needed.

    Attributes:
        name: of such values.
        admits: whether a value is one.
        needed: it must be present.
    """

    name: str
    admits: Callable[[Any], bool]
    needed: bool = False

    def always(self) -> "Kind":
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
VALUE = Kind(
    "a finite number, or two",
    lambda value: all(v is None or _is_number(v) for v in _listed(value)),
)
VALUES = {str: VALUE}
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
    **dict.fromkeys(("bbox", "segm", "lesion", "image", "patient"), VALUES),
    **dict.fromkeys(("recognition", "cancer"), VALUES),
}
# The settings of an evaluation of detections.
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


def check_fields(path: str | Path, value, kinds, where: str = ""):
    """
    Args:
        path: the file that errors name.
        value: its content.
        kinds (Kind, dict or list): what ``value`` must be: an object with these fields, one with
            any names of fields ({str: kind}), or a list of such values ([kind]).
        where: name of the field in the file.

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
        kind = "a list" if is_list else "an object"
        raise BadInputError(path, f"{where or 'its content'} is {_shown(value)}; it must be {kind}")
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


def read_metrics(path: str | Path) -> dict:
    """
    Returns:
        The content of a metrics.json: the settings in ``meta`` and ``tau_val`` can be used; its
        metrics are numbers, but may be any.

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


def read_run_record(path: str | Path) -> dict:
    """A run.json, checked as :func:`read_metrics` does."""
    record = _read(path, RUN)
    fold = record.get("fold")
    if fold and fold["index"] >= fold["of"]:
        raise BadInputError(path, f"fold.index is {fold['index']}, of {fold['of']} folds")
    return record


def read_coco_records(path: str | Path) -> dict:
    """A COCO file whose images, annotations and categories can be counted."""
    content = _read(path, COCO)
    if content.get("images") is None:
        raise BadInputError(path, "lacks images")
    return content


def read_split_settings(path: str | Path) -> dict:
    """A splits.json, which holds the settings of the splits."""
    return _read(path, SPLITS)


def read_robustness(path: str | Path) -> dict:
    """A robustness.json, ``meta`` and ``rows``."""
    content = _read(path, ROBUSTNESS)
    if missing := [name for name in ROBUSTNESS if content.get(name) is None]:
        raise BadInputError(path, f"lacks {', '.join(missing)}")
    for row in content["rows"]:
        values = {name: value for name, value in row.items() if "/" in name}
        check_fields(path, values, {str: NUMBER}, f"{row['distortion']} {row['severity']}")
    return content


def _read(path, kinds):
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise BadInputError(path, f"its content is {_shown(content)}; it must be an object")
    check_fields(path, content, kinds)
    return content


# The scored detections, as COCOEvaluator names them, and the probabilities of each image.
RESULTS = "coco_instances_results.json"
CLASSIFICATION_RESULTS = "recognition_results.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationResults:
    """
    What the evaluations of detection and of classification have in common.

    Attributes:
        calibration: n, ece, brier, mean_score, hit_rate of the scores, as probabilities of being
            right; the diagram is ``metrics.calibration``.
        confusion (ConfusionMatrix):
        per_image: one row per image by ascending id, with the fields of its record.
        meta: the settings, and the size of the data set.
        metrics (ResampledMetrics): as functions of how often each unit counts.
        intervals: group -> metric -> (low, high), see :func:`confidence_intervals`; empty without a
            bootstrap.
        undefined_shares: "group.metric" -> share in (0, 1] of the resamples in which it is
            undefined, where there are any.
        by_group (dict[str, GroupedMetrics]): by column, see :func:`with_groups`; empty without.
        chosen_tau: the operating point, where there is one.

    All metrics are in percent but for those of other units in ``METRICS``; undefined ones are NaN.
    """

    calibration: dict[str, float]
    confusion: Any
    per_image: list[dict]
    meta: dict
    metrics: Any
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    undefined_shares: dict[str, float] = field(default_factory=dict)
    by_group: dict = field(default_factory=dict)

    chosen_tau: ClassVar[float | None] = None

    def groups(self) -> dict[str, dict[str, float]]:
        """The groups of metrics, in the order of a report."""
        raise NotImplementedError

    def compared(self) -> dict[str, dict[str, float]]:
        """The groups that models are compared by."""
        return self.groups()

    def part(self, positions: np.ndarray, *, operating_point=None, bootstrap=None):
        """
        Args:
            positions: (M,) int, images, ascending.
            operating_point (OperatingPoint or None), bootstrap (Bootstrap or None): for the part.

        Returns:
            results of these images alone, with the same settings.
        """
        raise NotImplementedError

    def right(self, tau_val: bool = False) -> np.ndarray | None:
        """(I,) bool, the images that are predicted as what they are, at the operating point with
        ``tau_val``; None without one where that is requested."""
        raise NotImplementedError

    def document(self) -> dict:
        """What metrics.json holds, but for ``meta``."""
        document = {
            **self._documents(),
            "confusion_matrix": {
                "classes": self.confusion.classes,
                "counts": self.confusion.rows(),
            },
            **self._strata(),
        }
        if self.by_group:
            document["by_group"] = _group_documents(self.by_group)
        document["undefined_shares"] = self.undefined_shares
        return document

    def _documents(self):
        groups = {**self.groups(), "calibration": self.calibration}
        return {group: self._document(values, group) for group, values in groups.items()}

    def _document(self, values, group):
        return interleave_intervals(values, self.intervals.get(group, {}))

    def _strata(self):
        return {}

    def tables(self) -> dict[str, tuple[list[dict], list[str]]]:
        """file name -> rows and the columns that there are even without a row."""
        tables = {
            "per_image.csv": (self.per_image, ["image_id"]),
            "confusion_matrix.csv": (confusion_rows(self.confusion), ["truth"]),
            "calibration.csv": transposed(self.metrics.calibration.diagram()),
        }
        if self.by_group:
            tables["by_group.csv"] = (_group_rows(self.by_group), ["column"])
        return tables


def write_results(results: EvaluationResults, folder: str | Path, **meta) -> dict[str, Path]:
    """
    Write the files of an evaluation; each replaces its predecessor at once, or not at all. What is
    undefined is null in JSON and empty in CSV; shares are in percent, but for the probabilities of
    classes, in [0, 1].

    - ``metrics.json``: all metrics, each with its interval ``<key>_ci`` if there is one; ``meta``.
    - ``per_image.csv``: one row per image; ``confusion_matrix.csv``: rows are truth;
      ``calibration.csv``: one row per bin of scores.
    - ``by_group.csv``, where the results have groups: one row per metric of a group.

    Of detections also:

    - ``per_patient.csv``: one row per patient, where known.
    - ``pr_curve.csv``: one row per evaluated detection, by IoU type and class, from the highest
      score down: hits and false alarms so far, precision, recall and the best precision at this
      recall or a higher one.
    - ``froc.csv``: one row per score, from the highest down: hits and false alarms so far,
      sensitivity and false alarms per image.
    - ``thresholds.csv``: one row per threshold from 0.05 to 0.95: metrics of lesions and images.
    - ``by_size.csv``: one row per stratum, with intervals.

    Args:
        results:
        folder: made if it does not exist.
        **meta: what else to record under ``meta``, such as the data set's name; JSON values.

    Returns:
        file name -> path.
    """
    document = results.document()
    document["meta"] = {**meta, **results.meta, "versions": package_versions()}
    texts = {"metrics.json": strict_json(document)}
    texts.update({name: csv_text(*table) for name, table in results.tables().items()})
    paths = {name: Path(folder) / name for name in texts}
    for name, path in paths.items():
        write_atomically(path, texts[name])
    return paths


def write_evaluation(
    results: EvaluationResults, folder: str | Path, *, gt, dt, image_root=None, **meta
) -> dict[str, Path]:
    """
    :func:`write_results` with the sources under ``meta``: gt, dt and image_root as absolute paths,
    gt_sha256 of the file's bytes, checkpoint and checkpoint_sha256; None where unknown.

    Args:
        results:
        folder: made if it does not exist.
        gt, dt (str or Path): ground truth and predictions.
        image_root (str, Path or None): folder that ``file_name`` is relative to.
        **meta: what else to record; JSON values.
    """
    gt = Path(gt).absolute()
    known = {
        "gt": str(gt),
        "gt_sha256": file_sha256(gt),
        "image_root": None if image_root is None else str(Path(image_root).absolute()),
        "dt": str(Path(dt).absolute()),
        "checkpoint": None,
        "checkpoint_sha256": None,
    }
    dataset = {"dataset": meta.pop("dataset")} if "dataset" in meta else {}
    return write_results(results, folder, **dataset, **{**known, **meta})


def interleave_intervals(values: dict, intervals: dict) -> dict:
    """The values, each followed by its interval, where it has one, as ``<name>_ci``."""
    interleaved = {}
    for name, value in values.items():
        interleaved[name] = value
        if name in intervals:
            interleaved[f"{name}_ci"] = list(intervals[name])
    return interleaved


def _group_documents(by_group):
    """column -> level and groups; group -> n, metrics with intervals, undefined_shares."""
    return {
        column: {
            "level": grouped.level,
            "groups": {
                name: {
                    "n": group.n,
                    **{
                        level: interleave_intervals(values, group.intervals.get(level, {}))
                        for level, values in group.values.items()
                    },
                    "undefined_shares": group.undefined_shares,
                }
                for name, group in grouped.groups.items()
            },
        }
        for column, grouped in by_group.items()
    }


def _group_rows(by_group):
    """One row per metric of a group, with the size of the group."""
    rows = []
    for column, grouped in by_group.items():
        for name, group in grouped.groups.items():
            fields = {"column": column, "of": grouped.level, "group": name, **group.n}
            for level, values in group.values.items():
                for metric, value in values.items():
                    low, high = group.intervals.get(level, {}).get(metric, (math.nan,) * 2)
                    row = {"level": level, "figure": metric, "value": value}
                    rows.append({**fields, **row, "low": low, "high": high})
    return rows


def confusion_rows(confusion) -> list[dict]:
    """Rows of a ConfusionMatrix, by class, with the class under "truth"."""
    return [
        {"truth": truth, **dict(zip(confusion.classes, counts, strict=True))}
        for truth, counts in zip(confusion.classes, confusion.rows(), strict=True)
    ]


def transposed(columns: dict[str, np.ndarray]) -> tuple[list[dict], list[str]]:
    """The rows of columns of one length, and the names of the columns."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values], list(columns)


def coco_results(detections, gt) -> list[dict]:
    """Detections for a GroundTruth as a COCO results list; ``score`` is None where they have no
    scores."""
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


TEST_LOG = "test_evaluations.csv"
LOG_COLUMNS = ("date", "what", "sha256", "output")


def log_test_evaluation(gt_path, *, what, sha256, output):
    """
    Record that a test set was evaluated. Every evaluation is a chance to choose what does well on
    it, so reports state how many there were.

    Appends a line to ``test_evaluations.csv`` next to ``splits.json`` where ``gt_path`` is the
    ``annotations/test.json`` of a prepared data set, and does nothing for any other file. A folder
    that cannot be written to causes a warning, no error.

    Args:
        gt_path (str or Path or None): ground truth of the evaluation.
        what (str or Path): the checkpoint, or the results, that was evaluated.
        sha256 (str or None): of that file.
        output (str or Path): folder of the evaluation's files.
    """
    path = _log_of(gt_path)
    if path is None:
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = csv_line((date, Path(what).absolute(), sha256 or "", Path(output).absolute())).encode()
    try:
        with open(path, "ab", buffering=0, opener=_no_link) as file:
            # One write, at the end of the file: lines of evaluations at the same time stay whole.
            file.write(row if file.tell() else csv_line(LOG_COLUMNS).encode() + row)
    except OSError as error:
        logger.warning(f"{path}: this evaluation of the test set could not be recorded ({error}).")


def read_test_log(gt_path: str | Path) -> list[dict[str, str]]:
    """
    Returns:
        date (UTC, ISO 8601), what, sha256 and output of each evaluation of a test set, in the order
        of time; empty if none was recorded.

    Raises:
        ValueError: the log is no such table.
    """
    path = _log_of(gt_path)
    if path is None or not path.is_file():
        return []
    # Two first evaluations at once may both have written the header.
    return [row for row in read_rows(path, LOG_COLUMNS) if tuple(row.values()) != LOG_COLUMNS]


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
