"""Two models on the same patients or images: is one better than the other?

A model is given by the results of its runs, which differ by seed only. What happened in each image
is averaged over the runs before metrics are made of it; metrics that depend on the order of scores
(AP, break-even point, AUROC, FROC) are averaged themselves.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imrcnn_d2.evaluation.detection.metrics import GroupFormulas, ResampledMetrics
from imrcnn_d2.evaluation.statistics import (
    Bootstrap,
    Difference,
    McNemar,
    bootstrap_difference,
    confidence_intervals,
    mcnemar_exact,
    resampled_metrics,
)

__all__ = [
    "AveragedMetrics",
    "ModelMetrics",
    "check_same_units",
    "image_level_test",
    "model_figures",
    "paired_difference",
]


class AveragedMetrics(ResampledMetrics):
    """The metrics of runs that were scored on the same units, averaged."""

    def __init__(self, runs: list[ResampledMetrics]):
        super().__init__(runs[0].unit, runs[0].unit_of_image, runs[0].num_units)
        self.runs = runs

    def __call__(self, weights, *, all_coco=False):
        values = _mean([run(weights, all_coco=all_coco) for run in self.runs])
        for group, of_group in super().__call__(weights).items():
            values[group].update(of_group)
        return values

    def named(self, sums):
        return self.runs[0].named(sums)

    @property
    def width(self):
        return max(run.width for run in self.runs)

    def proportions(self):
        shares = _mean([run.proportions() for run in self.runs])
        return {
            group: {name: tuple(share) for name, share in of_group.items()}
            for group, of_group in shares.items()
        }

    @cached_property
    def columns(self):
        each = [run.columns for run in self.runs]
        return {
            group: GroupFormulas(np.mean([of_run[group][0] for of_run in each], axis=0), *rest)
            for group, (_, *rest) in each[0].items()
            if all(group in of_run for of_run in each)
        }


def _mean(runs):
    """Mean of {group: {metric: value}} over the runs, of the groups and metrics that all have."""
    return {
        group: {
            name: np.mean([of_run[group][name] for of_run in runs], axis=0)
            for name in of_group
            if all(name in of_run[group] for of_run in runs)
        }
        for group, of_group in runs[0].items()
        if all(group in of_run for of_run in runs)
    }


@dataclass(frozen=True, eq=False)
class ModelMetrics:
    """
    Attributes:
        values: group -> metric; groups as in ``LesionResults.groups()``, "froc", and
            "tau_val.lesion" and the like where every run has an operating point.
        runs: the same for each run.
        resampled: (B,) each, as :func:`resampled_metrics`.
        intervals: as :func:`confidence_intervals`.
        metrics: what ``values`` and ``resampled`` were computed with.
        taus: the operating point of each run, None where it has none.

    ``resampled`` and ``intervals`` are empty without a bootstrap.
    """

    values: dict[str, dict[str, float]]
    runs: list[dict[str, dict[str, float]]]
    resampled: dict[str, dict[str, np.ndarray]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    metrics: AveragedMetrics
    taus: list[float | None]

    def sd(self, group: str, metric: str, *, sample: bool = False) -> float:
        """Standard deviation over the runs, the population's or the ``sample``'s; NaN for one."""
        if len(self.runs) < 2:
            return float("nan")
        return float(np.std([run[group][metric] for run in self.runs], ddof=int(sample)))


def model_figures(results: list, bootstrap: Bootstrap | None = None) -> ModelMetrics:
    """
    Args:
        results (list of LesionResults or ClassificationResults): of runs that differ by seed, on
            the same test set.
        bootstrap: how to resample; None for no intervals.
    """
    metrics = AveragedMetrics([of_run.metrics for of_run in results])
    runs = [of_run.compared() for of_run in results]
    values = _mean(runs)
    once = metrics.once()
    for group in values.keys() & metrics.columns.keys():
        values[group].update(once[group])
    values = {group: {k: float(v) for k, v in one.items()} for group, one in values.items()}
    resampled, intervals = {}, {}
    if bootstrap is not None:
        resampled = resampled_metrics(metrics, bootstrap)
        intervals, _ = confidence_intervals(metrics, bootstrap, resampled)
    taus = [of_run.chosen_tau for of_run in results]
    return ModelMetrics(values, runs, resampled, intervals, metrics, taus)


def paired_difference(
    first: ModelMetrics, second: ModelMetrics, group: str, metric: str
) -> Difference:
    """
    Paired bootstrap of a metric, such as "segm", "AP50_voc", of two models with the same bootstrap
    on the same units.

    Returns:
        first minus second. NaN where either model has no such metric.
    """
    nothing = np.zeros(0)
    values = [model.values.get(group, {}).get(metric, np.nan) for model in (first, second)]
    samples = [model.resampled.get(group, {}).get(metric, nothing) for model in (first, second)]
    if not all(map(len, samples)):
        samples = [nothing, nothing]
    return bootstrap_difference(values[0] - values[1], *samples)


def image_level_test(first: list, second: list, tau_val: bool = False) -> McNemar | None:
    """
    McNemar's exact test of which images are predicted rightly: positive where there is a lesion and
    negative where there is none, or their class.

    Args:
        first, second (lists of results of detection or classification): of two models on the same
            images.
        tau_val: at each model's operating point instead of the common threshold.

    Returns:
        None for several runs of a model, whose outcomes are not one, and for results without an
        operating point where that is requested.
    """
    if len(first) > 1 or len(second) > 1:
        return None
    right = [results[0].right(tau_val) for results in (first, second)]
    return None if any(images is None for images in right) else mcnemar_exact(*right)


def check_same_units(first, second, names=("the first", "the second")):
    """
    Raises:
        ValueError: two LesionResults are not of the same images, lesions and patients.
    """
    one, two = first.ground_truth, second.ground_truth
    both = f"{names[0]} and {names[1]}"
    for field, kind in (("id", "images"), ("file_name", "images"), ("patient_id", "patients")):
        first_values, second_values = (
            [image.get(field) for image in gt.images] for gt in (one, two)
        )
        if first_values != second_values:
            place = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(first_values, second_values, strict=False))
                    if a != b
                ),
                None,
            )
            example = (
                ""
                if place is None
                else f", such as {first_values[place]!r} and {second_values[place]!r}"
            )
            raise ValueError(
                f"The test sets of {both} have different {kind} ({len(first_values)} and "
                f"{len(second_values)} images{example}): only models on the same test set can be "
                "compared."
            )
    same = [c["name"] for c in one.categories] == [c["name"] for c in two.categories]
    for field in ("image", "category", "boxes"):
        same = same and np.array_equal(getattr(one.regions, field), getattr(two.regions, field))
    for field in ("crowd", "area"):
        same = same and np.array_equal(getattr(one, field), getattr(two, field))
    if not same:
        raise ValueError(
            f"The test sets of {both} have the same images but different lesions or classes: only "
            "models scored against the same ground truth can be compared."
        )
