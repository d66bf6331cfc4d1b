"""Folders of masks of every kind, drawn here pixel by pixel."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats import read_kvasir_seg, read_mask_folder
from imrcnn_d2.utils.files import BadInputError, Rejects

TWO = np.zeros((40, 60), np.uint8)
TWO[5:15, 5:25] = 1
TWO[20:30, 40:50] = 2
TWO[35:37, 1:4] = 1  # a speck of 6 pixels


@pytest.fixture
def folder(tmp_path, picture):
    """Returns a function that saves images and masks by name; the folders of both."""

    def make(masks, images=("a", "b")):
        for i, name in enumerate(images):
            path = tmp_path / "images" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(40, 60, i)).save(path)
        for name, values in masks.items():
            path = tmp_path / "masks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = values if isinstance(values, Image.Image) else Image.fromarray(values)
            image.save(path)
        return tmp_path / "images", tmp_path / "masks"

    return make


def read(folders, kind="binary", on_error="raise", **options):
    rejects = Rejects(on_error)
    source = read_mask_folder(*folders, rejects, kind, **options)
    return list(source.samples), source, rejects.errors


def found(sample):
    return [(a["category_id"], a["bbox"], a["area"]) for a in sample.annotations]


SQUARES = [(1, [5, 5, 20, 10], 200), (1, [40, 20, 10, 10], 100)]


@pytest.mark.parametrize("value", [1, 255, "bool", "1 bit"])
def test_binary(folder, value):
    if isinstance(value, int):
        mask = (TWO > 0).astype(np.uint8) * value
    else:
        mask = Image.fromarray(TWO > 0)
        mask = mask.convert("1") if value == "1 bit" else mask
    (a, b), source, _ = read(folder({"a.png": mask, "b.png": np.zeros((40, 60), np.uint8)}))
    assert (found(a), found(b)) == (SQUARES, [])
    assert source.categories == [{"id": 1, "name": "lesion"}]
    assert source.notes == [
        "1 specks of fewer than 16 pixels left out of the masks",
        "1 images have an empty mask and are taken as lesion-free",
    ]
    # smaller ones on demand
    assert len(read(folder({}), min_area=1)[0][0].annotations) == 3


def test_binary_with_greys(folder):
    """As a scaled mask has them; and a JPEG's, which may have two values by chance."""
    scaled = (TWO > 0).astype(np.uint8) * 255
    scaled[15, 5:25] = 100
    nothing = np.zeros((40, 60), np.uint8)
    nothing[0, 0] = 9
    folders = folder({"a.png": scaled, "b.jpg": nothing})
    (a, b), _, _ = read(folders)
    assert (found(a), found(b)) == (SQUARES, [])


def test_as_kvasir_seg_is_read(kvasir_original):
    ours = read((kvasir_original / "images", kvasir_original / "masks"))[0]
    theirs = list(read_kvasir_seg(kvasir_original, Rejects()).samples)
    assert [(s.file_name, s.annotations) for s in ours] == [
        (s.file_name, s.annotations) for s in theirs
    ]


def test_classes(folder):
    palette = Image.fromarray(TWO).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    folders = folder({"a.png": palette, "b.png": np.stack([TWO] * 3, axis=-1)})
    samples, source, _ = read(folders, "classes", classes=["adenoma", "cancer"])
    expected = [(1, [5, 5, 20, 10], 200), (2, [40, 20, 10, 10], 100)]
    assert [found(sample) for sample in samples] == [expected, expected]
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    with pytest.raises(BadInputError, match="has the value 2; the classes are 0 background, 1 ad"):
        read(folders, "classes", classes=["adenoma"])


def test_instances(folder):
    many = TWO.astype(np.uint16)
    many[many == 2] = 700
    (a,), _, _ = read(folder({"a.png": many}, ["a"]), "instances", classes=["polyp"])
    # whole, in two parts
    assert found(a) == [(1, [1, 5, 24, 32], 206), (1, [40, 20, 10, 10], 100)]


@pytest.mark.parametrize("layout", ["{}/{}.png", "{}_{}.png"])
def test_a_file_for_each_instance(folder, layout):
    first, second, none = TWO == 1, TWO == 2, TWO > 9
    masks = {layout.format("a", i): m for i, m in ((1, first), (2, second))}
    folders = folder({**masks, layout.format("a10", 1): none}, ["a", "a10"])
    (a, other), source, _ = read(folders, "files")
    assert found(a) == [(1, [1, 5, 24, 32], 206), (1, [40, 20, 10, 10], 100)]
    assert found(other) == [] and source.categories == [{"id": 1, "name": "lesion"}]


def test_a_file_that_could_be_of_two_images(folder):
    folders = folder({"a_2_1.png": TWO == 1}, ["a", "a_2"])
    with pytest.raises(BadInputError, match="a_2_1.png: could be of a_2 or a; put it into a fold"):
        read(folders, "files")
    folders = folder({"a/1.png": TWO == 1, "a_2/1.png": TWO == 2}, ["a", "a_2"])
    (folders[1] / "a_2_1.png").unlink()
    assert [found(s)[0][2] for s in read(folders, "files")[0]] == [206, 100]


def test_classes_in_the_names_of_files(folder):
    masks = {"a/early cancer_1.png": TWO == 1, "a/polyp-2.png": TWO == 2, "b_polyp.png": TWO == 1}
    folders = folder(masks)
    (a, b), source, _ = read(folders, "files")
    assert [c["name"] for c in source.categories] == ["early cancer", "polyp"]
    assert [f[0] for f in found(a) + found(b)] == [1, 2, 2]
    assert [f[0] for f in found(read(folders, "files", classes=["x"])[0][0])] == [1, 1]
    with pytest.raises(BadInputError, match="unknown label 'early cancer'; the classes are x, pol"):
        read(folders, "files", classes=["x", "polyp"])


def test_a_suffix(folder):
    folders = folder({"a_segmentation.png": TWO, "b_segmentation.png": TWO})
    assert len(read(folders, "instances", suffix="_segmentation")[0]) == 2
    with pytest.raises(BadInputError, match="a_segmentation.png: mask without an image"):
        read(folders, "instances")


@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_exif_rotated(folder, drawn_on, picture):
    images, masks = folder({}, ["a"])
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(40, 60)).save(images / "a.png", exif=exif)
    masks.mkdir()
    stored = (TWO == 2).astype(np.uint8)
    mask = stored if drawn_on == "stored" else np.rot90(stored, -1)
    Image.fromarray(np.ascontiguousarray(mask)).save(masks / "a.png")
    (sample,), source, _ = read((images, masks))
    decoded = mask_util.decode(sample.annotations[0]["segmentation"])
    assert np.array_equal(decoded, np.rot90(stored, -1))
    assert len(source.notes) == (2 if drawn_on == "shown" else 1)


COLOURS = np.stack([TWO, TWO * 0, TWO], axis=-1)
BAD = {
    "missing": ({"b.png": TWO}, "classes", "a.png: has no mask; .* --negatives"),
    "size": ({"a.png": TWO[:30]}, "classes", "a.png: is 60x40, but its annotation says 60x30"),
    "values": ({"a.png": TWO}, "binary", "a.png: no pixel is 128 or brighter, the highest is 2"),
    "colour": ({"a.png": COLOURS}, "classes", "a.png: is in colour: save it with one channel"),
    "jpeg": ({"a.jpg": TWO}, "classes", "a.jpg: is a JPEG, which does not keep numbers"),
    "small": ({"a.png": np.pad(np.ones((2, 3), np.uint8), ((0, 38), (0, 57)))}, "binary",
              "a.png: has no part of at least 16 pixels"),
    "many instances": ({"a.png": np.arange(2400, dtype=np.uint16).reshape(40, 60)}, "instances",
                       "a.png: has 2399 instances, more than 1000"),
    "fractions": ({"a.tiff": TWO.astype(np.float32)}, "classes", "its pixels are no whole numbers"),
    "empty instance": ({"a_1.png": TWO > 0, "a_2.png": TWO > 9}, "files", "a_2.png: has no part"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_masks(folder, name):
    masks, kind, message = BAD[name]
    folders = folder({"b.png": TWO if kind == "classes" else TWO > 0, **masks})
    options = {"classes": ["x", "y"]} if kind == "classes" else {}
    with pytest.raises(BadInputError, match=message):
        read(folders, kind, **options)
    samples, _, errors = read(folders, kind, "reject", **options)
    assert [sample.file_name for sample in samples] == ["b.png"] and len(errors) == 1


def test_bad_options(folder):
    folders = folder({"a.png": TWO, "b.png": TWO})
    with pytest.raises(ValueError, match="the kind is 'x'; choose from binary, classes"):
        read(folders, "x")
    with pytest.raises(ValueError, match="masks of kind instances are of one class, not of 2"):
        read(folders, "instances", classes=["a", "b"])


def test_two_masks_of_one_image(folder):
    folders = folder({"a.png": TWO, "a.bmp": TWO, "b.png": TWO})
    with pytest.raises(BadInputError, match="a.png: duplicate: same image as .*a.bmp"):
        read(folders)
