"""What is drawn is where it was found, and says what it is not for."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from rectangles import rectangle

from imrcnn_d2.deploy.outputs import CONTOUR, draw_overlay, footer

METADATA = {"weights_sha256": "0123456789abcdef", "tau": 0.5}
CLASSES = ["polyp", "ulcère"]


def yellow(picture):
    """(H, W) bool."""
    return (abs(picture.astype(int) - CONTOUR) < 60).all(axis=2)


def test_the_outline_is_on_the_edge_of_the_mask():
    image = np.full((240, 320, 3), 90, np.uint8)
    before = image.copy()
    box = rectangle(1, 100, 80, 60, 50, size=(240, 320), score=0.9)
    picture = draw_overlay(image, [box], CLASSES, "")
    assert (image == before).all(), "the image itself is left alone"
    found = yellow(picture)
    assert found[80, 105:155].all() and found[85:125, 159].all()
    assert not found[90:120, 110:150].any(), "what is inside stays to be seen"
    assert (picture[90:120, 110:150] == 90).all()
    # a box is drawn alike
    del box["segmentation"]
    assert yellow(draw_overlay(image, [box], CLASSES, ""))[80, 105:155].all()


def test_a_hole_is_outlined_too():
    mask = np.zeros((240, 320), np.uint8)
    mask[50:150, 50:150] = 1
    mask[80:120, 80:120] = 0
    rle = mask_util.encode(np.asfortranarray(mask))
    region = {"category_id": 1, "score": 0.9, "bbox": [50, 50, 100, 100], "segmentation": rle}
    picture = draw_overlay(np.zeros((240, 320, 3), np.uint8), [region], CLASSES, "")
    assert yellow(picture)[79, 85:115].all()


def white(picture):
    """(H, W) bool."""
    return (picture > 220).all(axis=2)


@pytest.mark.parametrize("size", [(1080, 1920), (352, 352), (64, 48), (10, 200), (1, 1)])
def test_the_footer_is_there_whatever_the_size(size):
    image = np.full((*size, 3), 200, np.uint8)
    box = rectangle(1, 0, 0, 1, 1, 2, size=size, score=0.9)
    picture = draw_overlay(image, [box], CLASSES, footer(METADATA))
    assert picture.shape == image.shape
    if min(size) > 100:
        bottom = picture[-size[0] // 30 :]
        assert white(bottom)[:, : size[1] // 2].any()
        assert not white(bottom)[:, -1].any(), "its end is not cut off"


def test_what_the_footer_says():
    assert footer(METADATA) == "Research use only, not for diagnosis · weights 01234567 · τ 0.5"


def test_a_class_is_written_on_the_image():
    image = np.zeros((352, 352, 3), np.uint8)
    of_image = [{"category_id": 2, "score": 0.8, "probabilities": [0.2, 0.8]}]
    assert white(draw_overlay(image, of_image, CLASSES, ""))[:40, :200].sum() > 50


def test_labels_do_not_cover_each_other():
    image = np.zeros((352, 352, 3), np.uint8)
    boxes = [rectangle(1, 100, 100, 90, 90, size=(352, 352), score=0.9 - i / 10) for i in range(3)]
    drawn = [white(draw_overlay(image, boxes[:number], CLASSES, "")) for number in (1, 2, 3)]
    for fewer, more in zip(drawn, drawn[1:], strict=False):
        assert (more & fewer).sum() > 0.95 * fewer.sum(), "those before are still to be read"
        assert more.sum() > fewer.sum() + 50
