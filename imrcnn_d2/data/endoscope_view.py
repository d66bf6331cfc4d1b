"""Finds the endoscope's view in a frame.

An endoscopy processor shows a lit disc, octagon or square on a plain background, and writes next
to it: banners with a patient's name, dates, a second image, a map of the instrument's position.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

_WORKING_SIDE = 384  # pixels of the longer side, to which larger frames are reduced
_LEAST_SIDE = 0.3  # of the frame's shorter side: a smaller view is not cropped to
_LEAST_LIT = 0.5  # of the view: a darker one is not cropped to
_CORNER = 0.015  # of the shorter side: patches that show the background
_LEAST_CONTRAST = 12  # of a lit pixel to the background, gray values
_NOISE = 8  # of the background, above its mean
_STROKE = 0.02  # of the shorter side: what is thinner is writing
_SPECK = 0.005  # of the frame: what is smaller is no inset, and no part of the view
_GAP = 0.08  # of the shorter side, that shadow separates parts of the view by
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
    """The view of an endoscope in a frame: a convex area without the insets over it."""

    size: tuple[int, int]  # (H, W) of the frame
    corners: np.ndarray  # (N, 2) int32, pixels (x, y) of the area; none where nothing is lit
    insets: tuple[Box, ...] = ()  # second images and blanked rectangles that lie over the view
    lit: float = 0.0  # share of the view, insets included, that differs from the background

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, without the insets; made anew each time, so that a view takes little
        memory."""
        mask = np.zeros(self.size, np.uint8)
        cv2.fillConvexPoly(mask, self.corners, 1)
        for box in self.insets:
            mask[box.slices] = 0
        return mask.view(bool)

    @cached_property
    def box(self) -> Box:
        """The smallest around `mask`; (0, 0, 0, 0) if that is empty."""
        return _box(self.mask if self.insets else self.corners)

    @property
    def is_empty(self) -> bool:
        return not any(self.box)

    @property
    def is_whole(self) -> bool:
        """Whether the frame shows nothing else."""
        return bool(self.mask.all())

    @property
    def with_insets(self) -> np.ndarray:
        """(H, W) bool, the view with what lies over it."""
        mask = self.mask
        for box in self.insets:
            mask[box.slices] = True
        return mask

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Return the part in `box` of an (H, W) or (H, W, C) image of the frame's size, black, or
        false, where there is no view."""
        part, seen = image[self.box.slices], self.mask[self.box.slices]
        if image.dtype == bool:
            return part & seen
        return cv2.copyTo(part, seen.view(np.uint8))


def find_view(image: np.ndarray) -> View:
    """Find the endoscope's view in an (H, W, 3) uint8 RGB frame, a convex area, and insets over it;
    raise ValueError for another array."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"a frame is (H, W, 3) uint8, not {image.dtype} of shape {image.shape}")
    height, width = image.shape[:2]
    small, insets = _reduced(image), []
    bright = _lit(small)
    lit = _view_parts(small, _without_strokes(bright))
    if lit is not None:
        insets = _insets(small, _filled(lit, convex=True))
        for x0, y0, x1, y1 in insets:  # can have widened the hull; their blurred edges are no view
            lit[max(0, y0 - _BLUR) : y1 + _BLUR, max(0, x0 - _BLUR) : x1 + _BLUR] = False
        if insets:
            lit = _view_parts(small, lit)
    # Compression blurs the hull's edge by a pixel; beyond it may be writing.
    hull = None
    if lit is not None:
        hull = cv2.erode(_filled(lit, convex=True).view(np.uint8), np.ones((3, 3), np.uint8))
    if hull is None or not hull.any():
        return View((height, width), np.zeros((0, 2), np.int32))

    share = np.count_nonzero(bright & hull.view(bool)) / np.count_nonzero(hull)
    factors = np.array([width / small.shape[1], height / small.shape[0]])
    boxes = []
    for inset in insets:
        (x0, y0), (x1, y1) = np.floor(inset[:2] * factors), np.ceil(inset[2:] * factors)
        boxes.append(Box(int(x0), int(y0), min(int(x1), width), min(int(y1), height)))
    return View((height, width), _enlarged(hull, factors), tuple(boxes), share)


def find_crop(image: np.ndarray) -> View | None:
    """The view that a network is shown of a frame, see `find_view`. None, for the whole frame,
    where it cannot be relied on: a side is shorter than 0.3 of the frame's shorter side, or less
    than half of it is lit."""
    view = find_view(image)
    x0, y0, x1, y1 = view.box
    is_small = min(x1 - x0, y1 - y0) < _LEAST_SIDE * min(image.shape[:2])
    return None if is_small or view.lit < _LEAST_LIT else view


def _reduced(image: np.ndarray) -> np.ndarray:
    """An image of at most `_WORKING_SIDE`; halved at first, which is faster than in one step."""
    while (largest := max(image.shape[:2])) > _WORKING_SIDE:
        scale = max(0.5, _WORKING_SIDE / largest)
        size = [max(1, round(scale * side)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return image


def _enlarged(hull: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Of a convex mask (h, w), enlarged by factors (x, y): the corners (N, 2) int32 (x, y) of what
    its pixels become."""
    (contour,), _ = cv2.findContours(hull, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    ends = np.stack([contour * factors, (contour + 1) * factors - 1])  # of the pixels' sides
    x, y = np.rint(ends).astype(np.int32)[:, :, 0].transpose(2, 0, 1)
    corners = np.stack([(x[i], y[j]) for i in (0, 1) for j in (0, 1)]).transpose(0, 2, 1)
    return cv2.convexHull(corners.reshape(-1, 2))[:, 0]


def _lit(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: what differs from the background, which the frame's corners show."""
    side = max(2, round(_CORNER * min(image.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    corners = [image[y, x].reshape(-1, 3).astype(float) for y in ends for x in ends]
    colours = np.array([corner.mean(axis=0) for corner in corners])
    plain = max(corner.std(axis=0).max() for corner in corners) < _NOISE / 2
    red, green, blue = background = colours.mean(axis=0)
    is_mucosa = red > max(green, blue) + 2 * _NOISE
    if plain and np.ptp(colours, axis=0).max() < _NOISE and not is_mucosa:
        noise = 0.0
    else:  # at least one corner is lit; what is not is black
        dark = [corner.max() for corner in corners if corner.max() < 3 * _NOISE]
        background, noise = np.zeros(3), max(dark, default=0.0)
    contrast = brightest(cv2.absdiff(image, (*background, 0.0)))
    return contrast > max(_LEAST_CONTRAST, noise + _NOISE)


def brightest(image: np.ndarray) -> np.ndarray:
    """Return the (H, W) largest of the channels; NumPy takes many times as long over short axes."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


def _stroke(shape: tuple[int, int]) -> int:
    """An odd number of pixels that is wider than writing."""
    return max(3, round(_STROKE * min(shape))) | 1


def _without_strokes(mask: np.ndarray) -> np.ndarray:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_stroke(mask.shape),) * 2)
    mask, border = mask.view(np.uint8), cv2.BORDER_REPLICATE
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel, borderType=border).view(bool)


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, each a mask, that are larger than a speck, largest first."""
    _, labels = cv2.connectedComponents(mask.view(np.uint8))
    pixels = labels.ravel()
    # Pixels are counted run by run: OpenCV's statistics take ten times as long.
    ends = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]), pixels.size - 1)
    areas = np.bincount(pixels[ends], np.diff(ends, prepend=-1))
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")
    return [labels == i for i in order[: np.count_nonzero(areas > _SPECK * mask.size)]]


def _view_parts(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The largest connected part of a mask, with those next to it that shadow separates from it,
    which are as red as mucosa and no rectangles; None of an empty one."""
    view, *others = _parts(mask) or [None]
    if not others:
        return view
    kernel = np.ones((2 * round(_GAP * min(mask.shape)) + 1,) * 2, np.uint8)
    near = cv2.dilate(view.view(np.uint8), kernel).view(bool)
    for part in others:
        _, _, width, height = cv2.boundingRect(part.view(np.uint8))
        red, green, blue = np.median(image[part], axis=0)
        is_mucosa = red > 1.2 * max(green, blue) and part.sum() < _STRAIGHT * width * height
        if is_mucosa and (near & part).any():
            view |= part
    return view


def _filled(mask: np.ndarray, convex: bool = False) -> np.ndarray:
    """A mask with its holes filled, or its convex hull."""
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if convex:
        contours = [cv2.convexHull(np.concatenate(contours))]
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled.view(bool)


def _insets(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Rectangles laid over the view, each once."""
    blanked = _straight_parts(hull & (brightest(image) <= _NOISE), hull)
    boxes: list[Box] = []
    for candidates in (_coloured(image, hull), blanked, _at_corners(image, hull)):
        boxes += [c for c in candidates if not any(_overlap(c, box) > 0.3 for box in boxes)]
    return boxes


def _coloured(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Flat areas of a colour that mucosa does not have: a position map, a message."""
    red, green, blue = cv2.split(image)
    cold = cv2.max(green, blue) > cv2.add(red, 2 * _NOISE)
    if np.count_nonzero(cold) < _SPECK * cold.size:
        return []
    gradient = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    seeds = _parts(cold & (brightest(gradient) <= _FLAT))
    if not seeds:
        return []
    colour = np.median(image[seeds[0]], axis=0)
    same = brightest(cv2.absdiff(image, (*colour, 0.0))) < 2 * _NOISE
    kernel = np.ones((_stroke(same.shape),) * 2, np.uint8)  # closes letters and lines
    return _straight_parts(cv2.morphologyEx(same.view(np.uint8), cv2.MORPH_CLOSE, kernel), hull)


def _straight_parts(mask: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Boxes of the connected parts that fill them as far as they lie in the hull."""
    boxes: list[Box] = []
    if np.count_nonzero(mask) < _SPECK * mask.size:
        return boxes
    for part in _parts(mask):
        box = _box(part)
        inside = hull[box.slices]
        filled = _filled(part[box.slices]) & inside
        is_inset = part.sum() < _LARGEST_INSET * part.size
        if is_inset and inside.any() and filled.sum() > _STRAIGHT * inside.sum():
            boxes.append(box)
    return boxes


def _at_corners(image: np.ndarray, hull: np.ndarray) -> list[Box]:
    """Rectangles of any content over a corner of the view, found by two straight edges."""
    hull_box = _box(hull)
    hull, part = hull[hull_box.slices], image[hull_box.slices]
    if min(hull.shape) < 3:  # an edge is between two pixels
        return []
    edges = [np.zeros(hull.shape, bool) for _ in range(2)]
    edges[0][:, 1:-1] = brightest(cv2.absdiff(part[:, 2:], part[:, :-2])) > _EDGE
    edges[1][1:-1] = brightest(cv2.absdiff(part[2:], part[:-2])) > _EDGE
    edges = [edge & hull for edge in edges]
    height, width = hull.shape
    half = np.s_[: round(_HALF * height), : round(_HALF * width)]
    least = _SHORTEST_EDGE * min(hull.shape)
    boxes = []
    for flip in (np.s_[:, :], np.s_[::-1, :], np.s_[:, ::-1], np.s_[::-1, ::-1]):
        upright, level = (edge[flip][half] for edge in edges)
        corner = _where_edges_meet(upright, level, hull[flip][half], least)
        if corner is not None:
            inset = np.zeros(image.shape[:2], np.uint8)
            inset[hull_box.slices][flip][: corner[0], : corner[1]] = 1
            boxes.append(_box(inset))
    return boxes


def _where_edges_meet(
    upright: np.ndarray, level: np.ndarray, hull: np.ndarray, least: float
) -> tuple[int, int] | None:
    """Row and column, if any, to which an upright edge leads from above, a level one from the left,
    seen along most of their way through the hull, of at least `least` pixels."""
    columns, rows = _long(upright, 0, least), _long(level, 1, least)
    if not (columns.size and rows.size):
        return None
    above = _seen(upright[:, columns], hull[:, columns], 0, least)[rows]
    left = _seen(level[rows], hull[rows], 1, least)[:, columns]
    both = np.minimum(above, left)
    i, j = np.unravel_index(both.argmax(), both.shape)
    return (int(rows[i]), int(columns[j])) if both[i, j] > _SEEN else None


def _long(edge: np.ndarray, axis: int, least: float) -> np.ndarray:
    """The columns (axis 0) or rows (axis 1) with enough of an edge for one of `least` pixels."""
    seen = cv2.reduce(edge.view(np.uint8), axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    return np.flatnonzero(seen >= _SEEN * least)


def _seen(edge: np.ndarray, hull: np.ndarray, axis: int, least: float) -> np.ndarray:
    """Share of the hull's pixels up to each one where the edge is; 0 if they are few."""
    seen, length = (np.cumsum(mask, axis, dtype=np.float32) for mask in (edge, hull))
    return np.where(length >= least, seen / np.maximum(length, 1), 0)


def _overlap(a: Box, b: Box) -> float:
    """Share of the smaller of two boxes that lies in the other."""
    w, h = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    smaller = min((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b))
    return max(w, 0) * max(h, 0) / smaller


def _box(area: np.ndarray) -> Box:
    """Around a mask, or points (N, 2) int32; (0, 0, 0, 0) of an empty one."""
    x, y, w, h = cv2.boundingRect(area.view(np.uint8) if area.dtype == bool else area)
    return Box(x, y, x + w, y + h)
