"""Tests of a difference between two models, on plain arrays."""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from .bootstrap import percentile_interval

__all__ = [
    "Difference",
    "McNemar",
    "bootstrap_difference",
    "corrected_resampled_t_test",
    "holm",
    "mcnemar_exact",
]

NAN = float("nan")


@dataclass(frozen=True)
class Difference:
    """
    Attributes:
        estimate (float): first minus second, in the unit of the figure.
        low, high (float): 95 % interval.
        p (float): two-sided, of the hypothesis that there is no difference.
        undefined_share (float): of the resamples left out, in which a figure is undefined.

    Undefined is NaN.
    """

    estimate: float
    low: float
    high: float
    p: float
    undefined_share: float = 0.0


@dataclass(frozen=True)
class McNemar:
    """
    Attributes:
        only_first, only_second (int): cases that the first model alone has right, and the second.
        p (float): two-sided and exact.
    """

    only_first: int
    only_second: int
    p: float


def bootstrap_difference(estimate, first, second):
    """
    Paired bootstrap: the same resamples of the same units, scored with two models.

    Args:
        estimate (float): the difference on all units.
        first, second (np.ndarray): (B,) a figure of either model, resample by resample. NaN where
            it is undefined.

    Returns:
        Difference: the percentile interval, and p = 2 min(share <= 0, share >= 0) of the resampled
        differences, at most 1 and at least 1 / (B + 1).
    """
    differences = np.asarray(first, float) - np.asarray(second, float)
    defined = differences[np.isfinite(differences)]
    undefined = 1 - len(defined) / len(differences) if len(differences) else NAN
    if not len(defined) or not np.isfinite(estimate):
        return Difference(float(estimate), NAN, NAN, NAN, float(undefined))
    low, high = percentile_interval(defined)
    p = 2 * min(np.mean(defined <= 0), np.mean(defined >= 0))
    p = min(1.0, max(p, 1 / (len(defined) + 1)))
    return Difference(float(estimate), low, high, float(p), float(undefined))


def mcnemar_exact(first_right, second_right):
    """
    McNemar's exact test: among the cases that one model alone has right, is each as often the one?

    Args:
        first_right, second_right (np.ndarray): (U,) bool, the same cases.

    Returns:
        McNemar: p is 1 where no case tells the models apart.
    """
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    table = [
        [np.sum(first & second), np.sum(first & ~second)],
        [np.sum(~first & second), np.sum(~first & ~second)],
    ]
    p = mcnemar(table, exact=True).pvalue
    return McNemar(int(table[0][1]), int(table[1][0]), float(p))


def corrected_resampled_t_test(differences, n_train, n_test):
    """
    Nadeau and Bengio's t-test for folds, whose training sets overlap: the variance of the mean is
    (1 / k + n_test / n_train) s^2 instead of s^2 / k ("Inference for the generalization error",
    Machine Learning 52, 2003, doi 10.1023/A:1024068626366).

    Args:
        differences (np.ndarray): (k,) first minus second, a fold each; k >= 2.
        n_train, n_test (float): images that a fold's models were trained and tested on.

    Returns:
        Difference: mean, its interval and p by Student's t with k - 1 degrees of freedom. Interval
        and p are NaN where a fold is undefined, or where folds differ by the same amount, not 0.

    Raises:
        ValueError: fewer than two folds, or no images.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} fold cannot be tested: at least two are needed.")
    if not (n_train > 0 and n_test > 0):
        raise ValueError(f"n_train = {n_train}, n_test = {n_test}: both must be above 0.")
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    if not differences.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    if np.ptp(differences) == 0:
        return Difference(mean, NAN, NAN, NAN)
    error = sd * np.sqrt(1 / len(differences) + n_test / n_train)
    t = stats.t(df=len(differences) - 1)
    low, high = mean + error * t.ppf([0.025, 0.975])
    return Difference(mean, float(low), float(high), float(2 * t.sf(abs(mean) / error)))


def holm(p_values):
    """
    Args:
        p_values (np.ndarray): (T,) of one family of tests; NaN where a test is undefined, which
            does not count as a test.

    Returns:
        np.ndarray: (T,) adjusted by Holm's step-down method; NaN stays.
    """
    p_values = np.asarray(p_values, float)
    adjusted = np.full(p_values.shape, np.nan)
    defined = np.isfinite(p_values)
    if defined.any():
        adjusted[defined] = multipletests(p_values[defined], method="holm")[1]
    return adjusted
