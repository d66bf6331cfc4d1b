"""What an alarm, or none, is worth at a stated prevalence."""

import math

__all__ = ["predictive_values"]


def predictive_values(sensitivity, specificity, prevalence):
    """
    Positive and negative predictive value by Bayes' theorem.

    Args:
        sensitivity (float), specificity (float): in percent.
        prevalence (float): in (0, 1).

    Returns:
        tuple[float, float]: PPV and NPV in percent. NaN where one of the figures is, and where
        nothing is ever called positive, or negative.

    Raises:
        ValueError: if the prevalence is not between 0 and 1.

    Both grow with sensitivity and with specificity. So from the lower 95 % limits of the two follow
    lower limits of both values, and from the upper limits upper ones; these are wider than 95 %,
    since the two would have to be off in the same direction.
    """
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence is {prevalence}; it must lie between 0 and 1.")
    ill, healthy = prevalence, 1 - prevalence
    hits, alarms = ill * sensitivity / 100, healthy * (1 - specificity / 100)
    misses, cleared = ill * (1 - sensitivity / 100), healthy * specificity / 100
    return _percent(hits, hits + alarms), _percent(cleared, cleared + misses)


def _percent(part, whole):
    return 100 * part / whole if whole > 0 else math.nan
