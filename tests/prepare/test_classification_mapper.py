"""The whole image in a square; the augmentation of training is that of INPUT."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.data.loader import seed_generators
from imrcnn_d2.data.mapper import ClassificationMapper


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.INPUT.SIZE = 32
    cfg.INPUT.FORMAT = "RGB"
    return cfg


@pytest.fixture
def record(tmp_path):
    """An image of 60x40: left third red, the rest green, a blue line at the bottom."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 1] = pixels[36:, :, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "label": 2, "image_id": 7, "centre": "A"}


def test_nothing_is_cut_off(cfg, record):
    sample = ClassificationMapper(cfg, is_train=False)(record)
    image = sample.pop("image")
    assert sample == record
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 32, 32))
    shares = (image.float() / 255).mean(dim=(1, 2))
    np.testing.assert_allclose(shares, (1 / 3, 2 / 3, 1 / 10), atol=0.03)
    cfg.INPUT.FORMAT = "BGR"
    swapped = ClassificationMapper(cfg, is_train=False)(record)["image"]
    assert torch.equal(swapped, image.flip(0))


def test_training_augments_and_depends_on_the_seed_alone(cfg, record):
    cfg.INPUT.AUG.VFLIP_PROB, cfg.INPUT.AUG.ROT90, cfg.INPUT.AUG.COLOR = 0.5, True, 0.2
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "relative_range"
    cfg.INPUT.CROP.SIZE = [0.7, 0.7]
    mapper = ClassificationMapper(cfg, is_train=True)

    def draw(seed):
        seed_generators(seed)
        return mapper(record)["image"]

    images = [draw(seed) for seed in range(12)]
    assert {tuple(image.shape) for image in images} == {(3, 32, 32)}
    assert torch.equal(draw(3), images[3])
    assert len({image.numpy().tobytes() for image in images}) == 12
    # The red third is up, down, left and right of the rest.
    sides = set()
    for image in images:
        red = image[0].float()
        halves = red[:16].mean(), red[16:].mean(), red[:, :16].mean(), red[:, 16:].mean()
        sides.add(int(np.argmax(halves)))
    assert sides == {0, 1, 2, 3}


def test_an_unknown_size_is_refused(cfg):
    cfg.INPUT.SIZE = 0
    with pytest.raises(ValueError, match="INPUT.SIZE is 0"):
        ClassificationMapper(cfg)
