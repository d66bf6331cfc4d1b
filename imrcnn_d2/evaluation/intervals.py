"""Intervals of all figures, from resampled data sets."""

import logging
from collections import defaultdict
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .bootstrap import CHUNK, clopper_pearson, percentile_interval
from .metrics import COUNTS

__all__ = ["confidence_intervals", "resampled_figures", "with_intervals"]

logger = logging.getLogger(__name__)


def resampled_figures(results, bootstrap):
    """
    Every figure in every resample. Two models scored on the same units with the same bootstrap see
    the same resamples in the same order, so that figures can be subtracted (a paired comparison).

    Args:
        results (LesionResults):
        bootstrap (Bootstrap):

    Returns:
        dict[str, dict[str, np.ndarray]]: group -> figure -> (B,), in the units of the figures and
        NaN where undefined. Groups as in :meth:`LesionResults.groups`, "froc", "calibration",
        "by_size.share_of_image.<1 %" and so on, "by_class.NAME" with several classes and, with a
        second threshold, "tau_val.lesion", "tau_val.image", "tau_val.patient". Of COCO's figures
        AP50, the others only with ``bootstrap.all_coco``.
    """
    measures = results.measures
    rows = max(1, CHUNK // measures.width)
    parts = defaultdict(lambda: defaultdict(list))
    # The products are small: several threads would mostly wait for each other.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=bootstrap.resamples, desc="Resamples", delay=2) as bar,
    ):
        for weights in bootstrap.weights(measures.num_units, chunk=rows):
            for group, figures in measures(weights, all_coco=bootstrap.all_coco).items():
                for name, values in figures.items():
                    parts[group][name].append(values)
            bar.update(len(weights))
    return {
        group: {name: np.concatenate(values) for name, values in figures.items()}
        for group, figures in parts.items()
    }


def with_intervals(results, bootstrap):
    """
    Args:
        results (LesionResults or RecognitionResults):
        bootstrap (Bootstrap or None):

    Returns:
        the results with :func:`confidence_intervals`; as they are without a bootstrap.
    """
    if bootstrap is None:
        return results
    intervals, undefined_shares = confidence_intervals(results, bootstrap)
    return replace(results, intervals=intervals, undefined_shares=undefined_shares)


def confidence_intervals(results, bootstrap, resampled=None):
    """
    95 % intervals of all figures but counts: percentiles of the resampled figures. Resamples in
    which a figure is undefined are left out.

    Where a proportion is exactly 0 or 100 %, all resamples agree and say nothing; its interval is
    then Clopper and Pearson's for independent cases, F1's by way of TP / (TP + FP + FN). Other
    figures of which the resamples agree (such as an AUROC of 100 %) have no interval: NaN.

    Args:
        results (LesionResults):
        bootstrap (Bootstrap):
        resampled (dict or None): :func:`resampled_figures` of these, where they are at hand.

    Returns:
        tuple: intervals, dict[str, dict[str, tuple[float, float]]]: group -> figure -> (low, high),
        NaN where undefined; and the shares in (0, 1] of resamples in which a figure that the data
        set defines is undefined, dict[str, float] by "group.figure".
    """
    if resampled is None:
        resampled = resampled_figures(results, bootstrap)
    once = results.measures.once(all_coco=bootstrap.all_coco)
    proportions = results.measures.proportions()
    intervals, undefined = {}, {}
    for group, figures in resampled.items():
        intervals[group] = {}
        for name, samples in figures.items():
            if name in COUNTS or name == "n":
                continue
            figure = once[group][name]
            share = float(np.isnan(samples).mean())
            if np.isnan(figure):
                intervals[group][name] = (float("nan"), float("nan"))
                continue
            if share:
                undefined[f"{group}.{name}"] = share
            exact = proportions.get(group, {}).get(name)
            if exact and figure in (0, 100):
                intervals[group][name] = _exact(name, *exact)
            else:
                low, high = percentile_interval(samples)
                agree = np.isclose(low, high, rtol=1e-9)
                intervals[group][name] = (float("nan"),) * 2 if agree else (low, high)
    return intervals, undefined


def _exact(name, part, whole):
    interval = clopper_pearson(round(part), round(whole))
    return tuple(100 * (2 * s / (1 + s) if name.startswith("f1") else s) for s in interval)
