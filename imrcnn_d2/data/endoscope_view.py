"""Finds the endoscope's view in a frame.

An endoscopy processor shows a lit disc, octagon or square on a plain background, and writes next
to it: banners with a patient's name, dates, a second image, a map of the instrument's position.
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
_FLAT = 8  # difference of neighbouring gray values within a flat area
_BLUR = 3  # pixels
_EDGE = 24  # gray values over two pixels, at the edge of an inset
_SHORTEST_EDGE = 0.12  # of the shorter side
_SEEN = 0.8  # share of an edge
_HALF = 0.5  # of the view's sides, which no inset exceeds
_STRAIGHT = 0.88  # share of a box that a flat area fills


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
    """The view of an endoscope in a frame.

    Attributes:
        mask: (H, W) bool, the endoscope's view without the insets. Empty in a frame where
            nothing is lit.
        box: the smallest around `mask`; (0, 0, 0, 0) if that is empty.
        insets: picture-in-picture and blanked rectangles that lie over the view.
    """

    mask: np.ndarray
    box: Box
    insets: tuple[Box, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is lit."""
        return not self.mask.any()

    @property
    def is_whole(self) -> bool:
        """Whether the frame shows nothing else."""
        return bool(self.mask.all())

    def crop(self, image: np.ndarray) -> np.ndarray:
        """The part in `box` of an image of the frame's size, black where there is no view.

        Args:
            image: (H, W) or (H, W, C); of a mask, false is black.
        """
        part, seen = image[self.box.slices], self.mask[self.box.slices]
        return np.where(seen if image.ndim == 2 else seen[..., None], part, 0).astype(image.dtype)


def find_view(image: np.ndarray) -> View:
    """Finds the endoscope's view in a frame, a convex area, and insets that cover it.

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
    nothing = View(np.zeros((height, width), bool), Box(0, 0, 0, 0), ())
    lit = _largest(_without_strokes(_lit(small)))
    if lit is None:
        return nothing
    hull = _hull(lit)
    insets = _insets(small, hull)
    if insets:  # an inset can have widened the hull
        for x0, y0, x1, y1 in insets:  # nor are its blurred edges of the view
            lit[max(0, y0 - _BLUR) : y1 + _BLUR, max(0, x0 - _BLUR) : x1 + _BLUR] = False
        lit = _largest(lit)
        if lit is None:
            return nothing
        hull = _hull(lit)

    # Compression blurs its edge by a pixel; beyond it may be writing.
    hull = cv2.erode(hull.astype(np.uint8), np.ones((3, 3), np.uint8))
    factors = np.array([width / small.shape[1], height / small.shape[0]])
    insets = tuple(_scaled(box, factors, height, width) for box in insets)
    mask = cv2.resize(hull, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    for box in insets:
        mask[box.slices] = False
    return View(mask, _box(mask), insets)


def _lit(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: what differs from the background, which the frame's corners show."""
    side = max(2, round(_CORNER * min(image.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    corners = [image[y, x].reshape(-1, 3).astype(float) for y in ends for x in ends]
    colours = np.array([corner.mean(axis=0) for corner in corners])
    plain = max(corner.std(axis=0).max() for corner in corners) < _NOISE / 2
    if plain and np.ptp(colours, axis=0).max() < _NOISE:
        background, noise = colours.mean(axis=0), 0.0
    else:  # at least one corner is lit; what is not is black
        dark = [corner.max() for corner in corners if corner.max() < 3 * _NOISE]
        background, noise = np.zeros(3), max(dark, default=0.0)
    contrast = _brightest(cv2.absdiff(image, (*background, 0.0)))
    return contrast > max(_LEAST_CONTRAST, noise + _NOISE)


def _brightest(image: np.ndarray) -> np.ndarray:
    """(H, W) largest of the channels; NumPy takes many times as long over short axes."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


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
    return _filled(mask, convex=True)


def _filled(mask: np.ndarray, convex: bool = False) -> np.ndarray:
    """A mask with its holes filled; its convex hull."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if convex:
        contours = [cv2.convexHull(np.concatenate(contours))]
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled.astype(bool)


def _insets(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Rectangles laid over the view, each once."""
    boxes: list[Box] = []
    for found in (_coloured(image, hull), _blanked(image, hull), _at_corners(image, hull)):
        boxes += [box for box in found if not any(_overlap(box, other) > 0.3 for other in boxes)]
    return boxes


def _coloured(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Flat areas of a colour that mucosa does not have: a position map, a message."""
    kernel = np.ones((3, 3), np.uint8)
    red, green, blue = cv2.split(image)
    cold = cv2.max(green, blue) > cv2.add(red, 2 * _NOISE)
    if np.count_nonzero(cold) < _SPECK * cold.size:
        return []
    flat = _brightest(cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel)) <= _FLAT
    seed = _largest(cold & flat)
    if seed is None or np.count_nonzero(seed) < _SPECK * seed.size:
        return []
    colour = np.median(image[seed], axis=0)
    same = _brightest(cv2.absdiff(image, (*colour, 0.0))) < 2 * _NOISE
    side = max(3, round(_STROKE * min(same.shape))) | 1  # closes letters and lines
    kernel = np.ones((side, side), np.uint8)
    closed = cv2.morphologyEx(same.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    return _straight_parts(closed.astype(bool), hull)


def _blanked(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Black rectangles cut out of the view."""
    return _straight_parts(hull & (_brightest(image) <= _NOISE), hull)


def _straight_parts(mask: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Boxes of the connected parts that fill them as far as they lie in the hull."""
    boxes = []
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    for i in range(1, count):
        x, y, w, h, area = map(int, stats[i])
        box = Box(x, y, x + w, y + h)
        if not _SPECK * mask.size < area < _LARGEST_INSET * mask.size:
            continue
        inside = hull[box.slices]
        part = _filled(labels[box.slices] == i) & inside
        if inside.any() and part.sum() > _STRAIGHT * inside.sum():
            boxes.append(box)
    return boxes


def _at_corners(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Rectangles of any content over a corner of the view, found by two straight edges."""
    around = _box(hull)
    hull = hull[around.slices]
    brightness = image[around.slices].astype(np.int16)
    edges = [np.zeros(hull.shape, bool) for _ in range(2)]
    edges[0][:, 1:-1] = _brightest(abs(brightness[:, 2:] - brightness[:, :-2])) > _EDGE
    edges[1][1:-1] = _brightest(abs(brightness[2:] - brightness[:-2])) > _EDGE
    height, width = hull.shape
    half = np.s_[: round(_HALF * height), : round(_HALF * width)]
    least = _SHORTEST_EDGE * min(hull.shape)
    boxes = []
    for flip in (np.s_[:, :], np.s_[::-1, :], np.s_[:, ::-1], np.s_[::-1, ::-1]):
        upright, level = (edge[flip][half] for edge in edges)
        corner = _where_edges_meet(upright, level, hull[flip][half], least)
        if corner is not None:
            inset = np.zeros(hull.shape, np.uint8)
            inset[flip][: corner[0], : corner[1]] = 1
            x0, y0, x1, y1 = _box(inset)
            x, y = around[:2]
            boxes.append(Box(x0 + x, y0 + y, x1 + x, y1 + y))
    return boxes


def _where_edges_meet(
    upright: np.ndarray, level: np.ndarray, hull: np.ndarray, least: float
) -> tuple[int, int] | None:
    """Row and column, if any, to which an upright edge leads from above, a level one from the left.

    Both are seen along most of their way through the hull, of at least `least` pixels.
    """
    shares = []
    for edge, along in ((upright, 0), (level, 1)):
        length = np.cumsum(hull, axis=along, dtype=np.float32)
        seen = np.cumsum(edge & hull, axis=along, dtype=np.float32)
        shares.append(np.where(length >= least, seen / np.maximum(length, 1), 0))
    both = np.minimum(*shares)
    row, column = np.unravel_index(both.argmax(), both.shape)
    return (int(row), int(column)) if both[row, column] > _SEEN else None


def _overlap(a: Box, b: Box) -> float:
    """Share of the smaller of two boxes that lies in the other."""
    w, h = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    smaller = min((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b))
    return max(w, 0) * max(h, 0) / smaller


def _scaled(box: Box, factors: np.ndarray, height: int, width: int) -> Box:
    (x0, y0), (x1, y1) = np.floor(box[:2] * factors), np.ceil(box[2:] * factors)
    return Box(int(x0), int(y0), min(int(x1), width), min(int(y1), height))


def _box(mask: np.ndarray) -> Box:
    """Around a mask; (0, 0, 0, 0) of an empty one."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return Box(x, y, x + w, y + h)
