"""Kvasir-SEG's layout, its real images, and everything that can be wrong with it."""

import json
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image
from scipy import ndimage

from imrcnn_d2.data.formats import read_kvasir_seg
from imrcnn_d2.utils.files import BadInputError, Rejects


def read(root, on_error="raise", **kwargs):
    rejects = Rejects(on_error)
    source = read_kvasir_seg(root, rejects, **kwargs)
    return list(source.samples), source.notes, rejects.errors


def test_samples(kvasir_folder):
    samples, notes, _ = read(kvasir_folder())
    assert [sample.file_name for sample in samples] == ["a.png", "b.png", "c.png"]
    assert [sample.annotations[0]["bbox"] for sample in samples] == [
        [5, 10, 20, 20],
        [6, 10, 20, 20],
        [7, 10, 20, 20],
    ]
    assert notes == ["0 specks of fewer than 16 pixels left out of the masks"]


def test_real_masks(kvasir_original):
    samples, notes, _ = read(kvasir_original)
    assert len(samples) == 5
    for sample in samples:
        mask = Image.open(kvasir_original / "masks" / sample.file_name).convert("L")
        white = np.asarray(mask) >= 128
        labels, count = ndimage.label(white, structure=np.ones((3, 3)))
        areas = ndimage.sum_labels(white, labels, range(1, count + 1))
        assert sorted(a["area"] for a in sample.annotations) == sorted(areas[areas >= 16])
        lesions = [mask_util.decode(a["segmentation"]) for a in sample.annotations]
        assert np.array_equal(sum(lesions), np.isin(labels, 1 + np.flatnonzero(areas >= 16)))
    assert notes == ["1 specks of fewer than 16 pixels left out of the masks"]


def test_min_area(kvasir_folder):
    root = kvasir_folder(["a"])
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:20] = 255
    mask[30:33, 30:35] = 255
    Image.fromarray(mask).save(root / "masks" / "a.png")
    assert [len(read(root, min_area=n)[0][0].annotations) for n in (15, 16)] == [2, 1]
    assert read(root)[1] == ["1 specks of fewer than 16 pixels left out of the masks"]


def test_mask_and_image_may_differ_in_suffix(kvasir_folder):
    root = kvasir_folder(["a"])
    Image.open(root / "masks" / "a.png").save(root / "masks" / "a.bmp")
    (root / "masks" / "a.png").unlink()
    assert len(read(root)[0]) == 1


def put_text(path):
    path.write_text("no image")


def put_other_size(path):
    Image.new("L", (61, 40), 255).save(path)


def put_black(path):
    Image.new("L", (60, 40), 127).save(path)


def put_speck(path):
    speck = Image.new("L", (60, 40))
    speck.putpixel((3, 3), 255)
    speck.save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def duplicate(path):
    shutil.copy(path, path.with_suffix(".tif"))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("images/b.png", put_text, "images/b.png: is no readable image"),
        ("images/b.png", cut, "images/b.png: is no readable image"),
        ("masks/b.png", put_text, "masks/b.png: is no readable image"),
        ("masks/b.png", cut, "masks/b.png: is no readable image"),
        ("masks/b.png", put_other_size, "images/b.png: is 60x40, but its annotation says 61x40"),
        ("masks/b.png", put_black, "masks/b.png: empty mask"),
        ("masks/b.png", put_speck, "masks/b.png: empty mask: nothing of at least 16 pixels"),
        ("masks/b.png", lambda path: path.unlink(), "images/b.png: has no mask"),
        ("images/b.png", lambda path: path.unlink(), "masks/b.png: mask without an image"),
    ],
)
def test_bad_input(kvasir_folder, file, damage, message):
    root = kvasir_folder()
    damage(root / file)
    with pytest.raises(BadInputError, match=message):
        read(root)
    samples, _, errors = read(root, "reject")
    assert [sample.file_name for sample in samples] == ["a.png", "c.png"]
    assert len(errors) == 1


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_name(kvasir_folder, folder):
    root = kvasir_folder()
    duplicate(root / folder / "b.png")
    with pytest.raises(BadInputError, match=f"{folder}/b.tif: duplicate"):
        read(root)
    assert len(read(root, "reject")[0]) == 3


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_folder(kvasir_folder, folder):
    root = kvasir_folder()
    shutil.rmtree(root / folder)
    with pytest.raises(FileNotFoundError, match=folder):
        read(root)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_masks_of_exif_rotated_images(kvasir_folder, orientation, drawn_on):
    """The lesion is bright in the image: it must be under the mask in what Detectron2 reads."""
    root = kvasir_folder(["a"])
    stored = np.zeros((40, 60), np.uint8)
    stored[5:15, 8:30] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).convert("RGB").save(root / "images" / "a.png", exif=exif)
    shown = {3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}[orientation]
    mask = stored if drawn_on == "stored" else shown
    Image.fromarray(np.ascontiguousarray(mask)).save(root / "masks" / "a.png")
    (sample,), notes, _ = read(root)
    bright = read_image(str(root / "images" / "a.png"), "L")[..., 0] > 0
    lesion = mask_util.decode(sample.annotations[0]["segmentation"])
    if (orientation, drawn_on) == (3, "stored"):  # nothing tells the two apart: said, not guessed
        assert np.array_equal(lesion, stored > 0)
        assert "EXIF-rotated" in notes[0]
    else:
        assert np.array_equal(lesion, bright)


def boxes(**changes):
    box = {"label": "polyp", "xmin": 5, "ymin": 10, "xmax": 25, "ymax": 30, **changes}
    return {"height": 40, "width": 60, "bbox": [box]}


@pytest.mark.parametrize(
    "name", ["kavsir_bboxes.json", "kvasir_bboxes.json", "bounding-boxes.json"]
)
def test_published_boxes(kvasir_folder, name):
    root = kvasir_folder()
    entries = {"a": boxes(), "b": boxes(xmin=35, xmax=50), "c": {**boxes(), "bbox": []}}
    (root / name).write_text(json.dumps(entries))
    samples, notes, _ = read(root)
    assert len(samples) == 3
    assert len(notes) == 4
    assert "b.png: a published box overlaps the mask's box by only 0.00" in notes[0]
    assert "c.png: 1 lesions in the mask, 0 published boxes" in notes[1]
    assert notes[-1] == "3 images compared with the bounding-box file"


def test_published_boxes_of_another_size(kvasir_folder):
    root = kvasir_folder(["a"])
    (root / "kavsir_bboxes.json").write_text(json.dumps({"a": {**boxes(), "width": 600}}))
    assert "bounding-box file says 600x40" in read(root)[1][0]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"bbox": [{"xmin": 1}]}}', '{"a": 3}'])
def test_broken_bounding_box_file(kvasir_folder, text):
    root = kvasir_folder()
    (root / "kavsir_bboxes.json").write_text(text)
    with pytest.raises(BadInputError, match="kavsir_bboxes.json: is no (bounding-box file|JSON)"):
        read(root)
    assert len(read(root, "reject")[0]) == 3
