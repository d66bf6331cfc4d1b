"""The files of an audit: audit.json, tables as CSV, and the page."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from matplotlib.figure import Figure

from imrcnn_d2.data.audit import AREAS, KINDS, SEVERITIES, Audit, groups
from imrcnn_d2.evaluation.output import package_versions
from imrcnn_d2.report.html.page import as_data, contour_lines, embed, svg_path, write_html
from imrcnn_d2.report.plots.images import mask_contours
from imrcnn_d2.report.plots.style import BLUE, save_figure, tidy
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically

CELLS = 64  # of the heat map, in both directions


def plot_annotations(audit: Audit, path: str | Path) -> Figure:
    """Plot a heat map of the annotations' places, a histogram of their sizes and the counts of the
    classes, of an audit with at least one annotation.
    """
    annotations = [a for examined in audit.examined for a in examined.annotations]
    heat, shares = np.zeros((CELLS, CELLS)), []
    for annotation in annotations:
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

    counts = Counter(annotation.record["category_id"] for annotation in annotations)
    names = {category["id"]: str(category["name"]) for category in audit.data.categories}
    order = sorted(names, key=lambda number: counts[number])
    classes.barh([names[number] for number in order], [counts[n] for n in order], color=BLUE)
    classes.set(title="Of which class", xlabel="annotations")
    tidy(classes)
    return save_figure(figure, path)


TILES = 24  # of a kind; all others are in findings.csv
MOST_ANNOTATIONS = 200  # of a thumbnail
LONG_SIDE = 320  # pixels of a thumbnail
MOST_IMAGES = 4  # of one finding
CONTOURS = {
    "truth": ("ground truth", "annotation"),
    "alarm": ("false alarm", "annotation of the finding"),
}


def _render(audit, output):
    entries, flagged = audit.data.entries, audit.flagged
    counts = Counter(finding.severity for finding in audit.findings)
    across = sum(entries[pair.a].split != entries[pair.b].split for pair in audit.duplicates)
    annotations = sum(len(entry.annotations) for entry in entries)
    annotated = any(examined.annotations for examined in audit.examined)
    thumbnails = _Thumbnails(audit)
    return write_html(
        "audit",
        output,
        title=audit.data.title,
        kicker="Data audit",
        shown="data set",
        lead=f"{len(entries):,} images, {annotations:,} annotations.",
        lines=contour_lines(CONTOURS),
        sources=audit.data.title,
        counts=counts,
        flagged=len(flagged),
        flagged_share=_share(len(flagged), len(entries)),
        pairs=len(audit.duplicates),
        across=across,
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


def _share(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _split_rows(audit):
    """The images, annotations and patients of each split, and its images to look at."""
    rows = []
    for split in dict.fromkeys(entry.split for entry in audit.data.entries):
        entries = [entry for entry in audit.data.entries if entry.split == split]
        patients = [entry.record.get("patient_id") for entry in entries]
        named = len(patients) - patients.count(None)
        number = len({*patients} - {None})
        annotations = [len(entry.annotations) for entry in entries]
        flagged = sum(name == split for name, _ in audit.flagged)
        counts = len(entries), annotations.count(0), sum(annotations), number, flagged
        row = [split or "all", *(f"{count:,}" for count in counts)]
        if named < len(entries):
            row[4] = f"{number:,} (of {named:,} images)" if named else "not known"
        rows.append(row)
    return rows


def _kind_rows(audit, area):
    """The kinds of an area, whether found or not."""
    counts = audit.counts()
    return [
        {
            "key": key,
            "kind": kind,
            "severity": next((s for s in SEVERITIES if counts.get(key, {}).get(s)), ""),
            "findings": sum(counts.get(key, {}).values()),
            "images": len(audit.images_of(key)),
            "share": _share(len(audit.images_of(key)), len(audit.data.entries)),
        }
        for key, kind in KINDS.items()
        if kind.area == area and (area in audit.checked or key in counts)
    ]


def _kind(audit, key, thumbnails):
    """A kind of finding, with its first findings."""
    findings = [finding for finding in audit.findings if finding.kind == key]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable
    shown = []
    for finding in findings[:TILES]:
        places = list(zip(finding.splits, finding.images, strict=True))[:MOST_IMAGES]
        images = [thumbnails.of(*place, finding.annotation_id) for place in places]
        more = len(finding.images) - len(images)
        shown.append({"severity": finding.severity, "detail": finding.detail})
        shown[-1] |= {"more": more, "images": images}
    return {"key": key, "kind": KINDS[key], "count": len(findings), "findings": shown}


class _Thumbnails:
    """Images with their annotations, each embedded once."""

    def __init__(self, audit):
        self._examined = {(e.entry.split, e.entry.name): e for e in audit.examined}
        self._embedded = {}

    def of(self, split, name, annotation_id):
        """Name, split, jpeg (None if it cannot be read), size, and contours with their classes."""
        examined = self._examined[split, name]
        entry, measures = examined.entry, examined.measures
        thumbnail = {"name": name, "split": split, "jpeg": None, "paths": []}
        if measures is None:
            return thumbnail
        if entry.path not in self._embedded:
            self._embedded[entry.path] = embed(entry.path, LONG_SIDE)
        jpeg, _, scale = self._embedded[entry.path]
        # Masks are of the size that the annotations say, which may be wrong.
        width = entry.record.get("width") or measures.width
        height = entry.record.get("height") or measures.height
        thumbnail |= {"jpeg": jpeg, "width": width, "height": height}
        is_meant = [
            annotation_id is not None and annotation.record.get("id") == annotation_id
            for annotation in examined.annotations
        ]
        pairs = zip(is_meant, examined.annotations, strict=True)
        shown = sorted(pairs, key=lambda pair: not pair[0])[:MOST_ANNOTATIONS]
        for meant, annotation in reversed(shown):  # the annotation of the finding last, on top
            path = svg_path(mask_contours(annotation.rle), scale)
            thumbnail["paths"].append(("alarm" if meant else "truth", path))
        return thumbnail


FINDING_COLUMNS = ("kind", "severity", "images", "splits", "annotation_id", "score", "detail")
IMAGE_COLUMNS = ("file_name", "split", "annotations", "flags")
PAIR_COLUMNS = ("a", "b", "split_a", "split_b", "kind", "correlation")


def write_audit(audit: Audit, output: str | Path) -> Path:
    """Write ``audit.json``, ``findings.csv``, ``images.csv`` (one row per image: measurements and
    flags), ``twins.csv`` (pairs of duplicates) and ``audit.html`` to a folder; returns the page.
    """
    output, entries = Path(output), audit.data.entries
    write_atomically(output / "audit.json", strict_json(_document(audit)))
    rows = [
        {
            **finding.as_json(),
            "images": "; ".join(finding.images),
            "splits": "; ".join(finding.splits),
        }
        for finding in audit.findings
    ]
    write_atomically(output / "findings.csv", csv_text(rows, FINDING_COLUMNS))
    write_atomically(output / "images.csv", csv_text(_image_rows(audit), IMAGE_COLUMNS))
    rows = []
    for pair in audit.duplicates:
        a, b = entries[pair.a], entries[pair.b]
        values = a.name, b.name, a.split, b.split, pair.kind, pair.correlation
        rows.append(dict(zip(PAIR_COLUMNS, values, strict=True)))
    write_atomically(output / "twins.csv", csv_text(rows, PAIR_COLUMNS))
    return _render(audit, output / "audit.html")


def _document(audit):
    entries = audit.data.entries
    return {
        "title": audit.data.title,
        "images": len(entries),
        "annotations": sum(len(entry.annotations) for entry in entries),
        "flagged_images": len(audit.flagged),
        "kinds": {
            kind: {**counts, "images": len(audit.images_of(kind))}
            for kind, counts in audit.counts().items()
        },
        "findings": [finding.as_json() for finding in audit.findings],
        "groups": [[entries[i].name for i in group] for group in groups(entries, audit.duplicates)],
        "notes": audit.notes,
        "versions": package_versions(),
    }


def _image_rows(audit):
    flags = {}
    for finding in audit.findings:
        for key in zip(finding.splits, finding.images, strict=True) if finding.flags else ():
            flags.setdefault(key, {})[finding.kind] = None
    rows = []
    for examined in audit.examined:
        entry, measures = examined.entry, examined.measures
        row = {"file_name": entry.name, "split": entry.split}
        row["annotations"] = len(entry.annotations)
        row["flags"] = " ".join(flags.get((entry.split, entry.name), ()))
        if measures is not None:
            row |= {"width": measures.width, "height": measures.height}
            row |= {"brightness": round(measures.brightness, 1), "blur": round(measures.blur, 3)}
            row["white_share"] = round(measures.white, 3)
            for name, value in zip("Lab", measures.colour, strict=True):
                row[f"colour_{name}"] = round(value, 1)
            row["view_share"] = round(measures.view_share, 3)
            row |= {"text_lines": len(measures.text), "sha256": measures.file_hash}
        rows.append(row)
    return rows
