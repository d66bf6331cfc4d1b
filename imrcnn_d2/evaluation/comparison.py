"""Two models on the same patients or images: is one better than the other?

A model is given by the results of its runs, which differ by seed only. What happened in each image
is averaged over the runs before metrics are made of it; metrics that depend on the order of scores
(AP, break-even point, AUROC, FROC) are averaged themselves.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imrcnn_d2.evaluation.detection.metrics import GroupFormulas, ResampledMetrics
from imrcnn_d2.evaluation.output import EvaluationResults
from imrcnn_d2.evaluation.statistics import (
    Bootstrap,
    Difference,
    McNemar,
    bootstrap_difference,
    confidence_intervals,
    mcnemar_exact,
    resampled_metrics,
)


class AveragedMetrics(ResampledMetrics):
    """The metrics of runs that were scored on the same units, averaged."""

    def __init__(self, runs: list[ResampledMetrics]):
        super().__init__(runs[0].unit, runs[0].unit_of_image, runs[0].num_units)
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
            return float("nan")
        return float(np.std([run[group][metric] for run in self.runs], ddof=int(sample)))


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
    """First minus second of a metric, such as "segm", "AP50_voc": the paired bootstrap of two
    models with the same bootstrap on the same units. NaN where either has no such metric."""
    nothing = np.zeros(0)
    values = [model.values.get(group, {}).get(metric, np.nan) for model in (first, second)]
    samples = [model.resampled.get(group, {}).get(metric, nothing) for model in (first, second)]
    if not all(map(len, samples)):
        samples = [nothing, nothing]
    return bootstrap_difference(values[0] - values[1], *samples)


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
