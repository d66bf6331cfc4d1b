"""Two models on the same patients or images: is one better than the other?

A model is given by the results of its runs, which differ by seed only. What happened in each image
is averaged over the runs before figures are made of it; figures that depend on the order of scores
(AP, break-even point, AUROC, FROC) are averaged themselves.
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np

from imrcnn_d2.evaluation.detection.metrics import Measures
from imrcnn_d2.evaluation.statistics import (
    bootstrap_difference,
    confidence_intervals,
    mcnemar_exact,
    resampled_metrics,
)

__all__ = [
    "AveragedMeasures",
    "ModelFigures",
    "check_same_units",
    "image_level_test",
    "model_figures",
    "paired_difference",
]


class AveragedMeasures:
    """As :class:`Measures`, averaged over runs that were scored on the same units."""

    def __init__(self, measures):
        """
        Args:
            measures (list[Measures]): one a run.
        """
        self.measures = measures
        self.unit, self.num_units = measures[0].unit, measures[0].num_units
        self.unit_of_image = measures[0].unit_of_image
        self.width = max(one.width for one in measures)

    def __call__(self, weights, *, all_coco=False):
        figures = _mean([one(weights, all_coco=all_coco) for one in self.measures])
        named = self.measures[0].named
        for group, (columns, formulas, _) in self.columns.items():
            figures[group].update(formulas(named(weights @ columns)))
        return figures

    once = Measures.once

    def proportions(self):
        shares = _mean([one.proportions() for one in self.measures])
        return {
            group: {name: tuple(share) for name, share in of_group.items()}
            for group, of_group in shares.items()
        }

    @cached_property
    def columns(self):
        """As of Measures: columns averaged over the runs, formulas and proportions, by group."""
        each = [one.columns for one in self.measures]
        return {
            group: (np.mean([of_run[group][0] for of_run in each], axis=0), *rest)
            for group, (_, *rest) in each[0].items()
            if all(group in of_run for of_run in each)
        }


def _mean(runs):
    """Mean of {group: {figure: value}} over the runs, of the groups and figures that all have."""
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
class ModelFigures:
    """
    Attributes:
        figures (dict[str, dict[str, float]]): group -> figure; groups as in
            :meth:`LesionResults.groups`, "froc", and "tau_val.lesion" and the like where every run
            has an operating point.
        runs (list[dict[str, dict[str, float]]]): the same for each run.
        resampled (dict[str, dict[str, np.ndarray]]): (B,) each, as :func:`resampled_metrics`.
        intervals (dict[str, dict[str, tuple[float, float]]]): as :func:`confidence_intervals`.
        measures (AveragedMeasures): what ``figures`` and ``resampled`` were computed with.
        taus (list[float or None]): the operating point of each run, None where it has none.

    ``resampled`` and ``intervals`` are empty without a bootstrap.
    """

    figures: dict
    runs: list
    resampled: dict
    intervals: dict
    measures: AveragedMeasures
    taus: list

    def sd(self, group, figure, *, sample=False):
        """
        Args:
            group (str), figure (str): such as "segm", "AP50_voc".
            sample (bool): the sample's standard deviation instead of the population's.

        Returns:
            float: over the runs; NaN for a single one.
        """
        if len(self.runs) < 2:
            return float("nan")
        return float(np.std([run[group][figure] for run in self.runs], ddof=int(sample)))


def model_figures(results, bootstrap=None):
    """
    Args:
        results (list of results of detection or classification): of runs that differ by seed, on
            the same test set.
        bootstrap (Bootstrap or None): how to resample; None for no intervals.

    Returns:
        ModelFigures:
    """
    measures = AveragedMeasures([one.measures for one in results])
    runs = [one.compared() for one in results]
    figures = _mean(runs)
    once = measures.once()
    for group in figures.keys() & measures.columns.keys():
        figures[group].update(once[group])
    figures = {group: {k: float(v) for k, v in of.items()} for group, of in figures.items()}
    resampled, intervals = {}, {}
    if bootstrap is not None:
        averaged = SimpleNamespace(measures=measures)
        resampled = resampled_metrics(averaged, bootstrap)
        intervals, _ = confidence_intervals(averaged, bootstrap, resampled)
    taus = [one.own_tau for one in results]
    return ModelFigures(figures, runs, resampled, intervals, measures, taus)


def paired_difference(first, second, group, figure):
    """
    Paired bootstrap of one figure of two models.

    Args:
        first, second (ModelFigures): with the same bootstrap on the same units.
        group (str), figure (str): such as "segm", "AP50_voc".

    Returns:
        Difference: first minus second. NaN where either model has no such figure.
    """
    nothing = np.zeros(0)
    one, two = (model.figures.get(group, {}).get(figure, np.nan) for model in (first, second))
    samples = [model.resampled.get(group, {}).get(figure, nothing) for model in (first, second)]
    if not all(map(len, samples)):
        samples = [nothing, nothing]
    return bootstrap_difference(one - two, *samples)


def image_level_test(first, second, tau_val=False):
    """
    McNemar's exact test of which images are called rightly: positive where there is a lesion and
    negative where there is none, or their class.

    Args:
        first, second (lists of results of detection or classification): of two models on the same
            images.
        tau_val (bool): at each model's operating point instead of the common threshold.

    Returns:
        McNemar or None: None for several runs of a model, whose outcomes are not one, and for
        results without an operating point where that is asked for.
    """
    if len(first) > 1 or len(second) > 1:
        return None
    right = [results[0].right(tau_val) for results in (first, second)]
    return None if any(own is None for own in right) else mcnemar_exact(*right)


def check_same_units(first, second, names=("the first", "the second")):
    """
    Raises:
        ValueError: two LesionResults are not of the same images, lesions and patients.
    """
    one, two = first.ground_truth, second.ground_truth
    of = f"{names[0]} and {names[1]}"
    for field, what in (("id", "images"), ("file_name", "images"), ("patient_id", "patients")):
        ours, theirs = ([image.get(field) for image in gt.images] for gt in (one, two))
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None
            )
            example = "" if at is None else f", such as {ours[at]!r} and {theirs[at]!r}"
            raise ValueError(
                f"The test sets of {of} have different {what} ({len(ours)} and {len(theirs)} "
                f"images{example}): only models on the same test set can be compared."
            )
    same = [c["name"] for c in one.categories] == [c["name"] for c in two.categories]
    for field in ("image", "category", "boxes"):
        same = same and np.array_equal(getattr(one.regions, field), getattr(two.regions, field))
    for field in ("crowd", "area"):
        same = same and np.array_equal(getattr(one, field), getattr(two, field))
    if not same:
        raise ValueError(
            f"The test sets of {of} have the same images but different lesions or classes: only "
            "models scored against the same ground truth can be compared."
        )
