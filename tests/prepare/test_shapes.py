"""Shapes to masks and back, against geometry and pixels counted by hand."""

import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from imrcnn_d2.data.images import read_mask
from imrcnn_d2.data.masks import (
    MIN_IOU,
    check_extent,
    check_size,
    ellipse_rle,
    mask_polygons,
    patch_rle,
    polygon_rle,
    rectangle,
    union,
)

MASKS = arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))


def decoded(rle):
    return mask_util.decode(rle).astype(bool)


def redrawn(mask):
    lines = [polygon_rle(line.tolist(), *mask.shape) for line in mask_polygons(mask, True)]
    return decoded(mask_util.merge(lines))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@given(MASKS)
def test_outlines_are_near_the_mask_or_none(mask):
    assume(mask.any())
    lines = mask_polygons(mask)
    if lines is None:
        assert (ndimage.binary_fill_holes(mask) != mask).any()
    else:
        rle = mask_util.merge([polygon_rle(line.tolist(), *mask.shape) for line in lines])
        assert iou(decoded(rle), mask) >= MIN_IOU


@given(MASKS)
def test_outlines_keep_the_mask(mask):
    filled = ndimage.binary_fill_holes(mask)
    assume(mask.any())
    assert iou(redrawn(mask), filled) >= MIN_IOU
    assert len(mask_polygons(mask, True)) == ndimage.label(filled, np.ones((3, 3)))[1]


def test_holes():
    mask = np.zeros((60, 80), bool)
    mask[5:55, 5:75] = True  # of 3,500 pixels
    mask[20, 20:25] = False
    (line,) = mask_polygons(mask)  # a speck does not keep anybody from moving points
    assert len(line) == 4
    mask[20:30, 20:25] = False
    assert mask_polygons(mask) is None
    assert [len(line) for line in mask_polygons(mask, fill_holes=True)] == [4]


def test_outlines_of_lesions(kvasir_352):
    points = []
    for path in sorted((kvasir_352 / "masks").iterdir())[:40]:
        mask = read_mask(path)
        assert mask_polygons(mask) is not None, "specks alone"
        assert iou(redrawn(mask), mask) >= MIN_IOU
        points.append(sum(map(len, mask_polygons(mask))))
    assert np.median(points) < 50, "to be moved by hand"


def test_outlines_lie_on_the_edges_of_pixels():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    mask[7, 1] = True
    first, second = mask_polygons(mask)
    assert sorted(map(tuple, first)) == [(3, 2), (3, 5), (9, 2), (9, 5)]
    assert sorted(map(tuple, second)) == [(1, 7), (1, 8), (2, 7), (2, 8)]


def test_rectangle_is_turned_clockwise():
    assert rectangle(0, 0, 4, 2).tolist() == [[0, 0], [4, 0], [4, 2], [0, 2]]
    # the top left corner goes to the right, as y points down
    assert rectangle(0, 0, 4, 2, 90) == pytest.approx(np.array([[3, -1], [3, 3], [1, 3], [1, -1]]))


def test_ellipse():
    mask = decoded(ellipse_rle((50, 40), (30, 12), 80, 100))
    assert mask.sum() == pytest.approx(math.pi * 30 * 12, rel=0.01)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (28, 51, 20, 79)
    upright = decoded(ellipse_rle((50, 40), (30, 12), 80, 100, 90))
    rows, columns = np.nonzero(upright)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 69, 38, 61)
    tilted = decoded(ellipse_rle((50, 40), (30, 12), 80, 100, 30))
    assert tilted[40 + 10, 50 + 20] and not tilted[40 - 10, 50 + 20], "clockwise"
    with pytest.raises(ValueError, match="the radius 0 is not positive"):
        ellipse_rle((5, 5), (3, 0), 10, 10)


@given(st.integers(-9, 9), st.integers(-9, 9), arrays(bool, (4, 5)))
def test_patch_is_cut_at_the_borders(left, top, patch):
    mask = decoded(patch_rle(patch, left, top, 6, 7))
    for y, x in np.ndindex(6, 7):
        inside = 0 <= y - top < 4 and 0 <= x - left < 5
        assert mask[y, x] == (inside and patch[y - top, x - left])


@pytest.mark.parametrize("value", [1e9, -1e9, math.inf, math.nan, "3", None, True])
def test_coordinates(value):
    with pytest.raises(ValueError, match="coordinate"):
        check_extent([1, value], 40, 60)
    with pytest.raises(ValueError, match="coordinate"):
        polygon_rle([[1, 1], [5, value], [3, 3]], 40, 60)


def test_a_polygon_of_great_length():
    """A million points to and fro would take 50 GB."""
    zigzag = [[x, y] for x in range(100) for y in (0, 400)] * 5000
    with pytest.raises(ValueError, match="1000000 points is .* pixels long"):
        polygon_rle(zigzag, 40, 60)
    around = 10 * np.array([[-40, -40], [60, -40], [60, 40], [-40, 40]])
    assert decoded(polygon_rle(around.tolist(), 40, 60)).all(), "far outside, but no longer"


@pytest.mark.parametrize(
    "size", [(0, 5), (5, -1), (10**6, 5), (20_000, 20_000), ("5", 5), (5.5, 5)]
)
def test_sizes_of_no_image(size):
    with pytest.raises(ValueError, match="image"):
        check_size(*size)
    assert check_size(5.0, 60) == (5, 60)


@given(MASKS, st.integers(1, 30))
def test_union(mask, count):
    parts = [np.roll(mask, i, axis=0) for i in range(count)]
    rles = [mask_util.encode(np.asfortranarray(part, dtype=np.uint8)) for part in parts]
    assert np.array_equal(decoded(union(rles)), np.any(parts, axis=0))


def test_polygon_needs_three_points():
    with pytest.raises(ValueError, match="a polygon has 2 points, at least 3"):
        polygon_rle([[1, 1], [5, 5]], 40, 60)
