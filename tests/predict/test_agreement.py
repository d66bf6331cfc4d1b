"""How far two predictors differ."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.deploy.runtimes.check import Differences, compare_predictors, compare_records

from .conftest import picture

BOUNDS = {"lost": 0, "unmatched": 3, "score": 0.02, "box": 1, "mask_iou": 0.97}


class Moved:
    """A predictor whose boxes and scores are another's, moved by a known amount."""

    def __init__(self, predictor, *, score=0.0, shift=0.0, left_out=0, classes=0):
        self._predictor, self._score, self._shift = predictor, score, shift
        self._left_out, self._classes = left_out, classes
        self.prepare, self.finish = predictor.prepare, predictor.finish
        self.is_classifier, self.tau = False, predictor.tau

    def forward(self, prepared):
        outputs = self._predictor.forward(prepared)
        for output in outputs:
            output.scores = output.scores - self._score
            output.pred_classes += self._classes
            output.pred_boxes.tensor[:, :2] += self._shift
        return [output[self._left_out :] for output in outputs]


@pytest.fixture
def paths(tmp_path):
    for seed in range(2):
        Image.fromarray(picture(seed, 64, 85)).save(tmp_path / f"{seed}.png")
    return sorted(tmp_path.iterdir())


def test_one_agrees_with_itself(predictor, paths):
    differences = compare_predictors(predictor, predictor, paths)
    assert differences.images == 2 and differences.detections > 2
    assert (differences.unmatched, *differences.largest()) == (0, 0, 0, 1)
    assert not differences.exceeded(lost=0, unmatched=0, score=0, box=0, mask_iou=1)


def test_the_largest_difference_is_found(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, score=0.01, shift=0.5), paths)
    score, box, mask_iou = differences.largest()
    assert score == pytest.approx(0.01, abs=1e-5)
    # half a pixel of 85, as the network sees the image in its own size
    assert box == pytest.approx(100 * 0.5 / 85, rel=1e-3)
    assert mask_iou < 1


def test_what_is_missing_is_counted(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, left_out=1), paths)
    assert differences.unmatched == differences.lost == 2
    nothing = compare_predictors(predictor, Moved(predictor, left_out=100), paths)
    assert nothing.unmatched == nothing.detections > 2


def test_another_class_is_no_match(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, classes=1), paths)
    assert differences.unmatched == differences.detections > 2


def test_bounds_are_named():
    good = Differences(9, 100, 3, 0, *(np.array([v]) for v in (0.02, 1, 0.97)))
    assert good.exceeded(**BOUNDS) == []
    bad = Differences(9, 100, 4, 1, *(np.array([v]) for v in (0.03, 1.5, 0.9)))
    said = "; ".join(bad.exceeded(**BOUNDS))
    for part in ("1 detections above", "4 %", "0.03, more than 0.02", "1.5 %", "0.9, less"):
        assert part in said


def test_nan_is_beyond_any_bound():
    nothing = Differences(9, 100, 0, 0, *(np.array([np.nan]) for _ in range(3)))
    assert len(nothing.exceeded(**BOUNDS)) == 3


def test_a_bound_may_be_for_most_detections():
    steps = np.arange(1, 101) / 100
    differences = Differences(9, 100, 0, 1, steps, 100 * steps, 1 - steps)
    assert differences.largest() == pytest.approx((1, 100, 0))
    # Of a hundred, 95 differ by no more than 0.95; the quantile lies at the next one.
    assert differences.largest(0.95) == pytest.approx((0.96, 96, 0.04))
    bounds = {"lost": 1, "unmatched": 0, "score": 0.96, "box": 96, "mask_iou": 0.039}
    assert differences.exceeded(**bounds, share=0.95) == []
    assert len(differences.exceeded(**bounds)) == 3
    assert len(differences.exceeded(**{**bounds, "lost": 0}, share=0.95)) == 1


def test_two_empty_masks_are_equal():
    empty, full = (
        mask_util.encode(np.asfortranarray(np.full((8, 8), value, np.uint8))) for value in (0, 1)
    )
    box = {"bbox": [1, 1, 4, 4], "category_id": 0, "score": 0.9}

    def differences(one, two):
        found = ([[{**box, "segmentation": mask}]] for mask in (one, two))
        return compare_records(*found, [(8, 8)], 0.5).mask_ious.tolist()

    assert differences(empty, empty) == differences(full, full) == [1]
    assert differences(empty, full) == differences(full, empty) == [0]
