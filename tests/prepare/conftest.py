"""Small images on disk, in every kind that users bring."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.utils.files import Rejects


@pytest.fixture
def run(capsys):
    """Returns a function: what a command prints, or the message with which it ends."""

    def call(*args, command=prepare_dataset, fails=False):
        if not fails:
            command.main([str(arg) for arg in args])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            command.main([str(arg) for arg in args])
        return f"{error.value.code}{capsys.readouterr().err}"

    return call


@pytest.fixture
def noise():
    """A function: (height, width, 3) uint8 noise, the same for the same seed."""
    return lambda h, w, seed=0: np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


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

    def make(names=("a", "b", "c")):
        root = tmp_path / "kvasir"
        for i, name in enumerate(names):
            mask = np.zeros((40, 60), np.uint8)
            mask[10:30, 5 + i : 25 + i] = 255
            for folder, pixels in (("images", noise(40, 60, i)), ("masks", mask)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{name}.png")
        return root

    return make


@pytest.fixture
def coco_folder(tmp_path, noise):
    """Returns a function that writes three images of 60x40 and a COCO file, changed by `edit`:
    1.png and 2.png with a polygon lesion, 3.png without."""

    def make(edit=lambda coco: None):
        images, json_file = tmp_path / "images", tmp_path / "own.json"
        images.mkdir()
        coco = {"images": [], "categories": [{"id": 1, "name": "early gastric cancer"}]}
        for i in (1, 2, 3):
            Image.fromarray(noise(40, 60, i)).save(images / f"{i}.png")
            record = {"id": i, "file_name": f"{i}.png", "width": 60, "height": 40}
            coco["images"].append(record)
        polygon = [[10, 10, 30, 10, 30, 20, 10, 20]]
        lesion = {"category_id": 1, "segmentation": polygon, "bbox": [10, 10, 20, 10]}
        coco["annotations"] = [{"id": i, "image_id": i, **lesion} for i in (1, 2)]
        edit(coco)
        json_file.write_text(json.dumps(coco))
        return json_file, images

    return make


@pytest.fixture
def save(tmp_path, noise):
    """Returns a function: saves an image of noise, or of the pixels given, in the download."""

    def call(name, pixels=None, **options):
        path = tmp_path / "download" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if pixels is None:
            pixels = noise(40, 60, zlib.crc32(name.encode()))
        Image.fromarray(pixels).save(path, **options)
        return path

    return call


def prepared(out):
    """{file name: (image record, its annotations)} and the contents of a prepared data set."""
    records = {}
    for split in ("train", "val", "test"):
        content = json.loads((out / "annotations" / f"{split}.json").read_text())
        for image in content["images"]:
            lesions = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            records[image["file_name"]] = image | {"split": split}, lesions
    return records, content


@pytest.fixture
def prepare(tmp_path, run):
    """A function: prepares the download; its records, COCO content and what the command prints."""

    def call(form, *args):
        out = tmp_path / "out"
        text = run(form, "--root", tmp_path / "download", "--out", out, *args)
        return *prepared(out), text

    return call
