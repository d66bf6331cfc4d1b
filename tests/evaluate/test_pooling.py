"""Metrics over centres: by hand, against statsmodels, and by simulation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit
from statsmodels.stats.meta_analysis import combine_effects

from imrcnn_d2.evaluation.pooling import (
    _Likelihood,
    pool,
    random_effects,
    random_intercepts,
)
from imrcnn_d2.evaluation.statistics import effective_cases


def centre(part, whole, metric="recall", value=None, error=math.nan, few=False):
    """A group of which only one metric of lesions is known, by units."""
    part, whole = np.array(part, float), np.array(whole, float)
    value = 100 * part.sum() / whole.sum() if value is None else value
    proportions = {"lesion": {metric: (part, whole)}} if whole.any() else {}
    metrics = SimpleNamespace(proportions=lambda: proportions)
    return SimpleNamespace(
        values={"lesion": {metric: value}},
        standard_errors={"lesion": {metric: error}},
        intervals={"lesion": {metric: (value - error, value + error)}},
        is_few=lambda endpoint: few,
        results=SimpleNamespace(metrics=metrics),
    )


def pooled(centres, metric="recall"):
    named = {str(number): group for number, group in enumerate(centres)}
    return pool(named, [f"lesion/{metric}"])[f"lesion/{metric}"]


def test_three_centres_of_one_size_by_hand():
    """With equal variances tau² is that of the estimates, 4, less 1; Q is 8."""
    model = random_effects([0, 2, 4], [1, 1, 1])
    assert model.estimate == pytest.approx(2) and model.tau2 == pytest.approx(3)
    half = 4.302653 * math.sqrt(4 / 3)  # t of 2 degrees of freedom
    assert (model.low, model.high) == pytest.approx((2 - half, 2 + half))
    further = 12.706205 * math.sqrt(3 + 4 / 3)
    assert model.predicted == pytest.approx((2 - further, 2 + further))
    assert model.i2 == pytest.approx(75) and model.p == pytest.approx(math.exp(-4))


@pytest.mark.parametrize("seed", range(5))
def test_random_effects_are_those_of_statsmodels(seed):
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.02, 0.3, 8)
    estimates = rng.normal(1, 0.6, 8) + rng.normal(0, np.sqrt(variances))
    model = random_effects(estimates, variances)
    with pytest.warns(Warning):  # of the intervals of single centres
        reference = combine_effects(estimates, variances, method_re="iterated", use_t=True)
        frame = reference.summary_frame()
    assert model.tau2 == pytest.approx(reference.tau2, rel=1e-4)
    assert model.q == pytest.approx(reference.q)
    assert model.i2 == pytest.approx(100 * reference.i2)
    row = frame.loc["random effect wls"]  # Hartung and Knapp's
    expected = row["eff"], row["ci_low"], row["ci_upp"]
    assert (model.estimate, model.low, model.high) == pytest.approx(expected, rel=1e-4)


def test_centres_that_agree_better_than_chance():
    """The interval is not narrower than that of a common value, by Student's t."""
    model = random_effects([1.0, 1.01, 0.99], [0.04] * 3)
    half = stats.t.ppf(0.975, 2) * math.sqrt(0.04 / 3)
    assert model.tau2 == 0 and model.i2 == 0 and model.high == pytest.approx(1 + half, abs=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_the_likelihood_of_counts_is_the_integral_over_each_centre(share):
    events, cases = np.array([0, 18, 30.5]), np.array([25, 20, 40.0])
    likelihood = _Likelihood(events, cases, share)

    soft = (lambda value: np.logaddexp(0, value)) if share else np.exp

    def reference(mean, tau):
        def density(value, e, n):
            return np.exp(e * value - n * soft(value)) * stats.norm.pdf(value, mean, tau)

        options = {"limit": 500, "epsabs": 0, "points": [mean]}
        ends = mean - 9 * tau, mean + 9 * tau
        areas = [
            integrate.quad(density, *ends, args=pair, **options)[0]
            for pair in zip(events, cases, strict=True)
        ]
        return np.log(areas).sum()

    for place in ((0.3, 0.7), (-0.5, 1.5), (0.0, 0.2)):
        constant = 1.5 * math.log(2 * math.pi)
        assert likelihood(*place) - reference(*place) == pytest.approx(constant, abs=1e-4)


def test_large_centres_of_counts_are_those_of_normal_logits():
    """With many cases and shares away from the limits the two models are one."""
    cases = np.full(8, 4000)
    shares = expit(np.array([0.1, 0.9, 0.4, 1.3, 0.6, -0.2, 0.8, 0.5]))
    counts = random_intercepts(shares * cases, cases)
    normal = random_effects(np.log(shares / (1 - shares)), 1 / (cases * shares * (1 - shares)))
    assert counts.estimate == pytest.approx(normal.estimate, abs=0.01)
    assert counts.tau2 == pytest.approx(normal.tau2, rel=0.02)
    assert counts.low == pytest.approx(normal.low, abs=0.06)
    assert counts.predicted[1] == pytest.approx(normal.predicted[1], abs=0.06)


def test_centres_without_a_failure_are_100_percent():
    summary = pooled([centre([1] * 30, [1] * 30)] * 4)
    assert summary.value == pytest.approx(100, abs=0.1)
    assert 90 < summary.interval[0] < 98 and summary.interval[1] == pytest.approx(100, abs=0.01)
    assert summary.i2 == 0
    # 120 hits have the likelihood p^120; by likelihood ratio, with t of 2 degrees of freedom.
    lowest = 100 * math.exp(-(stats.t.isf(0.025, 2) ** 2) / 240)
    assert summary.predicted[0] == pytest.approx(lowest, abs=0.05)
    alarms = pooled([centre([0] * 30, [1] * 30, "fp_per_image")] * 4, "fp_per_image")
    highest = stats.t.isf(0.025, 2) ** 2 / 240
    assert alarms.predicted[1] == pytest.approx(highest, rel=0.01)


def test_how_many_cases_a_centre_has():
    """One case per unit: as many; six patients of 50 frames without a miss: six."""
    assert effective_cases(np.array([1, 0, 1, 1.0]), np.ones(4)) == pytest.approx(4)
    assert effective_cases(np.full(6, 50.0), np.full(6, 50.0)) == pytest.approx(6)


def test_false_alarms_per_image():
    centres = [centre([0, 1, 0, 2] * n, np.ones(4 * n), "fp_per_image") for n in (10, 15, 20)]
    summary = pooled(centres, "fp_per_image")
    assert summary.value == pytest.approx(0.75, rel=1e-2)
    assert summary.scale == "log" and 0 < summary.interval[0] < 0.75 < summary.interval[1]


def test_f1_is_pooled_as_the_share_it_is_of():
    """s = TP / (TP + FP + FN) = 0.5, F1 = 2s / (1 + s)."""
    summary = pooled([centre([1, 0] * 50, [1] * 100, "f1", value=200 / 3)] * 3, "f1")
    assert summary.value == pytest.approx(200 / 3, abs=0.1)


def test_what_cannot_be_pooled():
    two = [centre([1, 0, 1], [1, 1, 1])] * 2
    undefined = centre([0], [0], value=math.nan)
    summary = pooled([*two, undefined])
    assert summary.centres == ("0", "1") and summary.left_out == ("2",)
    assert math.isnan(summary.value) and math.isnan(summary.predicted[0])
    overlaps = [centre([0], [0], "iou", value=80.0 + n, error=1.0) for n in range(3)]
    assert pooled(overlaps, "iou").value == pytest.approx(81)
    alone = centre([0], [0], "iou", value=95.0)  # of one image: no standard error
    assert pooled([*overlaps, alone], "iou").left_out == ("3",)
    alike = centre([0], [0], "iou", value=90.0, error=0.01, few=True)  # two that agree by chance
    assert pooled([*overlaps, alike], "iou").left_out == ("3",)
    with pytest.raises(ValueError, match="2 centres"):
        random_effects([1, 2], [1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("number", "share"), [(5, 0.95), (10, 0.95), (5, 0.8), (10, 0.8)])
def test_coverage_of_the_pooled_interval(number, share, clustered):
    """Centres of 20 to 200 lesions, of single ones or of 5 per patient, that differ by 0.5 as
    logits; also of the interval for a further centre."""
    rng, studies = np.random.default_rng(number), 100
    middle, covered, further = math.log(share / (1 - share)), 0, 0
    for _ in range(studies):
        centres = []
        for p in expit(rng.normal(middle, 0.5, number)):
            lesions = int(np.exp(rng.uniform(np.log(20), np.log(200))))
            size = 5 if clustered else 1
            units = lesions // size
            chance = rng.beta(4 * p, 4 - 4 * p, units) if clustered else p
            part = rng.binomial(size, chance, units)
            centres.append(centre(part, np.full(units, size)))
        summary, another = pooled(centres), 100 * expit(rng.normal(middle, 0.5))
        covered += summary.interval[0] <= 100 * share <= summary.interval[1]
        further += summary.predicted[0] <= another <= summary.predicted[1]
    assert stats.binomtest(covered, studies, 0.95, "less").pvalue > 0.001
    assert further >= 0.78 * studies  # of few centres, tau is mostly too small
