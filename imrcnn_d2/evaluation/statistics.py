"""Intervals of all metrics of a model."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats
from threadpoolctl import threadpool_limits

from imrcnn_d2.evaluation.detection.metrics import (
    CURVE_METRICS,
    METRICS,
    ResampledMetrics,
    is_count,
)
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

# Coverage of all intervals.
LEVEL = 0.95
# Weight of the prior in proportion_interval; that of the data is G p (1 - p), of G units.
PRIOR = 1.0
# How many numbers of failures are tried there, about, where there are more.
MOST_COUNTS = 200
# Share of resamples. A single unit, without which a metric is undefined, is missing in 25 to 37 %
# of them and the same in all others: they do not show how the metric varies.
MOST_UNDEFINED = 0.2
# Patients, or images, below which a warning says that intervals are rough.
FEW = 30
# Numbers held at a time while resampling, unless a chunk is given.
CHUNK = 2_000_000
LEAST_ROWS = 8  # resamples at a time: what they share is read once for all of them
NAN = math.nan


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of a data set's units: as many units as there are, sampled with replacement. Two
    models scored on the same units with the same seed see the same resamples, in the same order."""

    resamples: int = 2000
    seed: int = 0
    all_coco: bool = False  # COCO's AP, AP75, APs, APm and APl too: 40 times as long as AP50

    def __post_init__(self):
        for name, least in (("resamples", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")

    def weights(self, num_units: int, chunk: int | None = None) -> Iterator[np.ndarray]:
        """How often each unit is sampled: yield (at most chunk, num_units) int32 rows that sum to
        ``num_units``, the same ones for any ``chunk``."""
        chunk = chunk or max(1, CHUNK // max(num_units, 1))
        rng = np.random.default_rng(self.seed)
        for start in range(0, self.resamples, chunk):
            rows = min(chunk, self.resamples - start)
            weights = np.empty((rows, num_units), dtype=np.int32)
            for row in weights:
                row[:] = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
            yield weights


def clopper_pearson(part: int, whole: int) -> tuple[float, float]:
    """The exact 95 % interval of a binomial proportion (Clopper and Pearson 1934), in [0, 1], of
    ``part`` among ``whole`` independent cases, at least 1."""
    interval = stats.binomtest(int(part), int(whole)).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def proportion_interval(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """The 95 % interval, in [0, 1], of a proportion whose cases lie in units, such as the frames of
    patients: Clopper and Pearson's on the effective number of cases (Korn and Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", Survey Methodology 24).

    The variance of the proportion p over units gives the number of independent cases that would
    have the same variance: N, all cases, where the intra-cluster correlation is 0; G, the number of
    units, where it is 1 and units are of one size. The correlation is undefined without failures
    and badly known with few. So it is shrunk towards 1, where all cases of a unit turn out alike:
    the estimate has the weight p (1 - p), this prior PRIOR / G. Six patients without a failure thus
    are six cases, however many frames they have; where each unit has one case, the interval is
    Clopper and Pearson's.

    More failures may give a smaller estimate of the correlation, which must not make the interval a
    better one. So the lower end is the lowest that any number of the failures would give, each
    spread over the units such that the variance is largest and the units are fewest. The upper end
    is 1 minus the lower end of the failures. So one more failure, or a success that becomes one,
    hardly ever raises an end: 126 of 37,000 such steps did in random data with very unequal units,
    by at most 0.14 percentage points. Where ever more failures lie in one unit alone, which comes
    to outweigh the others, the upper end rises from its lowest value again (by 1.6 points with 30
    units that have 5 successes and a failure each).

    Args:
        part: (U,), of the cases of each unit, those that count; for several runs, the mean number.
        whole: (U,), cases of each unit; 1 or more in all.
    """
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return _lower_end(part, whole - part), 1 - _lower_end(whole - part, part)


def _lower_end(successes, failures):
    """Of (U,) each; see :func:`proportion_interval`."""
    if not successes.any():
        return 0.0
    end = failures.sum()
    k = np.append(np.arange(0, end, max(1, end // MOST_COUNTS)), end)
    squared = -_least_sum(k, failures, -failures)
    mixed = _least_sum(k, failures, successes)
    # Units that have a success, and those of failures alone that are needed for k.
    alone = np.sort(failures[(successes == 0) & (failures > 0)])[::-1]
    through = np.append(0, np.cumsum(alone))
    needed = np.searchsorted(through, k - (end - through[-1]) - 1e-9)
    units = np.count_nonzero(successes) + needed
    cases = successes.sum() + k
    q = k / cases
    binomial = q * (1 - q)
    variance = (1 - q) ** 2 * squared - 2 * binomial * mixed + q**2 * (successes**2).sum()
    variance = np.maximum(variance, 0) / cases**2
    effective = (binomial + PRIOR / units) / (variance + PRIOR / units**2)
    effective = np.minimum(np.maximum(cases, 1), effective)
    tail = (1 - LEVEL) / 2
    return float(special.betaincinv(effective * (1 - q), effective * q + 1, tail).min())


def _least_sum(number, amounts, values):
    """The least sum of the values of ``number`` pieces, of which there are (U,) ``amounts``, each
    piece of a unit with the unit's value."""
    order = np.argsort(values, kind="stable")
    through = np.cumsum(np.stack([amounts, amounts * values])[:, order], axis=1)
    return np.interp(number, *np.pad(through, ((0, 0), (1, 0))))


def effective_cases(part: np.ndarray, whole: np.ndarray, *, share: bool = True) -> float:
    """The number of independent cases that would give a proportion, or a number per case, the
    variance that it has over units, shrunk as in `proportion_interval`.

    Args:
        part, whole: (U,), of each unit those that count, and its cases; 1 or more in all.
        share: ``part`` are some of the cases; else any number.
    """
    units, cases = np.count_nonzero(whole), whole.sum()
    mean = part.sum() / cases
    variance = ((part - mean * whole) ** 2).sum() / cases**2
    of_one = mean * (1 - mean) if share else mean
    return float(min(cases, (of_one + PRIOR / units) / (variance + PRIOR / units**2)))


def rate_interval(
    number: np.ndarray, cases: np.ndarray, *, of_time: bool = False
) -> tuple[float, float]:
    """The 95 % interval of a number per case, such as of false alarms per image, whose cases lie in
    units: Garwood's for a Poisson distribution (1936, doi 10.1093/biomet/28.3-4.437) on the
    effective number of cases, from the variance over units shrunk as in :func:`proportion_interval`
    towards cases of a unit that are all alike. Six patients without a false alarm thus are six
    images.

    Args:
        number, cases: (U,) of each unit; 1 case or more in all.
        of_time: the cases are a duration. One case is then the mean duration of a unit, so that
            minutes and seconds give the same interval.
    """
    number, cases = np.asarray(number, float), np.asarray(cases, float)
    case = cases.sum() / np.count_nonzero(cases) if of_time else 1.0
    effective = case * effective_cases(number, cases / case, share=False)
    events, tail = number.sum() / cases.sum() * effective, (1 - LEVEL) / 2
    low = special.gammaincinv(events, tail) if events else 0.0
    return float(low / effective), float(special.gammaincinv(events + 1, 1 - tail) / effective)


def bootstrap_se(samples: np.ndarray, units: int) -> float:
    """Standard error of a metric or a difference, of its (B,) defined resampled values. A resample
    of G units has (G - 1) / G of the variance of a sample from the population (of a mean exactly),
    hence the factor G / (G - 1). NaN with fewer than two resamples or units."""
    if len(samples) < 2 or units < 2:
        return NAN
    return float(np.sqrt(np.var(samples, ddof=1) * units / (units - 1)))


def bootstrap_interval(
    value: float, samples: np.ndarray, units: int, limits: tuple[float, float]
) -> tuple[float, float]:
    """The 95 % interval of a metric by Student's t with G - 1 degrees of freedom, of the standard
    error of its (B,) samples over ``units`` G, NaN where undefined; there is no interval where more
    than MOST_UNDEFINED are, or of two units, whose variance has one degree of freedom. It is made
    on the scale of
    log((x - a) / (b - x)) with the ``limits`` [a, b] of the metric, log(x - a) without an upper
    one, to which the error is carried over by the derivative, so that it lies within the limits. A
    value that is a limit has an interval on its own scale, cut there. NaN without variation.

    The error takes the factor of :func:`bootstrap_se` twice: metrics are ratios of sums over units
    of unequal size, whose resamples vary less than those of a mean. Once was too little for IoU:
    with 20 patients 92.1 % of the intervals contained the truth.
    """
    defined = ~np.isnan(samples)
    samples = samples[defined]
    if units < 3 or defined.mean() < 1 - MOST_UNDEFINED:
        return NAN, NAN
    if np.allclose(samples, samples[0], rtol=1e-9, atol=0):
        return NAN, NAN
    lowest, highest = limits
    error = bootstrap_se(samples, units) * math.sqrt(units / (units - 1))
    half = error * stats.t.ppf((1 + LEVEL) / 2, units - 1)
    above, below = value - lowest, highest - value
    if min(above, below) <= 0:
        return max(value - half, lowest), min(value + half, highest)
    shift = half * (1 / above + 1 / below)
    if np.isinf(below):
        return float(lowest + above * np.exp(-shift)), float(lowest + above * np.exp(shift))
    centre, width = np.log(above / below), highest - lowest
    low, high = (lowest + width * special.expit(centre + s) for s in (-shift, shift))
    return float(low), float(high)


def resampled_metrics(
    metrics: ResampledMetrics, bootstrap: Bootstrap
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric in every resample: group -> metric -> (B,), NaN where undefined; of COCO's AP50,
    the others only with ``all_coco``. Two models scored on the same units with the same bootstrap
    see the same resamples in the same order, so that values can be subtracted (a paired
    comparison)."""
    rows = max(LEAST_ROWS, CHUNK // metrics.width)
    parts = defaultdict(lambda: defaultdict(list))
    # The products are small: several threads would mostly wait for each other.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=bootstrap.resamples, desc="Resamples", delay=2) as bar,
    ):
        for weights in bootstrap.weights(metrics.num_units, chunk=rows):
            for group, values in metrics(weights, all_coco=bootstrap.all_coco).items():
                for name, samples in values.items():
                    parts[group][name].append(samples)
            bar.update(len(weights))
    return {
        group: {name: np.concatenate(samples) for name, samples in values.items()}
        for group, values in parts.items()
    }


def add_intervals(results, bootstrap: Bootstrap | None):
    """The results, a dataclass, with :func:`confidence_intervals` of their ``metrics``; as they are
    without a bootstrap."""
    if bootstrap is None:
        return results
    if results.metrics.num_units < FEW:
        logger.warning(
            f"There are only {results.metrics.units}: intervals are approximate below {FEW}."
        )
    intervals, undefined_shares = confidence_intervals(results.metrics, bootstrap)
    return replace(results, intervals=intervals, undefined_shares=undefined_shares)


def confidence_intervals(
    metrics: ResampledMetrics, bootstrap: Bootstrap, resampled: dict | None = None
) -> tuple[dict[str, dict[str, tuple[float, float]]], dict[str, float]]:
    """95 % intervals of all metrics but counts: of proportions :func:`proportion_interval`, of
    others :func:`bootstrap_interval` of the resamples in which they are defined. F1 has the
    interval of TP / (TP + FP + FN). Of what is read off a curve, the sensitivities of FROC and
    CURVE_METRICS, which depends on the scores in all images, the wider end of both holds on either
    side: near 100 %, where few images differ, resamples alone say too little. So it is with false
    alarms per image and :func:`rate_interval`.

    Args:
        resampled: :func:`resampled_metrics` of these, where already computed.

    Returns:
        The intervals, group -> metric -> (low, high), NaN where undefined; and, by "group.metric",
        the shares in (0, 1] of resamples in which a metric that the data set defines is undefined.
    """
    if resampled is None:
        resampled = resampled_metrics(metrics, bootstrap)
    once = metrics.once(all_coco=bootstrap.all_coco)
    proportions = metrics.proportions()
    intervals, undefined = {}, {}
    for group, values in resampled.items():
        intervals[group] = {}
        for name, samples in values.items():
            if is_count(name):
                continue
            value, interval = once[group][name], (NAN, NAN)
            if not math.isnan(value):
                if share := float(np.isnan(samples).mean()):
                    undefined[f"{group}.{name}"] = share
                cases, limits = proportions.get(group, {}).get(name), metrics.limits(group, name)
                is_rate = math.isinf(limits[1])
                if cases is None or is_rate or group == "froc" or name in CURVE_METRICS:
                    interval = bootstrap_interval(value, samples, metrics.num_units, limits)
                if cases is not None:
                    if is_rate:
                        of_time = METRICS[name].unit == "per minute"
                        exact = rate_interval(*cases, of_time=of_time)
                    else:
                        exact = proportion_interval(*cases)
                    if name.startswith("f1"):
                        exact = [2 * s / (1 + s) for s in exact]
                    low, high = exact if is_rate else (100 * share for share in exact)
                    interval = float(np.fmin(low, interval[0])), float(np.fmax(high, interval[1]))
            intervals[group][name] = interval
    return intervals, undefined
