"""What annotation tools draw, as masks, and masks as polygons.

Coordinates are of the image plane: pixel i covers i to i + 1, as in COCO and on the canvases of
LabelMe and CVAT. A polygon 10..30 is therefore 20 pixels wide.
"""

import math
from collections.abc import Sequence
from numbers import Real

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = [
    "MIN_IOU",
    "check_extent",
    "ellipse_rle",
    "outlines",
    "patch_rle",
    "polygon_rle",
    "rectangle",
]

# Of a polygon made from a mask with that mask.
MIN_IOU = 0.99
# Pixels that a polygon may be off the mask's edge to have fewer points; the first that is near
# enough is taken. 0 follows every pixel.
_TOLERANCES = (4.0, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.0)
# Times the image's size that a shape may reach beyond it. pycocotools walks along every edge, so a
# coordinate of a billion would fill the memory.
_MAX_OUTSIDE = 10


def check_extent(values: Sequence[float], height: int, width: int) -> None:
    """Raises ValueError for coordinates that are no finite numbers or far outside the image."""
    limit = _MAX_OUTSIDE * max(height, width)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the coordinate {value!r} is no number")
        if abs(value) > limit:
            raise ValueError(f"the coordinate {value:g} is far outside the {width}x{height} image")


def polygon_rle(points: Sequence[Sequence[float]], height: int, width: int) -> dict:
    """Compressed COCO RLE of a polygon of [x, y] points.

    Raises:
        ValueError: fewer than three points, or as `check_extent`.
    """
    if len(points) < 3:
        raise ValueError(f"a polygon has {len(points)} points, at least 3 are needed")
    flat = [value for point in points for value in point]
    check_extent(flat, height, width)
    return mask_util.frPyObjects([flat], height, width)[0]


def rectangle(
    left: float, top: float, right: float, bottom: float, degrees: float = 0.0
) -> np.ndarray:
    """(4, 2) corners of a rectangle, turned clockwise about its centre."""
    centre = np.array([left + right, top + bottom]) / 2
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return _turned(corners - centre, degrees) + centre


def ellipse_rle(
    centre: Sequence[float],
    radii: Sequence[float],
    height: int,
    width: int,
    degrees: float = 0.0,
) -> dict:
    """Compressed COCO RLE of an ellipse: the pixels whose centres are inside.

    Args:
        centre: x, y in pixels.
        radii: along x and y, before it is turned clockwise by `degrees`.
        height, width: of the image.
        degrees: see above.

    Raises:
        ValueError: a radius that is not positive, or as `check_extent`.
    """
    check_extent([*centre, *radii], height, width)
    if min(radii) <= 0:
        raise ValueError(f"the radius {min(radii):g} is not positive")
    x, y = np.meshgrid(np.arange(width) + 0.5 - centre[0], np.arange(height) + 0.5 - centre[1])
    along = _turned(np.stack([x, y], axis=-1), -degrees) / np.asarray(radii, float)
    return _encode((along**2).sum(axis=-1) <= 1)


def patch_rle(patch: np.ndarray, left: int, top: int, height: int, width: int) -> dict:
    """Compressed COCO RLE of an (h, w) bool patch at a place in the image; cut at its borders."""
    mask = np.zeros((height, width), bool)
    rows = slice(max(top, 0), max(min(top + patch.shape[0], height), 0))
    columns = slice(max(left, 0), max(min(left + patch.shape[1], width), 0))
    part = patch[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    mask[rows, columns] = part
    return _encode(mask)


def outlines(mask: np.ndarray, fill_holes: bool = False) -> list[np.ndarray] | None:
    """Polygons around the parts of a mask, of few points, at an IoU of at least `MIN_IOU`.

    Args:
        mask: (H, W) bool or 0 and 1.
        fill_holes: holes are part of the mask.

    Returns:
        one (N, 2) float array of x, y for each part, N at least 3, in raster order of their boxes'
        top left corners; None if the mask has holes too large to be left out.
    """
    mask = mask.astype(np.uint8)
    # Twice as large, each pixel has a corner of its own for each of its edges.
    doubled = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    edges = [(contour + 1) // 2 for contour in contours]
    edges.sort(key=lambda edge: tuple(edge[:, 0, ::-1].min(axis=0)))
    lines = [_simplified(edge, None if fill_holes else mask) for edge in edges]
    return None if any(line is None for line in lines) else lines


def _simplified(edge: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """The fewest points of an (N, 1, 2) contour of pixel edges that are near enough to the mask in
    it, or to all of its inside without one; None if none are, for holes."""
    left, top = edge.min(axis=0)[0]
    width, height = (edge.max(axis=0)[0] - (left, top)).tolist()

    def rle(points: np.ndarray) -> dict:
        return polygon_rle((points - (left, top)).tolist(), height, width)

    truth = rle(cv2.approxPolyDP(edge, 0, closed=True)[:, 0])
    if mask is not None:
        part = _encode(mask[top : top + height, left : left + width])
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


def _encode(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
