"""What an audit finds in the annotations of one image, and of all together."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.audit.findings import Finding, finding
from imrcnn_d2.data.audit.records import Entry
from imrcnn_d2.data.coco import to_rle

__all__ = [
    "Outline",
    "category_findings",
    "draw_outlines",
    "outline_findings",
    "repeated_id_findings",
]

# Of the frame, but at least so many pixels: 8x8 at 352x352. Smaller outlines are clicks and specks.
TINY_SHARE, TINY_PIXELS = 0.0005, 16
OUTSIDE_SHARE = 0.25  # of an outline, beyond the view
SAME_IOU = 0.75  # of two outlines of one lesion
CROSSING_SHARE = 0.01  # of a polygon's area, that changes with how its crossings are read
IMBALANCE = 10  # times as many annotations
PAIRED = 200  # outlines of an image that are compared in pairs


@dataclass(frozen=True)
class Outline:
    """An annotation that could be drawn.

    Attributes:
        annotation: as in the file.
        rle: compressed RLE of its mask.
        area: pixels.
    """

    annotation: dict
    rle: dict
    area: int


def draw_outlines(
    entry: Entry, width: int, height: int, category_ids: set
) -> tuple[list[Outline], list[Finding]]:
    """The outlines of an image, and findings on those that cannot be drawn.

    Args:
        entry: the image.
        width, height: pixels that it was annotated at.
        category_ids: the categories there are.
    """
    outlines, findings = [], []

    def add(kind: str, annotation: dict, detail: str) -> None:
        findings.append(
            finding(kind, [entry.name], [entry.split], detail, annotation_id=_id(annotation))
        )

    for annotation in entry.annotations:
        segmentation = annotation.get("segmentation")
        try:
            if annotation["category_id"] not in category_ids:
                raise ValueError(f"there is no category with id {annotation['category_id']!r}")
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"iscrowd is {annotation['iscrowd']!r}, neither 0 nor 1")
            rle = to_rle(segmentation, height, width) if segmentation else None
        except (ValueError, TypeError) as error:
            add("malformed", annotation, str(error))
            continue
        if rle is None:
            add("empty", annotation, "There is no segmentation.")
        elif not (area := int(mask_util.area(rle))):
            add("empty", annotation, f"The mask covers no pixel of the {width}x{height} image.")
        else:
            outlines.append(Outline(annotation, rle, area))
    return outlines, findings


def outline_findings(
    entry: Entry, outlines: Sequence[Outline], view: np.ndarray
) -> Iterator[Finding]:
    """Tiny outlines, such outside the view, in pairs on one lesion, and polygons that cross.

    Args:
        entry: the image.
        outlines: of :func:`draw_outlines`.
        view: (H, W) bool, the endoscope's view with what is laid over it.

    Raises:
        ModuleNotFoundError: shapely is not installed; the error says how.
    """
    where = [entry.name], [entry.split]
    least = max(TINY_PIXELS, TINY_SHARE * view.size)
    shown = mask_util.encode(np.asfortranarray(view, dtype=np.uint8))
    for outline in outlines:
        about = {"annotation_id": _id(outline.annotation)}
        if outline.area < least:
            told = f"It covers {outline.area} pixels, less than {least:.0f}."
            yield finding("tiny", *where, told, score=float(outline.area), **about)
        inside = mask_util.area(mask_util.merge([outline.rle, shown], intersect=True))
        outside = 1 - int(inside) / outline.area if view.any() else 0.0
        if outside > OUTSIDE_SHARE:
            told = f"{outside:.0%} of it is outside the endoscope's view."
            yield finding("outside_view", *where, told, score=float(outside), **about)
        crossing = _crossing(outline.annotation["segmentation"])
        if crossing > CROSSING_SHARE:
            told = f"{crossing:.0%} of its area depends on how the crossings are read."
            yield finding("self_crossing", *where, told, score=crossing, **about)
    yield from _pairs(entry, [o for o in outlines if not o.annotation.get("iscrowd")])


def _pairs(entry: Entry, outlines: Sequence[Outline]) -> Iterator[Finding]:
    if len(outlines) > PAIRED:
        told = f"Of {len(outlines)} outlines only the first {PAIRED} were compared in pairs."
        yield finding("overlapping", [entry.name], [entry.split], told, severity="info")
    masks = [outline.rle for outline in outlines[:PAIRED]]
    overlaps = mask_util.iou(masks, masks, [0] * len(masks)) if len(masks) > 1 else np.zeros((0, 0))
    for i, j in np.argwhere(np.triu(overlaps, 1) > SAME_IOU).tolist():
        a, b = outlines[i].annotation, outlines[j].annotation
        if a["category_id"] == b["category_id"]:
            told = f"Annotations {a.get('id')} and {b.get('id')} overlap with an IoU of "
            told += f"{overlaps[i, j]:.2f}."
            about = {"annotation_id": _id(a), "score": float(overlaps[i, j])}
            yield finding("overlapping", [entry.name], [entry.split], told, **about)


def _crossing(segmentation: object) -> float:
    """Largest share of a polygon's area that is inside by one way of reading it and not by another.

    The signed areas of the loops of a line that crosses itself cancel out; those of a line that
    touches itself, or runs back on itself, do not.
    """
    if not isinstance(segmentation, list):
        return 0.0
    shapely = _shapely()
    worst = 0.0
    for polygon in segmentation:
        points = np.asarray(polygon, dtype=float).reshape(-1, 2)
        shape = shapely.Polygon(points)
        if not shapely.is_valid(shape):
            x, y = points.T
            signed = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
            covered = shapely.make_valid(shape, method="structure", keep_collapsed=False).area
            lobes = shapely.make_valid(shape).area
            area = max(covered, lobes, signed)
            if area:
                worst = max(worst, 1 - min(covered, lobes, signed) / area)
    return worst


def category_findings(
    categories: Iterable[dict], annotations: Iterable[dict], imbalance: float = IMBALANCE
) -> Iterator[Finding]:
    """Categories without an annotation, or with far fewer than the largest one.

    Args:
        categories, annotations: of the whole data set.
        imbalance: how many times as many the largest one may have.
    """
    counts = Counter(str(annotation["category_id"]) for annotation in annotations)
    counts = {category["name"]: counts[str(category["id"])] for category in categories}
    if not any(counts.values()):
        return
    largest = max(counts, key=counts.get)
    for name, count in counts.items():
        if count * imbalance < counts[largest]:
            told = f"{name}: {count} annotations, {largest}: {counts[largest]}."
            ratio = counts[largest] / count if count else None
            yield finding("class_imbalance", (), (), told, score=ratio)


def repeated_id_findings(entries: Iterable[Entry]) -> Iterator[Finding]:
    """Annotations of one file that share an id: Detectron2 does not load such a file.

    Args:
        entries: the images; those of one split are of one file.
    """
    sharing = defaultdict(list)
    for entry in entries:
        for annotation in entry.annotations:
            if annotation.get("id") is not None:
                sharing[entry.split, annotation["id"]].append(entry)
    for (split, number), own in sharing.items():
        if len(own) > 1:
            names = list(dict.fromkeys(entry.name for entry in own))
            told = f"{len(own)} annotations have the id {number!r}; give each its own."
            about = {"annotation_id": _id({"id": number})}
            yield finding("malformed", names, [split] * len(names), told, **about)


def _id(annotation: dict) -> int | None:
    number = annotation.get("id")
    return number if isinstance(number, int) else None


def _shapely():
    try:
        import shapely
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("shapely is not installed: pip install -e '.[audit]'") from error
    return shapely
