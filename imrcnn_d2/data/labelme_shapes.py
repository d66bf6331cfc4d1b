"""The shapes of LabelMe files: to masks, and from COCO annotations."""

import base64
import io
from collections.abc import Mapping
from itertools import chain

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.coco import to_rle
from imrcnn_d2.data.files import open_image
from imrcnn_d2.data.instances import ANNOTATION_FIELDS, further_fields
from imrcnn_d2.data.shapes import (
    check_extent,
    ellipse_rle,
    outlines,
    patch_rle,
    polygon_rle,
    rectangle,
)

__all__ = ["SHAPE_KEYS", "draw", "shape_rle"]

# What LabelMe reads of a shape; it keeps other keys as they are.
SHAPE_KEYS = ("label", "points", "group_id", "shape_type", "flags", "mask")
_POINTS = {"rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}


def shape_rle(shape: Mapping, height: int, width: int) -> dict:
    """Compressed COCO RLE of a shape in an image of that size.

    Raises:
        ValueError: it is no area, or malformed.
    """
    kind = shape.get("shape_type") or "polygon"  # not in old files
    points = shape.get("points")
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 for point in points
    ):
        raise ValueError("its points are no list of [x, y]")
    if not isinstance(kind, str) or kind not in (*_POINTS, "polygon"):
        raise ValueError(f"{kind!r} is no area; outline it, or take it out of the file")
    if len(points) != _POINTS.get(kind, len(points)):
        raise ValueError(f"a {kind} has {len(points)} points instead of {_POINTS[kind]}")
    flat = list(chain.from_iterable(points))
    check_extent(flat, height, width)
    if kind == "rectangle":
        return polygon_rle(rectangle(*flat).tolist(), height, width)
    if kind == "circle":
        (x, y), (x_edge, y_edge) = points
        radius = float(np.hypot(x_edge - x, y_edge - y))
        return ellipse_rle((x, y), (radius, radius), height, width)
    if kind == "mask":
        left, top = (round(value) for value in flat[:2])
        return patch_rle(_decode(shape.get("mask")), left, top, height, width)
    return polygon_rle(points, height, width)


def draw(
    annotation: Mapping,
    label: str,
    height: int,
    width: int,
    group_id: int,
    fill_holes: bool = False,
) -> list[dict]:
    """The shapes of a COCO annotation, several of one `group_id` where it has several parts.

    Args:
        annotation: its mask becomes polygons; with holes that count, a LabelMe mask, which has no
            points to move. Without a mask, its box becomes a rectangle.
        label: name of its class.
        height, width: of the image in pixels.
        group_id: of this annotation alone.
        fill_holes: polygons all the same.
    """
    areas = _areas(annotation, height, width, fill_holes)
    further = further_fields(annotation, (*ANNOTATION_FIELDS, *SHAPE_KEYS, "score"))
    flags = {key: further.pop(key) for key in list(further) if isinstance(further[key], bool)}
    if annotation.get("iscrowd"):
        flags["iscrowd"] = True
    description = str(further.pop("description", ""))
    if annotation.get("score") is not None:
        description = f"score {annotation['score']:.4f}"
    common = {
        **further,
        "label": label,
        "group_id": group_id if len(areas) > 1 else None,
        "description": description,
        "flags": flags,
        "mask": None,
    }
    return [{**common, **area} for area in areas]


def _areas(annotation: Mapping, height: int, width: int, fill_holes: bool) -> list[dict]:
    """Type and points of each shape."""
    if "segmentation" not in annotation:
        x, y, box_width, box_height = annotation["bbox"]
        points = [[x, y], [x + box_width, y + box_height]]
        return [{"shape_type": "rectangle", "points": points}]
    rle = to_rle(annotation["segmentation"], height, width)
    mask = mask_util.decode(rle)
    lines = outlines(mask, fill_holes)
    if lines is not None:
        return [{"shape_type": "polygon", "points": line.tolist()} for line in lines]
    left, top, box_width, box_height = mask_util.toBbox(rle).astype(int).tolist()
    right, bottom = left + box_width, top + box_height
    return [
        {
            "shape_type": "mask",
            "points": [[left, top], [right - 1, bottom - 1]],  # pixels, the last one included
            "mask": _encode(mask[top:bottom, left:right]),
        }
    ]


def _encode(patch: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(patch).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _decode(text: object) -> np.ndarray:
    """(h, w) bool of a base64 PNG."""
    if not isinstance(text, str):
        raise ValueError("its mask is no text of base64")
    try:
        with open_image(io.BytesIO(base64.b64decode(text, validate=True)), ["PNG"]) as file:
            patch = np.asarray(file)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"its mask is no PNG in base64 ({error})") from error
    if patch.ndim != 2:
        raise ValueError("its mask has several channels; LabelMe's have one")
    return patch != 0
