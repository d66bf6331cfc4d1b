"""LabelMe files as LabelMe 6.3.1 wrote them, what we write, and everything that can be wrong."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats import labelme_document, read_labelme
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError

# Saved by LabelMe: every kind of area; an image that is in the file, from a Windows computer.
WRITTEN = Path(__file__).parent / "formats" / "labelme"


@pytest.fixture
def labelme(read, tmp_path):
    """Returns a function: samples, source and rejects of a folder of LabelMe files."""

    def call(root, on_error="raise", **options):
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        return read(read_labelme, on_error, root=root, scratch=scratch, **options)

    return call


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


def shape(**changes):
    return lambda content: content["shapes"][0].update(changes)


def top(**changes):
    return lambda content: content.update(changes)


def test_what_labelme_writes(tmp_path, labelme):
    for name in ("frame_a.json", "frame_a.jpg"):
        shutil.copy(WRITTEN / name, tmp_path)
    (sample,), source, _ = labelme(tmp_path)
    assert [c["name"] for c in source.categories] == ["adenoma", "hyperplastic"]
    assert sample.file_name == "frame_a.jpg" and source.notes == []
    assert sample.fields == {"blurred": False, "narrow_band": True}
    polygon, rectangles, circle, hollow, turned = sample.annotations
    assert [a["category_id"] for a in sample.annotations] == [1, 1, 2, 1, 2]
    assert (polygon["bbox"], polygon["area"]) == ([2, 3, 11, 6], 66)  # half a pixel is one
    assert (polygon["description"], polygon["uncertain"]) == ("flat, 12 mm", True)
    # two of one group and label; the circle of that group has another label
    assert (rectangles["area"], rectangles["bbox"]) == (10 * 10 + 6 * 4, [20, 10, 20, 10])
    assert circle["bbox"] == [6, 24, 8, 8] and circle["area"] == pytest.approx(3.14 * 16, rel=0.05)
    mask = mask_util.decode(hollow["segmentation"])
    assert hollow["bbox"] == [47, 26, 7, 6] and mask.sum() == 6 * 7 - 2 * 3
    assert not mask[28:30, 49:52].any()
    assert turned["area"] == pytest.approx(50, abs=6)
    assert all("description" not in a for a in (rectangles, circle, hollow, turned))


def test_an_image_that_is_in_the_file_alone(tmp_path, labelme):
    root, images = tmp_path / "in", tmp_path / "images"
    for folder in (root, images):
        (folder / "deep").mkdir(parents=True)
    shutil.copy(WRITTEN / "embedded.json", root / "deep" / "x.json")
    (sample,), source, _ = labelme(root)
    assert sample.file_name == "deep/x.jpg"
    content = json.loads((WRITTEN / "embedded.json").read_text())
    assert sample.image.path.read_bytes() == base64.b64decode(content["imageData"])
    assert len(source.notes) == 1 and str(root / "deep" / "x.json") in source.notes[0]
    # with the images at hand, those are taken
    shutil.copy(WRITTEN / "frame_a.jpg", images / "deep" / "frame_b.jpg")
    assert labelme(root, images=images)[0][0].file_name == "deep/frame_b.jpg"


def test_old_files_of_other_computers_and_fields_of_others(folder, labelme):
    def edit(content):
        del content["shapes"][0]["shape_type"], content["flags"], content["imageHeight"]
        content |= {"lineColor": [0, 255, 0, 128], "imagePath": "C:\\Users\\x\\a.png"}
        content["patient_id"] = "p1"
        content["shapes"][0] |= {"lesion_id": 7, "area": 3, "flags": {"iscrowd": True}}

    root = folder(edit)
    text = (root / "a.json").read_text()
    (root / "a.json").write_text(text, encoding="utf-8-sig")
    (sample,), _, _ = labelme(root)
    assert sample.file_name == "a.png" and sample.fields["patient_id"] == "p1"
    (annotation,) = sample.annotations
    assert (annotation["lesion_id"], annotation["iscrowd"]) == (7, 1)
    assert annotation["area"] == mask_util.area(annotation["segmentation"])
    assert annotation["area"] == pytest.approx(30, abs=4)


def test_images_and_their_files(folder, tmp_path, labelme):
    root = folder()
    shutil.copy(root / "a.png", root / "b.png")
    (root / "labels.txt").write_text("polyp")
    with pytest.raises(BadInputError, match="b.png: .*--negatives"):
        labelme(root)
    samples, _, errors = labelme(root, "reject")
    assert len(samples) == len(errors) == 1
    content = json.loads((root / "a.json").read_text())
    (root / "b.json").write_text(json.dumps({**content, "imagePath": "b.png", "shapes": []}))
    samples, _, _ = labelme(root, classes=["cancer", "polyp"])
    assert [[a["category_id"] for a in sample.annotations] for sample in samples] == [[2], []]
    for classes, message in ((["cancer"], "'polyp'; .*cancer"), (["polyp"] * 2, "polyp, polyp")):
        with pytest.raises(BadInputError, match=message):
            labelme(root, classes=classes)
    shutil.copy(root / "a.json", root / "c.json")
    with pytest.raises(BadInputError, match="a.json: duplicate: .*a.png"):
        labelme(root)
    samples, _, errors = labelme(root, "reject")
    assert (len(samples), len(errors)) == (1, 2)
    with pytest.raises(FileNotFoundError):
        labelme(tmp_path / "none")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(BadInputError, match=str(other)):
        labelme(other)
    (other / "a.json").write_text('{"images": []}')
    with pytest.raises(BadInputError, match="a.json"):
        labelme(other)


MASK = {"shape_type": "mask", "points": [[1, 1], [3, 3]]}
DOT = {"shape_type": "circle", "points": [[3, 3], [3, 3]]}
PNG = base64.b64encode(b"no png").decode()
BAD = {
    "line": (shape(shape_type="line"), "shapes.0., 'polyp': 'line'"),
    "kind": (shape(shape_type=[1]), r"\[1\]"),
    "no points": (shape(points=None), "no list"),
    "flat": (shape(points=[1, 2, 3, 4, 5, 6]), "no list"),
    "two points": (shape(points=[[1, 1], [2, 2]]), "2 points"),
    "text": (shape(points=[[1, 1], ["2", 2], [3, 3]]), "'2'"),
    "far": (shape(points=[[1, 1], [1e7, 2], [3, 3]]), "1e.07 .* 60x40"),
    "outside": (shape(points=[[70, 1], [80, 2], [75, 30]]), "no pixel of the 60x40"),
    "circle": (shape(shape_type="circle"), "3 points instead of 2"),
    "dot": (shape(**DOT), "radius 0"),
    "mask": (shape(**MASK), "mask"),
    "no png": (shape(**MASK, mask=PNG), "PNG"),
    "group": (shape(group_id=[1]), r"group_id \[1\]"),
    "label": (shape(label=7), "shapes.0. has no label"),
    "shape flags": (shape(flags={"a": 1}), "{'a': 1}"),
    "own flag": (shape(flags={"bbox": True}), "'bbox'"),
    "flags": (top(flags=[1]), r"\[1\]"),
    "image flag": (top(flags={"file_name": True}), "'file_name'"),
    "shapes": (top(shapes={}), "list of objects"),
    "height": (top(imageHeight="40"), "imageHeight '40'"),
    "size": (top(imageHeight=41), "a.png: .*60x41"),
    "path": (top(imagePath=None), "None"),
    "missing": (top(imagePath="b.png"), "b.png.*--images"),
    "away": (top(imagePath="../../b.png"), "../../b.png.*--images"),
    "data": (top(imagePath="b.png", imageData="%"), "imageData"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(folder, labelme, name):
    edit, message = BAD[name]
    root = folder(edit)
    with pytest.raises(BadInputError, match=message):
        labelme(root)
    (root / "good").mkdir()
    shutil.copy(WRITTEN / "frame_a.jpg", root / "good")
    shutil.copy(WRITTEN / "frame_a.json", root / "good")
    samples, _, errors = labelme(root, "reject")
    assert [sample.file_name for sample in samples] == ["good/frame_a.jpg"]
    # the file, and where it does not name its image, that image without a file
    assert 1 <= len(errors) <= 2


def test_a_document():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 10:30] = True
    hollow, parts = mask.copy(), mask.copy()
    hollow[14:16, 14:20] = False
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
