"""The predictor gives what Detectron2's own evaluation gives, for every kind of input."""

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from PIL import Image

from imrcnn_d2.data.mapper import LesionMapper
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import load_model

from .conftest import TAU, random_image


def same(one, two, tolerance=1e-4):
    assert one.image_size == two.image_size
    assert len(one) == len(two)
    for field in ("scores", "pred_classes"):
        torch.testing.assert_close(one.get(field), two.get(field), rtol=0, atol=tolerance)
    boxes = one.pred_boxes.tensor, two.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=100 * tolerance)
    assert (one.pred_masks != two.pred_masks).float().mean() < 1e-3


def test_it_is_what_the_evaluation_sees(predictor, tiny_run, kvasir_original):
    paths = sorted((kvasir_original / "images").iterdir())[:2]
    records = []
    for number, path in enumerate(paths):
        width, height = Image.open(path).size
        size = {"width": width, "height": height}
        records.append({"file_name": str(path), "image_id": number, "annotations": [], **size})
    loaded = load_model(None, tiny_run / "model_best.pth")
    mapper = LesionMapper(loaded.cfg, is_train=False)
    with torch.no_grad():
        loader = build_detection_test_loader(records, mapper=mapper, num_workers=0)
        expected = [loaded.model(batch)[0]["instances"] for batch in loader]
    found = predictor(paths)
    assert all(len(instances) for instances in found)
    for one, two in zip(found, expected, strict=True):
        same(one, two)


def test_batches_change_nothing(predictor):
    images = [
        random_image(seed, *size) for seed, size in enumerate([(60, 80)] * 3 + [(80, 60)] * 2)
    ]
    alone, together = predictor(images), predictor(images, batch_size=4)
    for one, two in zip(alone, together, strict=True):
        same(one, two)
    same(predictor(images[3]), alone[3])
    assert alone[3].image_size == (80, 60)


def test_files_and_arrays(predictor, image_folder):
    path = image_folder / "a.png"
    same(predictor(path), predictor(random_image(0)))
    same(predictor([str(path)])[0], predictor(random_image(0)))


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((4, 5), np.uint8), r"\(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\)"),
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.zeros((0, 5, 3), np.uint8), "5x0"),
        (np.zeros((1, 5000, 3), np.uint8), "5000x1"),
    ],
)
def test_what_is_no_image_is_named(predictor, array, named):
    with pytest.raises(ValueError, match=named):
        predictor([array])


def test_the_order_of_channels_is_the_config_s(predictor, tiny_run):
    turned = load_model(None, tiny_run / "model_best.pth").cfg.clone()
    turned.defrost()
    turned.INPUT.FORMAT = "BGR"
    other = Predictor(turned, tiny_run / "model_best.pth")
    assert torch.equal(other.prepare(random_image(0)), predictor.prepare(random_image(0)).flip(0))


def test_tau_is_that_of_the_weights_unless_given(predictor, tiny_run):
    assert predictor.tau == predictor.metadata["tau"] == TAU
    other = Predictor(None, tiny_run / "model_best.pth", tau=0.25)
    assert other.tau == other.metadata["tau"] == 0.25
    assert predictor.classes == ["polyp"]
    assert predictor.metadata["model"] == "IMR-CNN"


def test_a_device_of_another_machine_is_not_looked_for(tiny_run):
    cfg = load_model(None, tiny_run / "model_best.pth").cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda:7"
    assert len(Predictor(cfg, tiny_run / "model_best.pth")(random_image(0)))
