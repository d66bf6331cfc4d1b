import math

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from imrcnn_d2.evaluation.statistics import Bootstrap, clopper_pearson, percentile_interval


def test_weights_are_counts_of_seeded_draws_with_replacement():
    weights = np.concatenate(list(Bootstrap(resamples=50, seed=3).weights(7)))
    rng = np.random.default_rng(3)
    draws = [rng.integers(7, size=7) for _ in range(50)]
    assert weights.tolist() == [np.bincount(draw, minlength=7).tolist() for draw in draws]


@pytest.mark.parametrize("units", [1, 2, 9, 1000])
def test_chunks_do_not_change_the_draws(units):
    whole, parts = (
        list(Bootstrap(resamples=23, seed=1).weights(units, chunk=chunk)) for chunk in (23, 5)
    )
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(parts), np.concatenate(whole))
    assert (whole[0].sum(axis=1) == units).all()


def test_another_seed_draws_others():
    one, two = (next(Bootstrap(seed=seed).weights(50)) for seed in (0, 1))
    assert not np.array_equal(one, two)


def test_without_units():
    assert np.concatenate(list(Bootstrap(resamples=3).weights(0))).shape == (3, 0)


def test_at_least_one_resample():
    with pytest.raises(ValueError, match="resamples is 0"):
        Bootstrap(resamples=0)


def test_percentiles():
    samples = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert percentile_interval(samples) == pytest.approx((25, 975))
    with_undefined = np.concatenate([samples, np.full(500, np.nan)])
    assert percentile_interval(with_undefined) == pytest.approx((25, 975))
    assert all(map(math.isnan, percentile_interval(np.full(3, np.nan))))


@pytest.mark.parametrize("whole", [1, 2, 15, 250])
def test_clopper_pearson(whole):
    for part in {0, 1, whole // 2, whole}:
        expected = proportion_confint(part, whole, alpha=0.05, method="beta")
        assert clopper_pearson(part, whole) == pytest.approx(expected)


def test_rule_of_three():
    """With no case in n the upper end is about 3.7 / n (3 / n for a one-sided interval)."""
    low, high = clopper_pearson(0, 1000)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 1000))
