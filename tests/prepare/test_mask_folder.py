"""Folders of masks of every kind, pixel by pixel; Kvasir-SEG's layout and its real images."""

import json
import re
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from imrcnn_d2.data.formats import read_kvasir_seg, read_mask_folder
from imrcnn_d2.utils.files import BadInputError

TWO = np.zeros((40, 60), np.uint8)
TWO[5:15, 5:25] = 1
TWO[20:30, 40:50] = 2
TWO[35:37, 1:4] = 1  # a speck of 6 pixels
NOTHING = np.zeros((40, 60), np.uint8)
SQUARES = [(1, [5, 5, 20, 10], 200), (1, [40, 20, 10, 10], 100)]
PARTS = [(1, [1, 5, 24, 32], 206), (1, [40, 20, 10, 10], 100)]  # the speck with its instance


@pytest.fixture
def folder(tmp_path, noise):
    """Returns a function that saves images and masks by name; the folders of both."""

    def make(masks, images=("a", "b")):
        for i, name in enumerate(images):
            path = tmp_path / "images" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(40, 60, i)).save(path)
        for name, values in masks.items():
            path = tmp_path / "masks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = values if isinstance(values, Image.Image) else Image.fromarray(values)
            image.save(path)
        return tmp_path / "images", tmp_path / "masks"

    return make


@pytest.fixture
def masks(read):
    """Returns a function: samples, source and rejects of the two folders."""

    def call(folders, kind="binary", on_error="raise", **options):
        options |= {"images": folders[0], "masks": folders[1], "kind": kind}
        return read(read_mask_folder, on_error, **options)

    return call


@pytest.fixture
def kvasir(read):
    """Returns a function: samples, source and rejects of a folder in Kvasir-SEG's layout."""
    return lambda root, on_error="raise": read(read_kvasir_seg, on_error, root=root)


def lesions(sample):
    return [(a["category_id"], a["bbox"], a["area"]) for a in sample.annotations]


@pytest.mark.parametrize("value", [1, 255, "bool", "1 bit", "grey"])
def test_binary(folder, masks, value):
    if isinstance(value, int):
        mask = (TWO > 0).astype(np.uint8) * value
    elif value == "grey":  # as a scaled mask has it
        mask = (TWO > 0).astype(np.uint8) * 255
        mask[15, 5:25] = 100
    else:
        mask = Image.fromarray(TWO > 0).convert("1" if value == "1 bit" else None)
    nothing = NOTHING.copy()
    nothing[0, 0] = 9 * (value == "grey")  # and a JPEG's, which may have two values by chance
    (a, b), source, _ = masks(folder({"a.png": mask, "b.jpg": nothing}))
    assert (lesions(a), lesions(b)) == (SQUARES, [])
    assert source.categories == [{"id": 1, "name": "lesion"}]
    specks, empty = source.notes
    assert specks.startswith("1 specks of fewer than 16") and empty.startswith("1 images")
    # smaller ones on demand
    counts = [len(masks(folder({}), min_area=n)[0][0].annotations) for n in (1, 6, 7)]
    assert counts == [3, 3, 2]


def test_classes_and_instances(folder, masks):
    palette = Image.fromarray(TWO).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    folders = folder({"a.png": palette, "b.png": np.stack([TWO] * 3, axis=-1)})
    samples, source, _ = masks(folders, "classes", classes=["adenoma", "cancer"])
    expected = [(1, [5, 5, 20, 10], 200), (2, [40, 20, 10, 10], 100)]
    assert [lesions(sample) for sample in samples] == [expected, expected]
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    many = TWO.astype(np.uint16)
    many[many == 2] = 700
    folder({"a.png": many})
    (a, _), _, _ = masks(folders, "instances", classes=["polyp"])
    assert lesions(a) == PARTS
    for kind, classes, error, message in (
        ("classes", ["adenoma"], BadInputError, "value 2.* 1 adenoma|a.png: .*700"),
        ("x", [], ValueError, "'x'; .*binary, classes"),
        ("instances", ["a", "b"], ValueError, "instances .* not of 2"),
    ):
        with pytest.raises(error, match=message):
            masks(folders, kind, classes=classes)


@pytest.mark.parametrize("layout", ["{}/{}.png", "{}_{}.png"])
def test_a_file_for_each_instance(folder, masks, layout):
    files = {layout.format("a", i): TWO == i for i in (1, 2)}
    folders = folder({**files, layout.format("a10", 1): TWO > 9}, ["a", "a10"])
    (a, other), source, _ = masks(folders, "files")
    assert (lesions(a), lesions(other)) == (PARTS, [])
    assert source.categories == [{"id": 1, "name": "lesion"}]
    # one that could be of two images
    path = layout.format("a_2", 1)
    (folders[1] / layout.format("a", 2)).unlink()
    folders = folder({path: TWO == 1}, ["a", "a_2", "a10"])
    if "/" in layout:
        areas = [sum(area for _, _, area in lesions(s)) for s in masks(folders, "files")[0]]
        assert areas == [206, 0, 206]
    else:
        with pytest.raises(BadInputError, match="a_2_1.png: .*a_2 or a;"):
            masks(folders, "files")


def test_classes_in_the_names_of_files_and_a_suffix(folder, masks):
    files = {"a/early cancer_1.png": TWO == 1, "a/polyp-2.png": TWO == 2, "b_polyp.png": TWO == 1}
    folders = folder(files)
    (a, b), source, _ = masks(folders, "files")
    assert [c["name"] for c in source.categories] == ["early cancer", "polyp"]
    assert [lesion[0] for lesion in lesions(a) + lesions(b)] == [1, 2, 2]
    one_class = masks(folders, "files", classes=["x"])[0][0]
    assert [lesion[0] for lesion in lesions(one_class)] == [1, 1]
    with pytest.raises(BadInputError, match="'early cancer'; .*x, polyp"):
        masks(folders, "files", classes=["x", "polyp"])
    shutil.rmtree(folders[1])
    folder({"a_segmentation.png": TWO, "b_segmentation.png": TWO})
    assert len(masks(folders, "instances", suffix="_segmentation")[0]) == 2
    with pytest.raises(BadInputError, match="a_segmentation.png: mask without an image"):
        masks(folders, "instances")


COLOURS = np.stack([TWO, TWO * 0, TWO], axis=-1)
SPECK = np.pad(np.ones((2, 3), np.uint8), ((0, 38), (0, 57)))
MANY = np.arange(2400, dtype=np.uint16).reshape(40, 60)
BAD = [
    ({"b.png": TWO}, "classes", "a.png: .*--negatives"),
    ({"a.png": TWO[:30]}, "classes", "a.png: .*60x30"),
    ({"a.png": TWO}, "binary", "a.png: .*128 .* 2; .*--kind"),
    ({"a.png": COLOURS}, "classes", "a.png: is in colour"),
    ({"a.jpg": TWO}, "classes", "a.jpg: is a JPEG"),
    ({"a.png": SPECK}, "binary", "a.png: .*16 pixels"),
    ({"a.png": MANY}, "instances", "a.png: has 2399 .*1000"),
    ({"a.tiff": TWO.astype(np.float32)}, "classes", "a.tiff: .*whole numbers"),
    ({"a_1.png": TWO > 0, "a_2.png": TWO > 9}, "files", "a_2.png: has no part"),
    ({"a.png": TWO > 0, "a.bmp": TWO > 0}, "binary", "a.png: duplicate: .*a.bmp"),
]


@pytest.mark.parametrize(("files", "kind", "message"), BAD)
def test_bad_masks(folder, masks, files, kind, message):
    folders = folder({"b.png": TWO if kind == "classes" else TWO > 0, **files})
    options = {"classes": ["x", "y"]} if kind == "classes" else {}
    with pytest.raises(BadInputError, match=message):
        masks(folders, kind, **options)
    samples, _, errors = masks(folders, kind, "reject", **options)
    kept = ["a.png", "b.png"] if "duplicate" in message else ["b.png"]
    assert [sample.file_name for sample in samples] == kept and len(errors) == 1


def test_kvasir_seg(kvasir_folder, kvasir):
    root = kvasir_folder()
    Image.open(root / "masks" / "a.png").save(root / "masks" / "a.bmp")  # of another suffix
    (root / "masks" / "a.png").unlink()
    samples, source, _ = kvasir(root)
    boxes = {sample.file_name: sample.annotations[0]["bbox"] for sample in samples}
    assert boxes == {f"{name}.png": [5 + i, 10, 20, 20] for i, name in enumerate("abc")}
    assert source.categories == [{"id": 1, "name": "polyp", "supercategory": "lesion"}]
    for folder in ("images", "masks"):
        (root / folder).rename(root / "away")
        with pytest.raises(FileNotFoundError, match=folder):
            kvasir(root)
        (root / "away").rename(root / folder)


def put(image):
    return lambda path: image.save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("images/b.png", lambda path: path.write_text("no image"), "images/b.png: is no readable"),
        ("masks/b.png", cut, "masks/b.png: is no readable image"),
        ("masks/b.png", put(Image.new("L", (61, 40), 255)), "images/b.png: .*61x40"),
        ("masks/b.png", put(Image.new("L", (60, 40), 127)), "masks/b.png: empty mask"),
        ("masks/b.png", put(Image.fromarray(SPECK * 255)), "masks/b.png: .*16 pixels"),
        ("masks/b.png", lambda path: path.unlink(), "images/b.png: has no mask"),
        ("images/b.png", lambda path: path.unlink(), "masks/b.png: mask without an image"),
        ("images/b.tif", put(Image.new("RGB", (60, 40))), "images/b.tif: duplicate"),
        ("masks/b.tif", put(Image.new("L", (60, 40))), "masks/b.tif: duplicate"),
    ],
)
def test_bad_input(kvasir_folder, kvasir, file, damage, named):
    root = kvasir_folder()
    damage(root / file)
    with pytest.raises(BadInputError, match=named):
        kvasir(root)
    samples, _, errors = kvasir(root, "reject")
    kept = ["a.png", "b.png", "c.png"] if file.endswith(".tif") else ["a.png", "c.png"]
    assert [sample.file_name for sample in samples] == kept and len(errors) == 1


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_exif_rotated(kvasir_folder, kvasir, masks, rotated, orientation, annotated):
    """The lesion is bright in the image: it must be under the mask in what Detectron2 reads."""
    root = kvasir_folder(["a"])
    stored = np.zeros((40, 60), np.uint8)
    stored[5:15, 8:30] = 255
    pixels = np.repeat(stored[..., None], 3, axis=2)
    rotated(root / "images" / "a.png", orientation, pixels)
    shown = {3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}[orientation]
    mask = stored if annotated == "stored" else shown
    Image.fromarray(np.ascontiguousarray(mask)).save(root / "masks" / "a.png")
    bright = read_image(str(root / "images" / "a.png"), "L")[..., 0] > 0
    is_ambiguous = (orientation, annotated) == (3, "stored")  # nothing tells the two apart
    for samples, source, _ in (kvasir(root), masks((root / "images", root / "masks"))):
        lesion = mask_util.decode(samples[0].annotations[0]["segmentation"])
        assert np.array_equal(lesion, stored > 0 if is_ambiguous else bright)
        turned = annotated == "stored" and orientation == 6
        assert any("EXIF-rotated" in note for note in source.notes) != turned


def published(**changes):
    box = {"label": "polyp", "xmin": 5, "ymin": 10, "xmax": 25, "ymax": 30, **changes}
    return {"height": 40, "width": 60, "bbox": [box]}


@pytest.mark.parametrize("name", ["kavsir_bboxes.json", "bounding-boxes.json"])
def test_published_boxes(kvasir_folder, kvasir, name):
    root = kvasir_folder([*"abcd"])
    entries = {"a": published(), "b": published(xmin=35, xmax=50)}
    entries |= {"c": {**published(), "bbox": []}, "d": {**published(), "width": 600}}
    (root / name).write_text(json.dumps(entries))
    samples, source, _ = kvasir(root)
    assert len(samples) == 4
    expected = ("b.png: .*0.00", "c.png: 1 .* 0", "d.png: .*600x40")
    assert all(re.search(text, note) for text, note in zip(expected, source.notes[:3], strict=True))
    assert source.notes[-1].startswith("4 images compared") and len(source.notes) == 5
    for broken in ("{", "[]", '{"a": {"bbox": [{"xmin": 1}]}}', '{"a": 3}'):
        (root / name).write_text(broken)
        with pytest.raises(BadInputError, match=name):
            kvasir(root)
        assert len(kvasir(root, "reject")[0]) == 4
