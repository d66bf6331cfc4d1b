"""Files of the annotation tools LabelMe and CVAT."""

import base64
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats import labelme_document, read_cvat, read_labelme
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError

# Saved by LabelMe: every kind of area; an image that is in the file, from a Windows computer.
WRITTEN = Path(__file__).parent / "formats" / "labelme"


@pytest.fixture
def labelme(read, tmp_path):
    """A function: samples, source and rejects of a folder of LabelMe files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return lambda root, on_error="raise", **options: read(
        read_labelme, on_error, root=root, scratch=scratch, **options
    )


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of a.png and its file, with the content changed."""

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


def test_what_labelme_writes(tmp_path, labelme):
    for name in ("frame_a.jpg", "frame_a.json"):
        shutil.copy(WRITTEN / name, tmp_path / name.replace("json", "JSON"))
    (sample,), source, _ = labelme(tmp_path)
    assert [c["name"] for c in source.categories] == ["adenoma", "hyperplastic"]
    assert sample.file_name == "frame_a.jpg" and source.notes == []
    assert sample.fields == {"blurred": False, "narrow_band": True}
    polygon, rectangles, circle, hollow, turned = sample.annotations
    assert [a["category_id"] for a in sample.annotations] == [1, 1, 2, 1, 2]
    assert (polygon["bbox"], polygon["area"]) == ([2, 3, 11, 6], 66)  # half a pixel is one
    assert (polygon["description"], polygon["uncertain"]) == ("flat, 12 mm", True)
    assert not any("description" in annotation for annotation in sample.annotations[1:])
    # two of one group and label; the circle of that group has another label
    assert (rectangles["area"], rectangles["bbox"]) == (10 * 10 + 6 * 4, [20, 10, 20, 10])
    assert circle["bbox"] == [6, 24, 8, 8] and circle["area"] == pytest.approx(50, rel=0.05)
    mask = mask_util.decode(hollow["segmentation"])
    assert hollow["bbox"] == [47, 26, 7, 6] and mask.sum() == 6 * 7 - 2 * 3
    assert not mask[28:30, 49:52].any()
    assert turned["area"] == pytest.approx(50, abs=6)


def test_an_image_that_is_in_the_file_alone(tmp_path, labelme):
    root, images = tmp_path / "in/very/deep", tmp_path / "images/very/deep"
    for folder in (root, images):
        folder.mkdir(parents=True)
    shutil.copy(WRITTEN / "embedded.json", root / "x.json")
    (sample,), source, _ = labelme(tmp_path / "in")
    assert sample.file_name == "very/deep/x.jpg"
    content = json.loads((WRITTEN / "embedded.json").read_text())
    assert sample.image.path.read_bytes() == base64.b64decode(content["imageData"])
    assert len(source.notes) == 1 and str(root / "x.json") in source.notes[0]
    # with the images at hand, those are taken
    shutil.copy(WRITTEN / "frame_a.jpg", images / "frame_b.jpg")
    (sample,), _, _ = labelme(tmp_path / "in", images=tmp_path / "images")
    assert sample.file_name == "very/deep/frame_b.jpg"


@pytest.mark.parametrize("path", ["C:\\Users\\x\\a.png", "/home/x/a.png", "C:a.png"])
def test_old_files_of_other_computers_and_fields_of_others(folder, labelme, path):
    def edit(content):
        del content["shapes"][0]["shape_type"], content["flags"]
        del content["imageHeight"], content["imageWidth"]
        content |= {"lineColor": [0, 255, 0, 128], "imagePath": path, "patient_id": "p1"}
        content["shapes"][0] |= {"lesion_id": 7, "area": 3, "flags": {"iscrowd": True}}

    root = folder(edit)
    (root / "a.json").write_text((root / "a.json").read_text(), encoding="utf-8-sig")
    (sample,), _, _ = labelme(root)
    assert sample.file_name == "a.png" and sample.fields["patient_id"] == "p1"
    (annotation,) = sample.annotations
    assert (annotation["lesion_id"], annotation["iscrowd"]) == (7, 1)
    assert annotation["area"] == mask_util.area(annotation["segmentation"])
    assert annotation["area"] == pytest.approx(30, abs=4)


def test_an_empty_id_is_none(folder, labelme):
    def edit(content):
        content["patient_id"] = content["shapes"][0]["lesion_id"] = ""

    (sample,), _, _ = labelme(folder(edit))
    assert "patient_id" not in sample.fields and "lesion_id" not in sample.annotations[0]


def test_parts_and_equal_areas_of_a_rotated_image(folder, rotated, labelme):
    def edit(content):
        (shape,) = content["shapes"]
        first = {**shape, "group_id": 4, "note": "a", "flags": {"sure": False}}
        second = {**first, "note": "b", "flags": {"sure": True, "iscrowd": True}}
        second["points"] = [[30, 20], [40, 20], [40, 30]]
        content["shapes"] = [first, second, shape, {**shape, "label": "ulcer"}]

    root = folder(edit)
    rotated(root / "a.png", 3)
    (sample,), source, _ = labelme(root)
    parts, polyp, ulcer = sample.annotations
    assert polyp["segmentation"] == ulcer["segmentation"] != parts["segmentation"]
    assert (parts["note"], parts["sure"], parts["iscrowd"]) == ("a", True, 1)
    content = json.loads((root / "a.json").read_text())
    (root / "a.json").write_text(json.dumps({**content, "shapes": []}))
    assert (len(source.notes), labelme(root, classes=["polyp"])[1].notes) == (1, [])
    (root / "a.json").write_text(json.dumps({**content, "shapes": content["shapes"][2:3] * 2}))
    with pytest.raises(BadInputError, match="a 'polyp' is there twice"):
        labelme(root)


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
    other = tmp_path / "other"
    with pytest.raises(FileNotFoundError):
        labelme(other)
    other.mkdir()
    for name in ("labels.txt", "a.json"):
        (other / name).write_text('{"images": []}')
        with pytest.raises(BadInputError, match=str(other)):
            labelme(other)


def test_what_labelme_7_writes_comes_back(folder, labelme):
    """Flags stay flags, and keys that are none stay keys: LabelMe 7 locks shapes by one."""
    further = {"locked": True, "lesion_id": "l1", "size_mm": 4.5, "flags": {"sure": False}}
    image = {"patient_id": "p1", "flags": {"blurred": True}}

    def edit(content):
        content["shapes"].append({**content["shapes"][0], "points": [[30, 20], [40, 20], [40, 30]]})
        content["shapes"][0] |= further
        content |= image

    (sample,), source, _ = labelme(folder(edit))
    assert [a.get("locked") for a in sample.annotations] == [True, None]
    args = sample.annotations, source.class_names, "a.png", 40, 60
    document = labelme_document(*args, fields=sample.fields)
    first, second = document["shapes"]
    assert {key: first.get(key) for key in further} == further
    assert "locked" not in second and second["flags"] == {}
    assert {key: document.get(key) for key in image} == image


COLOURS = io.BytesIO()
Image.new("RGB", (3, 3)).save(COLOURS, "PNG")
COLOURS = base64.b64encode(COLOURS.getvalue()).decode()
MASK = {"shape_type": "mask", "points": [[1, 1], [3, 3]]}
DOT = {"shape_type": "circle", "points": [[3, 3], [3, 3]]}
# What of the error names it, and the change of the shape.
BAD_SHAPES = {r"\[1\] is no area": {"shape_type": [1]}, "'polyp': 'line'": {"shape_type": "line"}}
BAD_SHAPES |= {"no list of": {"points": None}, "list of .x, y": {"points": [1, 2, 3, 4, 5, 6]}}
BAD_SHAPES |= {"2 points": {"points": [[1, 1], [2, 2]]}, "of .x": {"points": [[1, 1], [5, 5, 5]]}}
BAD_SHAPES["'2'"] = {"points": [[1, 1], ["2", 2], [3, 3]]}
BAD_SHAPES["1e.07 .* 60x40"] = {"points": [[1, 1], [1e7, 2], [3, 3]]}
BAD_SHAPES["no pixel of the 60x40"] = {"points": [[70, 1], [80, 2], [75, 30]]}
BAD_SHAPES |= {"3 points instead of 2": {"shape_type": "circle"}, "radius 0": DOT}
PIXELS = {"is no PNG": COLOURS[:48], "is no text": 7, "several channels": COLOURS}
BAD_SHAPES |= {message: {**MASK, "mask": text} for message, text in PIXELS.items()}
BAD_SHAPES |= {"shapes.0. has no label": {"label": 7}, r"group_id \[1\]": {"group_id": [1]}}
BAD_SHAPES["shapes.0. has no"] = {"label": ""}
BAD_SHAPES |= {"{'a': 1}": {"flags": {"a": 1}}, "'bbox'": {"flags": {"bbox": True}}}
BAD_FILES = {r"flags \[1\]": {"flags": [1]}, "'file_name'": {"flags": {"file_name": True}}}
BAD_FILES |= {"a.png: .*60x41": {"imageHeight": 41}, "imageWidth '4'": {"imageWidth": "4"}}
BAD_FILES |= {"list of objects": {"shapes": {}}, "None is no file": {"imagePath": None}}
BAD_FILES |= {"imageHeight '4'": {"imageHeight": "4"}, "'' is no file": {"imagePath": ""}}
BAD_FILES |= {f"{name}.*--images": {"imagePath": name} for name in ("b.png", "../../b.png")}
BAD_FILES["imageData"] = {"imagePath": "b.png", "imageData": "%"}


@pytest.mark.parametrize("message", [*BAD_SHAPES, *BAD_FILES])
def test_bad_files(folder, labelme, message):
    def edit(content):
        content |= BAD_FILES.get(message, {})
        if message in BAD_SHAPES:
            content["shapes"][0] |= BAD_SHAPES[message]

    root = folder(edit)
    with pytest.raises(BadInputError, match=message):
        labelme(root)
    (root / "good").mkdir()
    for name in ("frame_a.jpg", "frame_a.json"):
        shutil.copy(WRITTEN / name, root / "good")
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
        {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.0},
        {"category_id": 1, "probabilities": [1.0]},
    ]
    fields = {"patient_id": "p", "blurred": True}
    document = labelme_document(annotations, {1: "a", 2: "b"}, "x/a.png", 40, 60, fields=fields)
    polygon, hollow, *parts, box = document.pop("shapes")
    size = {"imageHeight": 40, "imageWidth": 60, "version": document["version"]}
    image = {"imagePath": "x/a.png", "imageData": None}
    assert document == {**size, **image, "patient_id": "p", "flags": {"blurred": True}}
    assert sorted(polygon.pop("points")) == [[10, 10], [10, 20], [30, 10], [30, 20]]
    expected = {"label": "b", "shape_type": "polygon", "group_id": None, "mask": None}
    expected |= {"description": "score 0.5000", "lesion_id": "l1", "flags": {"sure": False}}
    assert polygon == expected
    assert (hollow["shape_type"], hollow["points"]) == ("mask", [[10, 10], [29, 19]])
    assert [part["group_id"] for part in parts] == [3, 3] and hollow["flags"] == {"iscrowd": True}
    assert (box["shape_type"], box["description"]) == ("rectangle", "score 0.0000")
    assert box["points"] == [[1, 2], [4, 6]]
    filled = labelme_document(annotations[1:2], {1: "a"}, "a.png", 40, 60, fill_holes=True)
    assert [shape["shape_type"] for shape in filled["shapes"]] == ["polygon"]


# As "CVAT for images 1.1" and "CVAT for video 1.1"; the mask is that of CVAT's documentation.
CVAT = Path(__file__).parent / "formats" / "cvat"
NAMES = ("a.png", "b/c.png", "d.png")


def save_images(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / name)
    return root


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path / "images", NAMES)


@pytest.fixture
def frames(tmp_path):
    """A folder of a video's first five frames."""
    return save_images(tmp_path / "frames", [f"frame_{i:06d}.PNG" for i in range(5)])


@pytest.fixture
def cvat(read):
    """Returns a function: samples, source and rejects of one or several XML files."""

    def call(paths, images, on_error="raise", **options):
        paths = paths if isinstance(paths, list) else [paths]
        return read(read_cvat, on_error, xml_files=paths, image_root=images, **options)

    return call


def changed(tmp_path, name, *replaced):
    text = (CVAT / name).read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_images(images, cvat):
    more = [f"more{i}.png" for i in range(4)]
    save_images(images, more)
    other = images / f"{NAMES[0]}.json"  # as programs leave them next to an image
    other.write_text("{}")
    (a, c, d), source, _ = cvat(CVAT / "images.xml", images)
    assert [sample.file_name for sample in (a, c, d)] == list(NAMES)
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    assert a.fields == {"narrow_band": True, "light": "NBI"}
    blob, polygon = a.annotations
    mask = mask_util.decode(blob.pop("segmentation"))
    assert blob.pop("area") == mask.sum()
    fields = {"paris": "IIc", "size_mm": 12, "ulcerated": True}
    assert blob == {"category_id": 2, "bbox": [7, 8, 13, 15], "iscrowd": 0, **fields}
    # of the documentation's runs 3, 5, 7, 7, 5, ...: the first two rows
    assert np.flatnonzero(mask[8]).tolist() == list(range(10, 15))
    assert np.flatnonzero(mask[9]).tolist() == list(range(9, 16))
    assert (polygon["bbox"], polygon["area"], polygon["occluded"]) == ([30, 5, 20, 10], 200, True)
    box, ellipse, parts = c.annotations
    assert (box["bbox"], box["area"]) == ([15, 5, 10, 20], 200)
    assert ellipse["bbox"] == [35, 15, 20, 10]
    assert ellipse["area"] == pytest.approx(math.pi * 50, rel=0.03)
    assert (parts["bbox"], parts["area"], parts["size_mm"]) == ([0, 0, 10, 4], 32, 0)
    assert parts["ulcerated"] is False and "occluded" not in parts
    assert d.annotations == [] and d.fields == {}
    assert len(source.notes) == 1 and source.notes[0].endswith(
        f": {', '.join([other.name, *more])}"
    )


BOX = '<box label="cancer" occluded="0" xtl="8" ytl="5" xbr="30" ybr="15" z_order="0"/>'


def test_several_tasks_a_project_and_classes(tmp_path, images, frames, rotated, cvat):
    replaced = [(f'name="{name}"', f'name="other/{name}"') for name in NAMES[1:]]
    replaced += [('name="a.png"', 'name="t.png" subset="Train"'), ("adenoma", "polyp")]
    replaced.append(('left="7" top="8"', 'left="47" top="25"'))  # to the last pixel
    replaced += [(">12<", "><"), (">true<", ">True<")]
    replaced.append(
        ('width="60" height="40">\n  </image>', f'width="40" height="60">{BOX}</image>')
    )
    other = changed(tmp_path, "images.xml", *replaced)
    save_images(images, ("other/b/c.png", "other/d.png", "Train/t.png"))
    rotated(images / "other" / "d.png")
    samples, source, _ = cvat([CVAT / "images.xml", other], images)
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer", "polyp"]
    blob, turned = samples[3].annotations[0], samples[5]
    assert (blob["bbox"], blob["ulcerated"], "size_mm" in blob) == ([47, 25, 13, 15], True, False)
    assert (turned.image.width, turned.annotations[0]["bbox"]) == (40, [8, 5, 22, 10])
    assert "other/d.png: EXIF-rotated" in "".join(source.notes)
    assert (samples[3].file_name, samples[3].fields["subset"]) == ("Train/t.png", "Train")
    with pytest.raises(BadInputError, match="images.xml: duplicate: .*'a.png'"):
        cvat([CVAT / "images.xml"] * 2, images)
    samples, _, _ = cvat(CVAT / "images.xml", images, classes=["ulcer", "cancer", "adenoma"])
    assert [a["category_id"] for a in samples[0].annotations] == [2, 3]
    with pytest.raises(BadInputError, match="'adenoma'; .*cancer"):
        cvat(CVAT / "images.xml", images, classes=["cancer"])
    # images by the numbers of a video's frames
    path = changed(tmp_path, "images.xml", ('name="a.png"', 'name="frame_000001"'))
    samples, _, errors = cvat(path, frames, "reject")
    assert [sample.file_name for sample in samples] == ["frame_000001.PNG"] and len(errors) == 2


def test_a_video(tmp_path, frames, cvat):
    samples, source, _ = cvat(CVAT / "video.xml", frames)
    assert [sample.file_name for sample in samples] == [f"frame_{i:06d}.PNG" for i in range(5)]
    assert [len(sample.annotations) for sample in samples] == [0, 1, 2, 0, 0]
    lesions = [(a["bbox"], a["lesion_id"], a.get("occluded")) for a in samples[2].annotations]
    assert lesions == [([12, 10, 10, 10], "0", None), ([40, 10, 10, 20], "1", True)]
    assert [c["name"] for c in source.categories] == ["polyp"]
    # and one without a track
    text = (CVAT / "video.xml").read_text()
    path = tmp_path / "video.xml"
    path.write_text(text[: text.index("<track")] + "</annotations>")
    samples, source, _ = cvat(path, frames, classes=["polyp"])
    assert [sample.annotations for sample in samples] == [[]] * 5 and source.notes == []


def test_tracks_with_gaps_or_without_an_end(tmp_path, frames, cvat):
    """What lies between two key frames is not lesion-free; a large number takes no time."""
    (frames / "frame_000004.PNG").rename(frames / "frame_999999998.PNG")
    key_frame = 'frame="2" keyframe="0"', 'frame="999999998" keyframe="1"'
    end = 'frame="3" keyframe="1" outside="1" occluded="0"', 'frame="999999999" outside="1"'
    path = changed(tmp_path, "video.xml", key_frame, end)
    with pytest.raises(BadInputError, match="frame_000002.PNG: track 0 .*between"):
        cvat(path, frames)
    samples, _, errors = cvat(path, frames, "reject")
    assert [sample.file_name[-5] for sample in samples] == [*"018"] and len(errors) == 2
    # nor what comes after a track without an end; one to the last frame needs none
    (frames / "frame_999999998.PNG").rename(frames / "frame_000004.PNG")
    end = '<box frame="3" keyframe="1" outside="1"'
    path = changed(tmp_path, "video.xml", (end, '<box frame="3" keyframe="1" outside="0"'))
    with pytest.raises(BadInputError, match="frame_000004.PNG: track 0 is in frame 3"):
        cvat(path, frames)
    samples, _, errors = cvat(path, frames, "reject")
    assert [sample.file_name[-5] for sample in samples] == [*"0123"] and len(errors) == 1
    (frames / "frame_000004.PNG").unlink()
    assert len(cvat(path, frames)[0]) == 4


def test_videos_that_cannot_be_read(tmp_path, images, frames, cvat):
    two = [(f'<track id="{i}"', f'<track task_id="{8 + i}" id="{i}"') for i in (0, 1)]
    with pytest.raises(BadInputError, match="video.xml: has 2 videos"):
        cvat(changed(tmp_path, "video.xml", *two), frames)
    with pytest.raises(BadInputError, match=f"video.xml: .*{images}"):
        cvat(CVAT / "video.xml", images)
    with pytest.raises(BadInputError, match="none.xml"):
        cvat(tmp_path / "none.xml", frames)
    (frames / "frame_000002.PNG").rename(frames / "frame_1.png")
    with pytest.raises(BadInputError, match="frame_1.png: .*frame_000001.PNG"):
        cvat(CVAT / "video.xml", frames)
    (frames / "frame_1.png").unlink()
    with pytest.raises(BadInputError, match="track 0: .*frame 2"):
        cvat(CVAT / "video.xml", frames)


CVAT_MASK = 'rle="3, 5, 7'
BAD = {
    "polyline": ("<polygon", "<polyline", "a polyline 'adenoma'"),
    "points": ("30.00,5.00;", "30.00;", "points"),
    "text": ("30.00,5.00;", "x,5.00;", "'x'"),
    "infinite": ("30.00,5.00;", "inf,5.00;", "'inf'"),
    "far": ("30.00,5.00;", "1e9,5.00;", "1e.09 .*60x40"),
    "group": ('occluded="1"', 'occluded="1" group_id="x"', "'x'"),
    "runs": (CVAT_MASK, 'rle="4, 5, 7', "196 .* 195"),
    "no runs": (CVAT_MASK, 'rle="-3, 5, 7', "'-3'"),
    "right": ('left="7"', 'left="48"', "60x40"),
    "below": ('top="8"', 'top="26"', "60x40"),
    "no label": ('<tag label="narrow_band"', "<tag", "a tag"),
    "attribute": ('"paris">IIc', '"bbox">IIc', "'bbox'"),
    "tag": ('label="narrow_band"', 'label="width"', "'width'"),
    "size": ('a.png" width="60"', 'a.png" width="61"', "a.png: .* 61x40"),
    "huge": ('a.png" width="60"', 'a.png" width="999999999"', "999999999x40"),
    "no size": ('a.png" width="60"', 'a.png" width="x"', "'a.png': 'x'"),
    "missing": ('name="a.png"', 'name="e.png"', "e.png: cannot be opened"),
    "away": ('name="a.png"', 'name="../a.png"', "../a.png"),
    "nameless": ('name="a.png"', "", "None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes(tmp_path, images, cvat, name):
    old, new, message = BAD[name]
    path = changed(tmp_path, "images.xml", (old, new))
    if new == "<polyline":
        path.write_text(path.read_text().replace("</polygon>", "</polyline>"))
    with pytest.raises(BadInputError, match=message):
        cvat(path, images)
    samples, _, errors = cvat(path, images, "reject")
    assert [sample.file_name for sample in samples] == ["b/c.png", "d.png"] and len(errors) == 1


EXTERNAL = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotations>&a;</annotations>'
ENTITIES = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>'
VERSION = "<annotations><version>1.1</version>"
BAD_XML = {
    ENTITIES: "entities",
    EXTERNAL: "entities",
    "{": "no XML",
    VERSION: "no XML",  # cut
    '<?xml version="1.0" encoding="utf-99"?><annotations/>': "no XML",
    "<html/>": "<html>",
    "<annotations><version>1.0</version></annotations>": "1.0",
    f'{VERSION}<image id="0"/><track id="0"/></annotations>': "images and tracks",
    f"{VERSION}</annotations>": "--classes",
}


@pytest.mark.parametrize("text", BAD_XML, ids=range(len(BAD_XML)))
def test_bad_cvat_files(tmp_path, images, cvat, text):
    (tmp_path / "bad.xml").write_text(text)
    with pytest.raises(BadInputError, match=f"bad.xml: .*{BAD_XML[text]}"):
        cvat(tmp_path / "bad.xml", images)
