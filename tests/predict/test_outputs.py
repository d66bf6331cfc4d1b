"""COCO records are the instances; overlays have contours at the masks, and a footer."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from rectangles import rectangle

from imrcnn_d2.deploy import outputs
from imrcnn_d2.deploy.outputs import draw_overlay

from .conftest import random_image

CLASSES = ["polyp", "ulcère"]


def test_records_are_the_instances(predictor):
    image = random_image(0)
    instances = predictor(image)
    (output,) = predictor.forward([predictor.prepare(image)])
    annotations = outputs.records(predictor, output, 60, 80)
    assert len(annotations) == len(instances) > 1
    for i, annotation in enumerate(annotations):
        x, y, width, height = annotation["bbox"]
        box = torch.tensor([x, y, x + width, y + height])
        torch.testing.assert_close(box, instances.pred_boxes.tensor[i])
        assert annotation["score"] == instances.scores[i].item()
        assert annotation["category_id"] == instances.pred_classes[i].item() + 1
        mask = mask_util.decode(annotation["segmentation"])
        assert (mask == instances.pred_masks[i].numpy()).all()
        assert annotation["area"] == mask.sum()
    assert np.all(np.diff([annotation["score"] for annotation in annotations]) <= 0)


def yellow(overlay):
    return (abs(overlay.astype(int) - outputs.CONTOUR) < 60).all(axis=2)


def white(overlay):
    return (overlay > 220).all(axis=2)


def test_contours():
    image = np.full((240, 320, 3), 90, np.uint8)
    box = rectangle(1, 100, 80, 60, 50, size=(240, 320), score=0.9)
    overlay = draw_overlay(image, [box], CLASSES, "")
    assert (image == 90).all(), "the image itself is left alone"
    is_yellow = yellow(overlay)
    assert is_yellow[80, 105:155].all() and is_yellow[85:125, 159].all()
    assert (overlay[90:120, 110:150] == 90).all(), "what is inside stays visible"
    del box["segmentation"]  # a box looks the same
    assert yellow(draw_overlay(image, [box], CLASSES, ""))[80, 105:155].all()
    mask = np.zeros((240, 320), np.uint8, order="F")
    mask[50:150, 50:150] = 1
    mask[80:120, 80:120] = 0
    region = {"category_id": 1, "score": 0.9, "segmentation": mask_util.encode(mask)}
    region["bbox"] = [50, 50, 100, 100]
    assert yellow(draw_overlay(image, [region], CLASSES, ""))[79, 85:115].all(), "of the hole"
    sure = rectangle(1, 0, 0, 10, 10, 1, score=0.9)
    other = rectangle(1, 5, 0, 10, 10, 2, score=0.8)
    labels = outputs.label_map([sure, other], 40, 50)  # the surer one is on top
    assert (labels[:10, :10] == 1).all() and (labels[:10, 10:15] == 2).all()
    assert labels.sum() == 100 + 2 * 50


@pytest.mark.parametrize("size", [(1080, 1920), (352, 352), (64, 48), (10, 200), (1, 1)])
def test_the_footer_is_there_whatever_the_size(size):
    text = outputs.footer({"weights_sha256": "0123456789abcdef", "tau": 0.5})
    assert text == "Research use only, not for diagnosis · weights 01234567 · τ 0.5"
    image = np.full((*size, 3), 200, np.uint8)
    box = rectangle(1, 0, 0, 1, 1, 2, size=size, score=0.9)
    overlay = draw_overlay(image, [box], CLASSES, text)
    assert overlay.shape == image.shape
    if min(size) > 100:
        bottom = white(overlay[-size[0] // 30 :])
        assert bottom[:, : size[1] // 2].any() and not bottom[:, -1].any(), "its end is cut off"


def test_labels_are_legible():
    image = np.zeros((352, 352, 3), np.uint8)
    class_annotations = [{"category_id": 2, "score": 0.8, "probabilities": [0.2, 0.8]}]
    assert white(draw_overlay(image, class_annotations, CLASSES, ""))[:40, :200].sum() > 50
    boxes = [rectangle(1, 100, 100, 90, 90, size=(352, 352), score=0.9 - i / 10) for i in range(3)]
    texts = [white(draw_overlay(image, boxes[:number], CLASSES, "")) for number in (1, 2, 3)]
    for fewer, more in zip(texts, texts[1:], strict=False):
        assert (more & fewer).sum() > 0.95 * fewer.sum(), "earlier labels are not covered"
        assert more.sum() > fewer.sum() + 50
