"""Images and masks go through the same augmentation; lesion-free images take part."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from pycocotools import mask as mask_util

from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.mapper import LesionMapper
from imrcnn_d2.engine import load_config

HEIGHT, WIDTH = 60, 90


@pytest.fixture
def sample(tmp_path):
    """A dark image with one bright, lopsided lesion, and its dataset dict."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 20:60] = 1
    mask[30:40, 20:30] = 1
    cv2.imwrite(str(tmp_path / "image.png"), np.repeat(mask[:, :, None] * 200 + 20, 3, axis=2))
    annotation = {
        "bbox": [20, 10, 60, 40],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "segmentation": mask_util.encode(np.asfortranarray(mask)),
    }
    return {
        "file_name": str(tmp_path / "image.png"),
        "image_id": 7,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [annotation],
    }


def load(**keys):
    opts = {
        "MODEL.DEVICE": "cpu",
        "INPUT.MIN_SIZE_TRAIN": (HEIGHT,),
        "INPUT.AUG.COLOR": 0.0,
        **keys,
    }
    return load_config("configs/imrcnn_lite.yaml", [x for kv in opts.items() for x in kv])


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_follows_the_image(sample, seed):
    np.random.seed(seed)
    mapped = LesionMapper(load(), is_train=True)(sample)
    instances = mapped["instances"]
    bright = mapped["image"][0] > 120
    # The image is interpolated at most in a shift of half a pixel: edges may differ, no more.
    mask = instances.gt_masks.tensor[0]
    overlap = (bright & mask).sum() / (bright | mask).sum()
    assert overlap > 0.9
    box = instances.gt_boxes.tensor[0]
    torch.testing.assert_close(
        box, BitMasks(bright[None]).get_bounding_boxes().tensor[0], atol=1.5, rtol=0
    )


def test_quarter_turns_lose_no_pixel():
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    turn = next(
        a for a in build_augmentation(load(), is_train=True) if isinstance(a, T.RandomRotation)
    )
    seen = set()
    for seed in range(20):
        np.random.seed(seed)
        turned = turn.get_transform(image).apply_image(image)
        quarters = [k for k in range(4) if np.array_equal(turned, np.rot90(image, k))]
        assert len(quarters) == 1, "a quarter turn has to move whole pixels"
        seen.update(quarters)
    assert seen == {0, 1, 2, 3}


def test_each_step_has_its_switch():
    def steps(**keys):
        return [type(a).__name__ for a in build_augmentation(load(**keys), is_train=True)]

    off = {"INPUT.AUG.VFLIP_PROB": 0.0, "INPUT.AUG.ROT90": False, "INPUT.RANDOM_FLIP": "none"}
    assert steps(**off) == ["ResizeShortestEdge"]
    assert steps(**{**off, "INPUT.AUG.ROT90": True}) == ["ResizeShortestEdge", "RandomRotation"]
    assert steps(**{**off, "INPUT.AUG.VFLIP_PROB": 0.5}) == ["ResizeShortestEdge", "RandomFlip"]
    assert steps(**{**off, "INPUT.AUG.COLOR": 0.2})[1:] == [
        "RandomBrightness",
        "RandomContrast",
        "RandomSaturation",
    ]
    inference = build_augmentation(load(), is_train=False)
    assert [type(a).__name__ for a in inference] == ["ResizeShortestEdge"]


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize(
    ("mask_format", "kind"), [("bitmask", BitMasks), ("polygon", PolygonMasks)]
)
def test_a_lesion_free_image_has_empty_masks(sample, crop, mask_format, kind):
    sample["annotations"] = []
    cfg = load(**{"INPUT.CROP.ENABLED": crop, "INPUT.MASK_FORMAT": mask_format})
    instances = LesionMapper(cfg, is_train=True)(sample)["instances"]
    assert len(instances) == 0
    assert isinstance(instances.gt_masks, kind) and len(instances.gt_masks) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)


def test_a_crowd_alone_is_no_lesion_to_learn(sample):
    sample["annotations"][0]["iscrowd"] = 1
    assert len(LesionMapper(load(), is_train=True)(sample)["instances"]) == 0


def test_the_dataset_dict_is_left_as_it_was(sample):
    LesionMapper(load(), is_train=True)(sample)
    assert len(sample["annotations"]) == 1 and "image" not in sample
