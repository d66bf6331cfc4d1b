"""Folders of masks of every kind, pixel by pixel; Kvasir-SEG's layout and its real images."""

import json
import os
import re
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from imrcnn_d2.data.formats import FORMATS, read_mask_folder
from imrcnn_d2.utils.files import BadInputError

read_kvasir_seg = FORMATS["kvasir-seg"].read_folder

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
        files = {f"images/{name}.png": noise(40, 60, i) for i, name in enumerate(images)}
        for name, values in (files | {f"masks/{name}": masks[name] for name in masks}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            image = values if isinstance(values, Image.Image) else Image.fromarray(values)
            image.save(tmp_path / name)
        return tmp_path / "images", tmp_path / "masks"

    return make


@pytest.fixture
def masks(read):
    """A function: samples, source and rejects of the two folders."""
    return lambda folders, kind="binary", on_error="raise", **options: read(
        read_mask_folder, on_error, images=folders[0], masks=folders[1], kind=kind, **options
    )


def lesions(sample):
    return [(a["category_id"], a["bbox"], a["area"]) for a in sample.annotations]


@pytest.mark.parametrize("kind", ["1", "255", "bool", "1 bit", "grey", "video"])
def test_binary(folder, masks, kind):
    mask, nothing = (TWO > 0).astype(np.uint8), NOTHING.copy()
    if kind == "video":
        mask = np.uint8([16, 235])[mask]
    mask *= {"255": 255, "grey": 128}.get(kind, 1)
    if kind == "grey":  # as a scaled mask has it, and a JPEG of two values by chance
        mask[15, 5:25], nothing[0, 0] = 127, 9
    elif "b" in kind:
        mask = Image.fromarray(TWO > 0).convert("1" if kind == "1 bit" else None)
    (a, b), source, _ = masks(folder({"a.png": mask, "b.jpg": nothing}))
    assert (lesions(a), lesions(b)) == (SQUARES, [])
    assert source.categories == [{"id": 1, "name": "lesion"}]
    specks, empty = source.notes
    assert specks.startswith("1 specks of fewer than 16") and empty.startswith("1 images")
    # smaller ones on demand
    counts = [len(masks(folder({}), min_area=n)[0][0].annotations) for n in (1, 6, 7)]
    assert counts == [3, 3, 2]


def test_what_is_transparent_is_background(folder, masks):
    """Whatever colour it has beneath, as Photoshop writes white; black on it could be either."""
    lesion = TWO > 0
    white = np.full((40, 60, 4), 255, np.uint8)
    white[..., 3] = 255 * lesion
    for image in (white, white[..., [0, 3]]):
        (a, b), _, _ = masks(folder({"a.png": image, "b.png": NOTHING}))
        assert (lesions(a), lesions(b)) == (SQUARES, [])
    nothing = np.zeros((40, 60, 4), np.uint8)
    assert not lesions(masks(folder({"a.png": nothing}))[0][0])
    black, hidden = nothing.copy(), nothing.copy()
    black[..., 3] = 255 * lesion
    hidden[..., :3] = 255 * lesion[..., None]
    for image in (black, hidden):
        with pytest.raises(BadInputError, match="a.png: .*transparent"):
            masks(folder({"a.png": image}))


def test_masks_without_a_lesion_or_without_a_background(folder, masks):
    for full in (np.full((40, 60), 255, np.uint8), np.ones((40, 60), bool)):
        (a, _), _, _ = masks(folder({"a.png": full, "b.png": NOTHING}))
        assert lesions(a) == [(1, [0, 0, 60, 40], 40 * 60)]
    for other in (np.full((40, 60), 16, np.uint8), 1 + (TWO > 0).astype(np.uint8)):
        with pytest.raises(BadInputError, match=f"a.png: .*{other.max()}"):
            masks(folder({"a.png": other}))


def test_classes_and_instances(folder, masks):
    palette = Image.fromarray(TWO).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    folders = folder({"a.png": palette, "b.png": np.stack([TWO] * 3, axis=-1)})
    samples, source, _ = masks(folders, "classes", classes=["adenoma", "cancer"])
    expected = [SQUARES[0], (2, *SQUARES[1][1:])]
    assert [lesions(sample) for sample in samples] == [expected, expected]
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    (a, _), _, _ = masks(folder({"a.png": MANY % 1001}), "instances")
    assert len(lesions(a)) == 1000
    folder({"a.png": np.uint16([0, 1, 700])[TWO]})
    (a, _), _, _ = masks(folders, "instances", classes=["polyp"])
    assert lesions(a) == PARTS
    for kind, classes, error, message in (
        ("classes", ["adenoma"], BadInputError, "value 2.* 1 adenoma|a.png: .*700"),
        ("x", [], ValueError, "'x'; .*binary, classes"),
        ("instances", ["a", "b"], ValueError, "instances .* not of 2"),
        ("binary", ["a", "b"], ValueError, "binary .* not of 2"),
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
    (folders[1] / layout.format("a", 2)).unlink()
    folders = folder({layout.format("a_2", 1): TWO == 1}, ["a", "a_2", "a10"])
    if "/" in layout:
        assert [len(lesions(sample)) for sample in masks(folders, "files")[0]] == [1, 0, 1]
    else:
        with pytest.raises(BadInputError, match="a_2_1.png: .*a_2 or a;"):
            masks(folders, "files")


def test_classes_in_the_names_of_files_and_a_suffix(folder, masks):
    files = {"a/early cancer_1.png": TWO == 1, "a/polyp-2.png": TWO == 2, "b_polyp.png": TWO == 1}
    folders = folder(files)
    (a, b), source, _ = masks(folders, "files")
    assert [c["name"] for c in source.categories] == ["early cancer", "polyp"]
    assert [lesion[0] for lesion in lesions(a) + lesions(b)] == [1, 2, 2]
    (a, b), _, _ = masks(folders, "files", classes=["x"])
    assert [lesion[0] for lesion in lesions(a)] == [1, 1]
    with pytest.raises(BadInputError, match="'early cancer'; .*x, polyp"):
        masks(folders, "files", classes=["x", "polyp"])
    shutil.rmtree(folders[1])
    folder({"a_segmentation.png": TWO, "b_segmentation.png": TWO})
    assert len(masks(folders, "instances", suffix="_segmentation")[0]) == 2
    with pytest.raises(BadInputError, match="a_segmentation.png: .* a .*--suffix _segmentation"):
        masks(folders, "instances")


COLOURS = np.stack([TWO, TWO * 0, TWO], axis=-1)
SPECK = np.pad(np.ones((2, 3), np.uint8), ((0, 38), (0, 57)))
MANY = np.arange(2400, dtype=np.uint16).reshape(40, 60) % 1002
BAD = [
    ({"b.png": TWO}, "classes", "a.png: has no mask"),
    ({"a.png": TWO[:30]}, "classes", "a.png: .*60x30"),
    ({"a.png": np.uint8([1, 2, 127])[TWO]}, "binary", "a.png: .*128 .* 127; .*--kind"),
    ({"a.png": COLOURS}, "classes", "a.png: is in colour"),
    ({"a.jpg": TWO}, "classes", "a.jpg: is a JPEG"),
    ({"a.png": SPECK}, "binary", "a.png: .*16 pixels"),
    ({"a.png": MANY}, "instances", "a.png: has 1001 .*1000"),
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


def put(image):
    return lambda path: image.save(path)


BAD_INPUT = [
    ("images/b.png", lambda path: path.write_text("no image"), "images/b.png: is no readable"),
    ("masks/b.png", lambda path: os.truncate(path, 60), "masks/b.png: is no readable image"),
    ("masks/b.png", put(Image.new("L", (60, 40), 127)), "masks/b.png: empty mask"),
    ("images/b.tif", put(Image.new("RGB", (60, 40))), "images/b.tif: duplicate"),
]


@pytest.mark.parametrize(("file", "damage", "named"), BAD_INPUT)
def test_bad_input(kvasir_folder, read, file, damage, named):
    root = kvasir_folder()
    damage(root / file)
    with pytest.raises(BadInputError, match=named):
        read(read_kvasir_seg, root=root)
    samples, _, errors = read(read_kvasir_seg, "reject", root=root)
    kept = ["a.png", "b.png", "c.png"] if file.endswith(".tif") else ["a.png", "c.png"]
    assert [sample.file_name for sample in samples] == kept and len(errors) == 1


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_exif_rotated(kvasir_folder, read, masks, rotated, orientation, annotated):
    """The lesion is bright in the image: it must be under the mask in what Detectron2 reads."""
    root, stored = kvasir_folder(["a"]), NOTHING.copy()
    stored[5:15, 8:30] = 255
    rotated(root / "images" / "a.png", orientation, np.dstack([stored] * 3))
    shown = {3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}[orientation]
    mask = stored if annotated == "stored" else shown
    Image.fromarray(np.ascontiguousarray(mask)).save(root / "masks" / "a.png")
    bright = read_image(str(root / "images" / "a.png"), "L")[..., 0] > 0
    is_ambiguous = (orientation, annotated) == (3, "stored")  # nothing tells the two apart
    readers = read(read_kvasir_seg, root=root), masks((root / "images", root / "masks"))
    for samples, source, _ in readers:
        lesion = mask_util.decode(samples[0].annotations[0]["segmentation"])
        assert np.array_equal(lesion, stored > 0 if is_ambiguous else bright)
        turned = annotated == "stored" and orientation == 6
        assert any("EXIF-rotated" in note for note in source.notes) != turned


@pytest.mark.parametrize("name", ["kavsir_bboxes.json", "bounding-boxes.json"])
def test_published_boxes(kvasir_folder, read, name):
    def published(number=1, width=60, height=40, **changes):
        box = {"label": "polyp", "xmin": 5, "ymin": 10, "xmax": 25, "ymax": 30, **changes}
        return {"height": height, "width": width, "bbox": [box] * number}

    root = kvasir_folder("abcdef")
    (root / "masks" / "f.png").unlink()
    Image.fromarray((TWO > 0) * np.uint8(255)).save(root / "masks" / "f.bmp")  # of another suffix
    entries = {"a": published(ymax=28), "b": published(xmin=35, xmax=50), "c": published(0)}
    entries |= {"d": published(width=600), "e": published(height=4)}
    entries["f"] = published(2, ymin=5, ymax=15)  # twice the same of two
    (root / name).write_text(json.dumps(entries))
    samples, source, _ = read(read_kvasir_seg, root=root)
    assert [sample.file_name for sample in samples] == [f"{letter}.png" for letter in "abcdef"]
    assert source.categories == [{"id": 1, "name": "polyp", "supercategory": "lesion"}]
    expected = ("b.png: .*0.00", "c.png: 1 .* 0", "d.png: .*600x40", "e.png: .*60x4", "f.*0.00")
    assert all(any(re.search(text, note) for note in source.notes) for text in expected)
    assert any(note.startswith("6 images compared") for note in source.notes)
    assert len(source.notes) == 9  # with the terms of use, and the number of images
    for broken in ("{", "[]", '{"a": {"bbox": [{"xmin": 1}]}}', '{"a": 3}'):
        (root / name).write_text(broken)
        with pytest.raises(BadInputError, match=name):
            read(read_kvasir_seg, root=root)
        assert len(read(read_kvasir_seg, "reject", root=root)[0]) == 6
    (root / "masks").rename(root / "away")
    with pytest.raises(BadInputError, match="masks"):
        read(read_kvasir_seg, root=root)
