"""Overlays have contours at the masks, and a footer that forbids diagnosis."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from rectangles import rectangle

from imrcnn_d2.deploy.outputs import CONTOUR, draw_overlay, footer

METADATA = {"weights_sha256": "0123456789abcdef", "tau": 0.5}
CLASSES = ["polyp", "ulcère"]


def yellow(overlay):
    """(H, W) bool."""
    return (abs(overlay.astype(int) - CONTOUR) < 60).all(axis=2)


def test_the_contour_is_on_the_edge_of_the_mask():
    image = np.full((240, 320, 3), 90, np.uint8)
    before = image.copy()
    box = rectangle(1, 100, 80, 60, 50, size=(240, 320), score=0.9)
    overlay = draw_overlay(image, [box], CLASSES, "")
    assert (image == before).all(), "the image itself is left alone"
    is_yellow = yellow(overlay)
    assert is_yellow[80, 105:155].all() and is_yellow[85:125, 159].all()
    assert not is_yellow[90:120, 110:150].any(), "what is inside stays to be seen"
    assert (overlay[90:120, 110:150] == 90).all()
    # a box looks the same
    del box["segmentation"]
    assert yellow(draw_overlay(image, [box], CLASSES, ""))[80, 105:155].all()


def test_a_hole_has_a_contour_too():
    mask = np.zeros((240, 320), np.uint8)
    mask[50:150, 50:150] = 1
    mask[80:120, 80:120] = 0
    rle = mask_util.encode(np.asfortranarray(mask))
    region = {"category_id": 1, "score": 0.9, "bbox": [50, 50, 100, 100], "segmentation": rle}
    overlay = draw_overlay(np.zeros((240, 320, 3), np.uint8), [region], CLASSES, "")
    assert yellow(overlay)[79, 85:115].all()


def white(overlay):
    """(H, W) bool."""
    return (overlay > 220).all(axis=2)


@pytest.mark.parametrize("size", [(1080, 1920), (352, 352), (64, 48), (10, 200), (1, 1)])
def test_the_footer_is_there_whatever_the_size(size):
    image = np.full((*size, 3), 200, np.uint8)
    box = rectangle(1, 0, 0, 1, 1, 2, size=size, score=0.9)
    overlay = draw_overlay(image, [box], CLASSES, footer(METADATA))
    assert overlay.shape == image.shape
    if min(size) > 100:
        bottom = overlay[-size[0] // 30 :]
        assert white(bottom)[:, : size[1] // 2].any()
        assert not white(bottom)[:, -1].any(), "its end is not cut off"


def test_what_the_footer_says():
    assert footer(METADATA) == "Research use only, not for diagnosis · weights 01234567 · τ 0.5"


def test_a_class_is_written_on_the_image():
    image = np.zeros((352, 352, 3), np.uint8)
    class_annotations = [{"category_id": 2, "score": 0.8, "probabilities": [0.2, 0.8]}]
    assert white(draw_overlay(image, class_annotations, CLASSES, ""))[:40, :200].sum() > 50


def test_labels_do_not_cover_each_other():
    image = np.zeros((352, 352, 3), np.uint8)
    boxes = [rectangle(1, 100, 100, 90, 90, size=(352, 352), score=0.9 - i / 10) for i in range(3)]
    texts = [white(draw_overlay(image, boxes[:number], CLASSES, "")) for number in (1, 2, 3)]
    for fewer, more in zip(texts, texts[1:], strict=False):
        assert (more & fewer).sum() > 0.95 * fewer.sum(), "those before are still to be read"
        assert more.sum() > fewer.sum() + 50
