"""What ranks detections by score, and thresholds; against other libraries and brute force."""

import logging
import math

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from hypothesis import given, settings
from hypothesis import strategies as st
from rectangles import rectangles
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from imrcnn_d2.evaluation import OperatingPoint, choose_operating_point, evaluate_lesions
from imrcnn_d2.evaluation.calibration import BINS
from imrcnn_d2.evaluation.detection.curves import (
    RATES,
    RankedDetections,
    Ranking,
    pr_curve,
    weighted_auroc,
)


def curve_of(score, hit, num_gt):
    return pr_curve(np.array(score, float), np.array(hit, bool), num_gt)


@pytest.mark.parametrize(
    ("score", "hit", "num_gt", "area", "break_even_point"),
    [
        *(([0.5, 0.5], [1, 0], 1, 1, 1), ([0.5, 0.5], [0, 1], 1, 0.5, 0)),  # ties stay in order
        *(([], [], 3, 0, 0), ([0.9], [0], 0, math.nan, math.nan)),
        ([0.9, 0.8], [1, 1], 3, 2 / 3, math.nan),  # fewer detections than ground truths
        ([0.9, 0.8, 0.7], [1, 1, 0], 3, 2 / 3, 2 / 3),
    ],
)
def test_edges_of_precision_recall(score, hit, num_gt, area, break_even_point):
    curve = curve_of(score, hit, num_gt)
    assert curve.area == pytest.approx(area, nan_ok=True)
    assert curve.break_even_point == pytest.approx(break_even_point, nan_ok=True)
    assert num_gt or np.isnan(curve.recall).all()


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
    assert curve.area == pytest.approx(voc_ap(curve.recall, curve.precision))  # Detectron2's
    # Without the envelope it is scikit-learn's average precision, of the recall reached.
    if any(hits):
        plain = average_precision_score(hits, score) * sum(hits) / num_gt
        steps = np.diff(curve.recall, prepend=0) * curve.precision
        assert steps.sum() == pytest.approx(plain)


def test_a_recall_that_is_met_exactly():
    """As floats compare: 7 hits of 100 are a recall of 0.07, COCO's recalls are k / 100."""
    ranking = Ranking(-np.arange(100.0), np.zeros(100, int))
    for number in range(1, 101):
        ranked = RankedDetections(ranking, np.arange(100) < number, np.array([100]))
        reached = sum(recall <= number / 100 for recall in np.linspace(0, 1, 101))
        assert ranked.weigh(np.array([[1]])).sampled_area == pytest.approx(reached / 101)


@settings(deadline=None, max_examples=100)
@given(
    cases=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 0.2, 0.5, 0.9]), st.integers(0, 4)),
        min_size=1,
        max_size=20,
    ),
    times=st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_auroc_is_scikit_learns(cases, times):
    positive, score, unit = (np.array(column) for column in zip(*cases, strict=True))
    weights = np.stack([np.array(times), np.ones(5, int)])
    areas = weighted_auroc(positive, score, unit, weights)
    for area, row in zip(areas, weights, strict=True):
        taken = row[unit] > 0
        if len(set(positive[taken])) < 2:
            assert np.isnan(area)
        else:
            args = positive[taken], score[taken]
            assert area == pytest.approx(roc_auc_score(*args, sample_weight=row[unit][taken]))


@pytest.fixture
def worked(dataset, region):
    """Four images, five lesions of two classes and a crowd. By falling score: hit, false alarm, hit
    and false alarm at 0.7, on the crowd alone, false alarm, hit."""
    data = dataset(
        4,
        rectangles(
            "1 0 0 10 10; 1 20 0 10 10 class 2; 2 0 0 10 10; 2 20 0 10 10; 3 0 0 10 10 class 2; "
            "3 20 20 20 20 crowd"
        ),
        classes=("a", "b"),
    )
    # (6) of the other class
    results = rectangles(
        "1 0 0 10 10 @0.9; 4 0 0 10 10 @0.8; 2 0 0 10 10 @0.7; 2 0 20 10 10 @0.7; "
        "3 20 20 10 10 @0.6; 3 0 0 10 10 @0.5; 1 20 0 10 10 class 2 @0"
    )
    return data, results


def test_froc_by_hand(worked):
    froc = evaluate_lesions(*worked).metrics.froc
    assert froc.curve()["score"].tolist() == [0.9, 0.8, 0.7, 0.5, 0]  # ties together
    assert froc.curve()["fp"].tolist() == [0, 1, 2, 3, 3]
    # 1/8 of an alarm in each of four images is half an alarm: none. 0.7 brings the second.
    expected = dict(zip(RATES, (20, 20, 40, 60, 60, 60, 60), strict=True))
    expected = {f"sensitivity_at_{rate:g}": value for rate, value in expected.items()}
    assert froc.values() == pytest.approx({**expected, "mean": 320 / 7})


def test_undefined_froc(dataset, region, worked):
    without_lesions = evaluate_lesions(dataset(1), [region(1, 0, 0, 10, 10, score=0.5)])
    assert np.isnan(list(without_lesions.froc.values())).all()
    assert without_lesions.metrics.froc.curve()["fp_per_image"] == [1]
    assert list(evaluate_lesions(worked[0], []).froc.values()) == [0] * 8


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_froc_against_every_threshold(random_case, seed, scores):
    scored = evaluate_lesions(*random_case(seed, scores))
    froc = scored.metrics.froc
    for rate in RATES if froc.lesions.sum() else ():
        best = 0.0
        for threshold in {*froc.score.tolist(), 2.0}:
            above = froc.score >= threshold
            if (above & ~froc.hit).sum() / len(froc.lesions) <= rate:
                best = max(best, (above & froc.hit).sum() / froc.lesions.sum())
        assert scored.froc[f"sensitivity_at_{rate:g}"] == pytest.approx(100 * best)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_calibration_is_scikit_learns(random_case, seed, scores):
    """Scores on the bins' edges, which "tied" ones all are, too; several classes and crowds."""
    calibration = evaluate_lesions(*random_case(seed, scores)).metrics.calibration
    score, hit = calibration.score, calibration.hit
    values, diagram = calibration.values(), calibration.diagram()
    if len(set(hit)) < 2:  # scikit-learn needs both
        return
    assert values["brier"] == pytest.approx(100 * brier_score_loss(hit, score, pos_label=True))
    means = {"n": len(hit), "mean_score": 100 * score.mean(), "hit_rate": 100 * hit.mean()}
    assert {name: values[name] for name in means} == pytest.approx(means)
    rate, mean = calibration_curve(hit, score, n_bins=BINS)
    filled = diagram["detections"] > 0
    assert diagram["hit_rate"][filled] == pytest.approx(100 * rate)
    assert diagram["mean_score"][filled] == pytest.approx(100 * mean)
    weight = diagram["detections"][filled] / len(score)
    assert values["ece"] == pytest.approx(100 * np.sum(weight * np.abs(rate - mean)))


def test_scores_that_are_no_probabilities(dataset, region, caplog):
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    scored = evaluate_lesions(data, [region(1, 0, 0, 10, 10, score=87.0)])
    assert "above 1" in caplog.text
    assert np.isnan(scored.calibration["ece"]) and scored.calibration["n"] == 0


def test_operating_points_by_hand(worked, dataset, region, caplog):
    """Of five lesions: F1 at 0.9 is 2/(1+5), at 0.8 2/(2+5), at 0.7 4/(4+5), at 0 6/(6+5)."""
    results = evaluate_lesions(*worked)
    assert choose_operating_point(results, dataset="val") == OperatingPoint(0, "f1", "val")
    for rule, tau in (("recall>=20", 0.9), ("recall>=20.5", 0.7), ("recall>=60", 0)):
        assert choose_operating_point(results, rule) == OperatingPoint(tau, rule, None)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert choose_operating_point(results, "recall>=100", "val").tau == 0
    assert "of val reach a recall of 60.0 %" in caplog.text
    # Of equal F1 the highest threshold. After one of three: 2/(1+2); after all: 4/(4+2).
    data = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    places = ((1, 0, 0.9), (1, 20, 0.6), (2, 20, 0.5), (2, 0, 0.4))
    tied = [region(image, x, 0, 10, 10, score=score) for image, x, score in places]
    assert choose_operating_point(evaluate_lesions(data, tied)).tau == 0.9


def test_thresholds_that_cannot_be_chosen(worked, dataset):
    data, results = worked
    for rule in ("F1", "recall", "recall>=0", "recall>=100.1", "recall>=-5"):
        with pytest.raises(ValueError, match=rule):
            choose_operating_point(evaluate_lesions(data, results), rule)
    unscored = [{**result, "score": None} for result in results]
    without_lesions = evaluate_lesions(dataset(4, classes=("a", "b")), results)
    for scored, missing in (
        (evaluate_lesions(data, []), "detection of val"),
        (without_lesions, "lesion of val"),
        (evaluate_lesions(data, unscored), "score of val"),
    ):
        with pytest.raises(ValueError, match=missing):
            choose_operating_point(scored, dataset="val")


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_operating_points_against_scoring_at_every_threshold(random_case, seed, scores):
    data, detected = random_case(seed, scores, num_images=3)
    results = evaluate_lesions(data, detected)
    if not results.matching.evaluated.any() or not results.ground_truth.lesions.any():
        return
    thresholds = set(results.detections.score[results.matching.evaluated].tolist())
    at = {tau: evaluate_lesions(data, detected, tau=tau).lesion for tau in thresholds}
    best = choose_operating_point(results).tau
    assert best == max(at, key=lambda tau: (at[tau]["f1"], tau))
    enough = [tau for tau in at if at[tau]["recall"] >= 50]
    assert not enough or choose_operating_point(results, "recall>=50").tau == max(enough)
