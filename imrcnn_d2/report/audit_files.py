"""The files that an audit leaves: audit.json, tables as CSV, and the page."""

from pathlib import Path

from ..data.audit.leakage import groups
from ..evaluation.files import csv_text, strict_json, write_atomically
from ..versions import package_versions
from .audit_page import render_audit

__all__ = ["write_audit"]

FINDING_COLUMNS = ("kind", "severity", "images", "splits", "annotation_id", "score", "detail")
IMAGE_COLUMNS = ("file_name", "split", "annotations", "flags")
PAIR_COLUMNS = ("a", "b", "split_a", "split_b", "kind", "correlation")


def write_audit(audit, output):
    """
    Write ``audit.json``, ``findings.csv``, ``images.csv`` (a row an image: what was measured and
    what it is flagged for), ``twins.csv`` (pairs of images that show the same) and ``audit.html``.

    Args:
        audit (imrcnn_d2.data.audit.audit.Audit):
        output (str or Path): folder, made if it is not there.

    Returns:
        Path: the page.
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
        "groups": [[entries[i].name for i in group] for group in groups(entries, audit.twins)],
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
        for pair in audit.twins
    ]
