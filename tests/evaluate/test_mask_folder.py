import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.evaluation.detection.inputs import (
    read_ground_truth,
    read_predicted_masks,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import MAX_DETECTIONS
from imrcnn_d2.evaluation.detection.results import evaluate_lesions

SHAPE = (40, 50)


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
    assert large["bbox"] == [20, 10, 20, 15]
    assert small["bbox"] == [0, 0, 7, 8]  # touching at a corner is touching
    both = mask_util.decode(large["segmentation"]) + mask_util.decode(small["segmentation"])
    assert np.array_equal(both, touching > 0)
    detections = read_results(str(masks), gt)
    assert not detections.scored
    assert detections.score.tolist() == [1, 1]
    assert read_results([{**large, "score": 1.0}], gt).scored


def test_only_the_regions_that_count_are_encoded(dataset, folder):
    """A small PNG can hold millions of them."""
    dots = np.zeros(SHAPE, np.uint8)
    dots[::2, ::2] = 1
    dots[20:23, 30:33] = 1
    masks = folder({"1.png": dots})
    found = read_predicted_masks(masks, read_ground_truth(dataset(1)))
    assert len(found) == MAX_DETECTIONS and found[0]["bbox"] == [30, 20, 3, 3]


def test_classes_by_category_order(dataset, folder):
    data = dataset(1)
    data["images"][0]["file_name"] = "patient 3/scope.v2.jpg"
    data["categories"] = [{"id": 9, "name": "ulcer"}, {"id": 4, "name": "cancer"}]
    masks = folder({"scope.v2.png": mask_of((0, 0, 5, 5, 1), (5, 0, 5, 5, 2))})
    first, second = read_predicted_masks(masks, read_ground_truth(data))
    assert (first["category_id"], first["bbox"]) == (4, [0, 0, 5, 5])
    assert (second["category_id"], second["bbox"]) == (9, [5, 0, 5, 5])


def test_kinds_of_png(dataset, folder):
    """Indices of a palette are taken as they are; grey saved as colour is grey."""
    gt = read_ground_truth(dataset(1, classes=("a", "b")))
    mask = mask_of((0, 0, 5, 5, 1), (10, 0, 5, 5, 2))
    palette = Image.fromarray(mask, mode="P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    masks = folder({})
    for image in (palette, Image.fromarray(np.dstack([mask] * 3)), Image.fromarray(mask * 1)):
        image.save(masks / "1.png")
        assert [r["category_id"] for r in read_predicted_masks(masks, gt)] == [1, 2]
    one = read_ground_truth(dataset(1))
    Image.fromarray(mask_of((0, 0, 5, 5, 1)) > 0).save(masks / "1.png")
    assert len(read_predicted_masks(masks, one)) == 1
    Image.fromarray(mask_of((0, 0, 5, 5, 255)).astype(np.uint16) * 257).save(masks / "1.png")
    assert len(read_predicted_masks(masks, one)) == 1


def test_missing_and_spare_masks(dataset, folder):
    gt = read_ground_truth(dataset(3))
    with pytest.raises(ValueError, match="holds no PNG file"):
        read_predicted_masks(folder({}), gt)
    some = {"1.png": mask_of(), "two.png": mask_of(), "3.png": mask_of()}
    with pytest.raises(ValueError, match=r"lacks the masks of 1 of 3 images: 2.png \(but has two"):
        read_predicted_masks(folder(some), gt)
    with pytest.raises(ValueError, match="4 masks that belong to no image .*: 4.png, 5.png"):
        read_predicted_masks(folder({f"{i}.png": mask_of() for i in range(1, 8)}), gt)
    many = read_ground_truth(dataset(9))
    with pytest.raises(ValueError, match=r"lacks the masks of 8 .*6.png and 3 more"):
        read_predicted_masks(folder({"1.png": mask_of()}), many)
    data = dataset(2)
    data["images"][0]["file_name"], data["images"][1]["file_name"] = "a/1.png", "b/1.jpg"
    with pytest.raises(ValueError, match="a/1.png and b/1.jpg would share the mask 1.png"):
        read_predicted_masks(folder({"1.png": mask_of()}), read_ground_truth(data))
    del data["images"][1]["file_name"]
    with pytest.raises(ValueError, match="Image 2 of the ground truth has no file_name"):
        read_predicted_masks(folder({"1.png": mask_of()}), read_ground_truth(data))


@pytest.mark.parametrize(
    ("mask", "classes", "message"),
    [
        (mask_of(shape=(50, 40)), "a", r"1.png is \[50, 40\] .* 1.png is \[40, 50\]: scale"),
        (mask_of((0, 0, 5, 5, 80), (9, 0, 5, 5, 255)), "a", "1.png has the values 80, 255 besides"),
        (mask_of((0, 0, 5, 5, 255)), "ab", "1.png has the value 255; .* 0 background, 1 a, 2 b"),
        (np.dstack([mask_of((0, 0, 5, 5, 9))] + [mask_of()] * 2), "a", "1.png: is in colour"),
    ],
)
def test_masks_that_cannot_be_meant(dataset, folder, mask, classes, message):
    gt = read_ground_truth(dataset(1, classes=tuple(classes)))
    with pytest.raises(ValueError, match=message):
        read_predicted_masks(folder({"1.png": mask}), gt)


def test_a_file_that_is_no_picture(dataset, folder):
    gt = read_ground_truth(dataset(1))
    masks = folder({"1.png": np.random.default_rng(0).integers(0, 2, SHAPE, np.uint8)})
    whole = (masks / "1.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:30]):
        (masks / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match="1.png"):
            read_predicted_masks(masks, gt)


def test_figures_of_masks_without_scores(dataset, region, folder):
    """IoU 0.8 and a false alarm; whatever takes scores is undefined."""
    data = dataset(3, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    masks = folder(
        {"1.png": mask_of((0, 0, 8, 10, 1)), "2.png": mask_of(), "3.png": mask_of((5, 5, 9, 9, 1))}
    )
    results = evaluate_lesions(data, masks)
    assert [results.lesion[name] for name in ("TP", "FP", "FN", "TN")] == [1, 1, 1, 0]
    assert results.lesion["iou"] == pytest.approx(80)
    assert results.image["recall"] == 50
    assert results.image["miou"] == pytest.approx(40)
    undefined = [*results.segm.values(), *results.bbox.values(), results.image["auroc"]]
    undefined += [results.calibration["ece"], *results.froc.values()]
    assert np.isnan(undefined).all()
    assert not results.curves


def test_more_components_than_are_counted(dataset, folder, caplog):
    gt = read_ground_truth(dataset(1))
    specks = np.zeros(SHAPE, np.uint8)
    specks[::3, ::3] = 1
    with caplog.at_level(logging.WARNING):
        found = read_predicted_masks(folder({"1.png": specks}), gt)
    assert "238 regions" in caplog.text
    assert len(found) == 100, "noise has as many regions as pixels"
