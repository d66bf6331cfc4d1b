"""The page of an audit: what was found, with thumbnails. It needs nothing else."""

from collections import Counter

from ..data.audit.findings import AREAS, KINDS, SEVERITIES
from .audit_figure import draw_annotations
from .gallery import embed, svg_path
from .html import write_html
from .outlines import mask_outlines
from .page import outline_lines
from .page_pictures import as_data

__all__ = ["render_audit"]

TILES = 24  # of a kind; all others are in findings.csv
OUTLINED = 200  # annotations of a picture at most
LONG_SIDE = 320  # pixels of a thumbnail
MOST_IMAGES = 4  # of one finding
OUTLINES = {
    "truth": ("ground truth", "annotation"),
    "alarm": ("false alarm", "annotation that the finding is about"),
}


def render_audit(audit, output):
    """
    Args:
        audit (imrcnn_d2.data.audit.audit.Audit):
        output (str or Path): the page to write; replaced at once, or not at all.

    Returns:
        Path: the page.
    """
    entries = audit.data.entries
    flagged = audit.flagged
    thumbnails = _Thumbnails(audit)
    severities = Counter(found.severity for found in audit.findings)
    drawn = any(one.outlines for one in audit.examined)
    return write_html(
        "audit",
        output,
        title=audit.data.title,
        kicker="Data audit",
        shown="data set",
        lead=_lead(audit),
        lines=outline_lines(OUTLINES),
        sources=audit.data.title,
        cards=[
            ("Errors", severities["error"], "make training or its figures wrong"),
            ("Warnings", severities["warning"], "should be looked at"),
            ("Images to look at", len(flagged), f"{_share(len(flagged), len(entries))} of all"),
            ("Pairs that show the same", len(audit.twins), _crossing(audit)),
        ],
        splits=_split_rows(audit),
        areas=[
            {"key": area, "title": title, "rows": _kind_rows(audit, area)}
            for area, title in AREAS.items()
        ],
        kinds=[_kind(audit, kind, thumbnails) for kind in audit.counts()],
        picture=as_data(draw_annotations, audit) if drawn else None,
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
    across = sum(entries[pair.a].split != entries[pair.b].split for pair in audit.twins)
    return f"{across:,} of them in two splits"


def _split_rows(audit):
    """list[list[str]]: of each split its images, annotations, patients, and images to look at."""
    rows = []
    for split in dict.fromkeys(entry.split for entry in audit.data.entries):
        own = [entry for entry in audit.data.entries if entry.split == split]
        patients = {e.record["patient_id"] for e in own if e.record.get("patient_id") is not None}
        flagged = sum(of == split for of, _ in audit.flagged)
        rows.append(
            [
                split or "all",
                f"{len(own):,}",
                f"{sum(not entry.annotations for entry in own):,}",
                f"{sum(len(entry.annotations) for entry in own):,}",
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
    """dict: all that the page says of a kind of finding."""
    own = [found for found in audit.findings if found.kind == key]
    own.sort(key=lambda found: SEVERITIES.index(found.severity))  # stable
    return {
        "key": key,
        "title": KINDS[key].title,
        "meaning": KINDS[key].meaning,
        "remedy": KINDS[key].remedy,
        "count": len(own),
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
            for found in own[:TILES]
        ],
    }


class _Thumbnails:
    """Pictures of images with their annotations, each made once."""

    def __init__(self, audit):
        self._examined = {(one.entry.split, one.entry.name): one for one in audit.examined}
        self._pictures = {}

    def of(self, split, name, annotation_id):
        """dict: name, split, jpeg (None if it cannot be read), size, and outlines by class."""
        one = self._examined[split, name]
        made = {"name": name, "split": split, "jpeg": None, "paths": []}
        if one.measures is None:
            return made
        if one.entry.path not in self._pictures:
            self._pictures[one.entry.path] = embed(one.entry.path, LONG_SIDE)
        jpeg, _, scale = self._pictures[one.entry.path]
        # Outlines are of the size that the annotations say, which may be wrong.
        width = one.entry.record.get("width") or one.measures.width
        height = one.entry.record.get("height") or one.measures.height
        made |= {"jpeg": jpeg, "width": width, "height": height}
        kinds = [
            "alarm"
            if annotation_id is not None and o.annotation.get("id") == annotation_id
            else "truth"
            for o in one.outlines
        ]
        shown = sorted(zip(kinds, one.outlines, strict=True), key=lambda shown: shown[0])[:OUTLINED]
        for kind, outline in reversed(shown):  # what the finding is of last, on top
            made["paths"].append((kind, svg_path(mask_outlines(outline.rle), scale)))
        return made
