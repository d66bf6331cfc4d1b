"""The files of an audit: audit.json, tables as CSV, and the page."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from matplotlib.figure import Figure

from imrcnn_d2.data.audit.audit import Audit
from imrcnn_d2.data.audit.checks import groups
from imrcnn_d2.data.audit.findings import AREAS, KINDS, SEVERITIES
from imrcnn_d2.report.html.gallery import embed, svg_path
from imrcnn_d2.report.html.page import as_data, contour_lines, write_html
from imrcnn_d2.report.plots.images import mask_contours
from imrcnn_d2.report.plots.style import BLUE, save_figure, tidy
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically
from imrcnn_d2.versions import package_versions

__all__ = ["plot_annotations", "render_audit", "write_audit"]


CELLS = 64  # of the heat map, in both directions


def plot_annotations(audit: Audit, path: str | Path) -> Figure:
    """
    Plot a heat map of the annotations' places, a histogram of their sizes and the counts of the
    classes, of an audit with at least one annotation.
    """
    heat, shares = np.zeros((CELLS, CELLS)), []
    for one in audit.examined:
        for annotation in one.annotations:
            mask = mask_util.decode(annotation.rle).astype(np.float32)
            heat += cv2.resize(mask, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
            shares.append(annotation.area / mask.size)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    place, size, classes = figure.subplots(1, 3)

    shown = place.imshow(100 * heat / len(shares), cmap="cividis", vmin=0)
    place.set(title="Where they are", xticks=[], yticks=[])
    figure.colorbar(shown, ax=place, label="annotations that cover it, %", shrink=0.85)

    edges = np.logspace(min(-4, np.log10(min(shares))), 0, 41)
    size.hist(shares, edges, color=BLUE)
    size.set(title="How large they are", xscale="log", ylabel="annotations")
    size.set_xlabel("share of the image")
    ticks = [tick for tick in (1e-4, 1e-3, 1e-2, 1e-1, 1) if tick >= edges[0]]
    size.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    tidy(size)

    counts = Counter(
        annotation.record["category_id"] for one in audit.examined for annotation in one.annotations
    )
    names = {category["id"]: str(category["name"]) for category in audit.data.categories}
    order = sorted(names, key=lambda number: counts[number])
    classes.barh([names[number] for number in order], [counts[n] for n in order], color=BLUE)
    classes.set(title="Of which class", xlabel="annotations")
    tidy(classes)
    save_figure(figure, path)
    return figure


TILES = 24  # of a kind; all others are in findings.csv
MOST_ANNOTATIONS = 200  # of a thumbnail
LONG_SIDE = 320  # pixels of a thumbnail
MOST_IMAGES = 4  # of one finding
CONTOURS = {
    "truth": ("ground truth", "annotation"),
    "alarm": ("false alarm", "annotation of the finding"),
}


def render_audit(audit: Audit, output: str | Path) -> Path:
    """Write the page; replaced at once, or not at all."""
    entries = audit.data.entries
    flagged = audit.flagged
    thumbnails = _Thumbnails(audit)
    severities = Counter(found.severity for found in audit.findings)
    annotated = any(one.annotations for one in audit.examined)
    return write_html(
        "audit",
        output,
        title=audit.data.title,
        kicker="Data audit",
        shown="data set",
        lead=_lead(audit),
        lines=contour_lines(CONTOURS),
        sources=audit.data.title,
        cards=[
            ("Errors", severities["error"], "make training or its metrics wrong"),
            ("Warnings", severities["warning"], "should be looked at"),
            ("Images to look at", len(flagged), f"{_share(len(flagged), len(entries))} of all"),
            ("Pairs that show the same", len(audit.duplicates), _crossing(audit)),
        ],
        splits=_split_rows(audit),
        areas=[
            {"key": area, "title": title, "rows": _kind_rows(audit, area)}
            for area, title in AREAS.items()
        ],
        kinds=[_kind(audit, kind, thumbnails) for kind in audit.counts()],
        plot=as_data(plot_annotations, audit) if annotated else None,
        notes=audit.notes,
        tiles=TILES,
    )


def _lead(audit):
    entries = audit.data.entries
    annotations = sum(len(entry.annotations) for entry in entries)
    return f"{len(entries):,} images, {annotations:,} annotations."


def _share(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _crossing(audit):
    entries = audit.data.entries
    across = sum(entries[pair.a].split != entries[pair.b].split for pair in audit.duplicates)
    return f"{across:,} of them in two splits"


def _split_rows(audit):
    """list[list[str]]: of each split its images, annotations, patients, and images to look at."""
    rows = []
    for split in dict.fromkeys(entry.split for entry in audit.data.entries):
        entries = [entry for entry in audit.data.entries if entry.split == split]
        patients = {
            e.record["patient_id"] for e in entries if e.record.get("patient_id") is not None
        }
        flagged = sum(name == split for name, _ in audit.flagged)
        rows.append(
            [
                split or "all",
                f"{len(entries):,}",
                f"{sum(not entry.annotations for entry in entries):,}",
                f"{sum(len(entry.annotations) for entry in entries):,}",
                f"{len(patients):,}" if patients else "not known",
                f"{flagged:,}",
            ]
        )
    return rows


def _kind_rows(audit, area):
    """list[dict]: the kinds of an area, whether found or not."""
    counts = audit.counts()
    return [
        {
            "key": key,
            "title": kind.title,
            "meaning": kind.meaning,
            "severity": next((s for s in SEVERITIES if counts.get(key, {}).get(s)), ""),
            "findings": sum(counts.get(key, {}).values()),
            "images": len(audit.images_of(key)),
            "share": _share(len(audit.images_of(key)), len(audit.data.entries)),
        }
        for key, kind in KINDS.items()
        if kind.area == area and (area in audit.checked or key in counts)
    ]


def _kind(audit, key, thumbnails):
    """dict: a kind of finding, with its first findings."""
    findings = [found for found in audit.findings if found.kind == key]
    findings.sort(key=lambda found: SEVERITIES.index(found.severity))  # stable
    return {
        "key": key,
        "title": KINDS[key].title,
        "meaning": KINDS[key].meaning,
        "remedy": KINDS[key].remedy,
        "count": len(findings),
        "findings": [
            {
                "severity": found.severity,
                "detail": found.detail,
                "more": max(len(found.images) - MOST_IMAGES, 0),
                "images": [
                    thumbnails.of(split, name, found.annotation_id)
                    for split, name in list(zip(found.splits, found.images, strict=True))[
                        :MOST_IMAGES
                    ]
                ],
            }
            for found in findings[:TILES]
        ],
    }


class _Thumbnails:
    """Images with their annotations, each embedded once."""

    def __init__(self, audit):
        self._examined = {(one.entry.split, one.entry.name): one for one in audit.examined}
        self._embedded = {}

    def of(self, split, name, annotation_id):
        """dict: name, split, jpeg (None if it cannot be read), size, and contours by class."""
        one = self._examined[split, name]
        thumbnail = {"name": name, "split": split, "jpeg": None, "paths": []}
        if one.measures is None:
            return thumbnail
        if one.entry.path not in self._embedded:
            self._embedded[one.entry.path] = embed(one.entry.path, LONG_SIDE)
        jpeg, _, scale = self._embedded[one.entry.path]
        # Masks are of the size that the annotations say, which may be wrong.
        width = one.entry.record.get("width") or one.measures.width
        height = one.entry.record.get("height") or one.measures.height
        thumbnail |= {"jpeg": jpeg, "width": width, "height": height}
        kinds = [
            "alarm"
            if annotation_id is not None and o.record.get("id") == annotation_id
            else "truth"
            for o in one.annotations
        ]
        shown = sorted(zip(kinds, one.annotations, strict=True), key=lambda shown: shown[0])[
            :MOST_ANNOTATIONS
        ]
        for kind, annotation in reversed(shown):  # the annotation of the finding last, on top
            thumbnail["paths"].append((kind, svg_path(mask_contours(annotation.rle), scale)))
        return thumbnail


FINDING_COLUMNS = ("kind", "severity", "images", "splits", "annotation_id", "score", "detail")
IMAGE_COLUMNS = ("file_name", "split", "annotations", "flags")
PAIR_COLUMNS = ("a", "b", "split_a", "split_b", "kind", "correlation")


def write_audit(audit: Audit, output: str | Path) -> Path:
    """
    Write ``audit.json``, ``findings.csv``, ``images.csv`` (one row per image: measurements and
    flags), ``twins.csv`` (pairs of duplicates) and ``audit.html`` to a folder; returns the page.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "audit.json", strict_json(_document(audit)))
    rows = [
        {**found.as_json(), "images": "; ".join(found.images), "splits": "; ".join(found.splits)}
        for found in audit.findings
    ]
    write_atomically(output / "findings.csv", csv_text(rows, FINDING_COLUMNS))
    write_atomically(output / "images.csv", csv_text(_image_rows(audit), IMAGE_COLUMNS))
    write_atomically(output / "twins.csv", csv_text(_pair_rows(audit), PAIR_COLUMNS))
    return render_audit(audit, output / "audit.html")


def _document(audit):
    entries = audit.data.entries
    return {
        "title": audit.data.title,
        "images": len(entries),
        "annotations": sum(len(entry.annotations) for entry in entries),
        "flagged_images": len(audit.flagged),
        "kinds": {
            kind: {
                **dict(counts),
                "images": len(audit.images_of(kind)),
            }
            for kind, counts in audit.counts().items()
        },
        "findings": [found.as_json() for found in audit.findings],
        "groups": [[entries[i].name for i in group] for group in groups(entries, audit.duplicates)],
        "notes": audit.notes,
        "versions": package_versions(),
    }


def _image_rows(audit):
    flags = {}
    for found in audit.findings:
        if found.flags:
            for key in zip(found.splits, found.images, strict=True):
                flags.setdefault(key, dict.fromkeys(())).update({found.kind: None})
    rows = []
    for one in audit.examined:
        entry, measures = one.entry, one.measures
        row = {
            "file_name": entry.name,
            "split": entry.split,
            "annotations": len(entry.annotations),
            "flags": " ".join(flags.get((entry.split, entry.name), ())),
        }
        if measures is not None:
            row |= {
                "width": measures.width,
                "height": measures.height,
                "brightness": round(measures.brightness, 1),
                "blur": round(measures.blur, 3),
                "white_share": round(measures.white, 3),
                "colour_L": round(measures.colour[0], 1),
                "colour_a": round(measures.colour[1], 1),
                "colour_b": round(measures.colour[2], 1),
                "view_share": round(measures.view_share, 3),
                "text_lines": len(measures.text),
                "sha256": measures.file_hash,
            }
        rows.append(row)
    return rows


def _pair_rows(audit):
    entries = audit.data.entries
    return [
        {
            "a": entries[pair.a].name,
            "b": entries[pair.b].name,
            "split_a": entries[pair.a].split,
            "split_b": entries[pair.b].split,
            "kind": pair.kind,
            "correlation": pair.correlation,
        }
        for pair in audit.duplicates
    ]
