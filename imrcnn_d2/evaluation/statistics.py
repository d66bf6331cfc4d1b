"""Bootstrap intervals of all metrics, and tests of a difference between two models."""

import logging
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from imrcnn_d2.evaluation.detection.metrics import is_count

__all__ = [
    "LEVEL",
    "Bootstrap",
    "Difference",
    "McNemar",
    "add_intervals",
    "bootstrap_difference",
    "clopper_pearson",
    "confidence_intervals",
    "corrected_resampled_t_test",
    "holm",
    "mcnemar_exact",
    "percentile_interval",
    "resampled_metrics",
]

logger = logging.getLogger(__name__)


# Coverage of all intervals.
LEVEL = 0.95

# Numbers held at a time while resampling, unless a chunk is given.
CHUNK = 2_000_000


@dataclass(frozen=True)
class Bootstrap:
    """
    Resamples of a data set's units: as many units as there are, sampled with replacement.

    Attributes:
        resamples: how many.
        seed: two models scored on the same units with the same seed see the same resamples, in the
            same order.
        all_coco: resample COCO's AP, AP75, APs, APm and APl too, which takes about forty times as
            long as AP50.
    """

    resamples: int = 2000
    seed: int = 0
    all_coco: bool = False

    def __post_init__(self):
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 1.")

    def weights(self, num_units: int, chunk: int | None = None):
        """
        How often each unit is sampled, a chunk of resamples at a time.

        Args:
            num_units: U, patients or images.
            chunk: resamples in a chunk; the samples do not depend on it.

        Yields:
            np.ndarray: (at most chunk, U) int32, rows that sum to U.
        """
        chunk = chunk or max(1, CHUNK // max(num_units, 1))
        rng = np.random.default_rng(self.seed)
        for start in range(0, self.resamples, chunk):
            rows = min(chunk, self.resamples - start)
            if not num_units:
                yield np.zeros((rows, 0), dtype=np.int32)
                continue
            sampled = rng.integers(num_units, size=(rows, num_units))
            sampled += np.arange(rows)[:, None] * num_units
            counts = np.bincount(sampled.ravel(), minlength=rows * num_units)
            yield counts.reshape(rows, num_units).astype(np.int32)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """
    The percentiles between which the central 95 % of the defined samples lie (Efron and Tibshirani
    1993, chapter 13).

    Args:
        samples: (B,) a metric in each resample, NaN where it is undefined.

    Returns:
        NaN without a defined sample.
    """
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(defined, (tail, 100 - tail))
    return float(low), float(high)


def clopper_pearson(part: int, whole: int) -> tuple[float, float]:
    """
    The exact 95 % interval of a binomial proportion (Clopper and Pearson 1934), in [0, 1].

    Args:
        part: cases that have it, in [0, whole].
        whole: independent cases, at least 1.
    """
    from scipy.stats import binomtest  # two seconds, which no start of a training should take

    interval = binomtest(int(part), int(whole)).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def resampled_metrics(metrics, bootstrap: Bootstrap) -> dict[str, dict[str, np.ndarray]]:
    """
    Every metric in every resample. Two models scored on the same units with the same bootstrap see
    the same resamples in the same order, so that values can be subtracted (a paired comparison).

    Args:
        metrics (ResampledMetrics):
        bootstrap: of COCO's metrics AP50 is resampled, the others only with ``all_coco``.

    Returns:
        group -> metric -> (B,), in the units of the metrics and NaN where undefined.
    """
    rows = max(1, CHUNK // metrics.width)
    parts = defaultdict(lambda: defaultdict(list))
    # The products are small: several threads would mostly wait for each other.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=bootstrap.resamples, desc="Resamples", delay=2) as bar,
    ):
        for weights in bootstrap.weights(metrics.num_units, chunk=rows):
            for group, of_group in metrics(weights, all_coco=bootstrap.all_coco).items():
                for name, values in of_group.items():
                    parts[group][name].append(values)
            bar.update(len(weights))
    return {
        group: {name: np.concatenate(values) for name, values in of_group.items()}
        for group, of_group in parts.items()
    }


def add_intervals(results, bootstrap: Bootstrap | None):
    """
    Args:
        results (dataclass): with ``metrics``, ``intervals`` and ``undefined_shares``.
        bootstrap: None leaves the results as they are.

    Returns:
        the results with :func:`confidence_intervals`.
    """
    if bootstrap is None:
        return results
    intervals, undefined_shares = confidence_intervals(results.metrics, bootstrap)
    return replace(results, intervals=intervals, undefined_shares=undefined_shares)


def confidence_intervals(metrics, bootstrap: Bootstrap, resampled: dict | None = None):
    """
    95 % intervals of all metrics but counts: percentiles of the resampled values. Resamples in
    which a metric is undefined are left out.

    Where a proportion is exactly 0 or 100 %, all resamples agree and carry no information; its
    interval is then Clopper and Pearson's for independent cases, F1's by way of
    TP / (TP + FP + FN). Other metrics of which the resamples agree (such as an AUROC of 100 %) have
    no interval: NaN.

    Args:
        metrics (ResampledMetrics):
        bootstrap:
        resampled: :func:`resampled_metrics` of these, where already computed.

    Returns:
        tuple: intervals, dict[str, dict[str, tuple[float, float]]]: group -> metric -> (low, high),
        NaN where undefined; and the shares in (0, 1] of resamples in which a metric that the data
        set defines is undefined, dict[str, float] by "group.metric".
    """
    if resampled is None:
        resampled = resampled_metrics(metrics, bootstrap)
    once = metrics.once(all_coco=bootstrap.all_coco)
    proportions = metrics.proportions()
    intervals, undefined = {}, {}
    for group, of_group in resampled.items():
        intervals[group] = {}
        for name, samples in of_group.items():
            if is_count(name):
                continue
            value = once[group][name]
            share = float(np.isnan(samples).mean())
            if np.isnan(value):
                intervals[group][name] = (float("nan"), float("nan"))
                continue
            if share:
                undefined[f"{group}.{name}"] = share
            exact = proportions.get(group, {}).get(name)
            if exact and value in (0, 100):
                intervals[group][name] = _exact(name, *exact)
            else:
                low, high = percentile_interval(samples)
                agree = np.isclose(low, high, rtol=1e-9)
                intervals[group][name] = (float("nan"),) * 2 if agree else (low, high)
    return intervals, undefined


def _exact(name, part, whole):
    interval = clopper_pearson(round(part), round(whole))
    return tuple(100 * (2 * s / (1 + s) if name.startswith("f1") else s) for s in interval)


NAN = float("nan")


@dataclass(frozen=True)
class Difference:
    """
    Attributes:
        estimate (float): first minus second, in the unit of the metric.
        low, high (float): 95 % interval.
        p (float): two-sided, of the hypothesis that there is no difference.
        undefined_share (float): of the resamples left out, in which a metric is undefined.

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
        first, second (np.ndarray): (B,) a metric of either model, resample by resample. NaN where
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
