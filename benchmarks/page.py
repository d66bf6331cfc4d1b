"""docs/performance.md, made from performance.md in this folder and the records of machines."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from inference_benchmark import EXPORTED, STOCK, TORCH
from machine import has_amx

from imrcnn_d2.report.tables import markdown_table

Rows = dict[str, dict[str, float]]  # row -> column -> value
TEMPLATE = Path(__file__).with_name("performance.md")
NOT_MEASURED = "not measured on this machine"
OURS = (*TORCH, *EXPORTED)
MOST_POINTS_LOST = 0.3  # of AP50_voc and IoU, by a runtime

# Columns of a benchmark's table; where none are given, all.
COLUMNS = {
    "prediction": [
        "ms",
        "times as fast",
        "network ms",
        "rest ms",
        "processor ms",
        "MiB at most",
        "AP50_voc",
        "iou",
    ],
    "prediction_r50": [
        "ms",
        "times as fast",
        "network ms",
        "MiB at most",
        "detections",
        "in one only, %",
        "scores differ by",
        "masks overlap",
    ],
    "training": [
        "Detectron2, s",
        "ours, s",
        "bits",
        "times as fast",
        "times less processor time",
        "loss curves, mean relative difference",
        "data time, % of ours",
    ],
}


@dataclass(frozen=True)
class Target:
    """A bound on a value of a benchmark's rows, `KeyError` or `ValueError` if they lack it."""

    text: str
    benchmark: str
    value: Callable[[Rows], float]
    at_least: bool
    bound: float | None  # None: only for processors with AMX
    with_amx: float | None

    def bounds(self) -> str:
        """As text."""
        if self.bound is None and self.with_amx is None:
            return "–"
        side = "at least" if self.at_least else "at most"
        if self.with_amx in (None, self.bound):
            return f"{side} {number(self.bound)}"
        amx = f"{number(self.with_amx)} with AMX"
        return f"{side} {amx if self.bound is None else f'{number(self.bound)}, {amx}'}"

    def result(self, record: dict) -> str:
        """The value that a machine's record has, and whether it meets the bound."""
        try:
            value = self.value(record["benchmarks"][self.benchmark]["rows"])
        except (KeyError, ValueError):
            return NOT_MEASURED
        amx = has_amx(record["machine"]["instructions"])
        bound = self.with_amx if amx and self.with_amx is not None else self.bound
        if bound is None:
            return number(value)
        met = value >= bound if self.at_least else value <= bound
        return f"{number(value)}, {'met' if met else 'not met'}"


def at_least(text, benchmark, value, bound, with_amx=None):
    return Target(text, benchmark, value, True, bound, with_amx)


def at_most(text, benchmark, value, bound, with_amx=None):
    return Target(text, benchmark, value, False, bound, with_amx)


def cell(row: str, column: str) -> Callable[[Rows], float]:
    return lambda rows: rows[row][column]


def fastest(rows: Rows) -> float:
    """Times as fast as Detectron2, of our runtimes that lose at most 0.3 points."""
    return max(
        rows[name]["times as fast"]
        for name in OURS
        if name in rows
        and all(
            rows[STOCK].get(key, 0) - rows[name].get(key, 0) <= MOST_POINTS_LOST
            for key in ("AP50_voc", "iou")
        )
    )


def over_yolo(name: str, precision: str) -> Callable[[Rows], float]:
    """Our time over that of a YOLO network at the same size, each in its fastest runtime."""
    runtimes = {"fp32": ("OpenVINO", "ONNX Runtime"), "bf16": ("OpenVINO bf16",)}[precision]

    def value(rows):
        theirs = min(rows[f"{name}, 352 pixels, {runtime}"]["ms"] for runtime in runtimes)
        return min(rows[runtime]["ms"] for runtime in runtimes) / theirs

    return value


LIGHT = "Light model, image file to masks"
R50 = "ResNet-50, 800 pixels"
TARGETS = [
    at_least(f"{LIGHT}: times as fast as Detectron2", "prediction", fastest, 4, 8),
    at_least(
        "Light model, the network alone: times as fast as Detectron2",
        "prediction",
        lambda rows: max(rows[name]["network, times as fast"] for name in OURS if name in rows),
        None,
        12,
    ),
    *(
        at_most(
            f"{LIGHT}: times as long as {name}, {precision}",
            "prediction",
            over_yolo(name, precision),
            *bounds,
        )
        for name, precision, *bounds in (
            ("yolo11s-seg", "fp32", 1.5),
            ("yolo11s-seg", "bf16", None, 1),
            ("yolo11n-seg", "fp32", None),
        )
    ),
    *(
        at_least(
            f"{R50}: times as fast as Detectron2, {precision}",
            "prediction_r50",
            cell(f"OpenVINO {precision}", "times as fast"),
            None,
            bound,
        )
        for precision, bound in (("bf16", 8), ("int8", 10))
    ),
    *(
        at_most(
            f"imrcnn predict on one image{text}: seconds", "cold_start", cell(row, "whole"), bound
        )
        for text, row, bound in (
            (", from nothing", "OpenVINO", 4),
            (", the graph compiled before", "OpenVINO, compiled before", 1.5),
        )
    ),
    at_most(
        "Finding the endoscope's view in a frame of 352 or 1080 rows: ms",
        "view",
        lambda rows: max(row["found, ms"] for row in rows.values()),
        5,
    ),
    at_most(
        "imrcnn predict on a folder or video: times as long as its slowest stage",
        "files",
        lambda rows: max(row["whole / slowest stage"] for row in rows.values()),
        1.15,
    ),
    at_least(
        "Training step of the light model: times as fast as Detectron2's parts in fp32",
        "training",
        cell("IMR-CNN light", "times as fast"),
        1.7,
        2,
    ),
    *(
        at_most(
            f"Evaluation of {images} images: processor time over COCOeval's",
            "evaluation",
            cell(f"{images} images", "ratio"),
            bound,
        )
        for images, bound in (("10,000", 0.7), ("100,000", 1.0))
    ),
    at_most(
        "Evaluation of 1,000,000 images: MiB",
        "evaluation",
        cell("1,000,000 images", "ours, MiB"),
        8192,
    ),
    at_most(
        "Evaluation of procedures, 2,700,000 frames: seconds",
        "procedures",
        cell("2,700,000 frames", "seconds"),
        300,
    ),
    at_most(
        "Evaluation of procedures, 2,700,000 frames: GiB",
        "procedures",
        cell("2,700,000 frames", "peak GiB"),
        8,
    ),
    at_most(
        "Catalogue of 1,000,000 images: MiB added, loading included",
        "catalogue",
        cell("1,000,000 images, ours", "MiB more, peak"),
        954,
    ),
    at_most(
        "PAFPN + CBAM: time over FPN's, divided by multiply-adds over FPN's",
        "neck",
        lambda rows: max(row["measured / predicted"] for row in rows.values()),
        1.15,
    ),
]


def page(folder: Path) -> str:
    """The page, of the records (*.json) in a folder."""
    paths = sorted(folder.glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    filled = {"machines": _machines(records), "targets": _targets(records)}
    return re.sub(
        r"^\{\{(\w+)\}\}$",
        lambda match: filled.get(match[1]) or _tables(match[1], records),
        TEMPLATE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )


def _machines(records):
    return "\n".join(
        "- **{name}**: {processor}, {instructions}, {cores} cores, {threads} threads, "
        "{memory} GiB; {system}; {versions}; images: {images}; {dates}.".format(
            **{
                **record["machine"],
                "memory": record["machine"]["memory, GiB"],
                "instructions": ", ".join(record["machine"]["instructions"]) or "no AVX2",
                "versions": ", ".join(
                    f"{library} {version}"
                    for library, version in record["machine"]["versions"].items()
                ),
                "dates": _dates(record),
            }
        )
        for record in records
    )


def _dates(record):
    made = {(entry["date"], entry["commit"]) for entry in record["benchmarks"].values()}
    return ", ".join(f"{date} at {commit}" for date, commit in sorted(made))


def _targets(records):
    rows = {
        target.text: {
            "target": target.bounds(),
            **{record["machine"]["name"]: target.result(record) for record in records},
        }
        for target in TARGETS
    }
    return _markdown(rows)


def _tables(benchmark, records):
    parts = []
    for record in records:
        entry = record["benchmarks"].get(benchmark, {"rows": {}})
        text = table(entry["rows"], COLUMNS.get(benchmark)) if entry["rows"] else NOT_MEASURED
        separator = "\n\n" if entry["rows"] else " "
        parts.append(f"**{record['machine']['name']}**:{separator}{text}")
    return "\n\n".join(parts) or "Not measured yet."


def table(rows: Rows, columns: list[str] | None = None) -> str:
    """Rows as Markdown; cells without a value have a dash."""
    columns = columns or list(dict.fromkeys(name for row in rows.values() for name in row))
    return _markdown(
        {
            name: {column: number(row[column]) if column in row else "–" for column in columns}
            for name, row in rows.items()
        }
    )


def _markdown(rows):
    cells = [{"": name, **row} for name, row in rows.items()]
    return markdown_table(pd.DataFrame(cells))


def number(value: float) -> str:
    """With three digits."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "−")
