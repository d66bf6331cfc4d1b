"""Small images on disk, in every kind that users bring."""

import json

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.utils.files import Rejects


@pytest.fixture
def noise():
    """Returns a function: (height, width, 3) uint8 noise, the same for the same seed."""

    def make(height, width, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def read():
    """Returns a function: samples, source and rejects of a reader with these arguments."""

    def call(reader, on_error="raise", **arguments):
        rejects = Rejects(on_error)
        source = reader(**arguments, rejects=rejects)
        return list(source.samples), source, rejects.errors

    return call


@pytest.fixture
def rotated(noise):
    """Returns a function that saves a 60x40 image whose EXIF orientation turns it."""

    def save(path, orientation=6, pixels=None):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(noise(40, 60) if pixels is None else pixels).save(path, exif=exif)

    return save


@pytest.fixture
def kvasir_folder(tmp_path, noise):
    """Returns a function that writes a folder in Kvasir-SEG's layout, each image with a square."""

    def make(names=("a", "b", "c"), height=40, width=60):
        root = tmp_path / "kvasir"
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            mask = np.zeros((height, width), np.uint8)
            mask[10:30, 5 + i : 25 + i] = 255
            Image.fromarray(noise(height, width, i)).save(root / "images" / f"{name}.png")
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        return root

    return make


@pytest.fixture
def coco_folder(tmp_path, noise):
    """Returns a function that writes images and a COCO file, the latter changed by `edit` before.

    Three images of 60x40: 1.png and 2.png with a polygon lesion, 3.png without.
    """

    def make(edit=lambda coco: None):
        images = tmp_path / "images"
        images.mkdir()
        for i in (1, 2, 3):
            Image.fromarray(noise(40, 60, i)).save(images / f"{i}.png")
        records = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2, 3)]
        polygon = [[10, 10, 30, 10, 30, 20, 10, 20]]
        lesion = {"category_id": 1, "segmentation": polygon, "bbox": [10, 10, 20, 10]}
        annotations = [{"id": i, "image_id": i, **lesion} for i in (1, 2)]
        categories = [{"id": 1, "name": "early gastric cancer"}]
        coco = {"images": records, "annotations": annotations, "categories": categories}
        edit(coco)
        json_file = tmp_path / "own.json"
        json_file.write_text(json.dumps(coco))
        return json_file, images

    return make
