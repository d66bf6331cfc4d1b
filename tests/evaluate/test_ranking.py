import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from imrcnn_d2.evaluation.detection.curves import (
    RankedDetections,
    Ranking,
    pr_curve,
    weighted_auroc,
)


def curve_of(hit, unit, lesions, weights, score=None):
    """Detections in order of score, unless it is given."""
    score = -np.arange(len(hit), dtype=float) if score is None else np.array(score, float)
    hit = np.array(hit, bool)
    ranking = Ranking(score, np.array(unit, int))
    return RankedDetections(ranking, hit, np.array(lesions)).weigh(np.array(weights))


def test_by_hand():
    # Unit 0 has two lesions, the first and third detection hit them; unit 1 one, hit by the last.
    curve = curve_of([1, 0, 1, 1], [0, 1, 0, 1], [2, 1], [[1, 1], [2, 0], [0, 3], [1, 2]])
    # Twice unit 0: four hits of four. Three times unit 1: three false alarms, then three hits.
    # The last: hit; two false alarms; hit; two hits.
    assert curve.num_gt.tolist() == [3, 4, 3, 4]
    assert curve.area == pytest.approx([(1 + 3 / 4 + 3 / 4) / 3, 1, 1 / 2, (1 + 3 * 4 / 6) / 4])
    assert curve.break_even_point == pytest.approx([2 / 3, 1, 0, 2 / 4])
    # Recalls up to 0.33 at the first hit; 0.25 (26 of 101) in the last resample.
    sampled = [(34 + 67 * 3 / 4) / 101, 1, 1 / 2, (26 + 75 * 4 / 6) / 101]
    assert curve.sampled_area == pytest.approx(sampled)
    accepted = np.array([[0, 1], [0, 1], [0, 3], [1, 2]])
    expected = [[1 / 3, 1], [1, 1], [0, 1], [1 / 4, 1]]
    assert curve.sensitivity(accepted) == pytest.approx(np.array(expected))


def test_a_recall_that_is_met_exactly_counts():
    """As floats compare: 7 hits of 100 are a recall of 0.07, COCO's recalls are k / 100."""
    for number in range(1, 101):
        hit = np.arange(100) < number
        curve = curve_of(hit, [0] * 100, [100], [[1]])
        reached = sum(recall <= number / 100 for recall in np.linspace(0, 1, 101))
        assert curve.sampled_area == pytest.approx(reached / 101)


def test_undefined():
    curve = curve_of([0, 1], [0, 1], [0, 2], [[1, 0], [1, 1]])
    for figure in (curve.area, curve.sampled_area, curve.break_even_point):
        assert np.isnan(figure[0])  # without ground truth
        assert not np.isnan(figure[1])
    # Fewer detections than ground truths; none at all.
    curve = curve_of([1, 1], [0, 0], [2, 1], [[1, 1], [0, 1], [1, 0]])
    assert curve.break_even_point == pytest.approx([np.nan, 0, 1], nan_ok=True)
    assert curve.area == pytest.approx([2 / 3, 0, 1])


def test_without_detections_or_without_hits():
    for hit in ([], [0, 0]):
        curve = curve_of(hit, [0] * len(hit), [1], [[1], [2]])
        assert curve.area.tolist() == curve.sampled_area.tolist() == [0, 0]
        assert curve.sensitivity(np.array([[1.0], [9.0]])).tolist() == [[0], [0]]
        assert curve.break_even_point.tolist() == [0, 0]


@st.composite
def cases(draw):
    """Detections of distinct score in up to five units, and how often a resample has each unit."""
    units = draw(st.integers(1, 5))
    number = draw(st.integers(0, 12))
    unit = draw(st.lists(st.integers(0, units - 1), min_size=number, max_size=number))
    hit = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    missed = draw(st.lists(st.integers(0, 2), min_size=units, max_size=units))
    times = draw(st.lists(st.integers(0, 4), min_size=units, max_size=units))
    lesions = np.bincount(unit, hit, minlength=units).astype(int) + missed
    return np.array(hit, bool), np.array(unit, int), lesions, np.array(times)


@settings(deadline=None, max_examples=300)
@given(case=cases(), alarms=st.integers(0, 20))
def test_weights_are_copies(case, alarms):
    """Equal to what is computed on a data set that holds the copies."""
    hit, unit, lesions, times = case
    curve = curve_of(hit, unit, lesions, [times])
    copies = times[unit]
    score = np.repeat(-np.arange(len(hit), dtype=float), copies)
    doubled = np.repeat(hit, copies)
    total = int(times @ lesions)
    other = pr_curve(score, doubled, total)
    assert curve.area == pytest.approx(other.area, nan_ok=True)
    assert curve.break_even_point == pytest.approx(other.break_even_point, nan_ok=True)
    if not total:
        assert np.isnan(curve.sampled_area[0])
        return
    reached = [
        other.precision[other.recall >= recall].max(initial=0) for recall in np.linspace(0, 1, 101)
    ]
    assert curve.sampled_area == pytest.approx(np.mean(reached))
    # Each threshold that keeps to the false alarms: after every score.
    found = [0] + [
        other.tp[i]
        for i in range(len(score))
        if other.fp[i] <= alarms and (i + 1 == len(score) or score[i + 1] < score[i])
    ]
    assert curve.sensitivity(np.array([[alarms]])) == pytest.approx(max(found) / total)


def test_detections_of_a_score_are_let_through_together():
    for score in ([0.9, 0.5, 0.5], [0.5, 0.9, 0.5]):
        curve = curve_of([1, 1, 0], [0, 0, 1], [2, 0], [[1, 1], [1, 2]], score)
        accepted = np.array([[0, 1, 2], [0, 1, 2]])
        assert curve.sensitivity(accepted).tolist() == [[0.5, 1, 1], [0.5, 0.5, 1]]


@settings(deadline=None, max_examples=100)
@given(
    cases=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 0.2, 0.5, 0.9]), st.integers(0, 4)),
        min_size=1,
        max_size=20,
    ),
    times=st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_auroc_agrees_with_scikit_learn(cases, times):
    positive, score, unit = (np.array(column) for column in zip(*cases, strict=True))
    times = np.array(times)
    weights = np.stack([times, np.ones(5, int)])
    own = weighted_auroc(positive, score, unit, weights)
    for b, row in enumerate(weights):
        taken = row[unit] > 0
        if len(set(positive[taken])) < 2:
            assert np.isnan(own[b])
        else:
            args = positive[taken], score[taken]
            assert own[b] == pytest.approx(roc_auc_score(*args, sample_weight=row[unit][taken]))
