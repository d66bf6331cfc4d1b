"""Own COCO data: what comes through, what is computed, and everything that can be wrong."""

import copy
import json
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.formats.coco import run_lengths, to_rle
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def coco(coco_folder, read):
    """Returns a function: samples, source and rejects of the COCO folder after `edit`."""

    def call(edit=lambda coco: None, on_error="raise", folder=None):
        json_file, image_root = folder or coco_folder(edit)
        return read(read_coco, on_error, json_file=json_file, image_root=image_root)

    return call


def edit_lesion(**changes):
    """Changes the annotation of the second image; a value of None deletes the key."""

    def edit(coco):
        lesion = coco["annotations"][1] | changes
        coco["annotations"][1] = {k: v for k, v in lesion.items() if v is not None}

    return edit


def rle(mask):
    encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def runs_of(mask):
    starts = np.flatnonzero(np.diff(np.concatenate([[0], mask.flatten("F").astype(int)])))
    return np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()


def test_what_passes_through(coco):
    def edit(content):
        for image in content["images"]:
            del image["width"], image["height"]
        content["images"][0].update(patient_id="p1", centre="X", device="endoscope 2")
        content["annotations"][0].update(lesion_id="l1", depth="sm1")
        content.update(info={"year": 2024}, licenses=[{"id": 1}])
        content["annotations"].append({**content["annotations"][1], "category_id": 2})
        # as many and as long as may be, in another order
        content["categories"] += [{"id": i, "name": "a" * i} for i in range(200, 1, -1)]

    samples, source, _ = coco(edit)
    assert [s.file_name for s in samples] == ["1.png", "2.png", "3.png"]
    lesion = {"category_id": 1, "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]]}
    lesion |= {"bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0}
    further = {"lesion_id": "l1", "depth": "sm1"}
    lesions = [{**lesion, **further}], [lesion, lesion | {"category_id": 2}], []
    assert [s.annotations for s in samples] == [*lesions]
    assert samples[0].fields == {"patient_id": "p1", "centre": "X", "device": "endoscope 2"}
    assert (source.info, source.extra) == ({"year": 2024}, {"licenses": [{"id": 1}]})
    assert [category["id"] for category in source.categories] == [*range(1, 201)]
    assert source.notes == []


def test_empty_ids_are_not_known(coco):
    def edit(content):
        content["images"][0].update(patient_id="", sequence_id="")
        content["images"][1].update(patient_id=0, note="")
        content["annotations"][0].update(lesion_id="")

    (first, second, _), _, _ = coco(edit)
    assert (first.fields, second.fields) == ({}, {"patient_id": 0, "note": ""})
    assert "lesion_id" not in first.annotations[0]


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.integers(0, 1600))
def test_rle_is_decoded_and_empty_runs_are_left_out(mask, at):
    """With them pycocotools loses pixels where it merges masks."""
    clean, runs = rle(mask), runs_of(mask)
    assert run_lengths([clean["counts"]])[0].tolist() == runs
    at %= len(runs)
    runs[at : at + 1] = [runs[at], 0, 0]
    uncompressed = {"size": clean["size"], "counts": runs}
    text = mask_util.frPyObjects(uncompressed, *mask.shape)
    for segmentation in (uncompressed, text):
        assert to_rle(segmentation, *mask.shape)["counts"].decode() == clean["counts"]


def test_random_text_is_refused():
    """pycocotools reads the half of such texts without end."""
    for row in np.random.default_rng(0).integers(48, 112, (500, 12), dtype=np.uint8):
        with pytest.raises(ValueError, match="64x48"):
            to_rle({"size": [48, 64], "counts": row.tobytes().decode()}, 48, 64)


def test_boxes_and_areas_come_from_the_mask(coco):
    def edit(content):
        edit_lesion(bbox=[10, 10, 30, 20], area=5)(content)  # x2 and y2 instead of width and height
        outside = [[-10, -10, 20, -10, 20, 20, -10, 20]]
        first, second = content["annotations"]
        content["annotations"].append(second | {"image_id": 3, "bbox": [12, 8, 18, 12]})
        first.update(segmentation=outside, bbox=[-10, -10, 30, 30])

    samples, source, _ = coco(edit)
    lesions = [(a["bbox"], a["area"]) for sample in samples for a in sample.annotations]
    assert lesions == [([0, 0, 20, 20], 400), *[([10, 10, 20, 10], 200)] * 2]
    # the third is two pixels off
    assert len(source.notes) == 1 and source.notes[0].startswith("2 boxes differed")


def polygon(*points):
    return edit_lesion(segmentation=[list(points)], bbox=None)


def edit_image(**changes):
    return lambda content: content["images"][1].update(changes)


def counts(value):
    return edit_lesion(segmentation={"size": [40, 60], "counts": value})


# just beyond each side; of no width, of no height
OUTSIDE = [60, 9, 5, 5], [9, 40, 5, 5], [-5, 9, 5, 5], [9, -5, 5, 5], [9, 9, 0, 5], [9, 9, 5, 0]
FULL = rle(np.ones((40, 60), bool))["counts"]
BAD_ANNOTATIONS = [
    (edit_lesion(category_id=9), "id 9"),
    (polygon(1, 1, 9, 9), "2 points"),
    (polygon(1, 1, 9, 1, 9, 1e9), "1e.09"),
    *((polygon(1, 1, 9, 1, *bad), "flat list") for bad in ([9, 9, 1], ["9", 9], [[9, 9]])),
    *((polygon(*far), "no pixel") for far in ([90, 90, 99, 90, 99, 99], [5] * 6)),  # a line
    *((edit_lesion(segmentation=none, bbox=[70, 0, 5, 5]), "outside") for none in (None, [])),
    (edit_lesion(segmentation="x"), "neither .* polygons nor RLE"),
    (edit_lesion(segmentation=rle(np.ones((60, 40), bool))), r"\[60, 40\]"),
    # short, negative; as text that never ends, of other letters, of huge numbers, too long
    *((counts(bad), "60x40") for bad in ([100, 50], [2500, -100], "4@", "P")),
    *((counts(bad), "60x40") for bad in ("\u00e9x~ ", "ooooooO" * 9, FULL + "zzz")),
    (counts("0" * (2**24 + 1)), str(2**24 + 1)),  # longer than the memory
    (polygon(*[0, 0, 0, 39, 1, 0] * 5000), "points is .* pixels long"),
    (edit_lesion(segmentation={"size": [40, 60]}), "60x40"),
    (edit_lesion(segmentation=rle(np.zeros((40, 60), bool))), "no pixel"),
    *((edit_lesion(bbox=box), f"{re.escape(str(box))} .* 60x40") for box in OUTSIDE),
    (edit_lesion(bbox=[10, 10, 5]), r"\[10, 10, 5\]"),
    (edit_lesion(iscrowd=2), "iscrowd is 2"),
    (edit_lesion(ignore=1), "ignore"),
]


def twice(content):
    content["annotations"].append({**copy.deepcopy(content["annotations"][1]), "id": 3})


def same(**value):
    """Changes the second image and its annotation to be of the first."""

    def edit(content):
        edit_image(**value)(content)
        edit_lesion(image_id=content["images"][1]["id"])(content)

    return edit


NAMES = "../1.png", "a/../../1.png", "/etc/hostname", "", "a\0.png", 7, None, "a" * 300, "a/" * 2000


@pytest.mark.parametrize(
    ("edit", "message", "kept", "num_errors"),
    [
        (twice, "2.png: annotation 3", "13", 1),
        (edit_lesion(image_id=99), "own.json: annotation 2: .* 99", "123", 1),
        (same(id=1), "1.png: duplicate: .* id 1", "3", 2),
        (same(file_name="1.png"), "1.png: duplicate: .* file_name '1.png'", "3", 2),
        (edit_image(width=61), "2.png: .*61x40", "13", 1),
        *((edit_image(file_name=name), "own.json: file_name", "13", 1) for name in NAMES),
        *((edit, f"2.png: annotation 2: .*{text}", "13", 1) for edit, text in BAD_ANNOTATIONS),
    ],
)
def test_bad_records_reject_their_images(coco, coco_folder, edit, message, kept, num_errors):
    folder = coco_folder(edit)
    with pytest.raises(BadInputError, match=message):
        coco(folder=folder)
    samples, _, errors = coco(on_error="reject", folder=folder)
    assert [sample.file_name for sample in samples] == [f"{i}.png" for i in kept]
    assert len(errors) == num_errors


def test_missing_and_cut_images(coco, coco_folder):
    _, images = folder = coco_folder()
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:3000])
    with pytest.raises(BadInputError, match="1.png: cannot be opened"):
        coco(folder=folder)
    samples, _, errors = coco(on_error="reject", folder=folder)
    assert [sample.file_name for sample in samples] == ["3.png"]
    assert [error.file for error in errors] == [str(images / name) for name in ("1.png", "2.png")]


@pytest.mark.parametrize("kind", ["polygon", "rle", "runs"])
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_exif_rotated(coco, coco_folder, rotated, kind, annotated):
    """The lesion is bright in the image: it must be under the mask in what Detectron2 reads."""
    stored = np.zeros((40, 60), bool)
    stored[5:15, 8:30] = True
    frame = stored if annotated == "stored" else np.rot90(stored, -1)
    x, y, w, h = box = [8, 5, 22, 10] if annotated == "stored" else [25, 8, 10, 22]

    def edit(content):
        for image in content["images"][1:]:
            image.update(width=frame.shape[1], height=frame.shape[0])
        segmentation = {
            "polygon": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            "rle": rle(frame),
            "runs": {"size": list(frame.shape), "counts": runs_of(frame)},
        }[kind]
        edit_lesion(segmentation=segmentation, bbox=box, lesion_id="x", iscrowd=1)(content)

    json_file, images = coco_folder(edit)
    for name in ("2.png", "3.png"):  # the latter without a lesion
        rotated(images / name, pixels=255 * np.dstack([stored] * 3).astype(np.uint8))
    samples, source, _ = coco(folder=(json_file, images))
    bright = read_image(str(images / "2.png"), "L")[..., 0] > 0
    assert (samples[1].image.height, samples[1].image.width) == bright.shape
    (annotation,) = samples[1].annotations
    mask = mask_util.decode(to_rle(annotation.pop("segmentation"), *bright.shape))
    assert np.array_equal(mask, bright)
    expected = {"bbox": [25, 8, 10, 22], "area": 220, "iscrowd": 1}
    assert annotation == {**expected, "category_id": 1, "lesion_id": "x"}
    assert len(source.notes) == (annotated == "shown")


def test_unusable_files(coco, coco_folder):
    folder = json_file, images = coco_folder()
    text = json_file.read_text()
    json_file.write_text(text, encoding="utf-8-sig")
    assert len(coco(folder=folder)[0]) == 3
    content = json.loads(text)
    category = content["categories"][0]
    for changes, message in (
        ({"annotations": {}}, "annotations"),
        ({"images": [{"id": 1}]}, r"images\[0\] lacks file_name"),
        ({"annotations": [{}]}, "category_id, image_id"),
        ({"categories": []}, "categories"),
        ({"categories": [category, category]}, "same id"),
        ({"info": float("nan")}, "NaN"),
        ({"images": [{"id": [], "file_name": "x"}]}, r"id \[\]"),
        ({"categories": [{"id": "1", "name": "x"}]}, "id '1'"),
        ({"categories": [{"id": 1, "name": {}}]}, "name {}"),
        ({"categories": [{"id": 1, "name": "a\x1b[2J"}]}, "name 'a"),
        ({"categories": [{"id": 1, "name": "a" * 201}]}, "at most 200"),
        ({"categories": [{"id": 1, "name": "a"}] * 201}, "201"),
    ):
        json_file.write_text(json.dumps({**content, **changes}))
        with pytest.raises(BadInputError, match=message) as error:
            coco(on_error="reject", folder=folder)
        assert error.value.file == str(json_file)
    for bad in ("{", "[]"):
        json_file.write_text(bad)
        with pytest.raises(BadInputError, match="own.json"):
            coco(folder=folder)
    with pytest.raises(BadInputError, match="none.json"):
        coco(folder=(images / "none.json", images))
