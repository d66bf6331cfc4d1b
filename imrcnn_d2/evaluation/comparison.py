"""Two models on the same patients or images: is one better than the other?

A model is given by the results of its runs, which differ by seed only. What happened in each image
is averaged over the runs before metrics are made of it; metrics that depend on the order of scores
(AP, break-even point, AUROC, FROC) are averaged themselves.

Two trainings of one recipe differ too. So a difference between models has two sources of error, the
choice of images and the chance of training, and one between single runs is a difference between
two checkpoints only (:attr:`Difference.of_checkpoints`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy import optimize, stats

from imrcnn_d2.evaluation.detection.counts import divide
from imrcnn_d2.evaluation.detection.metrics import GroupFormulas, ResampledMetrics
from imrcnn_d2.evaluation.output import EvaluationResults
from imrcnn_d2.evaluation.statistics import (
    LEVEL,
    MOST_UNDEFINED,
    NAN,
    Bootstrap,
    bootstrap_se,
    confidence_intervals,
    resampled_metrics,
)

# Numbers of runs or units up to which a plan is searched.
MOST = 1_000_000
# Differences of folds that are this close are the same: metrics have fewer digits.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """First minus second, in the unit of the metric. Undefined is NaN.

    Attributes:
        estimate: the difference.
        low, high: its 95 % interval.
        p: two-sided, of the hypothesis that there is no difference; below 0.05 where the interval
            excludes 0, and nowhere else.
        se, df: standard error, and degrees of freedom of Student's t.
        undefined_share: of the resamples left out, in which a metric is undefined.
        runs: trainings of the first model, and of the second.
        se_images, units: the part of ``se`` that comes from the choice of images, and the number of
            units (patients or images).
        seed_sds: sample standard deviation of the metric over the runs of each model; NaN for one.
        least_p: the smallest p that the resamples can support.
    """

    estimate: float
    low: float
    high: float
    p: float
    se: float = NAN
    df: float = NAN
    undefined_share: float = 0.0
    runs: tuple[int, int] = (1, 1)
    se_images: float = NAN
    units: int = 0
    seed_sds: tuple[float, float] = (NAN, NAN)
    least_p: float = 0.0

    @property
    def of_checkpoints(self) -> bool:
        """Each model is one run: nothing is known of other trainings of the two methods."""
        return max(self.runs) == 1

    @property
    def seed_sd(self) -> float:
        """Standard deviation over trainings, pooled over the models with several runs; NaN without
        one."""
        known = [(sd, n - 1) for sd, n in zip(self.seed_sds, self.runs, strict=True) if n > 1]
        if not known:
            return NAN
        return math.sqrt(sum(sd**2 * df for sd, df in known) / sum(df for _, df in known))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval of another level, such as TOST's of 0.9 for a test at 5 %."""
        half = self.se * stats.t.ppf((1 + level) / 2, self.df)
        return float(self.estimate - half), float(self.estimate + half)


def difference_by_t(
    estimate: float, se: float, df: float, least_p: float = 0.0, **parts
) -> Difference:
    """The Difference with interval and p from Student's t. Without any variation (``se`` of 0)
    nothing is known of the error, and two models that agree are not shown to be equivalent: all is
    NaN, but p is 1 where the difference is 0."""
    estimate, se, df = float(estimate), float(se), float(df)
    if se == 0:
        se, p = NAN, NAN if estimate else 1.0
    else:
        p = float(2 * stats.t.sf(abs(estimate) / se, df))
    half = se * float(stats.t.ppf((1 + LEVEL) / 2, df))
    p = p if math.isnan(p) else min(1.0, max(p, least_p))
    return Difference(
        estimate, estimate - half, estimate + half, p, se, df, least_p=least_p, **parts
    )


def difference_from_parts(
    estimate: float,
    se_images: float,
    units: int,
    seed_sds: tuple[float, float] = (NAN, NAN),
    runs: tuple[int, int] = (1, 1),
    *,
    resamples: int | None = None,
    undefined_share: float = 0.0,
) -> Difference:
    """The test of two models of which each was trained several times: SE^2 = SE^2_images +
    s_1^2 / n_1 + s_2^2 / n_2, and Student's t with the degrees of freedom of Welch (1947,
    doi 10.1093/biomet/34.1-2.28) and Satterthwaite (1946, doi 10.2307/3002019).

    With one run of each model there is no term of trainings, and the difference is of these two
    checkpoints. If only one model has several, the spread of the other's trainings is taken to be
    the same, as where one case is compared with a sample (Crawford and Howell 1998,
    doi 10.1076/clin.12.4.482.7241): s^2 (1 / n_1 + 1 / n_2) with the degrees of freedom of s.

    The runs are scored on the same images, so that s contains the noise of single images which
    averaging the runs leaves in SE_images too: the test errs on the safe side, by little where
    runs differ as a whole.

    Args:
        estimate: the difference of the metrics of the seed-averaged models.
        se_images: standard error of the paired difference over the choice of units, for these
            trainings. It estimates a variance from G units, so it has G - 1 degrees of freedom.
        units: G, the number of patients or images.
        seed_sds: sample standard deviation over the runs of each model; not used for one run.
        runs: n_1, n_2.
        resamples: B, where ``se_images`` is a bootstrap's; p is then at least 2 / (B + 1), which a
            two-sided p of B resamples can reach at best (so p and interval agree from 40 on).

    Returns:
        The Difference; NaN with fewer than two units.
    """
    pairs = zip(seed_sds, runs, strict=True)
    terms = [(se_images**2, units - 1)] + [(sd**2 / n, n - 1) for sd, n in pairs if n > 1]
    if min(runs) == 1 < max(runs):
        sd, n = max(zip(seed_sds, runs, strict=True), key=lambda pair: pair[1])
        terms[1] = (sd**2 * (1 + 1 / n), n - 1)
    if units < 2:
        terms[0] = (NAN, NAN)
    se, df = _welch_satterthwaite(*np.transpose(terms))
    return difference_by_t(
        estimate,
        se,
        df,
        least_p=2 / (resamples + 1) if resamples else 0.0,
        undefined_share=undefined_share,
        runs=tuple(runs),
        se_images=se_images,
        units=units,
        seed_sds=tuple(seed_sds),
    )


def _welch_satterthwaite(variances, dfs):
    """Standard error and degrees of freedom of a sum of independent (..., K) variances that were
    estimated with (K,) degrees of freedom each; NaN degrees of freedom for a sum of 0."""
    variance = variances.sum(axis=-1)
    return np.sqrt(variance), divide(variance**2, (variances**2 / dfs).sum(axis=-1))


def non_inferiority(difference: Difference, margin: float) -> float:
    """p of the hypothesis that the first model is worse than the second by ``margin`` or more, for
    metrics of which more is better. One-sided, Student's t.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"The margin is {margin}: it must be above 0.")
    return _one_sided(difference, difference.estimate + margin)


def equivalence(difference: Difference, margin: float) -> float:
    """p of the hypothesis that the models differ by ``margin`` or more, in either direction: the
    larger of two one-sided tests (TOST; Schuirmann 1987, doi 10.1007/BF01068419). It is below 0.05
    where the 90 % interval lies within ± ``margin``.

    Raises:
        ValueError: a margin that is not above 0.
    """
    first_not_worse = non_inferiority(difference, margin)
    return float(np.maximum(first_not_worse, _one_sided(difference, margin - difference.estimate)))


def _one_sided(difference, distance):
    """p of a difference that lies this far inside the margin, if that is 0."""
    p = stats.t.sf(distance / difference.se, difference.df)
    return float(np.maximum(p, difference.least_p / 2))


@dataclass(frozen=True)
class Plan:
    """Power of a comparison that is not made yet, from the spread seen in another one.

    With G units and n runs of each model SE^2 = SE^2_images G_0 / G + 2 s^2 / n, and if the models
    truly differ by ``effect``, the estimate is normal around it with this SE. The test of
    :func:`difference_from_parts` finds it where |estimate| > t_{1 - a/2, df} SE', with SE' and df
    from variances that are estimated, each by v chi^2 / df: the power is the probability of that,
    averaged over the three chi^2. (The noncentral t distribution does the same for a single
    variance; with the planned df it promises up to 9 points too much for two or three runs.) With
    one run of each model the effect is that between two checkpoints, and s is left out.

    Attributes:
        se_images, units: SE_images of the difference, in the unit of the metric, at G_0 units.
        seed_sd: s, standard deviation of a model's metric over trainings; not used for one run.
    """

    se_images: float
    units: int
    seed_sd: float = NAN

    @classmethod
    def of(cls, difference: Difference) -> "Plan":
        """The plan of another comparison like this one."""
        return cls(difference.se_images, difference.units, difference.seed_sd)

    def power(self, effect: float, runs: int, units: int | None = None) -> float:
        """Probability in [0, 1] that a two-sided test at 0.05 finds a true difference of
        ``effect``, with this many runs of each model and units (the present number if None); NaN
        where a spread that it needs is not known, or 0."""
        units = units or self.units
        variances, dfs = [self.se_images**2 * self.units / units], [units - 1]
        if runs > 1:
            variances, dfs = variances + [self.seed_sd**2 / runs] * 2, dfs + [runs - 1] * 2
        variances, dfs = np.array(variances), np.array(dfs)
        if not variances.sum() > 0:
            return NAN
        nodes, weights = np.polynomial.legendre.leggauss(20)
        levels = (1 + nodes[:, None]) / 2
        estimated = variances * stats.chi2.ppf(levels, dfs) / dfs
        weights = np.prod([*product(weights / 2, repeat=len(dfs))], axis=1)
        se, df = _welch_satterthwaite(np.array([*product(*estimated.T)]), dfs)
        bound = se * stats.t.isf(0.025, df)
        limits = np.array([-bound, bound]) - abs(effect)
        low, high = stats.norm.cdf(limits / np.sqrt(variances.sum()))
        return float(1 - weights @ (high - low))

    def runs_needed(self, effect: float, power: float = 0.8) -> int | None:
        """Runs of each model, at least 2, that give this power; None where no number does, since
        images add an error of their own, or where the power is not known."""
        return _smallest(lambda runs: self.power(effect, runs) >= power, 2)

    def units_needed(self, effect: float, runs: int, power: float = 0.8) -> int | None:
        """Units (patients or images) that give this power; None where no number does, since
        trainings add an error of their own, or where the power is not known."""
        return _smallest(lambda units: self.power(effect, runs, units) >= power, 2)


def _smallest(enough: Callable[[int], bool], low: int) -> int | None:
    """The smallest number from ``low`` to MOST that is enough, as all larger ones are."""
    high = low
    while not enough(high):
        if high >= MOST:
            return None
        low, high = high + 1, min(2 * high, MOST)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


@dataclass(frozen=True)
class McNemar(Difference):
    """The difference of the shares of cases that two models have right, in percent, with the exact
    p and its interval; the cases that the first model alone has right, and the second."""

    only_first: int = 0
    only_second: int = 0


def mcnemar_exact(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's exact test of the same (U,) bool cases: among those that one model alone has right,
    is each as often the one? p is 1 where no case tells the models apart.

    The interval of the difference of the shares is that of Fay and Lumbard (2021, doi
    10.1002/sim.8829), which excludes 0 where p is below 0.05 and nowhere else. NaN without a case.
    """
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(~first & second))
    discordant, cases = only_first + only_second, len(first)
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    if not cases:
        return McNemar(NAN, NAN, NAN, p)
    low = _melded_low(only_first, only_second, cases)
    high = -_melded_low(only_second, only_first, cases)
    estimate = (only_first - only_second) / cases
    return McNemar(
        100 * estimate,
        100 * low,
        100 * high,
        p,
        units=cases,
        only_first=only_first,
        only_second=only_second,
    )


def _melded_low(only_first, only_second, cases):
    """Fay and Lumbard's lower limit of the difference of two shares of paired cases. It is
    theta (2 beta - 1), with theta the share of cases that tell the models apart, and beta that of
    the first model among these. Both are replaced by the beta distributions whose quantiles are
    their Clopper-Pearson limits, theta by that of the lower ones for a difference above 0 and by
    that of the upper ones below; the limit is the 2.5 % quantile of the product."""
    discordant, tail = only_first + only_second, (1 - LEVEL) / 2
    nodes, weights = np.polynomial.legendre.leggauss(100)
    levels, weights = (1 + nodes) / 2, weights / 2

    def upper_share(level):
        if discordant == cases:
            return np.ones_like(level)
        return stats.beta.ppf(level, discordant + 1, cases - discordant)

    if not only_first:  # beta is 0
        return -float(upper_share(1 - tail))
    lower = stats.beta.ppf(levels, discordant, cases - discordant + 1)
    upper = upper_share(levels)

    def below(limit):
        """Probability that the product is at most ``limit``."""
        beta = (1 + limit / (lower if limit > 0 else upper)) / 2
        return float(weights @ stats.beta.cdf(beta, only_first, only_second + 1))

    return optimize.brentq(lambda limit: below(limit) - tail, -1, 1)


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
    folds = len(differences)
    if folds < 2:
        raise ValueError(f"{folds} fold cannot be tested: at least two are needed.")
    if not (n_train > 0 and n_test > 0):
        raise ValueError(f"n_train = {n_train}, n_test = {n_test}: both must be above 0.")
    sd = 0.0 if np.ptp(differences) < ROUNDING else differences.std(ddof=1)
    return difference_by_t(
        differences.mean(), sd * np.sqrt(1 / folds + n_test / n_train), folds - 1
    )


def fold_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    n_train: float,
    n_test: float,
) -> Difference:
    """Two models over the folds of a cross-validation, each trained with one or several seeds.

    The model is metric ~ model + (1 | fold) + (1 | fold:model), seeds as residual. The difference d
    of the two means over seeds is free of the fold's own effect; with n seeds in each cell its
    variance is 2 (s_fm^2 + s_e^2 / n). So the mixed model's test is exactly the t-test of the k
    differences d with k - 1 degrees of freedom, however many seeds there are: seeds make each d
    more precise, but add no fold. Training sets of folds overlap, which makes the d correlated, so
    :func:`corrected_resampled_t_test` takes them. Its correction is right for s_fm and more than
    needed for s_e, which folds do not share: the error stays below its level where seeds make most
    of the spread. (To correct s_fm alone, as estimated from the difference of the two, made the
    error up to 9 % in simulations of five folds.)

    Args:
        first, second: the metric of each run, one sequence of seeds per fold, in the same order of
            folds. With unequal numbers of seeds the test is approximate: folds weigh the same.
        n_train, n_test: images that a fold's models were trained and tested on.
    """
    means = [[np.mean(seeds) for seeds in model] for model in (first, second)]
    return corrected_resampled_t_test(np.subtract(*means), n_train, n_test)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """(T,) p-values of one family of tests, adjusted by Holm's step-down method. NaN stays, and
    does not count as a test."""
    p_values = np.asarray(p_values, float)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN comes last
    stepped = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return adjusted


class AveragedMetrics(ResampledMetrics):
    """The metrics of runs that were scored on the same units, averaged."""

    def __init__(self, runs: list[ResampledMetrics]):
        super().__init__(runs[0].units)
        self.runs = runs

    def __call__(self, weights, *, all_coco=False):
        values = _mean([run(weights, all_coco=all_coco) for run in self.runs])
        for group, metrics in super().__call__(weights).items():
            values[group].update(metrics)
        return values

    @property
    def width(self):
        return max(run.width for run in self.runs)

    def proportions(self):
        shares = _mean([run.proportions() for run in self.runs])
        return {
            group: {name: tuple(share) for name, share in metrics.items()}
            for group, metrics in shares.items()
        }

    @cached_property
    def columns(self):
        runs = [run.columns for run in self.runs]
        return {
            group: GroupFormulas(np.mean([run[group].columns for run in runs], axis=0), *rest)
            for group, (_, *rest) in runs[0].items()
            if all(group in run for run in runs)
        }


def _mean(runs):
    """Mean of {group: {metric: value}} over the runs, of the groups and metrics that all have."""
    return {
        group: {
            name: np.mean([run[group][name] for run in runs], axis=0)
            for name in metrics
            if all(name in run[group] for run in runs)
        }
        for group, metrics in runs[0].items()
        if all(group in run for run in runs)
    }


@dataclass(frozen=True, eq=False)
class ModelMetrics:
    """The metrics of a model by group and name, groups as of ``compared()`` of every run."""

    values: dict[str, dict[str, float]]
    runs: list[dict[str, dict[str, float]]]  # the same for each run
    resampled: dict[str, dict[str, np.ndarray]]  # (B,) each; empty without a bootstrap
    intervals: dict[str, dict[str, tuple[float, float]]]  # empty without a bootstrap
    metrics: AveragedMetrics  # what ``values`` and ``resampled`` were computed with
    taus: list[float | None]  # the operating point of each run, None where it has none

    def sd(self, group: str, metric: str, *, sample: bool = False) -> float:
        """Standard deviation over the runs, the population's or the ``sample``'s; NaN for one."""
        if len(self.runs) < 2:
            return NAN
        values = [run.get(group, {}).get(metric, NAN) for run in self.runs]
        return float(np.std(values, ddof=int(sample)))


def model_figures(
    results: list[EvaluationResults], bootstrap: Bootstrap | None = None
) -> ModelMetrics:
    """The metrics of a model, whose runs differ by seed, on the same test set; intervals with a
    bootstrap."""
    metrics = AveragedMetrics([run.metrics for run in results])
    runs = [run.compared() for run in results]
    values, once = _mean(runs), metrics.once()
    for group in values.keys() & metrics.columns.keys():
        values[group].update(once[group])
    values = {group: {k: float(v) for k, v in names.items()} for group, names in values.items()}
    resampled, intervals = {}, {}
    if bootstrap is not None:
        resampled = resampled_metrics(metrics, bootstrap)
        intervals, _ = confidence_intervals(metrics, bootstrap, resampled)
    taus = [run.chosen_tau for run in results]
    return ModelMetrics(values, runs, resampled, intervals, metrics, taus)


def paired_difference(
    first: ModelMetrics, second: ModelMetrics, group: str, metric: str
) -> Difference:
    """First minus second of a metric, such as "segm", "AP50_voc", of two models with the same
    bootstrap on the same units; see :func:`difference_from_parts`. SE_images is that of the paired
    bootstrap differences. NaN where either model has no such metric, and without an interval where
    :func:`bootstrap_interval` gives none: of two units, or if more than MOST_UNDEFINED of the
    resamples are undefined."""
    models = first, second
    values = [model.values.get(group, {}).get(metric, NAN) for model in models]
    samples = [model.resampled.get(group, {}).get(metric) for model in models]
    differences = np.zeros(0) if any(s is None for s in samples) else np.subtract(*samples)
    defined = differences[np.isfinite(differences)]
    units = first.metrics.num_units
    undefined_share = 1 - len(defined) / len(differences) if len(differences) else NAN
    is_known = units >= 3 and undefined_share <= MOST_UNDEFINED
    return difference_from_parts(
        values[0] - values[1],
        bootstrap_se(defined, units) if is_known else NAN,
        units,
        tuple(model.sd(group, metric, sample=True) for model in models),
        tuple(len(model.runs) for model in models),
        resamples=len(defined),
        undefined_share=undefined_share,
    )


def image_level_test(
    first: list[EvaluationResults], second: list[EvaluationResults], tau_val: bool = False
) -> McNemar | None:
    """McNemar's exact test of which images two models predict rightly: positive where there is a
    lesion and negative where there is none, or their class; with ``tau_val`` at each model's
    operating point instead of the common threshold. None for several runs of a model, whose
    outcomes are not one, and without an operating point where that is requested."""
    if len(first) > 1 or len(second) > 1:
        return None
    right = [results[0].right(tau_val) for results in (first, second)]
    return None if any(images is None for images in right) else mcnemar_exact(*right)
