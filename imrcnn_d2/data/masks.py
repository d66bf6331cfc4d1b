"""Masks, polygons and shapes of annotation tools as COCO annotations."""

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.images import (
    SourceImage,
    annotated_on_stored_pixels,
    max_pixels,
    orient,
    orient_box,
)
from imrcnn_d2.utils.files import BadInputError

# pixels; JPEG leaves specks of 1 in Kvasir-SEG's masks, its smallest polyps have over 200
MIN_AREA = 16
PART_SHARE = 0.8  # of a detection's mask in another one, of which it then is a part
MOST_INSTANCES = 1000  # of one mask: each takes a pass over all its pixels


def components(mask: np.ndarray, min_area: int) -> tuple[Iterator[np.ndarray], int]:
    """Return the 8-connected components of an (H, W) bool mask, (H, W) bool each, in raster order
    of their boxes' top left corners, and the number of those smaller than `min_area`, left out.

    Raises:
        ValueError: more than `MOST_INSTANCES` components.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    kept = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= min_area]
    if len(kept) > MOST_INSTANCES:
        raise ValueError(
            f"has {len(kept)} separate parts of at least {min_area} pixels, more than "
            f"{MOST_INSTANCES}; clean it, or raise --min-area"
        )
    # labels depend on OpenCV's algorithm; the corner does not
    kept.sort(key=lambda i: (*stats[i, [cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT]], i))
    return (labels == i for i in kept), count - 1 - len(kept)


def encode(mask: np.ndarray) -> dict:
    """Return the compressed COCO RLE of an (H, W) mask."""
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def annotation_from_mask(mask: np.ndarray, category_id: int = 1, **fields) -> dict:
    """Return a COCO annotation, without ids, of an (H, W) bool mask that is not empty."""
    rle = encode(mask)
    return {
        "category_id": category_id,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
        "iscrowd": 0,
        **fields,
    }


def cut_box(box: object, height: int, width: int) -> list[float]:
    """Return an XYWH box cut at the borders of its image; ValueError if it is none, or outside."""
    is_box = isinstance(box, list | tuple) and len(box) == 4
    if not is_box or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise ValueError(f"its box {reprlib.repr(box)} is not [x, y, width, height]")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if right <= left or bottom <= top or left >= width or top >= height or min(right, bottom) <= 0:
        text = f"its box {list(box)} [x, y, width, height] is empty or outside {width}x{height}"
        raise ValueError(text)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    return [left, top, right - left, bottom - top]


def annotation_from_box(
    box: object, height: int, width: int, category_id: int = 1, **fields
) -> dict:
    """Return a COCO annotation, without ids and without a mask, of `cut_box`."""
    box = cut_box(box, height, width)
    area = box[2] * box[3]
    return {"category_id": category_id, "bbox": box, "area": area, "iscrowd": 0, **fields}


MIN_IOU = 0.99  # of a polygon made from a mask with that mask
# Pixels that a polygon may be off the mask's edge to have fewer points; the first that is near
# enough is taken. 0 follows every pixel.
_TOLERANCES = (4.0, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.0)
_MAX_SIDE = 65_535  # JPEG's longest
# pycocotools walks along every edge, pixel by pixel, and keeps them all: times the image's size
# that a shape may reach beyond it, and times its width and height together that it may be long.
_MAX_OUTSIDE = 10
_MAX_PERIMETER = 100
_MERGED_AT_ONCE = 8
_ROWS = 64


def check_size(height: object, width: object) -> tuple[int, int]:
    """Return height and width as int; ValueError for what can be the size of no image."""
    for side in (height, width):
        is_number = isinstance(side, int | float | np.number) and not isinstance(side, bool)
        if not is_number or not 0 < side <= _MAX_SIDE or side != int(side):
            raise ValueError(f"the side of an image is {reprlib.repr(side)}, not 1 to {_MAX_SIDE}")
    if height * width > max_pixels():
        raise ValueError(f"{width}x{height} pixels are more than any image has ({max_pixels()})")
    return int(height), int(width)  # some tools write 640.0


def check_extent(values: Sequence[float], height: int, width: int) -> np.ndarray:
    """Return (N,) float coordinates; ValueError if one is no finite number or far outside."""
    kinds = {kind for kind in set(map(type, values)) if kind is bool or not issubclass(kind, Real)}
    if kinds:
        value = next(value for value in values if type(value) in kinds)
        raise ValueError(f"the coordinate {reprlib.repr(value)} is no number")
    try:
        coordinates = np.array(values, float)
    except OverflowError as error:
        raise ValueError("a coordinate is too large for any image") from error
    inside = np.abs(coordinates) <= _MAX_OUTSIDE * max(height, width)
    if not inside.all():  # NaN is not inside either
        value = coordinates[inside.argmin()]
        raise ValueError(f"the coordinate {value:g} is far outside the {width}x{height} image")
    return coordinates


def check_polygon(flat: Sequence[float], height: int, width: int) -> None:
    """Raise ValueError for a polygon x1, y1, x2, y2, ... that is none, or goes to and fro: others
    take bounded memory and time to fill."""
    if len(flat) < 6:
        raise ValueError(f"a polygon has {len(flat) // 2} points, at least 3 are needed")
    points = check_extent(flat, height, width).reshape(-1, 2)
    length = np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum()
    if length > _MAX_PERIMETER * (height + width):
        raise ValueError(
            f"a polygon of {len(points)} points is {length:.0f} pixels long, which no contour in a "
            f"{width}x{height} image is; annotate it again"
        )


def polygon_rle(points: Sequence[Sequence[float]], height: int, width: int) -> dict:
    """Return the compressed COCO RLE of a polygon of [x, y] points; raise as `check_polygon`."""
    flat = [value for point in points for value in point]
    check_polygon(flat, height, width)
    return mask_util.frPyObjects([flat], height, width)[0]


def union(rles: Sequence[dict]) -> dict:
    """Return the compressed RLE of the pixels in any of one or more masks. Merging all at once
    would read the growing union for each of them."""
    while len(rles) > 1:
        groups = range(0, len(rles), _MERGED_AT_ONCE)
        rles = [mask_util.merge(rles[i : i + _MERGED_AT_ONCE]) for i in groups]
    return rles[0]


def parts_of_others(
    rles: Sequence[dict], scores: Sequence[float], categories: Sequence[int]
) -> np.ndarray:
    """(N,) bool, which of the N detections of an image lie, by at least PART_SHARE of their own
    mask, in the mask of one of the same category with a higher score, or of equal ones an earlier
    one, that lies in none itself."""
    is_part = np.zeros(len(rles), dtype=bool)
    whole = {}  # by category, masks that lie in none
    for i in np.argsort(-np.asarray(scores, float), kind="stable").tolist():
        wholes = whole.setdefault(categories[i], [])
        # With a crowd, pycocotools divides the intersection by the detection's area.
        shares = mask_util.iou([rles[i]], wholes, [True] * len(wholes)) if wholes else 0
        is_part[i] = np.max(shares) >= PART_SHARE
        if not is_part[i]:
            wholes.append(rles[i])
    return is_part


def without_parts(records: Sequence[dict]) -> list[dict]:
    """COCO records of the detections of an image without :func:`parts_of_others`; all of them where
    they have no masks."""
    if not all("segmentation" in record for record in records):
        return list(records)
    columns = ([r[key] for r in records] for key in ("segmentation", "score", "category_id"))
    is_part = parts_of_others(*columns)
    return [record for record, part in zip(records, is_part, strict=True) if not part]


def rectangle(
    left: float, top: float, right: float, bottom: float, degrees: float = 0.0
) -> np.ndarray:
    """Return the (4, 2) corners of a rectangle, turned clockwise about its centre."""
    centre = np.array([left + right, top + bottom]) / 2
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return _turned(corners - centre, degrees) + centre


def box_rle(box: Sequence[float], height: int, width: int) -> dict:
    """Return the compressed COCO RLE of the pixels in an XYWH box."""
    x, y, w, h = box
    return polygon_rle(rectangle(x, y, x + w, y + h).tolist(), height, width)


def ellipse_rle(
    centre: Sequence[float], radii: Sequence[float], height: int, width: int, degrees: float = 0.0
) -> dict:
    """Return the compressed COCO RLE of an ellipse, x and y in pixels, turned clockwise: the pixels
    whose centres are inside. Raise ValueError as `check_extent`, or for a radius not above 0."""
    check_extent([*centre, *radii], height, width)
    if min(radii) <= 0:
        raise ValueError(f"the radius {min(radii):g} is not positive")
    mask = np.empty((height, width), bool)
    for top in range(0, height, _ROWS):  # coordinates of a whole image would take 50 times its mask
        rows = mask[top : top + _ROWS]
        y, x = np.indices(rows.shape) + 0.5
        offsets = np.stack([x - centre[0], y + top - centre[1]], axis=-1)
        along = _turned(offsets, -degrees) / np.asarray(radii, float)
        rows[:] = (along**2).sum(axis=-1) <= 1
    return encode(mask)


def patch_rle(patch: np.ndarray, left: int, top: int, height: int, width: int) -> dict:
    """Return the compressed COCO RLE of an (h, w) bool patch in the image, cut at its borders."""
    part = patch[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    y, x = max(top, 0), max(left, 0)
    # RLE counts pixels column by column: only the patch's columns are made, with a 0 at each end.
    pixels = np.zeros(part.shape[1] * height + 2, bool)
    pixels[1:-1].reshape(-1, height)[:, y : y + part.shape[0]] = part.T
    changes = x * height + np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    if not counts[-1]:  # the last pixel is in the mask
        counts.pop()
    return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def mask_polygons(mask: np.ndarray, fill_holes: bool = False) -> list[np.ndarray] | None:
    """Return polygons around the parts of an (H, W) mask, of few points, at an IoU of at least
    `MIN_IOU`: (N, 2) float x, y of each part, N at least 3, in raster order of their boxes' top
    left corners; None if the mask has holes too large to be left out, unless `fill_holes`."""
    mask = mask.astype(np.uint8)
    # Twice as large, each edge of a pixel has a corner that no other has.
    doubled = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    edges = [(contour + 1) // 2 for contour in contours]
    edges.sort(key=lambda edge: tuple(edge[:, 0, ::-1].min(axis=0)))
    lines = [_simplified(edge, None if fill_holes else mask) for edge in edges]
    return None if any(line is None for line in lines) else lines


def _simplified(edge: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """The fewest points of an (N, 1, 2) contour of pixel edges that are near enough to the mask in
    it, without one to all of its inside; None if holes keep all from it."""
    left, top = edge.min(axis=0)[0]
    width, height = (edge.max(axis=0)[0] - (left, top)).tolist()

    def rle(points: np.ndarray) -> dict:  # however long: it has as many points as the mask's edge
        flat = (points - (left, top)).ravel().tolist()
        return mask_util.frPyObjects([flat], height, width)[0]

    truth = rle(cv2.approxPolyDP(edge, 0, closed=True)[:, 0])
    if mask is not None:
        part = encode(mask[top : top + height, left : left + width])
        truth = mask_util.merge([truth, part], intersect=True)
    for tolerance in _TOLERANCES:
        points = cv2.approxPolyDP(edge, tolerance, closed=True)[:, 0]
        if len(points) > 2 and mask_util.iou([rle(points)], [truth], [0])[0, 0] >= MIN_IOU:
            return points.astype(float)
    return None


def _turned(vectors: np.ndarray, degrees: float) -> np.ndarray:
    """(..., 2) x, y turned clockwise, as seen with y pointing down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return vectors @ np.array([[cos, sin], [-sin, cos]])


# Fields of COCO itself, which annotation tools cannot set by a flag or attribute.
IMAGE_FIELDS = ("id", "file_name", "width", "height")
ANNOTATION_FIELDS = ("id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd")
# Fields of ours that identify what images and annotations are of.
IDS = ("patient_id", "sequence_id", "lesion_id")


@dataclass
class Region:
    """One annotated area."""

    label: str  # name of its class
    rle: dict  # compressed COCO RLE in the frame that was annotated
    group: int | None = None  # areas of one group and label are parts of one instance
    fields: dict = field(default_factory=dict)  # of COCO annotations, ``iscrowd`` among them
    box: Sequence[float] | None = None  # XYWH, where no more is known of the area than its box


def named_categories(
    labels: Iterable[str], classes: Sequence[str] | None, source: str | Path
) -> list[dict]:
    """Return COCO categories, numbered from 1: the classes in their order, else the sorted labels.
    Raise BadInputError, blaming `source`, if there is none, or one is given twice."""
    names = sorted(set(labels)) if classes is None else list(classes)
    if not names:
        raise BadInputError(source, "nothing is annotated in it; name the classes with --classes")
    if len(set(names)) < len(names):
        raise BadInputError(source, f"a class is given twice: {', '.join(names)}")
    return [{"id": i, "name": name} for i, name in enumerate(names, start=1)]


def check_classes(labels: Iterable[str], category_ids: Mapping[str, int], path: Path) -> None:
    """Raise BadInputError if a label is none of the classes."""
    if unknown := sorted(set(labels) - set(category_ids)):
        raise BadInputError(
            path, f"unknown label {unknown[0]!r}; the classes are {', '.join(category_ids)}"
        )


def further_fields(record: Mapping, standard: Iterable[str]) -> dict:
    """Return the texts, numbers and truth values of a record but for its `standard` keys."""
    values = {key: value for key, value in record.items() if key not in standard}
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def annotate(
    image: SourceImage,
    size: tuple[int, int],
    regions: Iterable[Region],
    category_ids: Mapping[str, int],
    notes: list[str],
) -> list[dict]:
    """Return COCO annotations of the instances in an image.

    Args:
        size: width and height that the annotation file gives for it.
        regions: in the frame of that size; read after the size was checked.
        notes: takes a note where an EXIF-rotated image leaves a choice.

    Raises:
        BadInputError: the size is of no frame of the image, an instance covers no pixel or is there
            twice.
    """
    turned = annotated_on_stored_pixels(image, *size)
    groups: dict[object, list[Region]] = {}
    for i, region in enumerate(regions):
        key = (i,) if region.group is None else (region.label, region.group)
        groups.setdefault(key, []).append(region)
    if image.orientation != 1 and not turned and groups:
        notes.append(f"{image.path}: EXIF-rotated, annotations taken as of the rotated image")
    annotations: list[dict] = []
    seen: set[tuple] = set()
    for parts in groups.values():
        label, rle = parts[0].label, union([part.rle for part in parts])
        if not mask_util.area(rle):
            frame = f"{size[0]}x{size[1]} image"
            raise BadInputError(image.path, f"a {label!r} covers no pixel of the {frame}")
        if len(parts) == 1 and parts[0].box is not None:
            box = parts[0].box
            if turned:
                box = orient_box(box, *size, image.orientation)
            content = label, tuple(box)
            annotation = annotation_from_box(box, image.height, image.width, category_ids[label])
        else:
            mask = mask_util.decode(rle)
            if turned:
                mask = orient(mask, image.orientation)
            annotation = annotation_from_mask(mask, category_ids[label])
            content = label, annotation["segmentation"]["counts"]
        annotation = {**_joined_fields(parts), **annotation}
        annotation["iscrowd"] = int(any(part.fields.get("iscrowd") for part in parts))
        if content in seen:
            raise BadInputError(image.path, f"a {label!r} is there twice")
        seen.add(content)
        annotations.append(annotation)
    return annotations


def _joined_fields(parts: Sequence[Region]) -> dict:
    """Fields of an instance: true where true of some part, else those of the first part."""
    joined: dict = {}
    for part in parts:
        for key, value in part.fields.items():
            if joined.setdefault(key, value) is False:
                joined[key] = value
    return joined
