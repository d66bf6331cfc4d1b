"""Files of ground truth and results as they are read, and those that an evaluation writes."""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import re
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pycocotools.mask as mask_util
import pytest
from mutations import with_wrong_values
from PIL import Image
from pycocotools.coco import COCO
from rectangles import rectangles

from imrcnn_d2.evaluation import (
    Bootstrap,
    OperatingPoint,
    evaluate_classification,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.annotator_agreement import agreement, read_annotator, read_model
from imrcnn_d2.evaluation.detection import inputs
from imrcnn_d2.evaluation.detection.inputs import (
    MAX_DETECTIONS,
    mask_areas,
    read_ground_truth,
    read_predicted_masks,
    read_results,
)
from imrcnn_d2.evaluation.output import (
    log_test_evaluation,
    read_metrics,
    read_test_log,
    write_detections,
    write_evaluation,
    write_results,
)
from imrcnn_d2.utils import files
from imrcnn_d2.utils.files import BadInputError, write_atomically

SHAPE = (40, 50)


@pytest.fixture
def gt(dataset, region):
    return read_ground_truth(dataset(3, [region(2, 0, 0, 10, 10)], classes=("a", "b")))


def test_arrays_are_by_image_then_file_order(dataset, region):
    data = dataset(
        3,
        [region(3, 0, 0, 4, 5), region(1, 1, 2, 3, 4, iscrowd=1, category_id=2)],
        classes=("a", "b"),
    )
    data["images"].reverse()
    data["categories"].reverse()
    gt = read_ground_truth(data)
    assert [image["id"] for image in gt.images] == [1, 2, 3]
    assert [category["id"] for category in gt.categories] == [1, 2]
    assert (gt.regions.image.tolist(), gt.regions.category.tolist()) == ([0, 2], [1, 0])
    assert gt.regions.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 4, 5]]
    assert (gt.crowd.tolist(), gt.area.tolist()) == ([True, False], [12, 20])
    assert gt.lesions.tolist() == [0, 0, 1]
    places = ((2, 2, 0.1), (1, 3, 0.2), (2, 4, 0.3))
    results = read_results([region(i, 0, 0, side, side, score=s) for i, side, s in places], gt)
    assert results.score.tolist() == [0.2, 0.1, 0.3]
    assert mask_areas(results.regions.masks).tolist() == [9, 4, 16]


def test_a_path_a_dict_and_a_coco_object_are_the_same(dataset, region, tmp_path, capsys):
    data, path = dataset(1, [region(1, 0, 0, 10, 10)]), tmp_path / "gt.json"
    path.write_text(json.dumps(data))
    for source in (data, path, str(path), COCO(str(path))):
        gt = read_ground_truth(source)
        assert gt.regions.boxes.tolist() == [[0, 0, 10, 10]]
    (tmp_path / "dt.json").write_text(json.dumps([region(1, 0, 0, 5, 5, score=0.5)]))
    assert read_results(tmp_path / "dt.json", gt).score.tolist() == [0.5]


def test_every_form_of_a_mask_is_read(dataset, region):
    rle = region(1, 5, 10, 20, 8)["segmentation"]
    pixels = mask_util.decode(rle).ravel("F")
    runs = np.diff(np.flatnonzero(np.diff(pixels, prepend=0, append=1)))
    first = 5 * 40 + 10  # pixels before the rectangle, column by column
    forms = (
        *(rle, rle | {"counts": rle["counts"].encode()}),
        {"size": [40, 50], "counts": [first, *runs.tolist()]},
        [[5, 10, 25, 10, 25, 18, 5, 18]],
        [[5, 10, 15, 10, 15, 18, 5, 18], [15, 10, 25, 10, 25, 18, 15, 18]],
    )
    for form in forms:
        data = dataset(1)  # its annotation has neither bbox, area nor iscrowd
        data["annotations"] = [{"image_id": 1, "category_id": 1, "segmentation": form}]
        gt = read_ground_truth(data)
        assert np.array_equal(mask_util.decode(gt.regions.masks[0]), mask_util.decode(rle))
        assert gt.regions.boxes.tolist() == [[5, 10, 20, 8]]
        assert gt.area.tolist() == [160] and not gt.crowd.any()


def test_areas_of_many_masks(region):
    masks = [region(1, 0, 0, 1 + i % 9, 3)["segmentation"] for i in range(300)]
    assert mask_areas(masks).tolist() == [3 * (1 + i % 9) for i in range(300)]


def test_boxes_alone_give_no_masks(dataset, region, gt, caplog):
    box = {key: v for key, v in region(3, 0, 0, 5, 4).items() if key != "segmentation"}
    boxes = read_ground_truth(dataset(3, [box, box | {"segmentation": []}]))
    assert boxes.regions.masks is None and boxes.area.tolist() == [20, 20]
    assert not caplog.text
    some = [region(1, 0, 0, 5, 5, score=0.5), box | {"score": 0.6}]
    assert read_results(some, gt).regions.masks is None
    assert "1 of 2 results" in caplog.text and "image 3" in caplog.text


def test_a_coco_dict_is_matched_by_names(dataset, region, gt):
    """As imrcnn predict writes it, with ids of its own."""
    results = {
        "images": [{"id": 7, "file_name": "some/folder/3.png"}, {"id": 1, "file_name": "2.png"}],
        "categories": [{"id": 5, "name": "b"}],
        "annotations": rectangles("7 0 0 5 5 class 5 @0.4; 1 0 0 6 6 class 5 @0.6"),
    }
    detections = read_results(results, gt)
    assert detections.score.tolist() == [0.6, 0.4]
    assert detections.regions.image.tolist() == [1, 2]
    assert detections.regions.category.tolist() == [1, 1]
    annotations = [region(1, 0, 0, 5, 5, score=0.4)]
    for key, kind, record in (
        *(("images", "'?x'?", {"file_name": "x"}), ("categories", "'y'", {"name": "y"})),
    ):
        with pytest.raises(ValueError, match=kind):
            read_results({key: [{"id": 1, **record}], "annotations": annotations}, gt)
    data = dataset(2)
    for image, folder in zip(data["images"], "ab", strict=True):
        image["file_name"] = f"{folder}/1.png"
    results = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": annotations}
    with pytest.raises(ValueError, match=r"'1.png'.*\[1, 2\]"):
        read_results(results, read_ground_truth(data))


def test_a_file_is_read_in_batches(random_case, tmp_path, monkeypatch):
    """As the records in memory, in batches that images span; then with faults in the last batch."""
    data, results = random_case(1)
    path, gt = tmp_path / "results.json", read_ground_truth(data)
    elsewhere = {**results[0], "image_id": 99}
    path.write_text(json.dumps([elsewhere, *results]))
    whole = read_results([elsewhere, *results], gt, ignore_extra_images=True)
    monkeypatch.setattr(files, "_BLOCK", 99)
    monkeypatch.setattr(inputs, "_BATCH", 3)
    parts = read_results(path, gt, ignore_extra_images=True)
    assert (parts.notes, whole.notes) == ({"ignored_images": [99]},) * 2
    assert np.array_equal(parts.score, whole.score)
    for name in ("image", "category", "boxes"):
        assert np.array_equal(getattr(parts.regions, name), getattr(whole.regions, name))
    masks = (mask_util.decode([*regions.masks]) for regions in (parts.regions, whole.regions))
    assert np.array_equal(*masks)
    assert json.dumps(evaluate_lesions(gt, parts).document()) == json.dumps(
        evaluate_lesions(gt, whole).document()
    )
    number = len(results)
    for change, message in (
        ({"score": -1}, rf"results\[{number}\].* the score -1"),
        ({"bbox": [0]}, rf"results\[{number}\].* the bbox \[0\]"),
        ({"category_id": 7}, rf"results\[{number}\] has the category_id 7"),
        ({"segmentation": {"size": [40, 50], "counts": "1"}}, rf"results\[{number}\].* exactly"),
    ):
        path.write_text(json.dumps([*results, {**results[0], **change}]))
        with pytest.raises(BadInputError, match=f"{re.escape(str(path))}.*{message}"):
            read_results(path, gt)
    path.write_text(
        json.dumps([{k: v for k, v in r.items() if k != "segmentation"} for r in results])
    )
    assert read_results(path, gt).regions.masks is None
    monkeypatch.setattr(inputs, "_MOST_RECORDS", number - 1)
    with pytest.raises(BadInputError, match=f"more than {number - 1} results; split it"):
        read_results(path, gt)


def test_a_single_class_is_matched_whatever_its_name(dataset, region, caplog):
    detected, one = [region(1, 0, 0, 5, 5, score=0.5, category_id=4)], read_ground_truth(dataset(1))
    for results, notes in (
        ({"categories": [{"id": 4, "name": "lesion"}]}, {}),
        ({"categories": [{"id": 4, "name": "polyp"}]}, {"matched_classes": {"polyp": "lesion"}}),
        ({}, {"matched_classes": {"4": "lesion"}}),
        (detected, {"matched_classes": {"4": "lesion"}}),
    ):
        results = results if results is detected else {**results, "annotations": detected}
        caplog.clear()
        detections = read_results(results, one)
        assert detections.regions.category.tolist() == [0] and detections.notes == notes
        assert ("'lesion'" in caplog.text) == bool(notes)


@pytest.mark.parametrize(
    ("names", "predicted"), [("a", "xy"), ("ab", "x"), ("ab", "ax"), ("abc", "abx")]
)
def test_several_classes_are_matched_by_name_alone(dataset, region, names, predicted):
    """Both sides' names are given where one does not match, even if the ids do."""
    gt = read_ground_truth(dataset(1, classes=tuple(names)))
    categories = [{"id": i, "name": name} for i, name in enumerate(predicted, 1)]
    detected = [region(1, 0, 0, 5, 5, score=0.5, category_id=len(predicted))]
    with pytest.raises(BadInputError) as error:
        read_results({"categories": categories, "annotations": detected}, gt, "dt.json")
    assert error.value.file == "dt.json" and "--classes" in error.value.reason
    for text in (", ".join(names), ", ".join(predicted)):
        assert text in error.value.reason


def test_images_that_one_side_lacks(dataset, region, caplog):
    gt = read_ground_truth(dataset(3))
    images = [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "sub/1.png"}]
    images.append({"id": 9, "file_name": "3.png"})
    detected = [region(i, 0, 0, 5, 5, score=0.5) for i in (8, 7)]
    results = {"images": images, "annotations": detected}
    with pytest.raises(BadInputError, match="sub/1.png"):  # not taken for 1.png, which is there
        read_results(results, gt)
    detections = read_results(results, gt, ignore_extra_images=True)
    assert detections.regions.image.tolist() == [0]
    notes = {"ignored_images": ["sub/1.png"], "missing_images": ["2.png"]}
    assert detections.notes == notes and "sub/1.png" in caplog.text and "2.png" in caplog.text
    assert read_results([region(1, 0, 0, 5, 5, score=0.5)], gt).notes == {}
    foreign = {"images": [{"id": 7, "file_name": "x.png"}], "annotations": detected[1:]}
    with pytest.raises(BadInputError, match="x.png"):  # a wrong file, not an image too many
        read_results(foreign, gt, ignore_extra_images=True)


def test_images_of_other_folders_are_others(dataset, region):
    """A name alone, or a path below more folders, is the same image; one in another folder is not,
    and two are not one."""
    data, detected = dataset(2), [region(i, 0, 0, 5, 5, score=0.5) for i in (7, 8)]

    def read(*names):
        images = [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)]
        gt = read_ground_truth(data)
        return read_results({"images": images, "annotations": detected}, gt).regions.image.tolist()

    assert read("A/1.png", "A/2.png") == [0, 1]
    with pytest.raises(BadInputError, match="A/1.png and B/1.png"):
        read("A/1.png", "B/1.png")
    for image in data["images"]:
        image["file_name"] = f"C/{image['file_name']}"
    assert read("2.png", "D/C/1.png") == [0, 1]
    with pytest.raises(BadInputError, match="B/1.png"):
        read("B/1.png", "C/2.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"results\[1\] has the image_id 9"),
        ({"category_id": 9}, r"results\[1\] has the category_id 9"),
        ({"score": float("nan")}, r"results\[1\], of image 1, has the score nan"),
        *(({"score": float("inf")}, "score inf"), ({"score": -0.1}, "score -0.1")),
        *(({"score": None}, "score None"), ({"score": True}, "score True")),
        ({"bbox": [0, 0, float("nan"), 5]}, r"image 1 has the bbox \[0, 0, nan, 5\]"),
        ({"segmentation": None, "bbox": None}, "image 1 has neither bbox nor segmentation"),
        ({"segmentation": {"size": [50, 40], "counts": [2000]}}, r"results\[1\], of image 1"),
        ({"segmentation": {"size": [40, 50], "counts": [10, 5]}}, r"results\[1\], of image 1"),
        ({"segmentation": [[1, 1, 5, 5]]}, r"results\[1\], of image 1"),
    ],
)
def test_bad_results_are_named(gt, region, change, message):
    good = region(1, 0, 0, 5, 5, score=0.5)
    with pytest.raises(BadInputError, match=message):
        read_results([good, good | change], gt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gt: gt.pop("annotations"), "annotations"),
        (lambda gt: gt["annotations"][0].update(image_id=3), r"annotations\[0\] .* image_id 3"),
        (lambda gt: gt["annotations"][0].update(iscrowd=2), "image 1 has iscrowd 2"),
        (lambda gt: gt["annotations"][0].update(area=-1), "image 1 has .*area -1"),
        (lambda gt: gt["annotations"][0].update(area=1e30), r"image 1 has .*area 1e\+30"),
        (lambda gt: gt["images"][1].update(id="2"), "ids of its images"),
        (lambda gt: gt["images"][1].pop("width"), "image 2: "),
        (lambda gt: gt["images"][1].update(id=1), "images with id 1"),
        (lambda gt: gt["categories"][1].update(name="a"), "categories 'a'"),
        (lambda gt: gt["images"][1].update(height="x"), "image 2: .*'x'"),
        (lambda gt: [gt["images"][0].pop(side) for side in ("height", "width")], "image 1 has no"),
    ],
)
def test_bad_ground_truth_is_named(dataset, region, tmp_path, change, message):
    data = dataset(2, [region(1, 0, 0, 5, 5)], classes=("a", "b"))
    data["annotations"][0]["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    change(data)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BadInputError, match=f"{re.escape(str(path))}: .*{message}"):
        read_ground_truth(path)


def test_files_that_are_no_results(dataset, region, tmp_path, gt):
    data, path = dataset(1, [region(1, 0, 0, 5, 5)]), tmp_path / "own.json"
    for text in ("{", json.dumps(data)[:-1] + ', "annotations": []}', '{"images": []}'):
        path.write_text(text)
        for read in (read_ground_truth, lambda path: read_results(path, gt)):
            with pytest.raises(BadInputError, match=re.escape(str(path))):
                read(path)


def truth_and_results():
    """Small documents of every kind of field, in which each value can be spoilt."""
    polygon = [5, 5, 25, 5, 25, 20]
    runs = {"size": [40, 50], "counts": [200, 100, 1700]}
    text = mask_util.frPyObjects(runs, 40, 50)["counts"].decode()
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 50, "patient_id": "p"}
    truth = {
        "images": [image, {"id": 2, "file_name": "2.png"}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [polygon], "area": 9, "iscrowd": 0},
            {"image_id": 2, "category_id": 2, "segmentation": runs, "bbox": [5, 0, 3, 40]},
        ],
    }
    detected = {"image_id": 7, "category_id": 1}
    compressed = {"size": [40, 50], "counts": text}
    results = {
        "images": [image | {"id": 7}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {**detected, "score": 0.5, "segmentation": [polygon]},
            {**detected, "score": 0.9, "bbox": [5, 0, 3, 40], "segmentation": compressed},
        ],
    }
    return truth, results


def agree(gt, dt):
    first = read_annotator("a", gt)
    return agreement([first], read_model("model", dt, 0.5, first))


CLASSES = (
    {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)],
        "categories": [{"id": 1, "name": "a", "supercategory": "cancer"}, {"id": 2, "name": "b"}],
        "annotations": [{"id": i, "image_id": i, "category_id": i} for i in (1, 2)],
    },
    [{"image_id": 1, "scores": [0.9, 0.1]}, {"image_id": 2, "scores": [1, 0]}],
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("evaluate", "documents"),
    [
        *((function, truth_and_results()) for function in (evaluate_lesions, agree)),
        (evaluate_classification, CLASSES),
    ],
)
def test_a_wrong_value_at_each_place(tmp_path, evaluate, documents, side):
    """Every one is either taken or named: no other error, no crash, no endless loop."""
    files = [tmp_path / "gt.json", tmp_path / "dt.json"]
    for path, document in zip(files, documents, strict=True):
        path.write_text(json.dumps(document))
    evaluate(*files)
    for done, document in with_wrong_values(documents[side]):
        files[side].write_text(json.dumps(document))
        memory = [*documents]
        memory[side] = document
        for sources in (files, memory):  # an evaluator's are not read here
            try:
                evaluate(*sources)
            except ValueError:
                pass
            except Exception as error:
                pytest.fail(f"{done}: {error!r}")


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [40, 50], "counts": "4@"},
        {"size": [40, 50], "counts": "00"},
        {"size": [40, 50], "counts": [2000, 5]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        [[0, 0, 1e9, 0, 0, 1e9]],
        [[0, 0, float("nan"), 0, 0, 9]],
        [[0, 0, 0, 400, 9, 0] * 10_000],
    ],
)
@pytest.mark.parametrize("has_size", [True, False])
def test_masks_that_pycocotools_must_not_see(dataset, region, segmentation, has_size):
    data = dataset(1, [region(1, 0, 0, 5, 5)])
    if not has_size:
        del data["images"][0]["height"], data["images"][0]["width"]
    bad = region(1, 0, 0, 5, 5, score=0.5) | {"segmentation": segmentation}
    with pytest.raises(BadInputError, match="the results: .*image 1"):
        read_results([bad], read_ground_truth(data))
    data["annotations"] = [bad]
    with pytest.raises(BadInputError, match="the ground truth: .*image 1"):
        read_ground_truth(data)


@pytest.fixture
def folder(tmp_path):
    """Writes masks: {name: array} -> folder."""

    def write(masks):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, mask in masks.items():
            Image.fromarray(mask).save(tmp_path / name)
        return tmp_path

    return write


def mask_of(*rectangles, shape=SHAPE):
    """(x, y, width, height, value) each."""
    mask = np.zeros(shape, np.uint8)
    for x, y, width, height, value in rectangles:
        mask[y : y + height, x : x + width] = value
    return mask


@pytest.mark.parametrize("value", [1, 255])
def test_one_detection_per_component(dataset, folder, value):
    gt = read_ground_truth(dataset(2))
    touching = mask_of((0, 0, 4, 5, value), (4, 5, 3, 3, value), (20, 10, 20, 15, value))
    masks = folder({"1.png": touching, "2.PNG": mask_of()})
    (masks / "dataset.json").write_text("{}")  # as nnU-Net leaves it there
    large, small = read_predicted_masks(masks, gt)
    assert (large["image_id"], large["category_id"]) == (1, 1)
    # Touching at a corner is touching.
    assert (large["bbox"], small["bbox"]) == ([20, 10, 20, 15], [0, 0, 7, 8])
    both = mask_util.decode(large["segmentation"]) + mask_util.decode(small["segmentation"])
    assert np.array_equal(both, touching > 0)
    detections = read_results(str(masks), gt)
    assert not detections.scored and detections.score.tolist() == [1, 1]
    assert read_results([{**large, "score": 1.0}], gt).scored


def test_only_the_largest_regions_are_scored(dataset, folder, caplog):
    """A small PNG can hold millions of them."""
    dots = np.zeros(SHAPE, np.uint8)
    dots[::2, ::2] = 1
    dots[20:23, 30:33] = 1
    masks = folder({"1.png": dots})
    regions = read_predicted_masks(masks, read_ground_truth(dataset(1)))
    assert len(regions) == MAX_DETECTIONS and regions[0]["bbox"] == [30, 20, 3, 3]
    assert str(masks / "1.png") in caplog.text and "497 regions" in caplog.text


def test_kinds_of_png(dataset, folder):
    """Indices of a palette are taken as they are; grey saved as colour is grey."""
    data = dataset(1)
    data["images"][0]["file_name"] = "patient 3/scope.v2.jpg"
    data["categories"] = [{"id": 9, "name": "ulcer"}, {"id": 4, "name": "cancer"}]
    gt, path = read_ground_truth(data), folder({}) / "scope.v2.png"
    mask = mask_of((0, 0, 5, 5, 1), (10, 0, 5, 5, 2))
    palette = Image.fromarray(mask, mode="P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    for image in (palette, Image.fromarray(np.dstack([mask] * 3)), Image.fromarray(mask * 1)):
        image.save(path)
        regions = read_predicted_masks(path.parent, gt)
        assert [(r["category_id"], r["bbox"][0]) for r in regions] == [(4, 0), (9, 10)]
    data["categories"].pop()
    lesion = mask_of((0, 0, 5, 5, 1))
    for pixels in (lesion > 0, lesion.astype(np.uint16) * 65535):
        Image.fromarray(pixels).save(path)
        assert len(read_predicted_masks(path.parent, read_ground_truth(data))) == 1


def test_missing_and_spare_masks(dataset, folder):
    gt, empty = read_ground_truth(dataset(3)), mask_of()
    many = read_ground_truth(dataset(9))
    data = dataset(2)
    data["images"][0]["file_name"], data["images"][1]["file_name"] = "a/1.png", "b/1.jpg"
    shared = read_ground_truth(data)
    nameless = dataset(1)
    del nameless["images"][0]["file_name"]
    for truth, names, message in (
        (gt, [], "no PNG"),
        (gt, ["1", "two", "3"], r"1 of 3 images: 2\.png .*two\.png"),
        (gt, "1234567", r"4 masks .*4\.png, 5\.png"),
        (many, ["1"], r"8 of 9 .*6\.png and 3 more"),
        (shared, ["1"], r"a/1\.png and b/1\.jpg .*1\.png"),
        (read_ground_truth(nameless), ["1"], "Image 1"),
    ):
        masks = folder({f"{name}.png": empty for name in names})
        with pytest.raises(ValueError, match=message):
            read_predicted_masks(masks, truth)


@pytest.mark.parametrize(
    ("mask", "classes", "message"),
    [
        (mask_of(shape=(50, 40)), "a", r"\[50, 40\] .*\[40, 50\]"),
        (mask_of((0, 0, 5, 5, 80), (9, 0, 5, 5, 255)), "a", "80, 255"),
        (mask_of((0, 0, 5, 5, 255)), "ab", "255; .*0 background, 1 a, 2 b"),
        (np.dstack([mask_of((0, 0, 5, 5, 9))] + [mask_of()] * 2), "a", "colour"),
    ],
)
def test_masks_that_cannot_be_meant(dataset, folder, mask, classes, message):
    gt = read_ground_truth(dataset(1, classes=tuple(classes)))
    with pytest.raises(ValueError, match=rf"1\.png.*{message}"):
        read_predicted_masks(folder({"1.png": mask}), gt)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scored(dataset, region):
    data = dataset(3, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)], patients=["a", "a", "b"])
    data["images"][0] = dict(reversed(data["images"][0].items()))
    data["images"][1]["centre"] = 'a, "b" ü'  # only one image has the field
    results = rectangles("1 0 0 10 10 @0.9; 1 20 0 10 10 @0.8; 2 0 0 10 8 @0.25")
    return evaluate_lesions(data, results)


@pytest.fixture(scope="module")
def paths(scored, tmp_path_factory):
    return write_results(scored, tmp_path_factory.mktemp("out") / "new", dataset="three")


def test_metrics_are_strict_json(scored, paths):
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=pytest.fail)
    groups = ["bbox", "segm", "lesion", "paper", "image", "patient"]
    assert list(written)[:6] == groups
    for group, values in scored.groups().items():
        expected = {name: None if math.isnan(v) else v for name, v in values.items()}
        assert written[group] == expected
    assert written["segm"]["APl"] is None
    assert {"dataset": "three", "tau": 0.7, "images": 3}.items() <= written["meta"].items()
    assert written["meta"]["versions"]["pycocotools"]
    assert {path.name for path in paths["metrics.json"].parent.iterdir()} == set(paths)


def test_settings_are_read_back(paths, tmp_path):
    document, path = json.loads(paths["metrics.json"].read_text()), tmp_path / "metrics.json"
    point = {"rule": "f1", "tau": 1}
    for tau, overlap, is_valid in ((0, 1, True), (1, 0.01, True), (0, 0, False)):
        meta = document["meta"] | {"tau": tau, "iou_threshold": overlap}
        path.write_text(json.dumps({**document, "meta": meta, "tau_val": point}))
        with contextlib.nullcontext() if is_valid else pytest.raises(BadInputError):
            assert read_metrics(path)["meta"] == meta
    document["lesion"]["f1_ci"] = [1, 2, 3]
    path.write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="lesion.f1_ci"):
        read_metrics(path)


# Columns of tables, as they are written.
TABLES = {
    "per_image.csv": {
        **{"image_id": "1 2 3", "file_name": "1.png 2.png 3.png", "patient_id": "a a b"},
        **{"TP": "1 0 0", "FP": "1 0 0", "score": "0.9 0.25 0.0", "union_iou": "50.0 0.0 -"},
        **{"n_gt": "1 1 0", "n_det": "2 0 0", "FN": "0 1 0", "image_outcome": "TP FN TN"},
    },
    "per_patient.csv": {
        **{"patient_id": "a b", "images": "2 1", "n_gt": "2 0", "TP": "1 0"},
        **{"patient_outcome": "TP TN", "iou": "100.0 -"},
    },
    "pr_curve.csv": {
        **{"score": "0.9 0.8 0.25", "class": "lesion lesion lesion", "n_gt": "2 2 2"},
        **{"tp": "1 1 2", "fp": "0 1 1", "recall": "50.0 50.0 100.0"},
        **{"precision": "100.0 50.0 66.66", "precision_envelope": "100.0 66.66 66.66"},
    },
    "froc.csv": {
        **{"score": "0.9 0.8 0.25", "tp": "1 1 2", "fp": "0 1 1"},
        **{"sensitivity": "50.0 50.0 100.0", "fp_per_image": "0.0 0.33 0.33"},
    },
    "calibration.csv": {
        "lower": "0.0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9",
        **{"detections": "0 0 1 0 0 0 0 1 1 0", "hit_rate": "- - 100.0 - - - - 0.0 100.0 -"},
    },
    "confusion_matrix.csv": {
        **{"truth": "lesion background", "lesion": "1 1", "background": "1 -"}
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(paths, name):
    rows = [row for row in rows_of(paths[name]) if row.get("iou_type") in (None, "segm")]
    for column, text in TABLES[name].items():
        cells = [row[column] or "-" for row in rows]
        short = [re.sub(r"(\.\d\d)\d+", r"\1", cell) for cell in cells]
        assert " ".join(short) == text, column


def test_further_rows(paths):
    assert [row["centre"] for row in rows_of(paths["per_image.csv"])] == ["", 'a, "b" ü', ""]
    tp = [float(row["lesion_TP"]) for row in rows_of(paths["thresholds.csv"])]  # at 0.05, 0.1 ...
    assert tp == [2] * 5 + [1] * 13 + [0]
    sizes = {row["size"]: row for row in rows_of(paths["by_size.csv"])}
    assert (sizes["small"]["n"], sizes["5-15 %"]["recall"]) == ("2.0", "50.0")


def test_intervals_stand_next_to_their_metrics(dataset, region, tmp_path):
    lesions = [region(i, 0, 0, 10, 10, category_id=1 + i % 2) for i in (1, 2, 3)]
    data = dataset(4, lesions, classes=("a", "b"))
    results = [region(i, 0, 0, 10, 7 + i, category_id=1 + i % 2, score=1 - i / 10) for i in (1, 2)]
    point = OperatingPoint(0.8, "f1", "val")
    scored = evaluate_lesions(data, results, operating_point=point, bootstrap=Bootstrap(50))
    paths = write_results(scored, tmp_path)
    assert "per_patient.csv" not in paths
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=pytest.fail)
    assert {"tau": 0.8, "rule": "f1", "dataset": "val"}.items() <= written["tau_val"].items()
    counts = [[1, 0, 0], [0, 1, 1], [0, 0, None]]
    assert written["confusion_matrix"] == {"classes": ["a", "b", "background"], "counts": counts}
    small = written["by_size"]["coco"]["small"]
    groups = (written["lesion"], written["tau_val"]["image"], written["by_class"]["b"], small)
    for group in groups:
        low, high = group["recall_ci"]
        assert low <= group["recall"] <= high
    assert written["by_size"]["coco"]["large"]["recall_ci"] == [None, None]  # there is none
    assert "n_ci" not in small and "n_ci" not in written["calibration"]
    assert written["by_class"]["a"]["recall_ci"][1] == 100
    assert written["froc"]["mean_ci"][0] < written["froc"]["mean"]
    assert written["calibration"]["brier_ci"][0] <= written["calibration"]["brier"]
    row = next(row for row in rows_of(paths["by_size.csv"]) if row["size"] == "small")
    assert float(row["recall_low"]) == small["recall_ci"][0]


def test_raw_scores(dataset, region, tmp_path):
    """The scores of the network next to mapped ones: in the order of the regions, kept in parts of
    the data set and in files, and those that the group of the paper goes by."""
    pairs = ((2, 0.8, 0.95), (1, 0.5, 0.7), (1, 0.6, 0.9))
    results = [region(i, 0, 0, 5, 5, score=s, raw_score=raw) for i, s, raw in pairs]
    gt = read_ground_truth(dataset(2, [region(2, 0, 0, 5, 5)]))
    detections = read_results(results, gt)
    assert detections.score.tolist() == [0.5, 0.6, 0.8]
    assert detections.raw_score.tolist() == [0.7, 0.9, 0.95]
    write_detections(tmp_path / "dt.json", detections, gt)
    again = read_results(tmp_path / "dt.json", gt)
    assert again.raw_score.tolist() == [0.7, 0.9, 0.95]
    scored = evaluate_lesions(gt, detections)
    assert (scored.lesion["FP"], scored.paper["FP"]) == (0, 2)
    part = scored.part(np.array([1]))
    assert part.detections.raw_score.tolist() == [0.95]
    one = read_results([region(1, 0, 0, 5, 5, score=0.5)], gt)
    assert one.unmapped is None and one.raw_score is one.score


@pytest.mark.parametrize("raw", [None, -0.1, math.nan, True])
def test_a_wrong_raw_score(dataset, region, raw):
    """Also where others have one."""
    good = region(1, 0, 0, 5, 5, score=0.5, raw_score=0.6)
    with pytest.raises(BadInputError, match=r"results\[1\], of image 1, .* raw_score") as error:
        read_results([good, {**good, "raw_score": raw}], read_ground_truth(dataset(1)), "dt.json")
    assert "dt.json" in str(error.value)


def test_coco_results_are_what_was_read(scored, tmp_path):
    gt, detections = scored.ground_truth, scored.detections
    boxes = replace(detections, scored=False, regions=replace(detections.regions, masks=None))
    write_detections(tmp_path / "dt.json", boxes, gt)
    again = read_results(tmp_path / "dt.json", gt)
    assert not again.scored and again.score.tolist() == [1, 1, 1] and again.regions.masks is None
    assert again.regions.boxes.tolist() == detections.regions.boxes.tolist()


def test_sources(scored, tmp_path, monkeypatch):
    (tmp_path / "gt.json").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path)
    write_evaluation(scored, tmp_path, gt="gt.json", dt="dt.json", checkpoint="c")
    before = (tmp_path / "metrics.json").read_text()
    meta = json.loads(before)["meta"]
    # sha256sum's
    sha256 = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    sources = {"gt": str(tmp_path / "gt.json"), "gt_sha256": sha256, "image_root": None}
    sources |= {"dt": str(tmp_path / "dt.json"), "checkpoint": "c", "checkpoint_sha256": None}
    assert {key: meta[key] for key in sources} == sources
    with pytest.raises(TypeError):  # what no JSON can hold leaves the old file
        write_results(scored, tmp_path, note=object())
    assert (tmp_path / "metrics.json").read_text() == before


def test_writes_are_whole_or_nothing(tmp_path):
    """Links in the way are not followed; a write that fails leaves the old file."""
    mine, path = tmp_path / "mine", tmp_path / "metrics.json"
    mine.write_text("mine")
    for name in ("metrics.json", "metrics.json.tmp"):
        (tmp_path / name).symlink_to(mine)
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert (mine.read_text(), path.read_text()) == ("mine", "old")
    write_atomically(path, b"newer")
    longest = 127 * "ü" + "a"
    write_atomically(tmp_path / longest, "")
    assert path.read_text() == "newer"
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "mine", longest}


@pytest.fixture
def root(tmp_path):
    """A prepared data set, as far as the log sees it."""
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "splits.json").write_text("{}")
    return tmp_path / "set"


def test_each_evaluation_of_a_test_set_is_a_line(root, tmp_path):
    foreign = tmp_path / "annotations" / "test.json"
    for gt in (root / "annotations" / "val.json", root / "test.json", foreign, None):
        log_test_evaluation(gt, source="x", sha256="y", output="z")
        assert read_test_log(gt) == []
    assert not list(tmp_path.rglob("test_evaluations.csv"))
    gt = root / "annotations" / "test.json"
    before = datetime.now(timezone.utc) - timedelta(seconds=1)  # the log has whole seconds
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(2)]
    for digest in digests:
        log_test_evaluation(gt, source="a, b.pth", sha256=digest, output=tmp_path / "out")
    log_test_evaluation(str(gt), source="masks", sha256=None, output="out")
    rows = rows_of(root / "test_evaluations.csv")
    assert [row["sha256"] for row in rows] == [*digests, ""]
    with open(root / "test_evaluations.csv", "a") as log:  # by two first evaluations at once
        log.write("date,what,sha256,output\n")
    assert read_test_log(gt) == rows
    assert rows[0]["what"].endswith("/a, b.pth") and rows[0]["output"] == str(tmp_path / "out")
    date = datetime.fromisoformat(rows[-1]["date"])
    assert before <= date <= datetime.now(timezone.utc)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "of another user"])
def test_what_cannot_be_written_to_is_warned_of(root, caplog, monkeypatch, kind):
    gt, log = root / "annotations" / "test.json", root / "test_evaluations.csv"
    if kind == "folder":
        log.mkdir()  # also root cannot append to a folder
    elif kind == "link":  # as a data set from elsewhere may hold one, to any file
        log.symlink_to(root / "splits.json")
    elif kind == "pipe":
        os.mkfifo(log)
    else:  # of another user; root may write there

        def refuse(path, *args):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "open", refuse)
    log_test_evaluation(gt, source="x", sha256="y", output="z")
    monkeypatch.undo()
    assert (root / "splits.json").read_text() == "{}"
    assert str(log) in caplog.text and "Errno" not in caplog.text
    assert caplog.records[0].levelname == "WARNING"
