import numpy as np
import pycocotools.mask as mask_util
import pytest

from imrcnn_d2.evaluation.detection.inputs import Regions
from imrcnn_d2.report.plots.images import CONTOUR_STYLES, choose_images, region_contours


def row(errors, overlap=np.nan):
    return {"FP": errors, "FN": 0, "union_iou": overlap}


def test_choice_over_several_models():
    # The sum of errors counts first, then the mean of the overlaps that are defined.
    rows = [
        [row(0, 90), row(0, 80)],
        [row(1, 90), row(1, 90)],
        [row(0), row(0)],
        [row(2, 90), row(0, 50)],
        [row(0, 10), row(0)],
    ]
    assert choose_images(rows, 9) == [3, 1, 4, 0, 2]
    assert choose_images(rows, 2) == [3, 1]
    assert choose_images(rows, 4) == [3, 1, 4, 2]


def test_outlines_run_through_the_outermost_pixels():
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[3:9, 5:17] = 1
    mask[5:7, 8:12] = 0  # a hole
    regions = Regions(
        np.zeros(1, int), np.zeros(1, int), np.array([[5.0, 3, 12, 6]]), [mask_util.encode(mask)]
    )
    lines = sorted(region_contours(regions, 0), key=len)
    assert all((line[0] == line[-1]).all() for line in lines)
    assert [line.min(axis=0).tolist() for line in lines] == [[7, 4], [5, 3]]
    assert [line.max(axis=0).tolist() for line in lines] == [[12, 7], [16, 8]]


def test_a_box_is_half_a_pixel_wider():
    regions = Regions(np.zeros(1, int), np.zeros(1, int), np.array([[5.0, 3, 12, 6]]), None)
    (line,) = region_contours(regions, 0)
    assert line.min(axis=0).tolist() == [4.5, 2.5]
    assert line.max(axis=0).tolist() == [16.5, 8.5]


@pytest.mark.parametrize("key", ["color", "linestyle"])
def test_kinds_differ_in_colour_and_in_line(key):
    assert len({style[key] for style in CONTOUR_STYLES.values()}) == len(CONTOUR_STYLES)
