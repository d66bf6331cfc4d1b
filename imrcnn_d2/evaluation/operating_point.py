"""The score threshold from which on a detection counts, chosen on validation data."""

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from imrcnn_d2.data.rejects import BadInputError

__all__ = ["OperatingPoint", "check_rule", "choose_operating_point"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OperatingPoint:
    """
    Attributes:
        tau (float): score from which on a detection counts.
        rule (str): how it was chosen, see :func:`choose_operating_point`.
        dataset (str or None): what it was chosen on.
    """

    tau: float
    rule: str
    dataset: str | None = None

    @classmethod
    def of_file(cls, value: object, path: str | Path) -> "OperatingPoint":
        """
        The one that a file of weights holds.

        Args:
            value: a dict of the attributes, as it was written; checked.
            path: of the file.

        Raises:
            BadInputError: it is none: with a tau of NaN there would be no detection in any image.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(value, dict) and sorted(value) == sorted(names):
            tau, rule, dataset = (value[name] for name in names)
            texts = isinstance(rule, str) and isinstance(dataset, str | None)
            if isinstance(tau, int | float) and 0 <= tau <= 1 and texts:
                return cls(float(tau), rule, dataset)
        raise BadInputError(
            path,
            f"its operating_point {str(value)[:80]!r} is none: it has tau, from 0 to 1, rule and "
            "dataset. Get the file anew, or export it again (tools/export.py)",
        )


def check_rule(rule):
    """
    Args:
        rule (str): see :func:`choose_operating_point`.

    Returns:
        float or None: the wished recall in percent; None for "f1".

    Raises:
        ValueError: for another rule.
    """
    wished = re.fullmatch(r"recall>=(\d+(?:\.\d+)?)", rule)
    if rule != "f1" and not (wished and 0 < float(wished[1]) <= 100):
        raise ValueError(
            f"The rule for the threshold is {rule!r}; it must be 'f1' or 'recall>=95', for a "
            "sensitivity of 95 %."
        )
    return float(wished[1]) if wished else None


def choose_operating_point(results, rule="f1", dataset=None):
    """
    Choose a threshold among the scores of the detections. Only ever on validation data: figures at
    a threshold chosen on the test set are those of no detector that one could use.

    Args:
        results (LesionResults): of the validation set; the matching is made, whatever its tau.
        rule (str): "f1": the largest lesion-level F1, of equal ones the highest threshold;
            "recall>=95": the highest threshold with a lesion-level recall of at least 95 %.
        dataset (str or None): name of the validation set, to be noted.

    Returns:
        OperatingPoint: where a wished recall is not reached at any score, the highest threshold
        with the largest recall; that is logged as a warning.

    Raises:
        ValueError: for another rule, without a lesion, without a detection, and for results that
            know no scores.
    """
    wished = check_rule(rule)
    detections, matching = results.detections, results.matching
    lesions = int(results.ground_truth.lesions.sum())
    of = f" of {dataset}" if dataset else ""
    if not detections.scored:
        raise ValueError(f"The results{of} know no scores, among which to choose a threshold.")
    if not lesions or not matching.counts.any():
        what = "detection" if lesions else "lesion"
        raise ValueError(f"Without a {what}{of} no threshold can be chosen.")
    score = detections.score[matching.counts]
    candidates, group = np.unique(-score, return_inverse=True)  # from the highest down
    tp = np.cumsum(np.bincount(group, matching.hit[matching.counts]))
    called = np.cumsum(np.bincount(group))
    if rule == "f1":
        best = int(np.argmax(2 * tp / (called + lesions)))  # the first, so the highest threshold
    else:
        # In whole numbers of lesions where that is exact: 95 % of 20 are 19.
        enough = 100 * tp >= wished * lesions
        best = int(np.argmax(enough if enough.any() else tp))
        if not enough.any():
            logger.warning(
                f"The detections{of} reach a recall of {100 * tp[-1] / lesions:.1f} % at most: the "
                f"threshold chosen for {rule!r} gives that."
            )
    return OperatingPoint(float(-candidates[best]), rule, dataset)
