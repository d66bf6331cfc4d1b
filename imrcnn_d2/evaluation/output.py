"""The files of an evaluation, written and read with every field checked; the log of test sets."""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from imrcnn_d2.utils.files import (
    BadInputError,
    atomic_file,
    csv_line,
    csv_text,
    file_sha256,
    read_json,
    read_rows,
    strict_json,
    write_texts,
)
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

# The scored detections, as COCOEvaluator names them, and the probabilities of each image.
RESULTS = "coco_instances_results.json"
CLASSIFICATION_RESULTS = "recognition_results.json"

_PACKAGES = "imrcnn-d2 detectron2 torch torchvision timm pycocotools numpy"


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that metrics depend on; None where there is none."""
    versions = {}
    for package in _PACKAGES.split():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationResults:
    """What the evaluations of detection and of classification have in common.

    Attributes:
        calibration: n, ece, brier, mean_score, hit_rate of the scores, as probabilities of being
            right; the diagram is ``metrics.calibration``.
        calibration_raw: the same of the scores before they were mapped; None where they were not.
        confusion (ConfusionMatrix):
        meta: the settings, and the size of the data set.
        metrics (ResampledMetrics): as functions of how often each unit counts.
        intervals: group -> metric -> (low, high), see :func:`confidence_intervals`; empty without a
            bootstrap.
        undefined_shares: "group.metric" -> share of the resamples in which it is undefined, if any.
        by_group (dict[str, GroupedMetrics]): by column, see :func:`with_groups`.
        chosen_tau: the operating point, where there is one.

    All metrics are in percent but for those of other units in the table ``METRICS`` of detection;
    undefined ones are NaN.
    """

    calibration: dict[str, float]
    calibration_raw: dict[str, float] | None
    confusion: Any
    meta: dict
    metrics: Any
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    undefined_shares: dict[str, float] = field(default_factory=dict)
    by_group: dict = field(default_factory=dict)

    chosen_tau: ClassVar[float | None] = None

    def groups(self) -> dict[str, dict[str, float]]:
        """The groups of metrics, in the order of a report."""
        raise NotImplementedError

    @property
    def per_image(self) -> list[dict]:
        """One row per image by ascending id, with the fields of its record."""
        raise NotImplementedError

    def compared(self) -> dict[str, dict[str, float]]:
        """The groups that models are compared by."""
        return self.groups()

    def part(self, positions: np.ndarray, *, operating_point=None, bootstrap=None):
        """Evaluate the images at ascending (M,) positions alone, with the same settings."""
        raise NotImplementedError

    def right(self, tau_val: bool = False) -> np.ndarray | None:
        """(I,) bool, the images that are predicted as what they are, at the operating point with
        ``tau_val``; None without one where that is requested."""
        raise NotImplementedError

    def check_same_units(
        self, other: "EvaluationResults", names: tuple[str, str] = ("the first", "the second")
    ) -> None:
        """
        Raises:
            ValueError: the results are not of the same images, patients, classes and annotations.
        """
        test_sets = f"The test sets of {names[0]} and {names[1]}"
        for key, kind in (("id", "images"), ("file_name", "images"), ("patient_id", "patients")):
            values = [
                [image.get(key) for image in each.ground_truth.images] for each in (self, other)
            ]
            if values[0] != values[1]:
                pairs = zip(*values, strict=False)
                example = next((f", such as {a!r} and {b!r}" for a, b in pairs if a != b), "")
                raise ValueError(
                    f"{test_sets} have different {kind} ({len(values[0])} and {len(values[1])} "
                    f"images{example}): only models on the same test set can be compared."
                )
        if self._annotations() != other._annotations():
            raise ValueError(
                f"{test_sets} have the same images but different annotations or classes: only "
                "models scored against the same ground truth can be compared."
            )

    def _annotations(self):
        """All that is annotated, to tell whether two ground truths are the same."""
        raise NotImplementedError

    def document(self) -> dict:
        """What metrics.json holds, but for ``meta``."""
        raw = {} if self.calibration_raw is None else {"calibration_raw": self.calibration_raw}
        groups = {**self.groups(), **self._further_groups(), **raw, "calibration": self.calibration}
        document = {
            **interleave_intervals(groups, self.intervals),
            "confusion_matrix": {
                "classes": self.confusion.classes,
                "counts": self.confusion.rows(),
            },
            **interleave_intervals(self._strata(), self.intervals),
        }
        if self.by_group:
            document["by_group"] = {
                column: grouped.document() for column, grouped in self.by_group.items()
            }
        return {**document, "undefined_shares": self.undefined_shares}

    def _further_groups(self):
        return {}

    def _strata(self):
        return {}

    def tables(self) -> dict[str, tuple[list[dict], list[str]]]:
        """File name -> rows, and the columns that there are even without a row."""
        columns = ["truth", *self.confusion.classes]
        rows = zip(columns[1:], self.confusion.rows(), strict=True)
        confusion = [dict(zip(columns, [truth, *row], strict=True)) for truth, row in rows]
        tables = {
            "per_image.csv": (self.per_image, ["image_id"]),
            "confusion_matrix.csv": (confusion, columns),
            "calibration.csv": transposed(self.metrics.calibration.diagram()),
        }
        if self.by_group:
            rows = [
                row for column, grouped in self.by_group.items() for row in grouped.rows(column)
            ]
            tables["by_group.csv"] = (rows, ["column"])
        return tables


def write_results(results: EvaluationResults, folder: str | Path, **meta) -> dict[str, Path]:
    """Write the files of an evaluation, each atomically, and return file name -> path:
    ``metrics.json`` with all metrics, their intervals as ``<key>_ci`` and ``meta``, to which JSON
    values can be added, and the tables of ``results.tables()``. What is undefined is null in JSON
    and empty in CSV; shares are in percent, but for the probabilities of classes, in [0, 1]."""
    document = results.document()
    document["meta"] = {**meta, **results.meta, "versions": package_versions()}
    texts = {"metrics.json": strict_json(document)}
    texts.update({name: csv_text(*table) for name, table in results.tables().items()})
    return dict(zip(texts, write_texts(folder, texts), strict=True))


def write_evaluation(
    results: EvaluationResults,
    folder: str | Path,
    *,
    gt: str | Path,
    dt: str | Path,
    image_root: str | Path | None = None,
    **meta,
) -> dict[str, Path]:
    """:func:`write_results` with the sources under ``meta``: gt, dt and image_root as absolute
    paths, gt_sha256 of the file's bytes, checkpoint and checkpoint_sha256; None where unknown."""
    gt = Path(gt).absolute()
    dataset = {"dataset": meta.pop("dataset")} if "dataset" in meta else {}
    sources = {
        "gt": str(gt),
        "gt_sha256": file_sha256(gt),
        "image_root": None if image_root is None else str(Path(image_root).absolute()),
        "dt": str(Path(dt).absolute()),
        "checkpoint": None,
        "checkpoint_sha256": None,
    }
    return write_results(results, folder, **dataset, **{**sources, **meta})


def interleave_intervals(values: dict, intervals: dict[str, dict], group: str = "") -> dict:
    """The values, nested ones by "group.subgroup", each followed by its interval, where it has one,
    as ``<name>_ci``."""
    interleaved = {}
    for name, value in values.items():
        interleaved[name] = value
        if isinstance(value, dict):
            subgroup = f"{group}.{name}" if group else name
            interleaved[name] = interleave_intervals(value, intervals, subgroup)
        elif name in intervals.get(group, {}):
            interleaved[f"{name}_ci"] = list(intervals[group][name])
    return interleaved


def rows_per_image(images: list[dict], columns: dict[str, np.ndarray]) -> list[dict]:
    """One row per image record: image_id and file_name, its other fields, and the columns."""
    rows = []
    for record, *values in zip(images, *(c.tolist() for c in columns.values()), strict=True):
        fields = {"image_id": record["id"], "file_name": record.get("file_name"), **record}
        del fields["id"]
        # Fields of the data set that have the name of a column keep both.
        fields = {(f"images.{k}" if k in columns else k): value for k, value in fields.items()}
        rows.append({**fields, **dict(zip(columns, values, strict=True))})
    return rows


def transposed(columns: dict[str, np.ndarray]) -> tuple[list[dict], list[str]]:
    """The rows of columns of one length, and the names of the columns."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values], list(columns)


def coco_result(detections, gt, row: int) -> dict:
    """One of the Detections for a GroundTruth as a COCO result; ``score`` is None where they have
    no scores."""
    regions = detections.regions
    record = {
        "image_id": gt.images[regions.image[row]]["id"],
        "category_id": gt.categories[regions.category[row]]["id"],
        "bbox": regions.boxes[row].tolist(),
        "score": float(detections.score[row]) if detections.scored else None,
    }
    if detections.mapped:
        record["raw_score"] = float(detections.raw_score[row])
    if regions.masks is not None:
        mask = regions.masks[row]
        size, counts = mask["size"], mask["counts"]
        text = counts if isinstance(counts, str) else counts.decode()
        record["segmentation"] = {"size": list(size), "counts": text}
    return record


def write_detections(path: str | Path, detections, gt) -> None:
    """Write a COCO results list of `coco_result`, of which there may be millions."""
    with atomic_file(path) as file:
        for row in tqdm(range(len(detections.score)), desc="Writing results", delay=2):
            text = json.dumps(coco_result(detections, gt, row))
            file.write(f"{', ' if row else '['}{text}".encode())
        file.write(b"]" if len(detections.score) else b"[]")


class Kind(NamedTuple):
    """What a value must be. Null and an absent field are admitted too, unless it is needed."""

    name: str
    admits: Callable[[Any], bool]
    needed: bool = False

    def always(self) -> "Kind":
        return self._replace(needed=True)


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_value(value):
    values = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(item is None or _is_number(item) for item in values)


def _is_score_map(value):
    if type(value) is not dict or not all(_is_number(value.get(k)) for k in ("slope", "offset")):
        return False
    return type(value.get("dataset")) in (str, type(None))


def _range(low, high):
    return Kind(
        f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high
    )


def _choice(*values):
    return Kind(" or ".join(map(repr, values)), lambda value: value in values)


TEXT = Kind("a text", lambda value: type(value) is str)
FLAG = Kind("true or false", lambda value: type(value) is bool)
NUMBER = Kind("a finite number", _is_number)
WHOLE = Kind("a whole number", lambda value: type(value) is int)
COUNT = _range(0, 10**12)
ID = Kind("a number or a text", lambda value: type(value) is str or _is_number(value))
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
OVERLAP = Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
REGIONS = _choice("segm", "bbox")
NAME = Kind("a text that is not empty", lambda value: type(value) is str and value.strip())
VALUES = {str: Kind("a finite number, or two", _is_value)}
RESAMPLES, FOLDS = _range(1, 100_000), 1000
VERSIONS = {str: TEXT}
# What is read of the info of a predictions.json.
PREDICTIONS = {
    **dict.fromkeys(("model", "backbone", "version", "runtime", "precision"), NAME),
    **dict.fromkeys(("weights_sha256", "source_sha256", "config_sha256"), NAME),
    "tau": SHARE,
    "score_map": Kind("a map of scores", _is_score_map),
}

METRICS_FILE = {
    "meta": {
        "task": Kind(
            "'lesions' or 'recognition': results of imrcnn evaluate --video are compared by its "
            "--against, and plotted next to them",
            lambda value: value in ("lesions", "recognition"),
        ),
        "dataset": NAME,
        **dict.fromkeys(("gt", "dt", "image_root"), TEXT),
        **dict.fromkeys(("gt_sha256", "checkpoint", "checkpoint_sha256"), TEXT),
        **dict.fromkeys(("model", "backbone"), NAME),
        "iterations": COUNT,
        "scored": FLAG,
        "bootstrap": {"resamples": RESAMPLES.always(), "seed": COUNT.always(), "all_coco": FLAG},
        "versions": VERSIONS,
        "predictions": PREDICTIONS,
        "score_map": {"temperature": NUMBER, "dataset": TEXT},  # of a classifier
    },
    **dict.fromkeys(("bbox", "segm", "lesion", "paper", "image", "patient"), VALUES),
    "unique_lesion": VALUES,
    **dict.fromkeys(("recognition", "cancer"), VALUES),
}
# The settings of an evaluation of detections.
LESIONS = {
    "meta": {
        "tau": SHARE.always(),
        "iou_threshold": OVERLAP.always(),
        "iou_type": REGIONS.always(),
        "score_map": {"slope": NUMBER.always(), "offset": NUMBER.always()},
    },
    "tau_val": {
        "tau": SHARE.always(),
        "rule": TEXT.always(),
        "dataset": TEXT,
        "suppress_parts": FLAG,
    },
}
RUN = {
    **dict.fromkeys(("model", "backbone"), NAME),
    **dict.fromkeys(("command", "device", "started", "finished"), TEXT),
    **dict.fromkeys(("config_sha256", "splits_sha256", "left_out"), TEXT),
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
    "info": {"description": TEXT, "source": TEXT},
}
SPLITS = {
    "ratio": [NUMBER],
    **dict.fromkeys(("split_by", "sha256", "fixed_from", "left_out"), TEXT),
    **dict.fromkeys(("seed", "fold", "folds", "given", "test_per_class"), WHOLE),
}
ROBUSTNESS = {
    "meta": {"model": NAME.always(), "dataset_sha256": TEXT, "images": COUNT, "seed": COUNT},
    "rows": [{"distortion": TEXT.always(), "severity": _range(0, 5).always()}],
}


def check_fields(path: str | Path, value: object, kinds: Kind | dict | list, where: str = ""):
    """Check ``value``, the content of a file or its field ``where``: it must be of a Kind, an
    object with these fields or with any names of fields ({str: kind}), or a list ([kind]).

    Raises:
        BadInputError: it is something else.
    """
    if isinstance(kinds, Kind):
        if value is None and kinds.needed:
            raise BadInputError(path, f"lacks {where}, {kinds.name}")
        if value is not None and not kinds.admits(value):
            raise BadInputError(path, f"{where} is {value!r:.60}; it must be {kinds.name}")
        return
    if value is None:
        return
    is_list = isinstance(kinds, list)
    if not isinstance(value, list if is_list else dict):
        kind = "a list" if is_list else "an object"
        raise BadInputError(path, f"{where or 'its content'} is {value!r:.60}; it must be {kind}")
    if is_list:
        for place, item in enumerate(value):
            check_fields(path, {} if item is None else item, kinds[0], f"{where}[{place}]")
        return
    if str in kinds:
        kinds = dict.fromkeys(value, kinds[str])
    for name, kind in kinds.items():
        check_fields(path, value.get(name), kind, f"{where}.{name}" if where else name)


def read_metrics(path: str | Path) -> dict:
    """Read a metrics.json. The settings in ``meta`` and ``tau_val`` can be used; its metrics are
    numbers, but may be any.

    Raises:
        BadInputError: it is none.
    """
    content = _read(path, METRICS_FILE, "meta")
    is_classification = content["meta"].get("task") == "recognition"
    _check_present(path, content, ["recognition"] if is_classification else ["image", "lesion"])
    if not is_classification:
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
    return _read(path, COCO, "images")


def prediction_info(info: object) -> dict | None:
    """What the ``info`` of a predictions.json says of its model; None of anything else."""
    if not isinstance(info, dict) or "weights_sha256" not in info:
        return None
    return {key: info[key] for key, kind in PREDICTIONS.items() if kind.admits(info.get(key))}


def read_split_settings(path: str | Path) -> dict:
    """The settings of the splits, a splits.json."""
    return _read(path, SPLITS)


def read_robustness(path: str | Path) -> dict:
    """A robustness.json, ``meta`` and ``rows``."""
    content = _read(path, ROBUSTNESS, *ROBUSTNESS)
    for row in content["rows"]:
        values = {name: value for name, value in row.items() if "/" in name}
        check_fields(path, values, {str: NUMBER}, f"{row['distortion']} {row['severity']}")
    return content


def _read(path, kinds, *needed):
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise BadInputError(path, f"its content is {content!r:.60}; it must be an object")
    check_fields(path, content, kinds)
    _check_present(path, content, needed)
    return content


def _check_present(path, content, needed):
    if missing := [name for name in needed if content.get(name) is None]:
        raise BadInputError(path, f"lacks {', '.join(missing)}: write it again")


TEST_LOG = "test_evaluations.csv"
LOG_COLUMNS = ("date", "what", "sha256", "output")


def log_test_evaluation(
    gt_path: str | Path | None, *, source: str | Path, sha256: str | None, output: str | Path
):
    """Record that a test set was evaluated: the checkpoint or results ``source``, their sha256,
    and the folder ``output``. Every evaluation is a chance to choose what does well on it, so
    reports state how many there were.

    Appends a line to ``test_evaluations.csv`` next to ``splits.json`` where ``gt_path`` is the
    ``annotations/test.json`` of a prepared data set, and does nothing for any other file. A folder
    that cannot be written to causes a warning, no error.
    """
    path = _log_of(gt_path)
    if path is None:
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = csv_line((date, Path(source).absolute(), sha256 or "", Path(output).absolute())).encode()
    try:
        with open(path, "ab", buffering=0, opener=_no_link) as file:
            # One write, at the end of the file: lines of evaluations at the same time stay whole.
            file.write(row if file.tell() else csv_line(LOG_COLUMNS).encode() + row)
    except OSError as error:
        logger.warning(
            f"The results are complete, but {path} cannot be written "
            f"({error.strerror or error}): this evaluation is missing from the list there, which "
            "model cards show."
        )


def read_test_log(gt_path: str | Path) -> list[dict[str, str]]:
    """Date (UTC, ISO 8601), what, sha256 and output of each evaluation of a test set, in the order
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
