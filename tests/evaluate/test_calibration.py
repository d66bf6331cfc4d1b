import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.calibration import BINS, Calibration


def calibration_of(data, results):
    return evaluate_lesions(data, results).metrics.calibration


def test_worked_by_hand(dataset, region):
    data = dataset(
        2,
        [
            region(1, 0, 0, 10, 10),
            region(1, 20, 0, 10, 10),
            region(2, 20, 20, 20, 20, iscrowd=1),
        ],
    )
    results = [
        region(1, 0, 0, 10, 10, score=0.95),
        region(1, 20, 0, 10, 10, score=0.65),
        region(2, 0, 0, 10, 10, score=0.61),
        region(2, 20, 20, 10, 10, score=0.9),  # on the crowd alone
    ]
    calibration = calibration_of(data, results)
    diagram = calibration.diagram()
    assert diagram["lower"] == pytest.approx(np.arange(10) / 10)
    assert diagram["upper"] == pytest.approx(np.arange(1, 11) / 10)
    assert diagram["detections"].tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 1]
    assert diagram["hits"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert diagram["mean_score"][[6, 9]] == pytest.approx([63, 95])
    assert diagram["hit_rate"][[6, 9]] == pytest.approx([50, 100])
    assert np.isnan(diagram["hit_rate"]).sum() == 8
    figures = calibration.values()
    assert figures["ece"] == pytest.approx((2 * 13 + 1 * 5) / 3)
    assert figures["brier"] == pytest.approx(100 * (0.05**2 + 0.35**2 + 0.61**2) / 3)
    assert figures["mean_score"] == pytest.approx((95 + 65 + 61) / 3)
    assert figures["hit_rate"] == pytest.approx(200 / 3)
    assert figures["n"] == 3


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_against_scikit_learn(random_case, seed, scores):
    """Scores on the bins' edges, which "tied" ones all are, too; several classes and crowds."""
    calibration = calibration_of(*random_case(seed, scores))
    score, hit = calibration.score, calibration.hit
    figures, diagram = calibration.values(), calibration.diagram()
    if not len(score):
        assert np.isnan(figures["ece"]) and np.isnan(figures["brier"])
        return
    assert figures["brier"] == pytest.approx(
        100 * brier_score_loss(hit, score, pos_label=True, labels=[False, True])
        if len(set(hit)) > 1
        else 100 * np.mean((score - hit) ** 2)
    )
    if len(set(hit)) > 1:
        rate, mean = calibration_curve(hit, score, n_bins=BINS)
        filled = diagram["detections"] > 0
        assert diagram["hit_rate"][filled] == pytest.approx(100 * rate)
        assert diagram["mean_score"][filled] == pytest.approx(100 * mean)
        weight = diagram["detections"][filled] / len(score)
        assert figures["ece"] == pytest.approx(100 * np.sum(weight * np.abs(rate - mean)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_weights_are_copies(random_case, seed):
    calibration = calibration_of(*random_case(seed, "distinct"))
    weights = np.random.default_rng(seed).multinomial(6, [1 / 6] * 6, size=3)
    weighted = calibration.values(weights)
    for b, row in enumerate(weights):
        times = row[calibration.image]
        copies = Calibration(
            np.repeat(calibration.score, times),
            np.repeat(calibration.hit, times),
            np.repeat(calibration.image, times),
            6,
        )
        for name, value in copies.values().items():
            assert weighted[name][b] == pytest.approx(value, nan_ok=True)


def test_scores_that_are_no_probabilities(dataset, region, caplog):
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    with caplog.at_level(logging.WARNING):
        calibration = calibration_of(data, [region(1, 0, 0, 10, 10, score=87.0)])
    assert "above 1" in caplog.text
    assert np.isnan(calibration.values()["ece"])
    assert calibration.values()["n"] == 0
    assert np.isnan(calibration_of(data, []).values()["brier"])
