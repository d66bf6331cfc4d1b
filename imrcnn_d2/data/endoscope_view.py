"""Where in a frame the endoscope's picture is.

An endoscopy processor shows a lit disc, octagon or square on a plain background, and writes beside
it: banners with a patient's name, dates, a second picture, a map of the instrument's position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

__all__ = ["Box", "View", "find_view"]

_WORKING_SIDE = 512  # pixels of the longer side, to which larger frames are reduced
_CORNER = 0.015  # of the shorter side: patches that show the background
_LEAST_CONTRAST = 12  # of a lit pixel to the background, gray values
_NOISE = 8  # of the background, above its mean
_STROKE = 0.02  # of the shorter side: what is thinner is writing
_SPECK = 0.005  # of the frame: what is smaller is no inset
_LARGEST_INSET = 0.35  # of the frame
_FLAT = 8  # difference of neighbouring gray values within a drawn area
_STRAIGHT = 0.88  # share of a box that a drawn area fills


class Box(NamedTuple):
    """Corners in pixels: columns x0 to x1 - 1, rows y0 to y1 - 1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """For indexing an array (H, W, ...)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


@dataclass(frozen=True)
class View:
    """What `find_view` found.

    Attributes:
        mask: (H, W) bool, the endoscope's picture without the insets. Empty in a frame where
            nothing is lit.
        box: the smallest around `mask`; (0, 0, 0, 0) if that is empty.
        insets: picture-in-picture and blanked rectangles that lie over the view.
    """

    mask: np.ndarray
    box: Box
    insets: tuple[Box, ...]


def find_view(image: np.ndarray) -> View:
    """Finds the endoscope's picture in a frame, a convex area, and what is laid over it.

    Args:
        image: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: it is no such array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"a frame is (H, W, 3) uint8, not {image.dtype} of shape {image.shape}")
    height, width = image.shape[:2]
    scale = min(1.0, _WORKING_SIDE / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    else:
        small = image
    lit = _largest(_without_strokes(_lit(small)))
    if lit is None:
        return View(np.zeros((height, width), bool), Box(0, 0, 0, 0), ())
    hull = _hull(lit)
    insets = [*_flat_insets(small, hull), *_notches(small, lit, hull)]
    if insets:  # a drawn area can have widened the hull
        for box in insets:
            lit[box.slices] = False
        lit = _largest(lit)
        hull = _hull(lit)

    factors = np.array([width / small.shape[1], height / small.shape[0]])
    insets = tuple(_scaled(box, factors, height, width) for box in insets)
    mask = cv2.resize(hull.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR) > 0
    for box in insets:
        mask[box.slices] = False
    return View(mask, _box(mask), insets)


def _lit(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: what differs from the background, which the frame's corners show."""
    side = max(2, round(_CORNER * min(image.shape[:2])))
    parts = slice(None, side), slice(-side, None)
    corners = [
        image[rows, columns].reshape(-1, 3).astype(float) for rows in parts for columns in parts
    ]
    colours = np.array([corner.mean(axis=0) for corner in corners])
    plain = max(corner.std(axis=0).max() for corner in corners) < _NOISE / 2
    if plain and np.ptp(colours, axis=0).max() < _NOISE:
        background, noise = colours.mean(axis=0), 0.0
    else:  # at least one corner is lit; what is not is black
        dark = [c.max() for c in colours if c.max() < 3 * _NOISE]
        background, noise = np.zeros(3), max(dark, default=0.0)
    contrast = np.abs(image - background).max(axis=2)
    return contrast > max(_LEAST_CONTRAST, noise + _NOISE)


def _without_strokes(mask: np.ndarray) -> np.ndarray:
    side = max(3, round(_STROKE * min(mask.shape))) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    opened = cv2.morphologyEx(
        mask.astype(np.uint8), cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_REPLICATE
    )
    return opened.astype(bool)


def _largest(mask: np.ndarray) -> np.ndarray | None:
    """The largest connected part of a mask; None of an empty one."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count == 1:
        return None
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def _hull(mask: np.ndarray) -> np.ndarray:
    points = cv2.findNonZero(mask.astype(np.uint8))
    drawn = np.zeros(mask.shape, np.uint8)
    cv2.fillConvexPoly(drawn, cv2.convexHull(points), 1)
    return drawn.astype(bool)


def _flat_insets(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Drawn areas of one colour: a position map, a message."""
    kernel = np.ones((3, 3), np.uint8)
    change = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).max(axis=2)
    flat = (change <= _FLAT) & (image.max(axis=2) > 3 * _NOISE)
    boxes = []
    count, labels, stats, _ = cv2.connectedComponentsWithStats(flat.astype(np.uint8))
    for i in range(1, count):
        x, y, w, h, area = map(int, stats[i])
        if not _SPECK * flat.size < area < _LARGEST_INSET * flat.size:
            continue
        part = labels[y : y + h, x : x + w] == i
        colours = image[y : y + h, x : x + w][part]
        red, green, blue = np.median(colours, axis=0)
        drawn = max(green, blue) > red + 2 * _NOISE and colours.std(axis=0).max() < _NOISE
        if drawn and _filled(part).mean() > _STRAIGHT and hull[y : y + h, x : x + w].any():
            boxes.append(Box(max(0, x - 1), max(0, y - 1), x + w + 1, y + h + 1))
    return boxes


def _filled(part: np.ndarray) -> np.ndarray:
    """A mask with its holes, such as letters, filled."""
    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = np.zeros(part.shape, np.uint8)
    cv2.drawContours(drawn, contours, -1, 1, cv2.FILLED)
    return drawn.astype(bool)


def _notches(image: np.ndarray, lit: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Rectangles of the background's colour that are cut out of the view's edge."""
    boxes = []
    count, labels, stats, _ = cv2.connectedComponentsWithStats((hull & ~lit).astype(np.uint8))
    for i in range(1, count):
        x, y, w, h, area = map(int, stats[i])
        if area < _SPECK * hull.size:
            continue
        rows, columns = slice(y, y + h), slice(x, x + w)
        part = labels[rows, columns] == i
        straight = area / hull[rows, columns].sum() > _STRAIGHT
        if straight and image[rows, columns][part].std(axis=0).max() < _NOISE / 2:
            boxes.append(Box(x, y, x + w, y + h))
    return boxes


def _scaled(box: Box, factors: np.ndarray, height: int, width: int) -> Box:
    (x0, y0), (x1, y1) = np.floor(box[:2] * factors), np.ceil(box[2:] * factors)
    return Box(int(x0), int(y0), min(int(x1), width), min(int(y1), height))


def _box(mask: np.ndarray) -> Box:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return Box(x, y, x + w, y + h)
