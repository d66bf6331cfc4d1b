import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from imrcnn_d2.evaluation.detection.inputs import (
    Detections,
    GroundTruth,
    Regions,
    read_ground_truth,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import Overlaps, match, overlaps

NO_CROWD = np.array([False, False])


def matched(dataset, results, iou_type="segm", threshold=0.5):
    gt = read_ground_truth(dataset)
    detections = read_results(results, gt)
    matching = match(gt, detections, overlaps(gt, detections, iou_type), threshold)
    return gt, detections, matching


def matched_overlaps(iou, crowd, threshold):
    """Detections by falling score, in rows, and ground truths of one image, in columns."""

    def regions(number):
        return Regions(*(np.zeros(number, int) for _ in "ab"), np.zeros((number, 4)), None)

    rows, columns = np.shape(iou)
    gt = GroundTruth([], [], regions(columns), [], crowd, np.zeros(columns))
    detections = Detections(regions(rows), np.zeros(rows))
    dt, truth = (index.ravel() for index in np.indices((rows, columns)))
    pairs = Overlaps(dt, truth, np.ravel(iou), np.arange(rows))
    return match(gt, detections, pairs, threshold)


@pytest.mark.parametrize(
    ("iou", "crowd", "expected"),
    [
        # The second wants ground truth 0 most, but the first has it; 1 is enough.
        ([[0.9, 0.0], [0.8, 0.6]], NO_CROWD, [0, 1]),
        # As before, but 1 is too far away.
        ([[0.9, 0.0], [0.8, 0.4]], NO_CROWD, [0, -1]),
        # The highest-scored takes what it overlaps most, even if another fits that better.
        ([[0.5, 0.6], [0.0, 1.0]], NO_CROWD, [1, -1]),
        # 0.5 is enough, just below is not.
        ([[0.5, 0.0], [0.0, 0.4999]], NO_CROWD, [0, -1]),
        # Of equal overlaps the last is taken, which leaves the first to who needs it.
        ([[0.8, 0.8], [0.7, 0.0]], NO_CROWD, [1, 0]),
        # A ground truth comes before a crowd that is overlapped more.
        ([[0.5, 1.0]], np.array([False, True]), [0]),
        # A crowd takes any number, also the second hit of a lesion inside it.
        ([[0.9, 1.0], [0.8, 1.0], [0.1, 0.7]], np.array([False, True]), [0, -2, -2]),
        ([[0.1, 0.4]], np.array([False, True]), [-1]),
    ],
)
def test_one_image_by_hand(iou, crowd, expected):
    matching = matched_overlaps(iou, crowd, 0.5)
    assert np.where(matching.evaluated, matching.gt, -2).tolist() == expected


def test_a_perfect_overlap_meets_a_threshold_of_one():
    assert matched_overlaps([[1.0, 0.0]], NO_CROWD, 1.0).gt.tolist() == [0]


def test_falling_score_then_file_order(dataset, region):
    truth = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    results = [
        region(2, 0, 0, 10, 9, score=0.5),  # IoU 0.9, first of its image with 0.5
        region(2, 0, 0, 10, 10, score=0.5),
        region(1, 0, 0, 10, 8, score=0.8),
        region(1, 0, 0, 10, 10, score=0.9),
    ]
    _, detections, matching = matched(truth, results)
    # By image, in file order: 0.8 and 0.9 of image 1, then the two of image 2.
    assert detections.score.tolist() == [0.8, 0.9, 0.5, 0.5]
    assert matching.gt.tolist() == [-1, 0, 1, -1]
    assert matching.iou[[1, 2]] == pytest.approx([1.0, 0.9])
    assert matching.evaluated.all()


def test_classes_and_images_do_not_mix(dataset, region):
    truth = dataset(2, [region(1, 0, 0, 10, 10, category_id=1)], classes=("a", "b"))
    results = [
        region(1, 0, 0, 10, 10, category_id=2, score=0.9),
        region(2, 0, 0, 10, 10, category_id=1, score=0.9),
    ]
    _, _, matching = matched(truth, results)
    assert matching.gt.tolist() == [-1, -1]


def test_overlap_with_a_crowd_is_of_the_detection(dataset, region):
    # A quarter of the crowd, wholly inside it: IoU 0.25, but all of the detection.
    truth = dataset(1, [region(1, 0, 0, 20, 20, iscrowd=1)])
    results = [region(1, 5, 5, 10, 10, score=0.9), region(1, 30, 0, 10, 10, score=0.8)]
    _, _, matching = matched(truth, results)
    assert matching.evaluated.tolist() == [False, True]
    assert not matching.hit.any()


def test_masks_and_boxes_overlap_differently(dataset, region):
    # The mask of the detection fills half of its box.
    truth = dataset(1, [region(1, 0, 0, 10, 10)])
    result = region(1, 0, 0, 10, 4, score=0.9) | {"bbox": [0, 0, 10, 10]}
    assert matched(truth, [result], "segm")[2].gt.tolist() == [-1]
    assert matched(truth, [result], "bbox")[2].gt.tolist() == [0]


def test_a_hundred_detections_per_image_and_class(dataset, region):
    truth = dataset(2, [region(1, 0, 0, 10, 10)], classes=("a", "b"))
    many = [region(1, 20, 20, 10, 10, score=0.5) for _ in range(100)]
    late = region(1, 0, 0, 10, 10, score=0.4)  # would hit, but is the 101st
    others = [region(1, 0, 0, 9, 9, category_id=2, score=0.1), region(2, 0, 0, 9, 9, score=0.1)]
    _, detections, matching = matched(truth, [late, *many, *others])
    assert matching.evaluated[detections.score == 0.5].all()
    assert not matching.evaluated[detections.score == 0.4].any()
    assert matching.evaluated[detections.score == 0.1].all()
    assert not matching.hit.any()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_agrees_with_pycocotools(random_case, seed, iou_type):
    """COCOeval's matching at IoU 0.5 over all sizes follows the same rule."""
    dataset, results = random_case(seed)
    gt, detections, matching = matched(dataset, results, iou_type)
    if not results:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), iou_type)
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    # loadRes numbers the results from 1 in file order; ours are stably sorted by image.
    order = np.argsort([result["image_id"] for result in results], kind="stable")
    gt_ids = np.argsort([a["image_id"] for a in dataset["annotations"]], kind="stable") + 1
    crowds = {a["id"] for a in dataset["annotations"] if a["iscrowd"]}
    theirs = {}
    for image in filter(None, evaluation.evalImgs):
        theirs.update(zip(image["dtIds"], image["dtMatches"][0].astype(int), strict=True))
    for row, number in enumerate(order):
        match_id = theirs[number + 1]
        assert matching.evaluated[row] == (match_id not in crowds)
        if matching.hit[row]:
            assert gt_ids[matching.gt[row]] == match_id
        else:
            assert match_id == 0 or match_id in crowds


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_a_threshold_takes_part_of_the_matching(random_case, seed, tau):
    """Matching only the detections above a threshold gives what reading it off all of them does."""
    dataset, results = random_case(seed)
    _, detections, everything = matched(dataset, results)
    _, _, alone = matched(dataset, [r for r in results if r["score"] >= tau])
    above = detections.score >= tau
    assert everything.gt[above].tolist() == alone.gt.tolist()
    assert everything.evaluated[above].tolist() == alone.evaluated.tolist()
