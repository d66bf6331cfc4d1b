import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation.detection.results import (
    OperatingPoint,
    choose_operating_point,
    evaluate_lesions,
)


@pytest.fixture
def validation(dataset, region):
    """
    Four lesions of two classes in three images of four. From the highest score down: hit, false
    alarm, on the crowd alone, hit and false alarm at 0.6, hit.
    """
    data = dataset(
        4,
        [
            region(1, 0, 0, 10, 10),
            region(1, 20, 0, 10, 10, category_id=2),
            region(2, 0, 0, 10, 10),
            region(3, 0, 0, 10, 10),
            region(3, 20, 20, 20, 20, iscrowd=1),
        ],
        classes=("a", "b"),
    )
    results = [
        region(1, 0, 0, 10, 10, score=0.9),
        region(4, 0, 0, 10, 10, score=0.8),
        region(3, 20, 20, 10, 10, score=0.7),
        region(1, 20, 0, 10, 10, category_id=2, score=0.6),
        region(2, 20, 0, 10, 10, score=0.6),
        region(3, 0, 0, 10, 10, score=0.3),
    ]
    return data, results


def test_largest_f1(validation):
    # F1 at 0.9: 2/(1+4), at 0.8: 2/(2+4), at 0.6: 4/(4+4), at 0.3: 6/(5+4).
    results = evaluate_lesions(*validation)
    assert choose_operating_point(results, dataset="val") == OperatingPoint(0.3, "f1", "val")
    assert evaluate_lesions(*validation, tau=0.3).lesion["f1"] == pytest.approx(600 / 9)


def test_of_equal_f1_the_highest_threshold(dataset, region):
    """After one of three: 2/(1+2); after all: 4/(4+2)."""
    data = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    scored = ((1, 0, 0.9), (1, 20, 0.6), (2, 20, 0.5), (2, 0, 0.4))
    results = [region(image, x, 0, 10, 10, score=score) for image, x, score in scored]
    assert choose_operating_point(evaluate_lesions(data, results)).tau == 0.9


def test_wished_recall(validation, caplog):
    results = evaluate_lesions(*validation)
    for rule, tau in (("recall>=25", 0.9), ("recall>=25.5", 0.6), ("recall>=75", 0.3)):
        assert choose_operating_point(results, rule) == OperatingPoint(tau, rule, None)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert choose_operating_point(results, "recall>=95", "val").tau == 0.3
    assert "of val reach a recall of 75.0 % at most" in caplog.text


def test_what_cannot_be_chosen(validation, dataset):
    data, results = validation
    for rule in ("F1", "recall", "recall>=0", "recall>=101", "recall>=-5"):
        with pytest.raises(ValueError, match="it must be 'f1' or 'recall>=95'"):
            choose_operating_point(evaluate_lesions(data, results), rule)
    with pytest.raises(ValueError, match="Without a detection of val no threshold"):
        choose_operating_point(evaluate_lesions(data, []), dataset="val")
    with pytest.raises(ValueError, match="Without a lesion no threshold"):
        choose_operating_point(evaluate_lesions(dataset(4, classes=("a", "b")), results))


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_against_scoring_at_every_threshold(random_case, seed, scores):
    data, found = random_case(seed, scores, num_images=3)
    results = evaluate_lesions(data, found)
    if not results.matching.evaluated.any() or not results.ground_truth.lesions.any():
        return
    candidates = set(results.detections.score[results.matching.evaluated].tolist())
    at = {t: evaluate_lesions(data, found, tau=t).lesion for t in candidates}
    best = choose_operating_point(results).tau
    assert at[best]["f1"] == max(figures["f1"] for figures in at.values())
    assert all(at[t]["f1"] < at[best]["f1"] for t in at if t > best)
    wished = choose_operating_point(results, "recall>=50").tau
    if any(figures["recall"] >= 50 for figures in at.values()):
        assert at[wished]["recall"] >= 50
        assert all(at[t]["recall"] < 50 for t in at if t > wished)
    assert np.isfinite(wished)
