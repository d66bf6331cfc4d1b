"""Small images on disk, in every kind that users bring."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture():
    """Returns a function: (height, width, 3) uint8 noise, the same for the same seed."""

    def make(height, width, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def kvasir_folder(tmp_path, picture):
    """Returns a function that writes a folder in Kvasir-SEG's layout, a square lesion an image."""

    def make(names=("a", "b", "c"), height=40, width=60):
        root = tmp_path / "kvasir"
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            mask = np.zeros((height, width), np.uint8)
            mask[10:30, 5 + i : 25 + i] = 255
            Image.fromarray(picture(height, width, i)).save(root / "images" / f"{name}.png")
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        return root

    return make


@pytest.fixture
def coco_folder(tmp_path, picture):
    """Returns a function that writes images and a COCO file, the latter changed by `edit` before.

    Three images of 60x40: 1.png and 2.png with a polygon lesion, 3.png without.
    """

    def make(edit=lambda coco: None):
        images = tmp_path / "images"
        images.mkdir()
        for i in (1, 2, 3):
            Image.fromarray(picture(40, 60, i)).save(images / f"{i}.png")
        coco = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2, 3)
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 1,
                    "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
                    "bbox": [10, 10, 20, 10],
                }
                for i in (1, 2)
            ],
            "categories": [{"id": 1, "name": "early gastric cancer"}],
        }
        edit(coco)
        json_file = tmp_path / "own.json"
        json_file.write_text(json.dumps(coco))
        return json_file, images

    return make
