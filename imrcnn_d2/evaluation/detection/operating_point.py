"""The threshold at which a detector is used, chosen on validation data."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imrcnn_d2.evaluation.statistics import CHUNK, Bootstrap
from imrcnn_d2.utils.files import BadInputError

if TYPE_CHECKING:
    from imrcnn_d2.evaluation.detection.results import LesionResults

logger = logging.getLogger(__name__)

# The paper's threshold, of scores as the network gives them.
PAPER_TAU = 0.7
# The default of TEST.SCORE_THRESH, of scores that are probabilities of a hit.
DEFAULT_TAU = 0.5
# A rule with a limit, and the limits that it may have.
_LIMITS = {
    "recall>=": lambda percent: 0 < percent <= 100,
    "fp_per_image<=": lambda number: 0 <= number < math.inf,
    "risk<=": lambda share: 0 < share < 1,
}
NOT_REACHED = ", not reached"  # added to a rule whose limit no score reaches
_SLACK = 1e-9  # of sums of fractions: 0.1 false alarms per image are 3 in 30 images


def score_threshold(score_thresh: float, mapped: bool) -> float:
    """The threshold that TEST.SCORE_THRESH, in [0, 1], stands for: itself; of scores as the network
    gives them, which no :class:`ScoreMap` has mapped, the paper's where it is the default.
    """
    return score_thresh if mapped or score_thresh != DEFAULT_TAU else PAPER_TAU


@dataclass(frozen=True)
class OperatingPoint:
    """How a model is used, see `choose_operating_point`."""

    tau: float  # score threshold
    rule: str  # how it was chosen, see `check_rule`; it may end in NOT_REACHED
    dataset: str | None = None  # the data set it was chosen on
    suppress_parts: bool = False  # without the detections of `parts_of_others`

    @classmethod
    def of_results(cls, tau_val: Mapping | None) -> "OperatingPoint | None":
        """That of the group ``tau_val`` of results; None where they have none. Those of earlier
        versions lack ``suppress_parts``."""
        names = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in tau_val.items() if k in names}) if tau_val else None

    @classmethod
    def of_file(cls, value: object, path: str | Path) -> "OperatingPoint":
        """The operating point of a file of weights, given as a dict of the attributes; files of
        earlier versions lack ``suppress_parts``.

        Raises:
            BadInputError: it is none: no score is above a tau of NaN.
        """
        if isinstance(value, dict):
            value = {"suppress_parts": False, **value}
        match value:
            case {
                "tau": int() | float() as tau,
                "rule": str(rule),
                "dataset": str() | None as dataset,
                "suppress_parts": bool(suppress_parts),
                **others,
            } if 0 <= tau <= 1 and not others:
                return cls(float(tau), rule, dataset, suppress_parts)
        raise BadInputError(
            path,
            f"its operating_point {str(value)[:80]!r} must have tau, from 0 to 1, rule and "
            "dataset: get the file anew, or export it again (imrcnn export)",
        )


def check_rule(rule: str) -> tuple[str, float]:
    """A rule of :func:`choose_operating_point` in two parts, such as ("recall>=", 95.0); "f1" has
    the limit NaN.

    Raises:
        ValueError: for another rule.
    """
    if rule == "f1":
        return rule, math.nan
    parts = re.fullmatch(r"(\w+[<>]=)(\d*\.?\d+)", rule)
    if not parts or parts[1] not in _LIMITS or not _LIMITS[parts[1]](float(parts[2])):
        raise ValueError(
            f"The rule for the threshold, {rule!r}, must be 'f1' or one such as 'recall>=95' "
            "(percent), 'fp_per_image<=0.1' or 'risk<=0.05' (a share)."
        )
    return parts[1], float(parts[2])


def choose_operating_point(
    results: "LesionResults",
    rule: str = "f1",
    dataset: str | None = None,
    bootstrap: Bootstrap | None = None,
) -> OperatingPoint:
    """Choose a threshold among the scores of the detections. Only ever on validation data: metrics
    at a threshold chosen on the test set are those of no detector that one could use.

    "f1", "recall>=95" and "fp_per_image<=0.1" are applied to each bootstrap resample of the set's
    patients (images where these are unknown), and the median of the thresholds is taken, of two
    middle ones the lower: that of a single set depends on a few detections. It may therefore miss
    a limit on the set itself by little.

    "risk<=0.05" is conformal risk control (Angelopoulos et al., "Conformal risk control", 2022,
    equation 4), applied once. The loss of a patient (or image) is the share of its lesions, over
    all of its images, that no detection at the threshold hits. With M the sum of the losses of the
    n patients that have a lesion, the highest threshold with (M + 1) / (n + 1) <= 0.05 is taken.
    Then, if these patients and a new one with a lesion are exchangeable, and the weights were
    trained and selected without them, the expected loss of the new one is at most 0.05: on average
    over validation sets and new patients, not for each set or patient, and not per lesion. Patients
    without a lesion, whose loss would be 0 at any threshold, are left out, since they would dilute
    it. Sets for which no threshold is found count with a loss of 0.

    Args:
        results: of the validation set, at any tau.
        rule: "f1": the largest lesion-level F1, of equal ones the highest threshold;
            "recall>=95": the highest threshold with a lesion-level recall of at least 95 %;
            "fp_per_image<=0.1": the lowest one with at most 0.1 false alarms per image;
            "risk<=0.05": see above. Where no score reaches the limit, a warning and the recorded
            rule say so (NOT_REACHED), and the threshold comes as near as possible.
        dataset: name of the validation set, to be recorded.
        bootstrap: the resamples, by default 2,000.

    Raises:
        ValueError: for another rule, without a lesion, without a detection, and for results that
            have no scores.
    """
    name, limit = check_rule(rule)
    detections, evaluated = results.detections, results.matching.evaluated
    place = f" of {dataset}" if dataset else ""
    lesions_of_image = results.ground_truth.lesions
    needed = {"score": detections.scored, "lesion": lesions_of_image.any()}
    for what, exists in {**needed, "detection": evaluated.any()}.items():
        if not exists:
            raise ValueError(f"Without a {what}{place} no threshold can be chosen.")
    unit_of_image, num_units = results.metrics.unit_of_image, results.metrics.num_units
    lesions = np.bincount(unit_of_image, lesions_of_image, minlength=num_units)
    images = np.bincount(unit_of_image, minlength=num_units)
    order = np.argsort(-detections.score[evaluated], kind="stable")
    score, hit = detections.score[evaluated][order], results.matching.hit[evaluated][order]
    unit = unit_of_image[detections.regions.image[evaluated][order]]
    # The last detection of each score: these are the candidates, from the highest down.
    ends = np.flatnonzero(np.append(np.diff(score) != 0, True))

    def sums(weights):
        """(B, C) hits and detections at each candidate, and (B, 1) lesions and images, of B samples
        that hold each unit (B, U) times."""
        copies = weights[:, unit]
        tp, above = (np.cumsum(w, axis=1, dtype=np.int32)[:, ends] for w in (copies * hit, copies))
        return tp, above, (weights @ lesions)[:, None], (weights @ images)[:, None]

    nearest = ""  # what the set gives where it gives less than the rule asks for
    tp, above, *_ = sums(np.ones((1, num_units), np.int32))
    if name == "risk<=":
        positive = np.count_nonzero(lesions)
        missed = positive - np.cumsum(hit / np.maximum(lesions, 1)[unit])[ends]
        bound = (missed + 1) / (positive + 1)
        best = np.maximum(bound, limit + _SLACK).argmin()
        if bound[best] > limit + _SLACK:
            nearest = f"bound the risk by {bound[best]:.3g} at least, not by {limit:g}"
    else:
        chunk = max(1, CHUNK // len(score))
        resamples = (bootstrap or Bootstrap()).weights(num_units, chunk)
        chosen = [_best(name, limit, *sums(some[some @ lesions > 0])) for some in resamples]
        chosen = np.sort(np.concatenate(chosen))
        best = chosen[len(chosen) // 2]
        recall, alarms = 100 * tp.max() / lesions.sum(), (above - tp).min() / images.sum()
        if name == "recall>=" and recall < limit:
            nearest = f"reach a recall of {recall:.1f} % at most"
        elif name == "fp_per_image<=" and alarms > limit + _SLACK:
            nearest = f"give {alarms:.3g} false alarms per image at least"
    if nearest:
        logger.warning(
            f"The detections{place} {nearest}: the threshold chosen for {rule!r} gives that."
        )
        rule += NOT_REACHED
    return OperatingPoint(float(score[ends[best]]), rule, dataset)


def _best(name, limit, tp, above, lesions, images):
    """(B,) int, which of C candidates, from the highest down, a rule takes in B samples: of (B, C)
    hits and detections, and (B, 1) lesions and images."""
    if name == "fp_per_image<=":
        return np.maximum((above - tp <= limit * images + _SLACK).sum(axis=1) - 1, 0)
    value = 2 * tp / (above + lesions) if name == "f1" else np.minimum(100 * tp / lesions, limit)
    return value.argmax(axis=1)  # the first, so the highest threshold
