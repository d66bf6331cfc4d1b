"""Resampling of patients or images, and the intervals made of it."""

from dataclasses import dataclass

import numpy as np

__all__ = ["LEVEL", "Bootstrap", "clopper_pearson", "percentile_interval"]

# Coverage of all intervals.
LEVEL = 0.95

# Numbers held at a time while resamples are drawn, unless told otherwise.
CHUNK = 2_000_000


@dataclass(frozen=True)
class Bootstrap:
    """
    Resamples of a data set's units: as many units as there are, drawn with replacement.

    Attributes:
        resamples (int): how many.
        seed (int): of the draws. Two models scored on the same units with the same seed see the
            same resamples, in the same order.
        all_coco (bool): resample COCO's AP, AP75, APs, APm and APl too, which takes about forty
            times as long as AP50.
    """

    resamples: int = 2000
    seed: int = 0
    all_coco: bool = False

    def __post_init__(self):
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 1.")

    def weights(self, num_units, chunk=None):
        """
        How often each unit is drawn, a chunk of resamples at a time.

        Args:
            num_units (int): U, patients or images.
            chunk (int or None): resamples in a chunk; the draws do not depend on it.

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
            drawn = rng.integers(num_units, size=(rows, num_units))
            drawn += np.arange(rows)[:, None] * num_units
            counts = np.bincount(drawn.ravel(), minlength=rows * num_units)
            yield counts.reshape(rows, num_units).astype(np.int32)


def percentile_interval(samples):
    """
    Args:
        samples (np.ndarray): (B,) a figure in each resample, NaN where it is undefined.

    Returns:
        tuple[float, float]: the percentiles between which the central 95 % of the defined samples
        lie (Efron and Tibshirani 1993, chapter 13). NaN without a defined one.
    """
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(defined, (tail, 100 - tail))
    return float(low), float(high)


def clopper_pearson(part, whole):
    """
    The exact 95 % interval of a binomial proportion (Clopper and Pearson 1934).

    Args:
        part (int): cases that have it, in [0, whole].
        whole (int): independent cases, at least 1.

    Returns:
        tuple[float, float]: in [0, 1].
    """
    from scipy.stats import binomtest  # two seconds, which no start of a training should take

    interval = binomtest(int(part), int(whole)).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)
