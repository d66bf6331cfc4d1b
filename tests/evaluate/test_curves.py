import math

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from imrcnn_d2.evaluation.detection.curves import pr_curve


def curve_of(score, hit, num_gt):
    return pr_curve(np.array(score, float), np.array(hit, bool), num_gt)


def test_by_hand():
    # In order of score: hit, false alarm, hit, false alarm, hit; four ground truths.
    curve = curve_of([0.5, 0.9, 0.8, 0.6, 0.7], [True, True, False, False, True], 4)
    assert curve.score.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve.tp.tolist() == [1, 1, 2, 2, 3]
    assert curve.fp.tolist() == [0, 1, 1, 2, 2]
    assert curve.precision == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])
    assert curve.recall == pytest.approx([1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4])
    assert curve.envelope == pytest.approx([1, 2 / 3, 2 / 3, 3 / 5, 3 / 5])
    assert curve.area == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert curve.break_even_point == 2 / 4  # two hits among the first four


def test_ties_keep_their_order():
    assert curve_of([0.5, 0.5], [True, False], 1).area == 1
    assert curve_of([0.5, 0.5], [False, True], 1).area == 0.5


def test_without_detections():
    curve = curve_of([], [], 3)
    assert curve.area == 0
    assert curve.break_even_point == 0


def test_without_ground_truth():
    curve = curve_of([0.9], [False], 0)
    assert math.isnan(curve.area)
    assert math.isnan(curve.break_even_point)
    assert math.isnan(curve.recall[0])


def test_break_even_needs_as_many_detections_as_ground_truths():
    assert math.isnan(curve_of([0.9, 0.8], [True, True], 3).break_even_point)
    assert curve_of([0.9, 0.8, 0.7], [True, True, False], 3).break_even_point == 2 / 3


@settings(deadline=None, max_examples=50)
@given(
    hits=st.lists(st.booleans(), min_size=1, max_size=30),
    missed=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_area_agrees_with_others(hits, missed, seed):
    num_gt = sum(hits) + missed
    if not num_gt:
        return
    score = np.random.default_rng(seed).permutation(len(hits)) / len(hits)  # distinct
    curve = curve_of(score, hits, num_gt)
    # Detectron2's own Pascal VOC code.
    assert curve.area == pytest.approx(voc_ap(curve.recall, curve.precision))
    # The mean over ground truths of the best precision with at least that many hits.
    best = [curve.precision[curve.tp >= k].max(initial=0) for k in range(1, num_gt + 1)]
    assert curve.area == pytest.approx(np.mean(best))
    # Without the envelope it is scikit-learn's average precision, of the recall reached.
    if any(hits):
        plain = average_precision_score(hits, score) * sum(hits) / num_gt
        steps = np.diff(curve.recall, prepend=0) * curve.precision
        assert steps.sum() == pytest.approx(plain)
        assert curve.area >= plain - 1e-12
