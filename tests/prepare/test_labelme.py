"""LabelMe files as LabelMe 6.3.1 wrote them, what we write, and everything that can be wrong."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats.labelme import labelme_document, read_labelme
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError, Rejects

# Saved by LabelMe: every kind of area; an image that is in the file, from a Windows computer.
WRITTEN = Path(__file__).parent / "formats" / "labelme"


def read(root, scratch, on_error="raise", **options):
    rejects = Rejects(on_error)
    source = read_labelme(root, rejects, scratch, **options)
    return list(source.samples), source, rejects.errors


def mask_of(annotation):
    return mask_util.decode(annotation["segmentation"]).astype(bool)


def box(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.fixture
def folder(tmp_path):
    """Returns a function that makes a folder of a.png and its file, with the content changed."""

    def make(edit=lambda content: None):
        root = tmp_path / "labelme"
        root.mkdir()
        Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(root / "a.png")
        shape = {"label": "polyp", "points": [[2, 3], [12, 3], [12, 9]], "shape_type": "polygon"}
        content = {"version": "5.0", "flags": {}, "shapes": [shape], "imagePath": "a.png"}
        content |= {"imageData": None, "imageHeight": 40, "imageWidth": 60}
        edit(content)
        (root / "a.json").write_text(json.dumps(content))
        return root

    return make


@pytest.fixture
def scratch(tmp_path):
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def test_what_labelme_writes(tmp_path, scratch):
    root = tmp_path / "in"
    root.mkdir()
    for name in ("frame_a.json", "frame_a.jpg"):
        shutil.copy(WRITTEN / name, root)
    (sample,), source, _ = read(root, scratch)
    assert [c["name"] for c in source.categories] == ["adenoma", "hyperplastic"]
    assert sample.file_name == "frame_a.jpg"
    assert sample.fields == {"blurred": False, "narrow_band": True}
    polygon, rectangles, circle, hollow, turned = sample.annotations
    assert [a["category_id"] for a in sample.annotations] == [1, 1, 2, 1, 2]
    assert (polygon["bbox"], polygon["area"]) == ([2, 3, 11, 6], 66)  # half a pixel is one
    assert (polygon["description"], polygon["uncertain"]) == ("flat, 12 mm", True)
    # two of one group and label; the circle of that group has another label
    assert rectangles["area"] == 10 * 10 + 6 * 4
    assert rectangles["bbox"] == [20, 10, 20, 10]
    assert circle["bbox"] == [6, 24, 8, 8] and circle["area"] == pytest.approx(3.14 * 16, rel=0.05)
    mask = mask_of(hollow)
    assert box(mask) == (47, 26, 54, 32) and mask.sum() == 6 * 7 - 2 * 3
    assert not mask[28:30, 49:52].any()
    assert turned["area"] == pytest.approx(50, abs=6)
    assert all("description" not in a for a in (rectangles, circle, hollow, turned))
    assert source.notes == []


def test_an_image_that_is_in_the_file_alone(tmp_path, scratch):
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    shutil.copy(WRITTEN / "embedded.json", root / "deep" / "x.json")
    (sample,), source, _ = read(root, scratch)
    assert sample.file_name == "deep/x.jpg"
    content = json.loads((WRITTEN / "embedded.json").read_text())
    assert sample.image.path.read_bytes() == base64.b64decode(content["imageData"])
    assert "x.json: its image is not there, the copy inside the file is used" in source.notes[0]
    # with the images at hand, those are taken
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    shutil.copy(WRITTEN / "frame_a.jpg", images / "deep" / "frame_b.jpg")
    (sample,), _, _ = read(root, scratch, images=images)
    assert sample.file_name == "deep/frame_b.jpg"


def test_paths_of_another_computer(folder, scratch):
    def edit(content):
        content["imagePath"] = "C:\\Users\\someone\\a.png"

    assert read(folder(edit), scratch)[0][0].file_name == "a.png"


def test_old_files_and_byte_order_marks(folder, scratch):
    def edit(content):
        del content["shapes"][0]["shape_type"], content["flags"], content["imageHeight"]
        content["lineColor"] = [0, 255, 0, 128]

    root = folder(edit)
    path = root / "a.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (sample,), _, _ = read(root, scratch)
    assert sample.annotations[0]["area"] == pytest.approx(30, abs=4)
    assert sample.fields == {}


def test_fields_of_others_and_crowds(folder, scratch):
    def edit(content):
        content["patient_id"] = "p1"
        content["shapes"][0] |= {"lesion_id": 7, "area": 3, "flags": {"iscrowd": True}}

    (sample,), _, _ = read(folder(edit), scratch)
    assert sample.fields == {"patient_id": "p1"}
    (annotation,) = sample.annotations
    assert (annotation["lesion_id"], annotation["iscrowd"]) == (7, 1)
    assert annotation["area"] == mask_of(annotation).sum() != 3
    assert not sample.has_lesion


def test_files_without_shapes_are_lesion_free(folder, scratch):
    root = folder()
    shutil.copy(root / "a.png", root / "b.png")
    content = json.loads((root / "a.json").read_text())
    (root / "b.json").write_text(json.dumps({**content, "imagePath": "b.png", "shapes": []}))
    samples, _, _ = read(root, scratch)
    assert [sample.has_lesion for sample in samples] == [True, False]


def test_images_without_a_file_are_listed(folder, scratch):
    root = folder()
    shutil.copy(root / "a.png", root / "b.png")
    (root / "labels.txt").write_text("polyp")
    with pytest.raises(BadInputError, match="b.png: has no LabelMe file, .* --negatives"):
        read(root, scratch)
    samples, _, errors = read(root, scratch, "reject")
    assert len(samples) == len(errors) == 1


def test_two_files_of_one_image(folder, scratch):
    root = folder()
    shutil.copy(root / "a.json", root / "b.json")
    with pytest.raises(BadInputError, match="a.json: duplicate: several LabelMe files are of"):
        read(root, scratch)
    samples, _, errors = read(root, scratch, "reject")
    assert (len(samples), len(errors)) == (0, 2)


def test_classes(folder, scratch):
    root = folder()
    assert read(root, scratch, classes=["cancer", "polyp"])[0][0].annotations[0]["category_id"] == 2
    with pytest.raises(BadInputError, match="unknown label 'polyp'; the classes are cancer"):
        read(root, scratch, classes=["cancer"])
    with pytest.raises(BadInputError, match="a class is given twice"):
        read(root, scratch, classes=["polyp", "polyp"])


def test_exif_rotated(folder, scratch):
    """LabelMe shows images upright; what was drawn on that must fit what Detectron2 reads."""

    def edit(content):
        content.update(imageHeight=60, imageWidth=40)
        content["shapes"][0].update(shape_type="rectangle", points=[[30, 50], [40, 60]])

    root = folder(edit)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(root / "a.png").save(root / "a.png", exif=exif)
    (sample,), _, _ = read(root, scratch)
    assert (sample.image.width, sample.image.height) == (40, 60)
    assert sample.annotations[0]["bbox"] == [30, 50, 10, 10]


def shape(**changes):
    def edit(content):
        content["shapes"][0].update(changes)

    return edit


def top(**changes):
    return lambda content: content.update(changes)


PNG = base64.b64encode(b"no png").decode()
BAD = {
    "line": (shape(shape_type="line"), "shapes.0., 'polyp': 'line' is no area"),
    "kind": (shape(shape_type=[1]), "is no area"),
    "no points": (shape(points=None), "its points are no list"),
    "flat": (shape(points=[1, 2, 3, 4, 5, 6]), "its points are no list"),
    "two points": (shape(points=[[1, 1], [2, 2]]), "a polygon has 2 points"),
    "text": (shape(points=[[1, 1], ["2", 2], [3, 3]]), "the coordinate '2' is no number"),
    "far": (shape(points=[[1, 1], [1e7, 2], [3, 3]]), "far outside the 60x40 image"),
    "outside": (shape(points=[[70, 1], [80, 2], [75, 30]]), "covers no pixel of the 60x40"),
    "circle": (shape(shape_type="circle"), "a circle has 3 points instead of 2"),
    "dot": (shape(shape_type="circle", points=[[3, 3], [3, 3]]), "the radius 0 is not positive"),
    "mask": (shape(shape_type="mask", points=[[1, 1], [3, 3]]), "its mask is no text"),
    "no png": (
        shape(shape_type="mask", points=[[1, 1], [3, 3]], mask=PNG),
        "its mask is no PNG in base64",
    ),
    "group": (shape(group_id=[1]), "its group_id .* is no number"),
    "label": (shape(label=7), "shapes.0. has no label"),
    "shape flags": (shape(flags={"a": 1}), "the flags .* are not all true or false"),
    "own flag": (shape(flags={"bbox": True}), "there is a flag called 'bbox'"),
    "flags": (top(flags=[1]), "the flags .* are not all true or false"),
    "image flag": (top(flags={"file_name": True}), "there is a flag called 'file_name'"),
    "shapes": (top(shapes={}), "its shapes are no list of objects"),
    "height": (top(imageHeight="40"), "its imageHeight '40' is no number of pixels"),
    "size": (top(imageHeight=41), "a.png: is 60x40, but its annotation says 60x41"),
    "path": (top(imagePath=None), "is no file name"),
    "missing": (top(imagePath="b.png"), "there is no image .*b.png; .* --images"),
    "away": (top(imagePath="../../b.png"), "there is no image ../../b.png; .* --images"),
    "data": (top(imagePath="b.png", imageData="%"), "a.json: its imageData is no readable image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(folder, scratch, name):
    edit, message = BAD[name]
    root = folder(edit)
    with pytest.raises(BadInputError, match=message):
        read(root, scratch)
    (root / "good").mkdir()
    shutil.copy(WRITTEN / "frame_a.jpg", root / "good")
    shutil.copy(WRITTEN / "frame_a.json", root / "good")
    samples, _, errors = read(root, scratch, "reject")
    assert [sample.file_name for sample in samples] == ["good/frame_a.jpg"]
    # the file, and where it does not name its image, that image without a file
    assert 1 <= len(errors) <= 2


def test_no_file_of_labelme(tmp_path, scratch):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", scratch)
    with pytest.raises(BadInputError, match=r"no LabelMe file \(\*.json\)"):
        read(tmp_path, scratch)
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(BadInputError, match="a.json: is no LabelMe file"):
        read(tmp_path, scratch)


def test_a_document():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 10:30] = True
    hollow = mask.copy()
    hollow[14:16, 14:20] = False
    parts = mask.copy()
    parts[30:35, 40:50] = True
    annotations = [
        {**annotation_from_mask(mask, 2), "lesion_id": "l1", "sure": False, "score": 0.5},
        {**annotation_from_mask(hollow, 1), "iscrowd": 1},
        annotation_from_mask(parts, 1),
        {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.25},
        {"category_id": 1, "probabilities": [1.0]},
    ]
    fields = {"patient_id": "p", "blurred": True}
    document = labelme_document(annotations, {1: "a", 2: "b"}, "x/a.png", 40, 60, fields=fields)
    assert (document["imageHeight"], document["imageWidth"]) == (40, 60)
    assert (document["imagePath"], document["imageData"]) == ("x/a.png", None)
    assert (document["patient_id"], document["flags"]) == ("p", {"blurred": True})
    first, second, third, fourth, fifth = document["shapes"]
    assert (first["label"], first["shape_type"], first["group_id"]) == ("b", "polygon", None)
    assert sorted(first["points"]) == [[10, 10], [10, 20], [30, 10], [30, 20]]
    assert (first["description"], first["lesion_id"]) == ("score 0.5000", "l1")
    assert first["flags"] == {"sure": False} and "score" not in first
    assert (second["shape_type"], second["points"]) == ("mask", [[10, 10], [29, 19]])
    assert second["flags"] == {"iscrowd": True}
    assert third["group_id"] == fourth["group_id"] is not None
    assert (fifth["shape_type"], fifth["points"]) == ("rectangle", [[1, 2], [4, 6]])
    filled = labelme_document(annotations[1:2], {1: "a"}, "a.png", 40, 60, fill_holes=True)
    assert [shape["shape_type"] for shape in filled["shapes"]] == ["polygon"]
