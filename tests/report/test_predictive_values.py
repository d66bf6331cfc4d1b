import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imrcnn_d2.report.html.tables import predictive_values


def test_by_counting():
    # Of 100,000 images 500 have a lesion; 450 of those and 9,950 of the others raise an alarm.
    ppv, npv = predictive_values(90, 90, 0.005)
    assert ppv == pytest.approx(100 * 450 / (450 + 9_950))
    assert npv == pytest.approx(100 * 89_550 / (89_550 + 50))


@given(st.tuples(*[st.integers(1, 50)] * 4))
def test_at_its_own_prevalence_a_table_has_its_own_values(counts):
    tp, fp, fn, tn = counts
    sensitivity, specificity = 100 * tp / (tp + fn), 100 * tn / (tn + fp)
    ppv, npv = predictive_values(sensitivity, specificity, (tp + fn) / sum(counts))
    assert ppv == pytest.approx(100 * tp / (tp + fp))
    assert npv == pytest.approx(100 * tn / (tn + fn))


def test_both_grow_with_both():
    grid = np.linspace(5, 95, 10)
    values = np.array([[predictive_values(a, b, 0.05) for b in grid] for a in grid])
    assert (np.diff(values, axis=0) > 0).all()
    assert (np.diff(values, axis=1) > 0).all()


def test_undefined():
    assert all(map(math.isnan, predictive_values(90, math.nan, 0.05)))
    ppv, npv = predictive_values(0, 100, 0.05)  # never an alarm
    assert math.isnan(ppv)
    assert npv == pytest.approx(95)


@pytest.mark.parametrize("prevalence", [0, 1, -0.1, 5, math.nan])
def test_a_prevalence_is_a_share(prevalence):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        predictive_values(90, 90, prevalence)
