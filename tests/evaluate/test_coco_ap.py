import contextlib
import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from imrcnn_d2.evaluation.detection.coco_ap import coco_average_precision
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
from imrcnn_d2.evaluation.detection.matching import overlaps

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def figures(dataset, results, iou_type="segm"):
    gt = read_ground_truth(dataset)
    detections = read_results(results, gt)
    pairs = overlaps(gt, detections, iou_type)
    return coco_average_precision(gt, detections, pairs, iou_type)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_agrees_with_pycocotools(random_case, seed, iou_type):
    dataset, results = random_case(seed)
    if not results:
        return
    # Of masks the area, which decides the size class, is the mask's: loadRes takes it from there
    # only where there is no box.
    unused = "bbox" if iou_type == "segm" else "segmentation"
    bare = [{key: value for key, value in r.items() if key != unused} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(bare), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [100 * s if s >= 0 else float("nan") for s in evaluation.stats[:6]]
    own = figures(dataset, results, iou_type)
    assert list(own) == NAMES
    assert list(own.values()) == pytest.approx(expected, nan_ok=True)


def test_nothing_detected_is_zero_where_there_is_something(dataset, region):
    own = figures(dataset(2, [region(1, 0, 0, 10, 10)]), [])  # 100 pixels: small
    assert [own[name] for name in NAMES[:4]] == [0, 0, 0, 0]
    assert math.isnan(own["APm"])
    assert math.isnan(own["APl"])


@pytest.mark.parametrize("found", [True, False])
def test_without_ground_truth(dataset, region, found):
    crowd = region(1, 0, 0, 10, 10, iscrowd=1)
    results = [region(1, 0, 0, 10, 10, score=0.9)] if found else []
    for annotations in ([], [crowd]):
        assert all(map(math.isnan, figures(dataset(1, annotations), results).values()))


def test_annotation_ids_from_zero(dataset, region):
    """COCOeval itself takes a match with the annotation of id 0 for none."""
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    data["annotations"][0]["id"] = 0
    assert figures(data, [region(1, 0, 0, 10, 10, score=0.9)])["AP"] == pytest.approx(100)


def test_more_detections_than_fit_a_byte(dataset, region):
    results = [region(1 + i % 3, 0, 0, 10, 10, score=0.5 + i / 1000) for i in range(300)]
    truth = dataset(3, [region(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    assert figures(truth, results)["AP"] == pytest.approx(100)


def test_size_of_a_detection_is_that_of_its_mask(dataset, region):
    """A false alarm that is medium by its box but small by its mask does not touch APm."""
    truth = dataset(1, [region(1, 0, 0, 40, 30)])
    hit = region(1, 0, 0, 40, 30, score=0.5)
    alarm = region(1, 45, 0, 5, 10, score=0.9) | {"bbox": [0, 0, 40, 30]}
    assert figures(truth, [alarm, hit], "segm")["APm"] == pytest.approx(100)
    assert figures(truth, [alarm, hit], "segm")["AP"] == pytest.approx(50)
