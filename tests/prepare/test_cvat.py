"""CVAT files in the form that CVAT's exporter writes them, and everything that can be wrong."""

import math
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats import read_cvat
from imrcnn_d2.utils.files import BadInputError, Rejects

# As "CVAT for images 1.1" and "CVAT for video 1.1"; the mask is that of CVAT's documentation.
WRITTEN = Path(__file__).parent / "formats" / "cvat"
NAMES = ("a.png", "b/c.png", "d.png")


@pytest.fixture
def images(tmp_path):
    """A folder of images of 60x40."""
    root = tmp_path / "images"
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / name)
    return root


@pytest.fixture
def frames(tmp_path):
    """A folder of a video's first five frames, 60x40."""
    root = tmp_path / "frames"
    root.mkdir()
    for i in range(5):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / f"frame_{i:06d}.PNG")
    return root


def read(paths, images, on_error="raise", **options):
    rejects = Rejects(on_error)
    source = read_cvat(paths if isinstance(paths, list) else [paths], images, rejects, **options)
    return list(source.samples), source, rejects.errors


def changed(tmp_path, name, *replaced):
    text = (WRITTEN / name).read_text()
    for old, new in replaced:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return path


def mask_of(annotation):
    return mask_util.decode(annotation["segmentation"]).astype(bool)


def test_images(images):
    (a, c, d), source, _ = read(WRITTEN / "images.xml", images)
    assert [sample.file_name for sample in (a, c, d)] == list(NAMES)
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    assert a.fields == {"narrow_band": True, "light": "NBI"}
    blob, polygon = a.annotations
    assert {k: blob[k] for k in ("category_id", "paris", "size_mm", "ulcerated")} == {
        "category_id": 2, "paris": "IIc", "size_mm": 12, "ulcerated": True,
    }  # fmt: skip
    assert blob["bbox"] == [7, 8, 13, 15]
    mask = mask_of(blob)
    # of the documentation's runs 3, 5, 7, 7, 5, ...: the first two rows
    assert np.flatnonzero(mask[8]).tolist() == list(range(10, 15))
    assert np.flatnonzero(mask[9]).tolist() == list(range(9, 16))
    assert (polygon["bbox"], polygon["area"], polygon["occluded"]) == ([30, 5, 20, 10], 200, True)
    box, ellipse, parts = c.annotations
    assert box["bbox"] == [15, 5, 10, 20] and box["area"] == 200
    assert ellipse["bbox"] == [35, 15, 20, 10]
    assert ellipse["area"] == pytest.approx(math.pi * 50, rel=0.03)
    assert (parts["bbox"], parts["area"], parts["size_mm"]) == ([0, 0, 10, 4], 32, 0)
    assert parts["ulcerated"] is False and "occluded" not in parts
    assert not d.has_lesion and d.fields == {}
    assert source.notes == []


def test_several_tasks(tmp_path, images):
    other = changed(tmp_path, "images.xml", ('name="', 'name="other/'), ("adenoma", "polyp"))
    # attributes have names as well
    other.write_text(other.read_text().replace('attribute name="other/', 'attribute name="'))
    shutil.copytree(images, images / "other")
    for path in (images / "other").rglob("*.png"):
        Image.open(path).resize((60, 40)).point(lambda v: v + 9).save(path)
    samples, source, _ = read([WRITTEN / "images.xml", other], images)
    assert len(samples) == 6
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer", "polyp"]
    with pytest.raises(BadInputError, match="duplicate: the image 'a.png' is there several times"):
        read([WRITTEN / "images.xml"] * 2, images)


def test_a_project(tmp_path, images):
    path = changed(tmp_path, "images.xml", ('name="a.png"', 'name="a.png" subset="Train"'))
    (images / "Train").mkdir()
    (images / "a.png").rename(images / "Train" / "a.png")
    sample = read(path, images)[0][0]
    assert sample.file_name == "Train/a.png" and sample.fields["subset"] == "Train"


def test_files_that_are_in_no_task_are_told(images):
    Image.new("RGB", (60, 40), "red").save(images / "more.png")
    _, source, _ = read(WRITTEN / "images.xml", images)
    assert source.notes == [f"1 files of {images} are in no CVAT file and left out: more.png"]


def test_a_video(frames):
    samples, source, _ = read(WRITTEN / "video.xml", frames)
    assert [sample.file_name for sample in samples] == [f"frame_{i:06d}.PNG" for i in range(5)]
    assert [len(sample.annotations) for sample in samples] == [0, 1, 2, 0, 0]
    assert [a["bbox"] for a in samples[2].annotations] == [[12, 10, 10, 10], [40, 10, 10, 20]]
    assert [a["lesion_id"] for a in samples[2].annotations] == ["0", "1"]
    assert samples[2].annotations[1]["occluded"] is True
    assert [c["name"] for c in source.categories] == ["polyp"]


def test_a_video_of_key_frames(tmp_path, frames):
    """What lies between two key frames is no mucosa without a lesion."""
    path = changed(
        tmp_path, "video.xml", ('frame="2" keyframe="0"', 'frame="4" keyframe="1"'),
        ('frame="3" keyframe="1" outside="1" occluded="0"', 'frame="5" outside="1"'),
    )  # fmt: skip
    with pytest.raises(BadInputError, match="frame_000002.PNG: track 0 .*not in this one between"):
        read(path, frames)
    samples, _, errors = read(path, frames, "reject")
    assert [sample.file_name[-5] for sample in samples] == ["0", "1", "4"] and len(errors) == 2


def test_a_number_of_a_frame_takes_no_time(tmp_path, frames):
    (frames / "frame_000004.PNG").rename(frames / "frame_999999998.PNG")
    path = changed(
        tmp_path, "video.xml", ('frame="2" keyframe="0"', 'frame="999999998" keyframe="1"'),
        ('frame="3" keyframe="1" outside="1" occluded="0"', 'frame="999999999" outside="1"'),
    )  # fmt: skip
    with pytest.raises(BadInputError, match="frame_000002.PNG: track 0 is in frame"):
        read(path, frames)


def test_a_track_without_an_end(tmp_path, frames):
    """Frames behind it are not without a lesion; a track to the last frame needs no end."""
    end = '<box frame="3" keyframe="1" outside="1"'
    path = changed(tmp_path, "video.xml", (end, '<box frame="3" keyframe="1" outside="0"'))
    with pytest.raises(BadInputError, match="frame_000004.PNG: track 0 is in frame 3 and not said"):
        read(path, frames)
    samples, _, errors = read(path, frames, "reject")
    assert [sample.file_name[-5] for sample in samples] == ["0", "1", "2", "3"]
    assert len(errors) == 1
    (frames / "frame_000004.PNG").unlink()
    assert len(read(path, frames)[0]) == 4


def test_several_videos_in_a_file(tmp_path, frames):
    path = changed(
        tmp_path, "video.xml",
        ('<track id="0"', '<track task_id="8" id="0"'),
        ('<track id="1"', '<track task_id="9" id="1"'),
    )  # fmt: skip
    with pytest.raises(BadInputError, match="has 2 videos.*export each task for itself"):
        read(path, frames)


def test_a_video_without_a_track(tmp_path, frames):
    text = (WRITTEN / "video.xml").read_text()
    path = tmp_path / "video.xml"
    path.write_text(text[: text.index("<track")] + "</annotations>")
    samples, source, _ = read(path, frames, classes=["polyp"])
    assert len(samples) == 5 and not any(sample.has_lesion for sample in samples)
    assert source.notes == []


@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_exif_rotated(tmp_path, images, drawn_on):
    """The size says which frame was drawn on."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(images / "d.png", exif=exif)
    size = 'width="60" height="40"' if drawn_on == "stored" else 'width="40" height="60"'
    box = '<box label="cancer" occluded="0" xtl="8" ytl="5" xbr="30" ybr="15" z_order="0"/></image>'
    path = changed(
        tmp_path, "images.xml",
        ('name="d.png" width="60" height="40">\n  </image>', f'name="d.png" {size}>{box}'),
    )  # fmt: skip
    samples, source, _ = read(path, images)
    assert (samples[2].image.width, samples[2].image.height) == (40, 60)
    found = samples[2].annotations[0]["bbox"]
    assert found == ([25, 8, 10, 22] if drawn_on == "stored" else [8, 5, 22, 10])
    assert len(source.notes) == (drawn_on == "shown")


def test_frames_in_the_format_for_images(tmp_path, frames):
    path = changed(tmp_path, "images.xml", ('name="a.png"', 'name="frame_000001"'))
    samples, _, errors = read(path, frames, "reject")
    assert [sample.file_name for sample in samples] == ["frame_000001.PNG"]
    assert len(errors) == 2


def test_a_video_without_frames(images, tmp_path, frames):
    with pytest.raises(BadInputError, match="is of a video, and .* has no frame_000000.png"):
        read(WRITTEN / "video.xml", images)
    (frames / "frame_000002.PNG").unlink()
    with pytest.raises(BadInputError, match="track 0: the image of frame 2 is missing"):
        read(WRITTEN / "video.xml", frames)


MASK = 'rle="3, 5, 7'
BAD = {
    "polyline": ("<polygon", "<polyline", "is no area"),
    "points": ("30.00,5.00;", "30.00;", "its points are not x,y;x,y"),
    "text": ("30.00,5.00;", "x,5.00;", "'x' is no number"),
    "infinite": ("30.00,5.00;", "inf,5.00;", "'inf' is no number"),
    "far": ("30.00,5.00;", "1e9,5.00;", "far outside the 60x40 image"),
    "group": ('occluded="1"', 'occluded="1" group_id="x"', "'x' is no whole number"),
    "runs": (MASK, 'rle="4, 5, 7', "its rle covers 196 pixels, its 13x15 frame 195"),
    "no runs": (MASK, 'rle="-3, 5, 7', "'-3' is no whole number"),
    "outside": ('left="7"', 'left="50"', "it reaches outside the 60x40 image"),
    "no label": ('<tag label="narrow_band"', "<tag", "a tag has no label"),
    "attribute": ('"paris">IIc', '"bbox">IIc', "there is an attribute 'bbox'"),
    "tag": ('label="narrow_band"', 'label="width"', "there is a tag or attribute 'width'"),
    "size": ('a.png" width="60"', 'a.png" width="61"', "a.png: is 60x40, .* says 61x40"),
    "huge": ('a.png" width="60"', 'a.png" width="999999999"', "annotation says 999999999x40"),
    "no size": ('a.png" width="60"', 'a.png" width="x"', "image 'a.png': 'x' is no whole number"),
    "missing": ('name="a.png"', 'name="e.png"', "e.png: cannot be opened"),
    "away": ('name="a.png"', 'name="../a.png"', "leads outside"),
    "nameless": ('name="a.png"', "", "file_name None is no file name"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes(tmp_path, images, name):
    old, new, message = BAD[name]
    path = changed(tmp_path, "images.xml", (old, new))
    if new == "<polyline":
        path.write_text(path.read_text().replace("</polygon>", "</polyline>"))
    with pytest.raises(BadInputError, match=message):
        read(path, images)
    samples, _, errors = read(path, images, "reject")
    assert [sample.file_name for sample in samples] == ["b/c.png", "d.png"]
    assert len(errors) == 1


ENTITIES = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>'
BAD_FILES = {
    "entities": (ENTITIES, "defines entities, which CVAT never does"),
    "external": (
        '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotations>&a;</annotations>',
        "defines entities",
    ),
    "no xml": ("{", "is no XML"),
    "cut": ("<annotations><version>1.1</version>", "is no XML"),
    "encoding": ('<?xml version="1.0" encoding="utf-99"?><annotations/>', "is no XML"),
    "other": ("<html/>", "is no CVAT file: it starts with <html>"),
    "old": ("<annotations><version>1.0</version></annotations>", "is of CVAT's format 1.0"),
    "both": (
        '<annotations><version>1.1</version><image id="0"/><track id="0"/></annotations>',
        "has both images and tracks",
    ),
    "nothing": ("<annotations><version>1.1</version></annotations>", "nothing is annotated in it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, images, name):
    text, message = BAD_FILES[name]
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message):
        read(path, images)
    with pytest.raises(BadInputError, match="none.xml: cannot be opened"):
        read(tmp_path / "none.xml", images)


def test_classes(images):
    options = {"classes": ["ulcer", "cancer", "adenoma"]}
    samples, _, _ = read(WRITTEN / "images.xml", images, **options)
    assert [a["category_id"] for a in samples[0].annotations] == [2, 3]
    with pytest.raises(BadInputError, match="unknown label 'adenoma'; the classes are cancer"):
        read(WRITTEN / "images.xml", images, classes=["cancer"])
