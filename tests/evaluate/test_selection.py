import math

import pytest

from imrcnn_d2.evaluation.detection.results import selection_score

NAN = float("nan")
LESION = {"precision": 80.0, "recall": 60.0, "f1": 70.0}


def test_mean_of_the_four():
    score = selection_score(
        LESION, {"specificity": 50.0}, has_lesions=True, has_lesion_free_images=True
    )
    assert score == pytest.approx((80 + 60 + 70 + 50) / 4)


def test_without_lesion_free_images_specificity_takes_no_part():
    score = selection_score(
        LESION, {"specificity": NAN}, has_lesions=True, has_lesion_free_images=False
    )
    assert score == pytest.approx((80 + 60 + 70) / 3)


def test_without_lesions_only_specificity_takes_part():
    nothing = {"precision": 0.0, "recall": NAN, "f1": 0.0}
    score = selection_score(
        nothing, {"specificity": 90.0}, has_lesions=False, has_lesion_free_images=True
    )
    assert score == 90


def test_a_model_that_detects_nothing_is_no_good():
    # Precision is undefined; leaving it out would raise the mean to 100 / 3.
    silent = {"precision": NAN, "recall": 0.0, "f1": 0.0}
    score = selection_score(
        silent, {"specificity": 100.0}, has_lesions=True, has_lesion_free_images=True
    )
    assert score == 25


def test_without_images():
    nothing = dict.fromkeys(("precision", "recall", "f1", "specificity"), NAN)
    score = selection_score(nothing, nothing, has_lesions=False, has_lesion_free_images=False)
    assert math.isnan(score)
