import pytest

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.label_errors import LabelError, find_label_errors, pool_label_errors

OUTLINE = 10, 10, 20, 10  # x, y, width, height


@pytest.fixture
def suspects_of(dataset, region):
    """Suspects of one image with outlines, as boxes, and detections, as (score, box)."""

    def find(outlines, found, crowds=(), tau=0.7, iou_type="segm"):
        annotations = [region(1, *box) for box in outlines]
        annotations += [region(1, *box, iscrowd=1) for box in crowds]
        results = [region(1, *box, score=score) for score, box in found]
        data = dataset(1, annotations)
        return find_label_errors(evaluate_lesions(data, results, tau=tau, iou_type=iou_type))

    return find


def brief(suspects):
    return [(s.kind, pytest.approx(s.score), pytest.approx(s.iou)) for s in suspects]


@pytest.mark.parametrize("iou_type", ("segm", "bbox"))
def test_a_detection_upon_the_outline_leaves_no_suspicion(suspects_of, iou_type):
    (only,) = suspects_of([OUTLINE], [(0.9, OUTLINE)], iou_type=iou_type)
    assert (only.kind, only.score, only.detection) == ("badly_fitting_outline", 0, 0)


def test_an_outline_that_fits_badly(suspects_of):
    (only,) = suspects_of([OUTLINE], [(0.9, (10, 10, 16, 10))])  # 160 of 200 pixels
    assert brief([only]) == [("badly_fitting_outline", 0.9 * 2 * 0.2, 0.8)]


def test_an_outline_in_the_wrong_place_is_one_suspicion(suspects_of):
    """The halves that they share make an IoU of 1/3: neither is a hit."""
    (only,) = suspects_of([OUTLINE], [(0.9, (20, 10, 20, 10))])
    assert brief([only]) == [("badly_fitting_outline", 0.9, 1 / 3)]


@pytest.mark.parametrize("order", (1, -1))
def test_an_alarm_goes_to_the_outline_that_it_meets_best(suspects_of, order):
    """IoU 1/4 with one outline and 1/3 with the other, whichever the file has first."""
    outlines = [(2, 10, 20, 10), (24, 10, 20, 10)][::order]  # 8 and 10 of 20 columns
    found = suspects_of(outlines, [(0.9, (14, 10, 20, 10))])
    by_x = found[::order]
    assert brief(by_x) == [
        ("unmatched_outline", 1 - 0.9 / 4, 1 / 4),
        ("badly_fitting_outline", 0.9, 1 / 3),
    ]


def test_an_outline_that_nothing_meets_and_one_met_by_a_weak_detection(suspects_of):
    assert brief(suspects_of([OUTLINE], [])) == [("unmatched_outline", 1, 0)]
    (weak,) = suspects_of([OUTLINE], [(0.3, OUTLINE), (0.1, (10, 10, 10, 10))])
    assert brief([weak]) == [("unmatched_outline", 0.7, 1)]
    assert weak.detection == 0


def test_a_confident_detection_without_an_outline(suspects_of):
    far = 35, 25, 10, 10
    found = suspects_of([OUTLINE], [(0.9, OUTLINE), (0.8, far), (0.6, (0, 0, 5, 5))])
    assert brief(found)[1:] == [("unlabelled_lesion", 0.8, 0)]
    assert found[1].region is None and found[1].detection == 1


def test_what_lies_within_an_outline_is_no_forgotten_lesion(suspects_of):
    """A second detection, three quarters of it in the outline that another one hits."""
    found = suspects_of([OUTLINE], [(0.95, OUTLINE), (0.8, (25, 12, 4, 4)), (0.9, (14, 17, 4, 4))])
    assert brief(found)[1:] == [
        ("unlabelled_lesion", 0, 0),
        ("unlabelled_lesion", 0.9 * 0.25, 0),
    ]


def test_crowds_are_no_suspects_and_hide_what_is_in_them(suspects_of):
    assert suspects_of([], [], crowds=[OUTLINE]) == []
    assert suspects_of([], [(0.9, (12, 12, 5, 5))], crowds=[OUTLINE]) == []
    (half,) = suspects_of([], [(0.8, (25, 10, 20, 10))], crowds=[OUTLINE])
    assert half.score == pytest.approx(0.8 * 0.75)


def test_models_are_pooled_by_their_mean():
    def outline(score, region=0):
        return LabelError("unmatched_outline", score, 3, region, None, 0.0)

    def alarm(score, detection):
        return LabelError("unlabelled_lesion", score, 4, None, detection, 0.0)

    first = [outline(0.4), outline(1.0, 1), alarm(0.9, 0), alarm(0.5, 1)]
    second = [outline(0.8), outline(0.9, 1)]
    pooled = pool_label_errors([first, second])
    assert [(s.region, pytest.approx(s.score), model) for s, model in pooled] == [
        (1, 0.95, 0),
        (0, 0.6, 1),
        (None, 0.45, 0),
    ]
    assert pooled[2][0].detection == 0
