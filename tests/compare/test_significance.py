"""Tests of significance by hand, by SciPy, and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from imrcnn_d2.evaluation.statistics import (
    bootstrap_difference,
    corrected_resampled_t_test,
    holm,
    mcnemar_exact,
)


def test_the_bootstrap_by_hand():
    first = np.array([3.0, 1, 2, 5, np.nan, 4, 4, 4, 4, 4])
    second = np.array([1.0, 2, 2, 1, 1, np.nan, 1, 1, 1, 1])
    result = bootstrap_difference(2.5, first, second)
    # Differences 2 -1 0 4 3 3 3 3, two undefined; two of eight are <= 0, seven >= 0.
    assert (result.estimate, result.p) == (2.5, pytest.approx(2 * 2 / 8))
    assert result.undefined_share == pytest.approx(0.2)
    # Linear between order statistics: positions 0.025 * 7 and 0.975 * 7 of -1 0 2 3 3 3 3 4.
    assert (result.low, result.high) == pytest.approx((-1 + 0.175, 3 + 0.825))
    assert bootstrap_difference(1, np.ones(99), np.zeros(99)).p == pytest.approx(1 / 100)
    assert bootstrap_difference(-1, np.zeros(99), np.ones(99)).p == pytest.approx(1 / 100)
    same = bootstrap_difference(0, np.ones(99), np.ones(99))
    assert (same.p, same.low, same.high) == (1, 0, 0)
    for estimate, values in ((1.0, np.full(5, np.nan)), (np.nan, np.ones(5))):
        result = bootstrap_difference(estimate, values, np.ones(5))
        assert np.isnan([result.low, result.high, result.p]).all()
    assert bootstrap_difference(1.0, np.full(5, np.nan), np.ones(5)).undefined_share == 1


def test_size_and_power_of_the_paired_bootstrap():
    """Recall of two detectors on lesions they find with the same probability, outcomes correlated
    by the image: at the level of 5 % about 5 % of data sets are significant; many more where one is
    truly better.
    """
    rng = np.random.default_rng(3)
    sets, images, resamples = 600, 120, 400
    weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples)

    def rejected(better):
        count = 0
        for _ in range(sets):
            lesions = rng.integers(1, 4, images)
            easy = rng.beta(2, 1, images)  # shared by both models, so that they are correlated
            one = rng.binomial(lesions, np.clip(easy + better, 0, 1))
            two = rng.binomial(lesions, easy)
            recalls = [weights @ hits / (weights @ lesions) for hits in (one, two)]
            count += bootstrap_difference((one - two).sum(), *recalls).p < 0.05
        return count / sets

    # Three standard errors of a share of 5 % of 600 are 2.7 %.
    assert 0.023 < rejected(0.0) < 0.077
    assert rejected(0.12) > 0.6


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_a_sign_test_of_the_discordant(cases):
    result = mcnemar_exact(*np.array(cases).T)
    b, c = sum(a and not z for a, z in cases), sum(z and not a for a, z in cases)
    assert (result.only_first, result.only_second) == (b, c)
    assert result.p == pytest.approx(binomtest(b, b + c, 0.5).pvalue if b + c else 1.0)


def test_nadeau_bengio_by_hand():
    """Mean 2, s^2 = 10 / 4 = 2.5; t = 2 / sqrt((1/5 + 1/4) 2.5) = 2 / 1.06066 = 1.88562."""
    result = corrected_resampled_t_test([0, 1, 2, 3, 4], n_train=640, n_test=160)
    # Quantile 2.776445 of t with four degrees of freedom, from a table.
    half = 2.776445 * 1.0606602
    assert result.estimate == 2
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    # For four degrees of freedom P(T > t) is (1 - x (3 - x^2) / 2) / 2 with x = t / sqrt(4 + t^2).
    x = 1.8856181 / np.sqrt(4 + 1.8856181**2)
    assert result.p == pytest.approx(1 - x * (3 - x**2) / 2, rel=1e-6)
    same = corrected_resampled_t_test([0, 0, 0], 2, 1)
    assert (same.estimate, same.low, same.high, same.p) == (0, 0, 0, 1)
    for differences in ([1.1, 1.1, 1.1], [1, np.nan, 2]):
        assert np.isnan(corrected_resampled_t_test(differences, 2, 1).p)
    for differences, n_train in (([1.0], 2), ([1.0, 2.0], 0)):
        with pytest.raises(ValueError, match="1 fold" if n_train else "n_train = 0"):
            corrected_resampled_t_test(differences, n_train, 1)


def test_holm_by_hand():
    # Sorted 0.01 0.02 0.03 0.04, times 4 3 2 1 and never falling: 0.04 0.06 0.06 0.06.
    adjusted = holm([0.04, np.nan, 0.01, 0.03, 0.02])
    assert adjusted == pytest.approx([0.06, np.nan, 0.04, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.9]).tolist() == [1, 1]
    assert np.isnan(holm([np.nan])).all() and len(holm([])) == 0
