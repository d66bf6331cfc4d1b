"""Which detection hits which lesion, and the confusion matrix; by hand and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rectangles import rectangles

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import Detections, GroundTruth, Regions
from imrcnn_d2.evaluation.detection.matching import Overlaps, match

LESIONS, WITH_CROWD = np.array([False, False]), np.array([False, True])


def matched(data, results, iou_type="segm"):
    scored = evaluate_lesions(data, results, iou_type=iou_type)
    return scored.detections, scored.matching


def matched_overlaps(iou, crowd, threshold=0.5):
    """Detections by falling score, in rows, and ground truths of one image, in columns."""

    def regions(number):
        return Regions(*(np.zeros(number, int) for _ in "ab"), np.zeros((number, 4)), None)

    rows, columns = np.shape(iou)
    gt = GroundTruth([], [], regions(columns), [], crowd, np.zeros(columns))
    dt, truth = (index.ravel() for index in np.indices((rows, columns)))
    pairs = Overlaps(dt, truth, np.ravel(iou), np.arange(rows))
    return match(gt, Detections(regions(rows), np.zeros(rows)), pairs, threshold)


@pytest.mark.parametrize(
    ("iou", "crowd", "expected"),
    [
        # The second overlaps ground truth 0 most, but the first has it; 1 is enough.
        ([[0.9, 0.0], [0.8, 0.6]], LESIONS, [0, 1]),
        # As before, but 1 is too far away.
        ([[0.9, 0.0], [0.8, 0.4]], LESIONS, [0, -1]),
        # The highest-scored takes what it overlaps most, even if another fits that better.
        ([[0.5, 0.6], [0.0, 1.0]], LESIONS, [1, -1]),
        # 0.5 is enough, just below is not.
        ([[0.5, 0.0], [0.0, 0.4999]], LESIONS, [0, -1]),
        # Of equal overlaps the last is taken, which leaves the first to who needs it.
        ([[0.8, 0.8], [0.7, 0.0]], LESIONS, [1, 0]),
        # A ground truth comes before a crowd that is overlapped more.
        ([[0.5, 1.0]], WITH_CROWD, [0]),
        # A crowd takes any number, also the second hit of a lesion inside it.
        ([[0.9, 1.0], [0.8, 1.0], [0.1, 0.7]], WITH_CROWD, [0, -2, -2]),
        ([[0.1, 0.4]], WITH_CROWD, [-1]),
    ],
)
def test_one_image_by_hand(iou, crowd, expected):
    matching = matched_overlaps(iou, crowd)
    assert np.where(matching.evaluated, matching.gt, -2).tolist() == expected


def test_a_perfect_overlap_meets_a_threshold_of_one():
    assert matched_overlaps([[1.0, 0.0]], LESIONS, 1.0).gt.tolist() == [0]


def test_a_hundred_detections_per_image_and_class(dataset, region):
    truth = dataset(2, [region(1, 0, 0, 10, 10)], classes=("a", "b"))
    many = [region(1, 20, 20, 10, 10, score=0.5) for _ in range(100)]
    late = region(1, 0, 0, 10, 10, score=0.4)  # would hit, but is the 101st
    others = [region(1, 0, 0, 9, 9, category_id=2, score=0.1), region(2, 0, 0, 9, 9, score=0.1)]
    detections, matching = matched(truth, [late, *many, *others])
    assert matching.evaluated.tolist() == (detections.score != 0.4).tolist()
    assert not matching.hit.any()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_agrees_with_pycocotools(random_case, seed, iou_type):
    """COCOeval's matching at IoU 0.5 over all sizes follows the same rule."""
    data, results = random_case(seed)
    _, matching = matched(data, results, iou_type)
    if not results:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), iou_type)
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    # loadRes numbers the results from 1 in file order; ours are stably sorted by image.
    order = np.argsort([result["image_id"] for result in results], kind="stable")
    gt_ids = np.argsort([a["image_id"] for a in data["annotations"]], kind="stable") + 1
    crowds = {a["id"] for a in data["annotations"] if a["iscrowd"]}
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


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_a_threshold_takes_part_of_the_matching(random_case, seed, tau):
    """Matching only the detections above a threshold gives what reading it off all of them does."""
    data, results = random_case(seed)
    detections, everything = matched(data, results)
    _, alone = matched(data, [r for r in results if r["score"] >= tau])
    above = detections.score >= tau
    assert everything.gt[above].tolist() == alone.gt.tolist()
    assert everything.evaluated[above].tolist() == alone.evaluated.tolist()


def test_confusion_by_hand(dataset, region):
    lesions = rectangles(
        "1 0 0 10 10; 1 20 0 10 10 class 2; 1 0 20 10 10 class 2; 2 0 0 10 10; 2 20 0 10 10; "
        "2 20 20 20 20 class 2 crowd"
    )
    data = dataset(3, lesions, classes=("cancer", "ulcer"))
    # (1) right; (2) too late: it is taken; (3) an ulcer taken for cancer; (4) below the threshold;
    # (5) a cancer taken for an ulcer; (6) on the other class's crowd; (7) a false alarm
    results = rectangles(
        "1 0 0 10 9 @0.9; 1 0 0 10 10 class 2 @0.8; 1 20 0 10 10 @0.9; 1 0 20 10 10 class 2 @0.4; "
        "2 0 0 10 10 class 2 @0.5; 2 20 20 10 10 @0.9; 3 0 0 10 10 @0.9"
    )
    for detected, tau, rows in (
        (results, 0.5, [[1, 1, 1], [1, 0, 1], [1, 1, None]]),
        (results, 0.4, [[1, 1, 1], [1, 1, 0], [1, 1, None]]),
        ([], 0.5, [[0, 0, 3], [0, 0, 2], [0, 0, None]]),
    ):
        matrix = evaluate_lesions(data, detected, tau=tau).confusion
        assert (matrix.classes, matrix.rows()) == (["cancer", "ulcer", "background"], rows)
    # Of equal scores the first in the file takes the lesion.
    data = dataset(1, [region(1, 0, 0, 10, 10)], classes=("a", "background"))
    both = [region(1, 0, 0, 10, 10, category_id=c, score=0.6) for c in (2, 1)]
    matrix = evaluate_lesions(data, both, tau=0.5).confusion
    assert matrix.classes == ["a", "background", "no lesion"]
    assert matrix.rows() == [[0, 1, 0], [0, 0, 0], [1, 0, None]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3))
def test_sums_of_a_confusion_matrix(random_case, seed, classes):
    data, results = random_case(seed, num_classes=classes)
    scored = evaluate_lesions(data, results, tau=0.5)
    gt, counts = scored.ground_truth, scored.confusion.counts
    lesions = np.bincount(gt.regions.category[~gt.crowd], minlength=classes)
    assert counts[:-1].sum(axis=1).tolist() == lesions.tolist()
    above = scored.detections.score >= 0.5
    at_tau = np.bincount(scored.detections.regions.category[above], minlength=classes)
    assert (np.nansum(counts[:, :-1], axis=0) <= at_tau).all()
    if not gt.crowd.any():
        assert counts[:, :-1].sum(axis=0).tolist() == at_tau.tolist()
    if classes == 1:
        tp, fp, fn = (scored.lesion[name] for name in ("TP", "FP", "FN"))
        assert scored.confusion.rows() == [[tp, fn], [fp, None]]
    # The classes' order is all that their ids decide.
    for record in (*data["annotations"], *results):
        record["category_id"] = 10 - record["category_id"]
    for category in data["categories"]:
        category["id"] = 10 - category["id"]
    again = evaluate_lesions(data, results, tau=0.5).confusion.counts
    order = [*range(classes)[::-1], classes]
    assert again[np.ix_(order, order)] == pytest.approx(counts, nan_ok=True)
