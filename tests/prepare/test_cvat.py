"""CVAT files in the form that CVAT's exporter writes them, and everything that can be wrong."""

import math
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.data.formats import read_cvat
from imrcnn_d2.utils.files import BadInputError

# As "CVAT for images 1.1" and "CVAT for video 1.1"; the mask is that of CVAT's documentation.
WRITTEN = Path(__file__).parent / "formats" / "cvat"
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
    text = (WRITTEN / name).read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return path


def test_images(images, cvat):
    Image.new("RGB", (60, 40), "red").save(images / "more.png")
    (a, c, d), source, _ = cvat(WRITTEN / "images.xml", images)
    assert [sample.file_name for sample in (a, c, d)] == list(NAMES)
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer"]
    assert a.fields == {"narrow_band": True, "light": "NBI"}
    blob, polygon = a.annotations
    values = [blob[key] for key in ("category_id", "paris", "size_mm", "ulcerated", "bbox")]
    assert values == [2, "IIc", 12, True, [7, 8, 13, 15]]
    mask = mask_util.decode(blob["segmentation"])
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
    assert d.annotations == [] and d.fields == {}
    assert len(source.notes) == 1 and source.notes[0].endswith(": more.png")


def test_several_tasks_a_project_and_classes(tmp_path, images, frames, cvat):
    other = changed(tmp_path, "images.xml", ('<image id="', '<image id="1'), ("adenoma", "polyp"))
    other.write_text(other.read_text().replace('name="a.png"', 'name="t.png" subset="Train"'))
    for name in NAMES[1:]:
        other.write_text(other.read_text().replace(f'name="{name}"', f'name="other/{name}"'))
    shutil.copytree(images, images / "other")
    (images / "Train").mkdir()
    shutil.copy(images / "a.png", images / "Train" / "t.png")
    samples, source, _ = cvat([WRITTEN / "images.xml", other], images)
    assert len(samples) == 6
    assert [c["name"] for c in source.categories] == ["adenoma", "cancer", "polyp"]
    assert (samples[3].file_name, samples[3].fields["subset"]) == ("Train/t.png", "Train")
    with pytest.raises(BadInputError, match="images.xml: duplicate: .*'a.png'"):
        cvat([WRITTEN / "images.xml"] * 2, images)
    samples, _, _ = cvat(WRITTEN / "images.xml", images, classes=["ulcer", "cancer", "adenoma"])
    assert [a["category_id"] for a in samples[0].annotations] == [2, 3]
    with pytest.raises(BadInputError, match="'adenoma'; .*cancer"):
        cvat(WRITTEN / "images.xml", images, classes=["cancer"])
    # images by the numbers of a video's frames
    path = changed(tmp_path, "images.xml", ('name="a.png"', 'name="frame_000001"'))
    samples, _, errors = cvat(path, frames, "reject")
    assert [sample.file_name for sample in samples] == ["frame_000001.PNG"] and len(errors) == 2


def test_a_video(tmp_path, frames, cvat):
    samples, source, _ = cvat(WRITTEN / "video.xml", frames)
    assert [sample.file_name for sample in samples] == [f"frame_{i:06d}.PNG" for i in range(5)]
    assert [len(sample.annotations) for sample in samples] == [0, 1, 2, 0, 0]
    assert [a["bbox"] for a in samples[2].annotations] == [[12, 10, 10, 10], [40, 10, 10, 20]]
    assert [a["lesion_id"] for a in samples[2].annotations] == ["0", "1"]
    assert samples[2].annotations[1]["occluded"] is True
    assert [c["name"] for c in source.categories] == ["polyp"]
    # and one without a track
    text = (WRITTEN / "video.xml").read_text()
    path = tmp_path / "video.xml"
    path.write_text(text[: text.index("<track")] + "</annotations>")
    samples, source, _ = cvat(path, frames, classes=["polyp"])
    assert [sample.annotations for sample in samples] == [[]] * 5 and source.notes == []


INNER = 'frame="3" keyframe="1" outside="1" occluded="0"'


def test_a_video_of_key_frames(tmp_path, frames, cvat):
    """What lies between two key frames is no mucosa without a lesion."""
    for frame, name in ((4, "frame_000004.PNG"), (999999998, "frame_999999998.PNG")):
        (frames / "frame_000004.PNG").rename(frames / name)  # its number takes no time
        key_frame = 'frame="2" keyframe="0"', f'frame="{frame}" keyframe="1"'
        end = f'frame="{frame + 1}" outside="1"'
        path = changed(tmp_path, "video.xml", key_frame, (INNER, end))
        with pytest.raises(BadInputError, match="frame_000002.PNG: track 0 .*between"):
            cvat(path, frames)
        samples, _, errors = cvat(path, frames, "reject")
        assert [s.file_name[-5] for s in samples] == ["0", "1", name[-5]] and len(errors) == 2


def test_a_track_without_an_end(tmp_path, frames, cvat):
    """Frames after it are not without a lesion; a track to the last frame needs no end."""
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
    for path, folder, message in (
        (changed(tmp_path, "video.xml", *two), frames, "video.xml: has 2 videos"),
        (WRITTEN / "video.xml", images, f"video.xml: .*{images}"),
        (WRITTEN / "video.xml", frames, "track 0: .*frame 2"),
    ):
        if "track" in message:
            (frames / "frame_000002.PNG").unlink()
        with pytest.raises(BadInputError, match=message):
            cvat(path, folder)


@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_exif_rotated(tmp_path, images, rotated, cvat, annotated):
    """The size says which frame was annotated."""
    rotated(images / "d.png")
    size = 'width="60" height="40"' if annotated == "stored" else 'width="40" height="60"'
    box = '<box label="cancer" occluded="0" xtl="8" ytl="5" xbr="30" ybr="15" z_order="0"/></image>'
    old = 'name="d.png" width="60" height="40">\n  </image>'
    path = changed(tmp_path, "images.xml", (old, f'name="d.png" {size}>{box}'))
    samples, source, _ = cvat(path, images)
    assert (samples[2].image.width, samples[2].image.height) == (40, 60)
    expected = [25, 8, 10, 22] if annotated == "stored" else [8, 5, 22, 10]
    assert samples[2].annotations[0]["bbox"] == expected
    assert len(source.notes) == (annotated == "shown")


MASK = 'rle="3, 5, 7'
BAD = {
    "polyline": ("<polygon", "<polyline", "a polyline 'adenoma'"),
    "points": ("30.00,5.00;", "30.00;", "points"),
    "text": ("30.00,5.00;", "x,5.00;", "'x'"),
    "infinite": ("30.00,5.00;", "inf,5.00;", "'inf'"),
    "far": ("30.00,5.00;", "1e9,5.00;", "1e.09 .*60x40"),
    "group": ('occluded="1"', 'occluded="1" group_id="x"', "'x'"),
    "runs": (MASK, 'rle="4, 5, 7', "196 .* 195"),
    "no runs": (MASK, 'rle="-3, 5, 7', "'-3'"),
    "outside": ('left="7"', 'left="50"', "60x40"),
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
BAD_FILES = {
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


@pytest.mark.parametrize("text", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(tmp_path, images, cvat, text):
    (tmp_path / "bad.xml").write_text(text)
    for name, message in (("bad.xml", BAD_FILES[text]), ("none.xml", "")):
        with pytest.raises(BadInputError, match=f"{name}: .*{message}"):
            cvat(tmp_path / name, images)
