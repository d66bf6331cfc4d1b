"""Random-effects summary of a metric over centres.

The value of each centre, on a scale without limits, is normal around mu, the centre in the middle,
with the variance tau² between centres. Metrics that are a share of cases, or a number per case, are
counts: binomial, or Poisson, given the centre's value (a generalised linear mixed model; estimates
with a normal error, half a case added to zeros, would pull shares near 100 % away from it: with ten
centres of some 30 cases at 95 %, intervals of a mean of logits contained the truth in 66 % of
simulated studies). Other metrics have a normal error of known variance.

Counts: tau by the likelihood adjusted for the estimation of mu (Cox and Reid 1987,
doi 10.1111/j.2517-6161.1987.tb01422.x), the interval of mu by likelihood ratio against Student's t.
Others: tau² by Paule and Mandel (1982, doi 10.6028/jres.087.022), the interval by Hartung and Knapp
(2001, doi 10.1002/sim.791). A further centre lies in the interval of Higgins, Thompson and
Spiegelhalter (2009, doi 10.1111/j.1467-985X.2008.00552.x); of counts the error of mu is read off
its likelihood, on each side. I² is that of Higgins and Thompson (2002, doi 10.1002/sim.1186), of
counts with Pearson's chi-squared.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from imrcnn_d2.evaluation.detection.metrics import CURVE_METRICS, is_percent
from imrcnn_d2.evaluation.statistics import LEVEL, effective_cases
from imrcnn_d2.evaluation.subgroups import Group

NAN = math.nan
# With fewer centres nothing is known of how they differ, nor of a further one.
LEAST_CENTRES = 3
# Logits, or logarithms, beyond which a share is 0 or 1.
MOST = 12.0
LEAST_TAU, MOST_TAU = 1e-3, 4.0
# Of the integral over a centre's value, in standard deviations.
NODES = np.linspace(-7, 7, 41)


@dataclass(frozen=True)
class RandomEffects:
    """On the scale of the estimates."""

    estimate: float
    low: float
    high: float
    predicted: tuple[float, float]  # 95 % interval of the value in a further centre
    tau2: float  # variance between centres
    q: float  # Cochran's, of k - 1 degrees of freedom if all centres are alike
    p: float  # of q
    i2: float  # share of the variance that is between centres, in percent


def random_effects(estimates: np.ndarray, variances: np.ndarray) -> RandomEffects:
    """The model of this file, of (k,) estimates and their variances, above 0.

    Raises:
        ValueError: there are fewer than LEAST_CENTRES.
    """
    y, v = np.asarray(estimates, float), np.asarray(variances, float)
    k = len(y)
    _check_number(k)
    tau2 = between_variance(y, v)
    weights = 1 / (v + tau2)
    mean = (weights @ y) / weights.sum()
    # Not below the variance that all centres would give if weights were known: by chance, a few
    # centres may agree better than their own sizes allow.
    spread = max(1.0, weights @ (y - mean) ** 2 / (k - 1))
    se = math.sqrt(spread / weights.sum())
    half = stats.t.ppf((1 + LEVEL) / 2, k - 1) * se
    further = stats.t.ppf((1 + LEVEL) / 2, k - 2) * math.sqrt(tau2 + se**2)
    q = _heterogeneity(y, v, 0)
    return RandomEffects(
        estimate=float(mean),
        low=float(mean - half),
        high=float(mean + half),
        predicted=(float(mean - further), float(mean + further)),
        tau2=tau2,
        **dict(zip(("q", "p", "i2"), _of_chi_squared(q, k), strict=True)),
    )


def _check_number(k):
    if k < LEAST_CENTRES:
        raise ValueError(f"{k} centres: at least {LEAST_CENTRES} are needed to pool them.")


def _of_chi_squared(q, k):
    """q, p and I²."""
    return q, float(stats.chi2.sf(q, k - 1)), 100 * max(0.0, 1 - (k - 1) / q) if q else 0.0


def random_intercepts(
    events: np.ndarray, cases: np.ndarray, *, share: bool = True
) -> RandomEffects:
    """The model of this file of (k,) counts, which need not be whole: logits of shares of the
    cases, or logarithms of numbers per case.

    Raises:
        ValueError: there are fewer than LEAST_CENTRES.
    """
    events, cases = np.asarray(events, float), np.asarray(cases, float)
    k = len(events)
    _check_number(k)
    likelihood = _Likelihood(events, cases, share)

    def best(tau):
        return _least(lambda mean: -likelihood(mean, tau), -MOST, MOST)

    def adjusted(tau):
        mean, step = best(tau), 0.05
        middle, *sides = (likelihood(mean + shift, tau) for shift in (0, -step, step))
        information = max((2 * middle - sum(sides)) / step**2, 1e-6)
        return -middle + 0.5 * math.log(information)

    tau = min(_least(adjusted, LEAST_TAU, MOST_TAU), LEAST_TAU, key=adjusted)
    mean = best(tau)
    highest = likelihood(mean, tau)

    def ends_at(quantile):
        """Of the interval of mu by likelihood ratio."""

        def excess(value):
            return 2 * (highest - likelihood(value, tau)) - quantile**2

        limits = -MOST, MOST
        return [optimize.brentq(excess, mean, end) if excess(end) > 0 else end for end in limits]

    ends = ends_at(stats.t.ppf((1 + LEVEL) / 2, k - 1))
    t = stats.t.ppf((1 + LEVEL) / 2, k - 2)
    # Each side on its own: near 100 % the two differ.
    low, high = (math.hypot(t * tau, end - mean) for end in ends_at(t))
    pooled = events.sum() / cases.sum()
    variance = cases * pooled * (1 - pooled if share else 1)
    q = float(((events - cases * pooled) ** 2 / variance).sum()) if variance.all() else 0.0
    return RandomEffects(mean, *ends, (mean - low, mean + high), tau**2, *_of_chi_squared(q, k))


def _least(function, low, high):
    """Where a function is least between two ends."""
    options = {"xatol": 1e-3}
    bounds = {"bounds": (low, high), "method": "bounded", "options": options}
    return float(optimize.minimize_scalar(function, **bounds).x)


class _Likelihood:
    """The log-likelihood of mu and tau, up to a constant, of (k,) events among cases."""

    def __init__(self, events, cases, share):
        self.events, self.cases, self.share = events[:, None], cases[:, None], share
        # Where the likelihood of each centre is, roughly.
        hits = self.events + 0.5
        if share:
            misses = self.cases - self.events + 0.5
            self.place, self.precision = np.log(hits / misses), 1 / (1 / hits + 1 / misses)
        else:
            self.place, self.precision = np.log(hits / self.cases), hits

    def __call__(self, mean: float, tau: float) -> float:
        precision = self.precision + 1 / tau**2
        centre = (self.precision * self.place + mean / tau**2) / precision
        value = centre + NODES / np.sqrt(precision)
        log = self.events * value - (value - mean) ** 2 / (2 * tau**2)
        log -= self.cases * (np.logaddexp(0, value) if self.share else np.exp(value))
        step = np.log((NODES[1] - NODES[0]) / np.sqrt(precision[:, 0]) / tau)
        return float((special.logsumexp(log, axis=1) + step).sum())


def between_variance(estimates: np.ndarray, variances: np.ndarray) -> float:
    """Paule and Mandel's tau²: the one at which the weighted squares sum to k - 1; 0 where they sum
    to less without any."""

    def excess(tau2):
        return _heterogeneity(estimates, variances, tau2) - (len(estimates) - 1)

    if excess(0) <= 0:
        return 0.0
    high = np.ptp(estimates) ** 2
    return float(optimize.brentq(excess, 0, high, xtol=1e-12 * high))


def _heterogeneity(y, v, tau2):
    weights = 1 / (v + tau2)
    mean = (weights @ y) / weights.sum()
    return float(weights @ (y - mean) ** 2)


@dataclass(frozen=True)
class Pooled:
    """A metric over centres, on its own scale."""

    centres: tuple[str, ...]  # those that it is of
    left_out: tuple[str, ...]  # in which it, or its interval, is undefined, or of few cases
    scale: str  # that it is pooled on
    value: float = NAN
    interval: tuple[float, float] = (NAN, NAN)
    predicted: tuple[float, float] = (NAN, NAN)
    i2: float = NAN
    tau: float = NAN  # standard deviation between centres, on that scale
    q: float = NAN
    p: float = NAN


def pool(centres: Mapping[str, Group], endpoints: Iterable[str]) -> dict[str, Pooled]:
    """Pool each "group/metric" over the groups of images of a column such as the centre; NaN where
    fewer than LEAST_CENTRES define it.

    Shares of cases (of F1 = 2s / (1 + s) that share is s) and numbers per case are pooled as counts
    of `effective_cases`; what is read off a precision-recall curve likewise, of as few cases as its
    variance by bootstrap asks for. Other metrics are pooled as they are, with that variance;
    centres without an interval, or with fewer than FEW_CASES cases, are left out.
    """
    proportions = {name: group.results.metrics.proportions() for name, group in centres.items()}
    pooled = {}
    for endpoint in endpoints:
        level, _, metric = endpoint.partition("/")
        shares = {name: levels.get(level, {}).get(metric) for name, levels in proportions.items()}
        counted = any(share is not None for share in shares.values())
        pairs = {}
        for name, group in centres.items():
            value = group.values.get(level, {}).get(metric, NAN)
            error = group.standard_errors.get(level, {}).get(metric, NAN)
            if counted:
                pair = _counts(value, error, shares[name], metric)
            else:  # its variance is its weight, and that of few cases may be 0 by chance
                interval = group.intervals.get(level, {}).get(metric, (NAN, NAN))
                is_known = np.isfinite(interval).all() and not group.is_few(endpoint)
                pair = value, error**2 if is_known else NAN
            if np.isfinite(pair).all() and pair[1] > 0:
                pairs[name] = pair
        left_out = tuple(name for name in centres if name not in pairs)
        pooled[endpoint] = _pooled(pairs, left_out, metric, counted)
    return pooled


def _counts(value, error, units, metric):
    """Effective events and cases of one centre; NaN where undefined."""
    if units is None or math.isnan(value):
        return NAN, NAN
    part, whole = (np.asarray(each, float) for each in units)
    cases = effective_cases(part, whole, share=is_percent(metric))
    mean = part.sum() / whole.sum()
    if metric in CURVE_METRICS and error > 0:
        cases = min(cases, mean * (1 - mean) / (error / 100) ** 2)
    return mean * cases, cases


def _pooled(pairs, left_out, metric, counted):
    share = is_percent(metric)
    scale = ("logit" if share else "log") if counted else "itself"
    if len(pairs) < LEAST_CENTRES:
        return Pooled(tuple(pairs), left_out, scale)
    columns = np.transpose(list(pairs.values()))
    model = random_intercepts(*columns, share=share) if counted else random_effects(*columns)

    def value(y):
        if not counted:
            return min(max(y, 0.0), 100.0 if share else math.inf)
        if not share:
            return math.exp(y)
        part = float(special.expit(y))
        return 100 * (2 * part / (1 + part) if metric == "f1" else part)

    return Pooled(
        tuple(pairs),
        left_out,
        scale,
        value=value(model.estimate),
        interval=(value(model.low), value(model.high)),
        predicted=tuple(map(value, model.predicted)),
        i2=model.i2,
        tau=math.sqrt(model.tau2),
        q=model.q,
        p=model.p,
    )
