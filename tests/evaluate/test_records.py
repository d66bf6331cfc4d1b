import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from mutations import with_wrong_values
from pycocotools.coco import COCO

from imrcnn_d2.evaluation.annotator_agreement import agreement, read_annotator, read_model
from imrcnn_d2.evaluation.classification import evaluate_classification
from imrcnn_d2.evaluation.detection.inputs import mask_areas, read_ground_truth, read_results
from imrcnn_d2.evaluation.detection.results import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError


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
    assert gt.regions.image.tolist() == [0, 2]
    assert gt.regions.category.tolist() == [1, 0]
    assert gt.regions.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 4, 5]]
    assert gt.crowd.tolist() == [True, False]
    assert gt.area.tolist() == [12, 20]
    assert gt.lesions.tolist() == [0, 0, 1]
    results = read_results(
        [
            region(2, 0, 0, 2, 2, score=0.1),
            region(1, 0, 0, 3, 3, score=0.2),
            region(2, 0, 0, 4, 4, score=0.3),
        ],
        gt,
    )
    assert results.score.tolist() == [0.2, 0.1, 0.3]
    assert mask_areas(results.regions.masks).tolist() == [9, 4, 16]


def test_a_path_a_dict_and_a_coco_object_are_the_same(dataset, region, tmp_path, capsys):
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(data))
    for source in (data, path, str(path), COCO(str(path))):
        gt = read_ground_truth(source)
        assert gt.regions.boxes.tolist() == [[0, 0, 10, 10]]
    (tmp_path / "dt.json").write_text(json.dumps([region(1, 0, 0, 5, 5, score=0.5)]))
    assert read_results(tmp_path / "dt.json", gt).score.tolist() == [0.5]


def test_every_form_of_a_mask_is_read(dataset, region):
    rle = region(1, 5, 10, 20, 8)
    runs = np.diff(
        np.flatnonzero(
            np.diff(mask_util.decode(rle["segmentation"]).ravel("F"), prepend=0, append=1)
        )
    )
    first = 5 * 40 + 10  # pixels before the rectangle, column by column
    uncompressed = {"size": [40, 50], "counts": [first, *runs.tolist()]}
    forms = (
        rle["segmentation"],
        rle["segmentation"] | {"counts": rle["segmentation"]["counts"].encode()},
        uncompressed,
        [[5, 10, 25, 10, 25, 18, 5, 18]],
        [[5, 10, 15, 10, 15, 18, 5, 18], [15, 10, 25, 10, 25, 18, 15, 18]],
    )
    for form in forms:
        annotation = {"image_id": 1, "category_id": 1, "segmentation": form}
        data = dataset(1)
        data["annotations"] = [annotation]
        gt = read_ground_truth(data)  # neither bbox, area nor iscrowd
        assert np.array_equal(
            mask_util.decode(gt.regions.masks[0]), mask_util.decode(rle["segmentation"])
        )
        assert gt.regions.boxes.tolist() == [[5, 10, 20, 8]]
        assert gt.area.tolist() == [160]
        assert not gt.crowd.any()


def test_areas_of_many_masks(region):
    masks = [region(1, 0, 0, 1 + i % 9, 3)["segmentation"] for i in range(300)]
    assert mask_areas(masks).tolist() == [3 * (1 + i % 9) for i in range(300)]


def test_boxes_alone_give_no_masks(dataset, region):
    boxes = {key: value for key, value in region(1, 0, 0, 5, 4).items() if key != "segmentation"}
    gt = read_ground_truth(dataset(1, [boxes, boxes | {"segmentation": []}]))
    assert gt.regions.masks is None
    assert gt.area.tolist() == [20, 20]


def test_masks_for_some_only_are_not_used(gt, region, caplog):
    boxes = {key: value for key, value in region(3, 0, 0, 5, 4).items() if key != "segmentation"}
    results = [region(1, 0, 0, 5, 5, score=0.5), boxes | {"score": 0.6}]
    with caplog.at_level(logging.WARNING):
        assert read_results(results, gt).regions.masks is None
    assert "1 of 2 results have no segmentation" in caplog.text
    assert "image 3" in caplog.text


def test_a_coco_dict_is_matched_by_names(dataset, region, gt):
    """As tools/predict.py writes it, with ids of its own."""
    results = {
        "images": [{"id": 7, "file_name": "some/folder/3.png"}, {"id": 1, "file_name": "2.png"}],
        "categories": [{"id": 5, "name": "b"}],
        "annotations": [
            region(7, 0, 0, 5, 5, category_id=5, score=0.4),
            region(1, 0, 0, 6, 6, category_id=5, score=0.6),
        ],
    }
    detections = read_results(results, gt)
    assert detections.score.tolist() == [0.6, 0.4]
    assert detections.regions.image.tolist() == [1, 2]
    assert detections.regions.category.tolist() == [1, 1]


def test_a_coco_dict_of_other_images_or_classes_is_refused(gt, region):
    annotations = [region(1, 0, 0, 5, 5, score=0.4)]
    other_image = {"images": [{"id": 1, "file_name": "x.png"}], "annotations": annotations}
    with pytest.raises(ValueError, match="image 1, which the ground truth lacks"):
        read_results(other_image, gt)
    other_class = {"categories": [{"id": 1, "name": "polyp"}], "annotations": annotations}
    with pytest.raises(ValueError, match="category 1, which the ground truth lacks"):
        read_results(other_class, gt)


def test_a_coco_dict_whose_images_have_the_same_name_is_refused(dataset, region):
    data = dataset(2)
    for image, folder in zip(data["images"], "ab", strict=True):
        image["file_name"] = f"{folder}/1.png"
    results = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [region(1, 0, 0, 5, 5, score=0.4)],
    }
    with pytest.raises(ValueError, match=r"'1.png' of the results could be any of .*\[1, 2\]"):
        read_results(results, read_ground_truth(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"results\[1\] has the image_id 9"),
        ({"category_id": 9}, r"results\[1\] has the category_id 9"),
        ({"score": float("nan")}, r"results\[1\], of image 1, has the score nan"),
        ({"score": float("inf")}, "score inf"),
        ({"score": -0.1}, "score -0.1"),
        ({"score": None}, "score None"),
        ({"bbox": [0, 0, float("nan"), 5]}, r"image 1 has the bbox \[0, 0, nan, 5\]"),
        ({"segmentation": None, "bbox": None}, "image 1 has neither bbox nor segmentation"),
        (
            {"segmentation": {"size": [50, 40], "counts": [2000]}},
            r"results\[1\], of image 1: its RLE has size \[50, 40\], the image \[40, 50\]",
        ),
        (
            {"segmentation": {"size": [40, 50], "counts": [10, 5]}},
            "not cover the 50x40 image exactly",
        ),
        ({"segmentation": [[1, 1, 5, 5]]}, "a polygon has 2 points"),
    ],
)
def test_bad_results_are_named(gt, region, change, message):
    good = region(1, 0, 0, 5, 5, score=0.5)
    with pytest.raises(ValueError, match=message):
        read_results([good, good | change], gt)


def test_bad_ground_truth_is_named(dataset, region, tmp_path):
    with pytest.raises(ValueError, match="no list of annotations"):
        read_ground_truth({"images": [], "categories": []})
    data = dataset(2, [region(3, 0, 0, 5, 5)])
    with pytest.raises(ValueError, match=r"annotations\[0\] has the image_id 3"):
        read_ground_truth(data)
    data = dataset(2)
    data["images"][1]["id"] = 1
    with pytest.raises(ValueError, match="two images with id 1"):
        read_ground_truth(data)
    data = dataset(1, [region(1, 0, 0, 5, 5)])
    data["annotations"][0]["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    del data["images"][0]["height"], data["images"][0]["width"]
    with pytest.raises(ValueError, match="image 1 has no height and width"):
        read_ground_truth(data)
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="broken.json: is no JSON"):
        read_ground_truth(path)
    with pytest.raises(ValueError, match="object without 'annotations'"):
        read_results({"images": []}, read_ground_truth(dataset(1)))


def truth_and_results():
    """Small documents of every kind of field, in which each value can be spoilt."""
    outline = [5, 5, 25, 5, 25, 20]
    runs = {"size": [40, 50], "counts": [200, 100, 1700]}
    text = mask_util.frPyObjects(runs, 40, 50)["counts"].decode()
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 50, "patient_id": "p"}
    truth = {
        "images": [image, {"id": 2, "file_name": "2.png"}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [outline], "area": 9, "iscrowd": 0},
            {"image_id": 2, "category_id": 2, "segmentation": runs, "bbox": [5, 0, 3, 40]},
        ],
    }
    results = {
        "images": [image | {"id": 7}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": [outline]},
            {
                **{"image_id": 7, "category_id": 1, "score": 0.9, "bbox": [5, 0, 3, 40]},
                "segmentation": {"size": [40, 50], "counts": text},
            },
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
        (evaluate_lesions, truth_and_results()),
        (agree, truth_and_results()),
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
def test_masks_that_pycocotools_must_not_see(tmp_path, dataset, region, segmentation, has_size):
    data = dataset(1, [region(1, 0, 0, 5, 5)])
    if not has_size:
        del data["images"][0]["height"], data["images"][0]["width"]
    bad = region(1, 0, 0, 5, 5, score=0.5) | {"segmentation": segmentation}
    with pytest.raises(BadInputError, match="the results: .*image 1"):
        read_results([bad], read_ground_truth(data))
    data["annotations"] = [bad]
    with pytest.raises(BadInputError, match="the ground truth: .*image 1"):
        read_ground_truth(data)


@pytest.mark.parametrize("tau", [float("nan"), float("inf"), -1])
def test_a_threshold_that_is_none(dataset, region, tau):
    data = dataset(1, [region(1, 0, 0, 5, 5)])
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        evaluate_lesions(data, [], tau=tau)
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        read_model("model", [], tau, read_annotator("a", data))


def test_keys_that_are_there_twice(tmp_path, dataset, region):
    data = dataset(1, [region(1, 0, 0, 5, 5)])
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data)[:-1] + ', "annotations": []}')
    for read in (read_ground_truth, lambda path: read_results(path, read_ground_truth(data))):
        with pytest.raises(BadInputError, match="own.json: .*'annotations'"):
            read(path)
