"""A data set whose lesions have boxes and no masks, through every command that reads one."""

import json

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.cli import audit_dataset, evaluate, export_annotations
from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.images import orient, orient_box
from imrcnn_d2.utils.files import Rejects

BOXES = {  # XYWH in images of 60 x 40
    "a.png": [[4, 6, 20, 15], [30.5, 10, 20, 20]],
    "b.png": [[-5, 8, 30, 15]],  # beyond the border
    "c.png": [],
    "d.png": [[40, 20, 30, 30]],
}
CUT = {**BOXES, "b.png": [[0, 8, 25, 15]], "d.png": [[40, 20, 20, 20]]}


@pytest.fixture
def boxes(tmp_path, noise):
    """A COCO file of boxes with lesions by size, and its folder of images."""
    images, annotations = [], []
    for image_id, (name, of_image) in enumerate(BOXES.items(), start=1):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise(40, 60, image_id)).save(tmp_path / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": 60, "height": 40})
        images[-1] |= {"centre": "AB"[image_id % 2], "patient_id": f"p{image_id}"}
        for box in of_image:
            fields = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1}
            annotations.append({**fields, "bbox": box, "lesion_id": f"l{fields['id']}"})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "polyp"}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path, tmp_path / "images"


def boxes_of(out):
    """The boxes of a data set that was prepared for testing, by file name; none has a mask."""
    content = json.loads((out / "annotations" / "test.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    by_name = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        assert "segmentation" not in annotation
        by_name[names[annotation["image_id"]]].append(annotation["bbox"])
    return by_name


@pytest.fixture
def prepared(boxes, run, tmp_path):
    path, images = boxes
    out = tmp_path / "prepared"
    text = run(*("coco", "--annotations", path, "--images", images, "--out", out, "--all-test"))
    assert "4 of 4 annotations have a box and no mask" in text and "MODEL.MASK_ON" in text
    return out


def test_boxes_are_cut_at_the_border_and_loaded(prepared):
    assert boxes_of(prepared) == CUT
    catalog = load_catalog(prepared / "annotations" / "test.json", prepared / "images")
    assert [len(record["annotations"]) for record in catalog] == [2, 1, 0, 1]


@pytest.mark.parametrize("tool", ["labelme", "cvat"])
def test_boxes_come_back_from_an_annotation_tool_as_boxes(prepared, run, tmp_path, tool):
    images, exported, out = prepared / "images", tmp_path / tool, tmp_path / "back"
    annotations = prepared / "annotations" / "test.json"
    arguments = "--annotations", annotations, "--images", images, "--to", tool
    run(*arguments, "--output", exported, command=export_annotations)
    source = ("--root", exported)
    if tool == "cvat":
        source = ("--annotations", exported / "annotations.xml")
    run(tool, *source, "--images", images, "--follow-links", "--out", out, "--all-test")
    assert boxes_of(out) == CUT


def test_masks_cannot_be_made_of_boxes(prepared, run, tmp_path):
    annotations = prepared / "annotations" / "test.json"
    arguments = "--annotations", annotations, "--images", prepared / "images", "--to", "masks"
    text = run(*arguments, "--output", tmp_path / "x", command=export_annotations, fails=True)
    assert "a.png" in text and "labelme" in text


@pytest.mark.slow  # loads a network
def test_an_audit_takes_a_box_for_what_it_holds(prepared, run, tmp_path):
    run("--dataset", prepared, "--output", tmp_path / "audit", command=audit_dataset)
    findings = json.loads((tmp_path / "audit" / "audit.json").read_text())["findings"]
    assert not {"empty", "malformed"} & {finding["kind"] for finding in findings}


def test_boxes_are_evaluated_as_boxes_without_being_asked(prepared, run, tmp_path):
    """Of four lesions three are hit, one of them by a box that is 20 of 25 pixels wide."""
    gt, dt = prepared / "annotations" / "test.json", tmp_path / "dt.json"
    detected = [
        (1, [4, 6, 20, 15]),
        (1, [30.5, 10, 20, 20]),
        (2, [0, 8, 20, 15]),
        (3, [5, 5, 9, 9]),
    ]
    ids = {"a.png": 1, "b.png": 2, "c.png": 3}
    names = {image["file_name"]: image["id"] for image in json.loads(gt.read_text())["images"]}
    ids = {number: names[name] for name, number in ids.items()}
    results = [
        {"image_id": ids[number], "category_id": 1, "bbox": box, "score": 0.9 - n / 10}
        for n, (number, box) in enumerate(detected)
    ]
    dt.write_text(json.dumps(results))
    arguments = "--gt", gt, "--dt", dt, "--tau", "0.5", "--resamples", "0", "--by", "centre"
    text = run(
        *arguments, "--images", prepared / "images", "--output", tmp_path / "out", command=evaluate
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "the ground truth has no masks" in text and metrics["meta"]["iou_type"] == "bbox"
    lesion = metrics["lesion"]
    assert [lesion[key] for key in ("TP", "FP", "FN")] == [3, 1, 1]
    assert lesion["iou_box"] == pytest.approx(100 * (1 + 1 + 0.8) / 3) and lesion["iou"] is None
    assert "lesion iou_box" in text and "lesion dice" not in text
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_turns_with_its_image(rotated, tmp_path, orientation):
    """As a mask of the same pixels does: annotated on 60 x 40 stored pixels."""
    x, y, w, h = box = 5, 7, 20, 10
    stored = np.zeros((40, 60), bool)
    stored[y : y + h, x : x + w] = True
    rows, columns = np.nonzero(orient(stored, orientation))
    expected = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
    assert orient_box(box, 60, 40, orientation) == expected
    if orientation < 5:  # of others the size says that the image was annotated as it is stored
        return
    rotated(tmp_path / "1.png", orientation)
    image = {"id": 1, "file_name": "1.png", "width": 60, "height": 40}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}
    content = {"images": [image], "annotations": [annotation]}
    content["categories"] = [{"id": 1, "name": "polyp"}]
    (tmp_path / "own.json").write_text(json.dumps(content))
    (sample,) = read_coco(tmp_path / "own.json", tmp_path, Rejects()).samples
    assert sample.annotations[0]["bbox"] == list(expected)


def test_boxes_move_with_the_view_when_it_is_cropped(run, tmp_path, noise):
    frame = np.zeros((200, 300, 3), np.uint8)
    frame[40:160, 60:240] = 120 + noise(120, 180) // 4
    (tmp_path / "images").mkdir()
    Image.fromarray(frame).save(tmp_path / "images" / "1.png")
    image = {"id": 1, "file_name": "1.png", "width": 300, "height": 200}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [100, 60, 50, 30]}
    content = {"images": [image], "annotations": [annotation]}
    content["categories"] = [{"id": 1, "name": "polyp"}]
    (tmp_path / "own.json").write_text(json.dumps(content))
    arguments = "--annotations", tmp_path / "own.json", "--images", tmp_path / "images"
    arguments += "--out", tmp_path / "out", "--all-test", "--deidentify", "--key", tmp_path / "key"
    run("coco", *arguments)
    content = json.loads((tmp_path / "out" / "annotations" / "test.json").read_text())
    (image,), (annotation,) = content["images"], content["annotations"]
    left, top, right, bottom = 60, 40, 240, 160
    assert (image["width"], image["height"]) == pytest.approx((right - left, bottom - top), abs=4)
    assert annotation["bbox"] == pytest.approx([100 - left, 60 - top, 50, 30], abs=2)
