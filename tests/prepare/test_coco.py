"""Own COCO data: what comes through, what is computed, and everything that can be wrong."""

import copy
import json
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from imrcnn_d2.data.formats.coco import _run_lengths, read_coco, to_rle
from imrcnn_d2.utils.files import BadInputError, Rejects


def read(json_file, images, on_error="raise"):
    rejects = Rejects(on_error)
    source = read_coco(json_file, images, rejects)
    samples = list(source.samples)
    return samples, source, rejects.errors


def edit_lesion(**changes):
    """Changes the annotation of the second image; a value of None deletes the key."""

    def edit(coco):
        coco["annotations"][1].update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del coco["annotations"][1][key]

    return edit


def rle(mask, compressed=True):
    encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    if compressed:
        return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    flat = np.concatenate([[0], mask.flatten("F"), [2]])
    runs = np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=0).tolist()
    return {"size": list(mask.shape), "counts": ([0] if mask[0, 0] else []) + runs[:]}


def test_polygons_pass_through(coco_folder):
    samples, source, _ = read(*coco_folder())
    assert [s.file_name for s in samples] == ["1.png", "2.png", "3.png"]
    assert samples[0].annotations == [
        {
            "category_id": 1,
            "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]],
            "bbox": [10, 10, 20, 10],
            "area": 200,
            "iscrowd": 0,
        }
    ]
    assert not samples[2].has_lesion
    assert source.notes == []
    assert source.categories == [{"id": 1, "name": "early gastric cancer"}]


def test_further_fields_pass_through(coco_folder):
    def edit(coco):
        coco["images"][0].update(patient_id="p1", centre="X", device="endoscope 2")
        coco["annotations"][0].update(lesion_id="l1", depth="sm1")
        coco.update(info={"year": 2024}, licenses=[{"id": 1}], categories=coco["categories"][::-1])

    (first, *_), source, _ = read(*coco_folder(edit))
    assert first.fields == {"patient_id": "p1", "centre": "X", "device": "endoscope 2"}
    assert {k: first.annotations[0][k] for k in ("lesion_id", "depth")} == {
        "lesion_id": "l1",
        "depth": "sm1",
    }
    assert source.info == {"year": 2024}
    assert source.extra == {"licenses": [{"id": 1}]}


@pytest.mark.parametrize("compressed", [True, False])
def test_rle(coco_folder, compressed):
    mask = np.zeros((40, 60), bool)
    mask[5:25, 8:20] = True
    segmentation = rle(mask, compressed)
    changes = edit_lesion(segmentation=segmentation, bbox=[8, 5, 12, 20])
    annotation = read(*coco_folder(changes))[0][1].annotations[0]
    assert annotation["segmentation"] == segmentation
    assert (annotation["bbox"], annotation["area"]) == ([8, 5, 12, 20], 240)


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_compressed_rle_is_decoded(mask):
    starts = np.flatnonzero(np.diff(np.concatenate([[0], mask.flatten("F").astype(int)])))
    runs = np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()
    assert _run_lengths([rle(mask)["counts"]])[0].tolist() == runs


def test_random_text_is_refused():
    """It reads the half of such texts without end."""
    letters = np.random.default_rng(0).integers(48, 112, (500, 12), dtype=np.uint8)
    for row in letters:
        with pytest.raises(ValueError, match="does not cover"):
            to_rle({"size": [48, 64], "counts": row.tobytes().decode()}, 48, 64)


@given(arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))), st.integers(0, 400))
def test_empty_runs_are_left_out(mask, at):
    """With them pycocotools loses pixels where it merges masks."""
    clean = rle(mask)
    runs = _run_lengths([clean["counts"]])[0].tolist()
    at %= len(runs)
    runs[at : at + 1] = [runs[at], 0, 0]
    uncompressed = {"size": clean["size"], "counts": runs}
    text = mask_util.frPyObjects(uncompressed, *mask.shape)
    for segmentation in (uncompressed, text):
        assert to_rle(segmentation, *mask.shape)["counts"].decode() == clean["counts"]


def test_boxes_and_areas_come_from_the_mask(coco_folder):
    wrong = edit_lesion(bbox=[10, 10, 30, 20], area=5)  # x2 and y2 instead of width and height
    samples, source, _ = read(*coco_folder(wrong))
    assert samples[1].annotations[0]["bbox"] == [10, 10, 20, 10]
    assert samples[1].annotations[0]["area"] == 200
    assert source.notes == [
        "1 boxes differed by more than 2 pixels from their masks' boxes, which are used instead"
    ]


def test_polygons_reaching_outside_are_clipped(coco_folder):
    polygon = [[-10, -10, 20, -10, 20, 20, -10, 20]]
    outside = edit_lesion(segmentation=polygon, bbox=[-10, -10, 30, 30])
    annotation = read(*coco_folder(outside))[0][1].annotations[0]
    assert annotation["bbox"] == [0, 0, 20, 20]


def test_crowds_make_no_image_positive(coco_folder):
    samples, _, _ = read(*coco_folder(edit_lesion(iscrowd=1)))
    assert [sample.has_lesion for sample in samples] == [True, False, False]
    assert samples[1].annotations[0]["iscrowd"] == 1


def test_sizes_may_be_left_out(coco_folder):
    def edit(coco):
        for image in coco["images"]:
            del image["width"], image["height"]

    assert len(read(*coco_folder(edit))[0]) == 3


def polygon(*points):
    return edit_lesion(segmentation=[list(points)], bbox=None)


FULL = rle(np.ones((40, 60), bool))
UNCOMPRESSED = {"size": [40, 60]}
BAD_ANNOTATIONS = {
    "category": (edit_lesion(category_id=9), "there is no category with id 9"),
    "two points": (polygon(1, 1, 9, 9), "a polygon has 2 points, at least 3 are needed"),
    "odd": (polygon(1, 1, 9, 1, 9, 9, 1), "not a flat list"),
    "text": (polygon(1, 1, 9, 1, "9", 9), "not a flat list"),
    "huge": (polygon(1, 1, 9, 1, 9, 1e9), "1e.09 is far outside the 60x40 image"),
    "nested": (polygon([1, 1], [9, 1], [9, 9]), "not a flat list"),
    "a line": (polygon(5, 5, 5, 5, 5, 5), "its mask covers no pixel of the 60x40 image"),
    "far away": (polygon(90, 90, 99, 90, 99, 99), "its mask covers no pixel of the 60x40 image"),
    "no segmentation": (edit_lesion(segmentation=None), "has no segmentation"),
    "empty segmentation": (edit_lesion(segmentation=[]), "has no segmentation"),
    "string": (edit_lesion(segmentation="x"), "neither a list of polygons nor RLE"),
    "RLE size": (
        edit_lesion(segmentation=rle(np.ones((60, 40), bool))),
        r"its RLE has size \[60, 40\], the image \[40, 60\]",
    ),
    "RLE short": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": [100, 50]}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE negative": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": [2500, -100]}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE that never ends": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": "4@"}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE of other letters": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": "\u00e9x~ "}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE of huge numbers": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": "ooooooO" * 9}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE without end": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": "P"}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE longer than the memory": (
        edit_lesion(segmentation={**UNCOMPRESSED, "counts": "0" * (2**24 + 1)}),
        "longer than",
    ),
    "to and fro": (polygon(*[0, 0, 0, 39, 1, 0] * 5000), "points is .* pixels long"),
    "RLE no counts": (edit_lesion(segmentation=UNCOMPRESSED), "does not cover the 60x40"),
    "RLE garbage": (
        edit_lesion(segmentation={**FULL, "counts": FULL["counts"] + "zzz"}),
        "does not cover the 60x40 image exactly",
    ),
    "RLE empty": (
        edit_lesion(segmentation=rle(np.zeros((40, 60), bool))),
        "its mask covers no pixel",
    ),
    "box outside": (edit_lesion(bbox=[70, 10, 5, 5]), r"its box \[70, 10, 5, 5\] .* outside 60x40"),
    "box left": (edit_lesion(bbox=[-20, 10, 15, 5]), r"is outside 60x40"),
    "box flat": (edit_lesion(bbox=[10, 10, 0, 5]), r"is outside 60x40"),
    "box short": (edit_lesion(bbox=[10, 10, 5]), r"is not \[x, y, width, height\]"),
    "crowd": (edit_lesion(iscrowd=2), "iscrowd is 2"),
    "ignore": (edit_lesion(ignore=1), "mark it iscrowd instead"),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_bad_annotation_rejects_its_image(coco_folder, name):
    edit, message = BAD_ANNOTATIONS[name]
    json_file, images = coco_folder(edit)
    with pytest.raises(BadInputError, match=f"2.png: annotation 2: .*{message}"):
        read(json_file, images)
    samples, _, errors = read(json_file, images, "reject")
    assert [sample.file_name for sample in samples] == ["1.png", "3.png"]
    assert len(errors) == 1


def test_annotation_listed_twice(coco_folder):
    def edit(coco):
        coco["annotations"].append({**copy.deepcopy(coco["annotations"][1]), "id": 3})

    with pytest.raises(BadInputError, match="2.png: annotation 3: listed twice"):
        read(*coco_folder(edit))


def test_annotation_for_an_unknown_image(coco_folder):
    json_file, images = coco_folder(edit_lesion(image_id=99))
    with pytest.raises(BadInputError, match="own.json: annotation 2: there is no image with id 99"):
        read(json_file, images)
    samples, _, errors = read(json_file, images, "reject")
    assert len(samples) == 3
    assert len(errors) == 1


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_duplicate_images(coco_folder, key):
    def edit(coco):
        coco["images"][1][key] = coco["images"][0][key]
        coco["annotations"][1]["image_id"] = coco["images"][1]["id"]

    json_file, images = coco_folder(edit)
    with pytest.raises(BadInputError, match=f"1.png: duplicate: several images with {key}"):
        read(json_file, images)
    samples, _, errors = read(json_file, images, "reject")
    assert [sample.file_name for sample in samples] == ["3.png"]
    assert len(errors) == 2


@pytest.mark.parametrize(
    "name",
    ["../1.png", "a/../../1.png", "/etc/hostname", "", "a\0.png", 7, None, "a" * 300, "a/" * 2000],
)
def test_file_name_outside_the_folder(coco_folder, name):
    def edit(coco):
        coco["images"][1]["file_name"] = name

    json_file, images = coco_folder(edit)
    shutil.copy(images / "1.png", images.parent / "1.png")
    with pytest.raises(
        BadInputError, match="own.json: file_name .*(outside|is no file name|too long)"
    ):
        read(json_file, images)
    assert len(read(json_file, images, "reject")[0]) == 2


def test_missing_and_cut_images(coco_folder):
    json_file, images = coco_folder()
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:3000])
    with pytest.raises(BadInputError, match="1.png: cannot be opened: No such file"):
        read(json_file, images)
    samples, _, errors = read(json_file, images, "reject")
    assert [sample.file_name for sample in samples] == ["3.png"]
    assert [error.reason.split(" (")[0] for error in errors] == [
        "cannot be opened: No such file or directory",
        "is no readable image",
    ]


def test_image_of_another_size(coco_folder):
    def edit(coco):
        coco["images"][1]["width"] = 61

    with pytest.raises(BadInputError, match="2.png: is 60x40, but its annotation says 61x40"):
        read(*coco_folder(edit))


@pytest.mark.parametrize("kind", ["polygon", "rle"])
@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_exif_rotated(coco_folder, kind, drawn_on):
    """The lesion is bright in the image: it must be under the mask in what Detectron2 reads."""
    stored = np.zeros((40, 60), bool)
    stored[5:15, 8:30] = True
    shown = np.rot90(stored, -1)
    frame = stored if drawn_on == "stored" else shown
    height, width = frame.shape
    rows, columns = np.nonzero(frame)
    x1, y1, x2, y2 = map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    corners = [x1, y1, x2, y1, x2, y2, x1, y2]

    def edit(coco):
        coco["images"][1].update(width=width, height=height)
        coco["annotations"][1].update(
            segmentation=[corners] if kind == "polygon" else rle(frame),
            bbox=[x1, y1, x2 - x1, y2 - y1],
            lesion_id="x",
        )

    json_file, images = coco_folder(edit)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(stored).convert("RGB").save(images / "2.png", exif=exif)
    samples, source, _ = read(json_file, images)
    sample = samples[1]
    bright = read_image(str(images / "2.png"), "L")[..., 0] > 0
    assert (sample.image.height, sample.image.width) == bright.shape
    annotation = sample.annotations[0]
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *bright.shape))
    assert np.array_equal(mask_util.decode(segmentation), bright)
    assert annotation["bbox"] == [25, 8, 10, 22]
    assert annotation["lesion_id"] == "x"
    assert len(source.notes) == (drawn_on == "shown")


def test_unusable_files(coco_folder):
    json_file, images = coco_folder()
    content = json.loads(json_file.read_text())
    category = content["categories"][0]
    for bad, message in (
        ("{", "is no JSON"),
        ("[]", "no COCO instance file: it has no list of images"),
        (json.dumps({**content, "annotations": {}}), "it has no list of annotations"),
        (json.dumps({**content, "images": [{"id": 1}]}), r"images\[0\] lacks file_name"),
        (json.dumps({**content, "annotations": [{}]}), "lacks category_id, image_id"),
        (json.dumps({**content, "categories": []}), "no categories"),
        (json.dumps({**content, "categories": [category, category]}), "two of the same id"),
        (json.dumps({**content, "info": float("nan")}), "NaN is no JSON value"),
        (json.dumps({**content, "images": [{"id": [], "file_name": "x"}]}), r"has the id \[\]"),
        (json.dumps({**content, "categories": [{"id": "1", "name": "x"}]}), "has the id '1'"),
        (json.dumps({**content, "categories": [{"id": 1, "name": {}}]}), "has the name {}"),
        (json.dumps({**content, "categories": [{"id": 1, "name": "a\x1b[2J"}]}), "has the name 'a"),
        (json.dumps({**content, "categories": [{"id": 1, "name": "a" * 201}]}), "at most 200"),
        (json.dumps({**content, "categories": [{"id": 1, "name": "a"}] * 201}), "has 201 categ"),
    ):
        json_file.write_text(bad)
        with pytest.raises(BadInputError, match=message) as error:
            read(json_file, images, "reject")
        assert error.value.file == str(json_file)
    with pytest.raises(BadInputError, match="none.json: cannot be opened"):
        read(images / "none.json", images)


def test_byte_order_mark(coco_folder):
    json_file, images = coco_folder()
    json_file.write_text(json_file.read_text(), encoding="utf-8-sig")
    assert len(read(json_file, images)[0]) == 3
