import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation.detection.counts import confusion_matrix
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
from imrcnn_d2.evaluation.detection.matching import match, overlaps


def matrix_of(data, results, tau=0.5):
    """(ConfusionMatrix, ground truth, detections, class-wise matching)."""
    gt = read_ground_truth(data)
    detections = read_results(results, gt)
    matching = match(gt, detections, overlaps(gt, detections, "segm"), 0.5)
    settings = dict(tau=tau, iou_threshold=0.5, iou_type="segm")
    return confusion_matrix(gt, detections, matching, **settings), gt, detections, matching


def test_worked_by_hand(dataset, region):
    cancer, ulcer = 4, 7  # any ids
    data = dataset(
        3,
        [
            region(1, 0, 0, 10, 10, category_id=cancer),
            region(1, 20, 0, 10, 10, category_id=ulcer),
            region(1, 0, 20, 10, 10, category_id=ulcer),
            region(2, 0, 0, 10, 10, category_id=cancer),
            region(2, 20, 0, 10, 10, category_id=cancer),
            region(2, 20, 20, 20, 20, category_id=ulcer, iscrowd=1),
        ],
    )
    data["categories"] = [{"id": ulcer, "name": "ulcer"}, {"id": cancer, "name": "cancer"}]
    results = [
        region(1, 0, 0, 10, 9, category_id=cancer, score=0.9),  # right
        region(1, 0, 0, 10, 10, category_id=ulcer, score=0.8),  # too late: it is taken
        region(1, 20, 0, 10, 10, category_id=cancer, score=0.9),  # an ulcer taken for cancer
        region(1, 0, 20, 10, 10, category_id=ulcer, score=0.4),  # below the threshold
        region(2, 0, 0, 10, 10, category_id=ulcer, score=0.5),  # a cancer taken for an ulcer
        region(2, 20, 20, 10, 10, category_id=cancer, score=0.9),  # on the other class's crowd
        region(3, 0, 0, 10, 10, category_id=cancer, score=0.9),  # a false alarm
    ]
    matrix, *_ = matrix_of(data, results)
    assert matrix.classes == ["cancer", "ulcer", "background"]
    assert matrix.rows() == [[1, 1, 1], [1, 0, 1], [1, 1, None]]
    matrix, *_ = matrix_of(data, results, tau=0.4)
    assert matrix.rows() == [[1, 1, 1], [1, 1, 0], [1, 1, None]]
    matrix, *_ = matrix_of(data, [])
    assert matrix.rows() == [[0, 0, 3], [0, 0, 2], [0, 0, None]]


def test_of_equal_scores_the_first_in_the_file_takes_the_lesion(dataset, region):
    data = dataset(1, [region(1, 0, 0, 10, 10)], classes=("a", "b"))
    both = [region(1, 0, 0, 10, 10, category_id=c, score=0.6) for c in (2, 1)]
    assert matrix_of(data, both)[0].rows() == [[0, 1, 0], [0, 0, 0], [1, 0, None]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3))
def test_sums_and_one_class(random_case, seed, classes):
    data, results = random_case(seed, num_classes=classes)
    matrix, gt, detections, matching = matrix_of(data, results)
    counts = matrix.counts
    lesions = np.bincount(gt.regions.category[~gt.crowd], minlength=classes)
    assert counts[:-1].sum(axis=1).tolist() == lesions.tolist()
    at_tau = np.bincount(detections.regions.category[detections.score >= 0.5], minlength=classes)
    assert (np.nansum(counts[:, :-1], axis=0) <= at_tau).all()
    if not gt.crowd.any():
        assert counts[:, :-1].sum(axis=0).tolist() == at_tau.tolist()
    counted = matching.evaluated & (detections.score >= 0.5)
    if classes == 1:
        tp = int((counted & matching.hit).sum())
        fp = int((counted & ~matching.hit).sum())
        assert matrix.rows() == [[tp, int(lesions[0]) - tp], [fp, None]]
    # The classes' order is all that their ids decide.
    flipped = {c["id"]: 10 - c["id"] for c in data["categories"]}
    for record in (*data["annotations"], *results):
        record["category_id"] = flipped[record["category_id"]]
    for category in data["categories"]:
        category["id"] = flipped[category["id"]]
    again, *_ = matrix_of(data, results)
    order = [*range(classes)[::-1], classes]
    assert again.counts[np.ix_(order, order)] == pytest.approx(counts, nan_ok=True)
