import pytest

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.label_errors import LabelError, find_label_errors, pool_label_errors

BOX = 10, 10, 20, 10  # x, y, width, height
MISSED, FITS, FORGOTTEN = "unmatched_outline", "badly_fitting_outline", "unlabelled_lesion"
# Annotations, detections as (score, box), and the errors as (kind, score, IoU).
CASES = {
    "a perfect hit": ([BOX], [(0.9, BOX)], [(FITS, 0, 1)]),
    "160 of 200 pixels": ([BOX], [(0.9, (10, 10, 16, 10))], [(FITS, 0.9 * 2 * 0.2, 0.8)]),
    "one error in the wrong place": ([BOX], [(0.9, (20, 10, 20, 10))], [(FITS, 0.9, 1 / 3)]),
    "an alarm goes to the annotation that it meets best": (
        [(2, 10, 20, 10), (24, 10, 20, 10)],  # 8 and 10 of 20 columns
        [(0.9, (14, 10, 20, 10))],
        [(MISSED, 1 - 0.9 / 4, 1 / 4), (FITS, 0.9, 1 / 3)],
    ),
    "whichever the file has first": (
        [(24, 10, 20, 10), (2, 10, 20, 10)],
        [(0.9, (14, 10, 20, 10))],
        [(FITS, 0.9, 1 / 3), (MISSED, 1 - 0.9 / 4, 1 / 4)],
    ),
    "nothing near": ([BOX], [], [(MISSED, 1, 0)]),
    "weak detections": ([BOX], [(0.3, BOX), (0.1, (10, 10, 10, 10))], [(MISSED, 0.7, 1)]),
    "a confident detection without an annotation": (
        [BOX],
        [(0.9, BOX), (0.8, (35, 25, 10, 10)), (0.6, (0, 0, 5, 5))],
        [(FITS, 0, 1), (FORGOTTEN, 0.8, 0)],
    ),
    "what lies within an annotation is no forgotten lesion": (
        [BOX],
        [(0.95, BOX), (0.8, (25, 12, 4, 4)), (0.9, (14, 17, 4, 4))],  # three quarters of the last
        [(FITS, 0, 1), (FORGOTTEN, 0, 0), (FORGOTTEN, 0.9 * 0.25, 0)],
    ),
}


def errors_of(dataset, region, boxes, detected, crowds=(), iou_type="segm"):
    annotations = [region(1, *box) for box in boxes]
    annotations += [region(1, *box, iscrowd=1) for box in crowds]
    results = [region(1, *box, score=score) for score, box in detected]
    data = dataset(1, annotations)
    return find_label_errors(evaluate_lesions(data, results, iou_type=iou_type))


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("name", CASES)
def test_errors_of_an_image(dataset, region, name, iou_type):
    boxes, detected, expected = CASES[name]
    errors = errors_of(dataset, region, boxes, detected, iou_type=iou_type)
    assert [error.kind for error in errors] == [kind for kind, _, _ in expected]
    values = [(error.score, error.iou) for error in errors]
    assert values == [(pytest.approx(score), pytest.approx(iou)) for _, score, iou in expected]
    for error in errors:
        assert (error.region is None) == (error.kind == FORGOTTEN)
        assert (error.detection is None) == (not detected)


def test_crowds_are_no_errors_and_hide_what_is_in_them(dataset, region):
    assert errors_of(dataset, region, [], [], crowds=[BOX]) == []
    assert errors_of(dataset, region, [], [(0.9, (12, 12, 5, 5))], crowds=[BOX]) == []
    (half,) = errors_of(dataset, region, [], [(0.8, (25, 10, 20, 10))], crowds=[BOX])
    assert half.score == pytest.approx(0.8 * 0.75)


def test_models_are_pooled_by_their_mean():
    def missed(score, region=0):
        return LabelError(MISSED, score, 3, region, None, 0.0)

    def alarm(score, detection):
        return LabelError(FORGOTTEN, score, 4, None, detection, 0.0)

    first = [missed(0.4), missed(1.0, 1), alarm(0.9, 0), alarm(0.5, 1)]
    second = [missed(0.8), missed(0.9, 1)]
    pooled = pool_label_errors([first, second])
    assert [(error.region, pytest.approx(error.score), model) for error, model in pooled] == [
        *((1, 0.95, 0), (0, 0.6, 1), (None, 0.45, 0))
    ]
    assert pooled[2][0].detection == 0
