"""The files an evaluation leaves: metrics.json, and tables as CSV."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.csv_files import csv_lines
from ..versions import package_versions
from .rows import patient_rows

__all__ = [
    "RESULTS",
    "atomic_file",
    "coco_results",
    "confusion_rows",
    "csv_text",
    "file_sha256",
    "group_documents",
    "group_rows",
    "lock_folder",
    "results_document",
    "sources",
    "strict_json",
    "transposed",
    "with_intervals",
    "write_atomically",
    "write_results",
]

# The scored detections, as COCOEvaluator names them.
RESULTS = "coco_instances_results.json"

_LONGEST_NAME = 255  # bytes, as nearly all file systems have it

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
        by_group (dict[str, GroupedFigures]): by column.

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
        by_group (dict[str, GroupedFigures]): by column.

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


def file_sha256(path):
    """str: sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path, mark=""):
    """
    Open a file for writing that replaces its predecessor at once, or not at all: it is written
    beside, reaches the disk, and takes the name when the block ends without an error. Nothing is
    written through a link that somebody left under either name.

    Args:
        path (str or Path): its folder is made if it does not exist.
        mark (str): in the name of the file beside, where others may be writing the same one.

    Yields:
        BinaryIO
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}{mark}.tmp")
    if len(os.fsencode(beside.name)) > _LONGEST_NAME:
        beside = path.with_name(hashlib.sha256(os.fsencode(beside.name)).hexdigest() + ".tmp")
    beside.unlink(missing_ok=True)  # of a process that was killed
    file = open(beside, "xb")  # noqa: SIM115  (closed below)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomically(path, content):
    """
    Write a whole file through :func:`atomic_file`.

    Args:
        path (str or Path): its folder is made if it does not exist.
        content (str or bytes): text is written as UTF-8.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def lock_folder(folder: str | Path, option: str, timeout: float = 0) -> FileLock:
    """
    Lock a folder for one writer, until the lock is released or the process ends, however it ends.

    Args:
        folder (str or Path): made if it does not exist.
        option (str): what chose it, such as "--output", for the error.
        timeout (float): seconds to wait for another writer to end.

    Returns:
        FileLock: acquired.

    Raises:
        ValueError: another run is writing into the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another run is writing into {folder}: wait for it, or choose another {option}"
        ) from error
    return lock


def strict_json(document):
    """
    Args:
        document (dict): of JSON values; floats that are not finite become null.

    Returns:
        str: indented JSON that every reader takes.
    """
    return json.dumps(_nan_to_null(document), indent=2, allow_nan=False) + "\n"


def _nan_to_null(value):
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(rows, columns):
    """str: the rows under all their keys, in the order of their first appearance; without a row
    ``columns`` alone. NaN is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) or columns
    values = ([row.get(column) for column in columns] for row in rows)
    known = ([None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in values)
    return csv_lines([columns, *known])
