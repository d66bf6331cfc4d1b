"""Bootstrap intervals of all metrics, and tests of a difference between two models."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from imrcnn_d2.evaluation.detection.metrics import ResampledMetrics, is_count
from imrcnn_d2.utils.progress import tqdm

# Coverage of all intervals.
LEVEL = 0.95
# Numbers held at a time while resampling, unless a chunk is given.
CHUNK = 2_000_000
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
            if not num_units:
                yield np.zeros((rows, 0), dtype=np.int32)
                continue
            sampled = rng.integers(num_units, size=(rows, num_units))
            sampled += np.arange(rows)[:, None] * num_units
            counts = np.bincount(sampled.ravel(), minlength=rows * num_units)
            yield counts.reshape(rows, num_units).astype(np.int32)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentiles between which the central 95 % of the defined samples of a metric lie (Efron
    and Tibshirani 1993, chapter 13); NaN where all samples are."""
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return NAN, NAN
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(defined, (tail, 100 - tail))
    return float(low), float(high)


def clopper_pearson(part: int, whole: int) -> tuple[float, float]:
    """The exact 95 % interval of a binomial proportion (Clopper and Pearson 1934), in [0, 1], of
    ``part`` among ``whole`` independent cases, at least 1."""
    interval = stats.binomtest(int(part), int(whole)).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def resampled_metrics(
    metrics: ResampledMetrics, bootstrap: Bootstrap
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric in every resample: group -> metric -> (B,), NaN where undefined; of COCO's AP50,
    the others only with ``all_coco``. Two models scored on the same units with the same bootstrap
    see the same resamples in the same order, so that values can be subtracted (a paired
    comparison)."""
    rows = max(1, CHUNK // metrics.width)
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
    intervals, undefined_shares = confidence_intervals(results.metrics, bootstrap)
    return replace(results, intervals=intervals, undefined_shares=undefined_shares)


def confidence_intervals(
    metrics: ResampledMetrics, bootstrap: Bootstrap, resampled: dict | None = None
) -> tuple[dict[str, dict[str, tuple[float, float]]], dict[str, float]]:
    """95 % intervals of all metrics but counts: percentiles of the resampled values. Resamples in
    which a metric is undefined are left out.

    Where a proportion is exactly 0 or 100 %, all resamples agree and carry no information; its
    interval is then Clopper and Pearson's for independent cases, F1's by way of
    TP / (TP + FP + FN). Other metrics of which the resamples agree (such as an AUROC of 100 %) have
    no interval: NaN.

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
                _, whole = proportions.get(group, {}).get(name, (None, None))
                if whole is not None and value in (0, 100):
                    whole = max(1, round(float(whole)))
                    interval = clopper_pearson(whole if value else 0, whole)
                    if name.startswith("f1"):
                        interval = (2 * s / (1 + s) for s in interval)
                    interval = tuple(100 * share for share in interval)
                else:
                    low, high = percentile_interval(samples)
                    if not np.isclose(low, high, rtol=1e-9):
                        interval = low, high
            intervals[group][name] = interval
    return intervals, undefined


@dataclass(frozen=True)
class Difference:
    """First minus second, in the unit of the metric. Undefined is NaN."""

    estimate: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, of the hypothesis that there is no difference
    undefined_share: float = 0.0  # of the resamples left out, in which a metric is undefined


@dataclass(frozen=True)
class McNemar:
    """Cases that the first model alone has right, and the second; the exact two-sided p."""

    only_first: int
    only_second: int
    p: float


def bootstrap_difference(estimate: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """Paired bootstrap: the same resamples of the same units, scored with two models.

    ``estimate`` is the difference on all units; ``first`` and ``second`` are the (B,) resampled
    values of a metric of either model, NaN where undefined. p = 2 min(share <= 0, share >= 0) of
    the differences, at most 1 and at least 1 / (B + 1).
    """
    estimate = float(estimate)
    differences = np.asarray(first, float) - np.asarray(second, float)
    defined = differences[np.isfinite(differences)]
    undefined = float(1 - len(defined) / len(differences)) if len(differences) else NAN
    if not len(defined) or not math.isfinite(estimate):
        return Difference(estimate, NAN, NAN, NAN, undefined)
    p = 2 * min(np.mean(defined <= 0), np.mean(defined >= 0))
    p = min(1.0, max(p, 1 / (len(defined) + 1)))
    return Difference(estimate, *percentile_interval(defined), float(p), undefined)


def mcnemar_exact(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's exact test of the same (U,) bool cases: among those that one model alone has right,
    is each as often the one? p is 1 where no case tells the models apart."""
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    discordant = only_first + only_second
    p = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    return McNemar(only_first, only_second, float(p))


def corrected_resampled_t_test(
    differences: Sequence[float], n_train: float, n_test: float
) -> Difference:
    """Nadeau and Bengio's t-test for folds, whose training sets overlap: the variance of the mean
    is (1 / k + n_test / n_train) s^2 instead of s^2 / k ("Inference for the generalization error",
    Machine Learning 52, 2003, doi 10.1023/A:1024068626366).

    Args:
        differences: (k,) first minus second, one per fold; k >= 2.
        n_train, n_test: images that a fold's models were trained and tested on.

    Returns:
        The mean with interval and p by Student's t, NaN where a fold is undefined, or where folds
        differ by the same amount, not 0.
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


def holm(p_values: Sequence[float]) -> np.ndarray:
    """(T,) p-values of one family of tests, adjusted by Holm's step-down method. NaN stays, and
    does not count as a test."""
    p_values = np.asarray(p_values, float)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN comes last
    stepped = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return adjusted
