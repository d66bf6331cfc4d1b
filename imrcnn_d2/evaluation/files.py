"""The files an evaluation leaves: metrics.json, per_image.csv and pr_curve.csv."""

import csv
import io
import json
import math
import os
from importlib import metadata
from pathlib import Path

__all__ = ["strict_json", "write_atomically", "write_results"]

PACKAGES = ("imrcnn-d2", "detectron2", "torch", "torchvision", "pycocotools", "numpy")
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
    Write the three files; each replaces its predecessor at once, or not at all.

    - ``metrics.json``: the groups of figures and ``meta``; strict JSON, undefined is null.
    - ``per_image.csv``: a row an image; undefined figures are empty.
    - ``pr_curve.csv``: a row for each detection let through, by IoU type and class, from the
      highest score down: hits and false alarms so far, precision, recall and the best precision
      at this recall or a higher one, in percent.

    Args:
        results (LesionResults):
        folder (str or Path): made if it does not exist.
        **meta: what else to note under ``meta``, such as the data set's name; JSON values.

    Returns:
        dict[str, Path]: file name -> path.
    """
    folder = Path(folder)
    document = _document(results)
    document["meta"] = {**meta, **results.meta, "versions": _versions()}
    curve_rows = []
    for iou_type, name, curve in results.curves:
        columns = (curve.precision, curve.recall, curve.envelope)
        points = zip(curve.score, curve.tp, curve.fp, *columns, strict=True)
        for score, tp, fp, *shares in points:
            values = [iou_type, name, float(score), int(tp), int(fp), curve.num_gt]
            values += [100 * float(share) for share in shares]
            curve_rows.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
    texts = {
        "metrics.json": strict_json(document),
        "per_image.csv": _csv(results.per_image, _columns(results.per_image)),
        "pr_curve.csv": _csv(curve_rows, CURVE_COLUMNS),
    }
    paths = {name: folder / name for name in texts}
    for name, path in paths.items():
        write_atomically(path, texts[name])
    return paths


def _document(results):
    """What metrics.json holds, but for ``meta``."""
    intervals = results.intervals

    def with_intervals(figures, group):
        beside = {}
        for name, figure in figures.items():
            beside[name] = figure
            if name in intervals.get(group, ()):
                beside[f"{name}_ci"] = list(intervals[group][name])
        return beside

    document = {name: with_intervals(figures, name) for name, figures in results.groups().items()}
    if results.tau_val is not None:
        document["tau_val"] = {
            key: with_intervals(value, f"tau_val.{key}") if isinstance(value, dict) else value
            for key, value in results.tau_val.items()
        }
    document["froc"] = with_intervals(results.froc, "froc")
    document["undefined_shares"] = results.undefined_shares
    return document


def write_atomically(path, content):
    """
    Write a file that replaces its predecessor at once, or not at all.

    Args:
        path (str or Path): its folder is made if it does not exist.
        content (str or bytes): text is written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def strict_json(document):
    """
    Args:
        document (dict): of JSON values; floats that are not finite become null.

    Returns:
        str: indented JSON that every reader takes.
    """
    return json.dumps(_nan_to_null(document), indent=2, allow_nan=False) + "\n"


def _versions():
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _nan_to_null(value):
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(rows):
    """All keys, in the order of their first appearance; the figures come last in every row."""
    return list(dict.fromkeys(key for row in rows for key in row)) or ["image_id"]


def _csv(rows, columns):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        )
    return text.getvalue()
