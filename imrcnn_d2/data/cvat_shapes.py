"""The shapes of CVAT files: to masks, and from COCO annotations."""

import math
from collections.abc import Mapping
from xml.etree.ElementTree import Element

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.coco import to_rle
from imrcnn_d2.data.instances import ANNOTATION_FIELDS, Region, further_fields
from imrcnn_d2.data.shapes import (
    check_extent,
    ellipse_rle,
    outlines,
    patch_rle,
    polygon_rle,
    rectangle,
)

__all__ = ["attributes_of", "draw", "integer", "region", "with_attributes"]


def integer(text: str | None) -> int:
    """A whole number of at least 0; ValueError naming what is written instead."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def with_attributes(element: Element, label: str, types: Mapping[tuple[str, str], str]) -> dict:
    """COCO fields of a shape or tag: its attributes, and ``occluded`` where it is.

    Args:
        element: of CVAT.
        label: name of its class.
        types: CVAT's input_type by label and attribute: a checkbox is true or false, a number a
            number, all else text; an empty text is left out.
    """
    fields: dict = {"occluded": True} if element.get("occluded") == "1" else {}
    for attribute in element.iterfind("attribute"):
        name, text = attribute.get("name"), attribute.text or ""
        if not name or name in set(ANNOTATION_FIELDS) - {"iscrowd"}:
            raise ValueError(f"there is an attribute {name!r}; give it another name")
        kind = types.get((label, name))
        if kind == "checkbox":
            fields[name] = text.casefold() == "true"
        elif kind == "number" and text:
            fields[name] = _number(text)
        elif text:
            fields[name] = text
    return fields


def region(element: Element, label: str, fields: dict, height: int, width: int) -> Region:
    """The area of a shape in an image of that size.

    Raises:
        ValueError: it is no area, or malformed.
    """
    group = integer(element.get("group_id", "0")) or None
    return Region(label, _rle(element, height, width), group, fields)


def _rle(element: Element, height: int, width: int) -> dict:
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("its points are not x,y;x,y;...")
        points = [[_number(value) for value in pair] for pair in pairs]
        return polygon_rle(points, height, width)
    if element.tag == "box":
        corners = [_number(element.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
        check_extent(corners, height, width)
        degrees = _number(element.get("rotation", "0"))
        return polygon_rle(rectangle(*corners, degrees).tolist(), height, width)
    if element.tag == "ellipse":
        x, y, rx, ry = (_number(element.get(key)) for key in ("cx", "cy", "rx", "ry"))
        degrees = _number(element.get("rotation", "0"))
        return ellipse_rle((x, y), (rx, ry), height, width, degrees)
    if element.tag == "mask":
        return _mask_rle(element, height, width)
    raise ValueError("is no area; outline it, or take it out of the task")


def _mask_rle(element: Element, height: int, width: int) -> dict:
    left, top, w, h = (integer(element.get(key)) for key in ("left", "top", "width", "height"))
    if left + w > width or top + h > height:
        raise ValueError(f"it reaches outside the {width}x{height} image")
    runs = [integer(run.strip()) for run in element.get("rle", "").split(",")]
    if sum(runs) != w * h:
        raise ValueError(f"its rle covers {sum(runs)} pixels, its {w}x{h} frame {w * h}")
    # of rows, background first
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return patch_rle(values.reshape(h, w), left, top, height, width)


def _number(text: str | None) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def attributes_of(annotation: Mapping) -> dict:
    """CVAT attributes of a COCO annotation: its further fields, and ``iscrowd`` where it is one."""
    crowd = {"iscrowd": True} if annotation.get("iscrowd") else {}
    return {**further_fields(annotation, (*ANNOTATION_FIELDS, "occluded")), **crowd}


def draw(annotation: Mapping, height: int, width: int, group: int) -> list[tuple[str, dict]]:
    """The shapes of a COCO annotation: name of the element and XML attributes, without its label.

    Args:
        annotation: its mask becomes polygons, of one group where it has several parts; with
            holes that count, a CVAT mask.
        height, width: of the image in pixels.
        group: number of the group.
    """
    rle = to_rle(annotation["segmentation"], height, width)
    mask = mask_util.decode(rle)
    common = {"source": "file", "occluded": str(int(bool(annotation.get("occluded"))))}
    lines = outlines(mask)
    if lines is None:
        left, top, w, h = mask_util.toBbox(rle).astype(int).tolist()
        flat = mask[top : top + h, left : left + w].ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=0))
        runs = np.diff(np.concatenate([[0], starts, [flat.size]])).tolist()
        frame = {"left": left, "top": top, "width": w, "height": h}
        attributes = {"rle": ", ".join(map(str, runs)), **{k: str(v) for k, v in frame.items()}}
        return [("mask", {**common, **attributes, "z_order": "0"})]
    shapes = []
    for line in lines:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in line.tolist())
        attributes = {**common, "points": points, "z_order": "0"}
        if len(lines) > 1:
            attributes["group_id"] = str(group)
        shapes.append(("polygon", attributes))
    return shapes
