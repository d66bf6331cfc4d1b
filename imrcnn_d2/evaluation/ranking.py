"""Figures that depend on the order of scores, under weights: AP, break-even point, FROC, AUROC.

A resample draws a unit (an image or a patient) w times. What would be computed on a data set that
holds w copies of its images is computed here from the ranks of the original detections, each
counted w times: the copies of a detection follow each other, so that only the counts up to it
change. That is exact, as though scores were distinct; detections of equal score keep the order they
have in the original data set (FROC lets them through together, in AUROC a tie counts half).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .metrics import divide

__all__ = ["RECALLS", "RankedDetections", "Ranking", "WeightedCurve", "weighted_auroc"]

# Recalls at which COCO samples the precision-recall curve.
RECALLS = np.linspace(0, 1, 101)


class Ranking:
    """
    Detections from the highest score down.

    Attributes:
        order (np.ndarray): (N,) int, their positions; ties stay in order.
        unit (np.ndarray): (N,) int in [0, U), the unit that each belongs to.
        ends (np.ndarray): (N,) int, place in the ranking of the last that has the score of each.
    """

    def __init__(self, score, unit):
        """
        Args:
            score (np.ndarray): (N,) float, by image id and file order.
            unit (np.ndarray): (N,) int in [0, U), the unit that each belongs to.
        """
        self.order = np.argsort(-score, kind="stable")
        falling = -score[self.order]
        self.unit = unit[self.order]
        self.ends = np.searchsorted(falling, falling, side="right") - 1

    def draw(self, weights):
        """
        Args:
            weights (np.ndarray): (B, U) int, how often each resample holds each unit.

        Returns:
            tuple: (B, N) int each, copies of each detection and copies of all up to and with it.
        """
        copies = np.take(weights, self.unit, axis=1)
        return copies, np.cumsum(copies, axis=1, dtype=np.int32)


class RankedDetections:
    """The detections of one class, or of all, with the ground truth that there is of it."""

    def __init__(self, ranking, hit, lesions):
        """
        Args:
            ranking (Ranking): of N detections, those that count.
            hit (np.ndarray): (N,) bool, in their original order.
            lesions (np.ndarray): (U,) int, ground truths of each unit, crowds left out.
        """
        self.ranking = ranking
        self.hits = np.flatnonzero(hit[ranking.order])
        self.lesions = lesions

    def weigh(self, weights, drawn=None):
        """
        Args:
            weights (np.ndarray): (B, U) int, how often each resample holds each unit.
            drawn (tuple or None): what the ranking's ``draw`` gives for them, if it is known.

        Returns:
            WeightedCurve: of B resamples.
        """
        copies, through = drawn or self.ranking.draw(weights)
        return WeightedCurve(
            self.hits,
            self.ranking.ends[self.hits],
            through,
            np.take(copies, self.hits, axis=1),
            weights @ self.lesions,
        )


@dataclass(frozen=True, eq=False)
class WeightedCurve:
    """
    The precision-recall curves of B resamples, as far as they differ: at each of N detections from
    the highest score down, H of them hits, after all of its copies.

    Attributes:
        hits (np.ndarray): (H,) int, ascending positions of the hits among the detections.
        ends (np.ndarray): (H,) int, position of the last detection that has the score of each hit.
        through (np.ndarray): (B, N) int, detections so far.
        copies (np.ndarray): (B, H) int, of each hit.
        num_gt (np.ndarray): (B,) int, ground truths.

    Figures are shares in [0, 1], NaN for resamples without ground truth.
    """

    hits: np.ndarray
    ends: np.ndarray
    through: np.ndarray
    copies: np.ndarray
    num_gt: np.ndarray

    @cached_property
    def tp(self):
        """np.ndarray: (B, H) int, hits up to and with each hit."""
        return np.cumsum(self.copies, axis=1, dtype=np.int32)

    @cached_property
    def fp(self):
        """np.ndarray: (B, H) int, false alarms before each hit."""
        return np.take(self.through, self.hits, axis=1) - self.tp

    @cached_property
    def envelope(self):
        """
        np.ndarray: (B, H) float, the best precision at the recall of each hit or a higher one. Each
        copy of a hit raises the precision, so that all share the value of the last.
        """
        precision = self.tp / np.maximum(self.tp + self.fp, 1)
        return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]

    @property
    def sampled_area(self):
        """np.ndarray: (B,), COCO's average precision: mean of the envelope at 101 recalls."""
        num_gt = np.maximum(self.num_gt, 1)[:, None]
        # The least number of hits for which tp / num_gt >= recall, as floats compare.
        needed = np.ceil(RECALLS * num_gt)
        needed -= (needed - 1) / num_gt >= RECALLS
        needed += needed / num_gt < RECALLS
        reached = _search(self.tp, needed, "left")
        beyond = np.zeros((len(self.tp), 1))
        sampled = np.take_along_axis(np.hstack([self.envelope, beyond]), reached, axis=1)
        return self._where_defined(sampled.mean(axis=1))

    @property
    def area(self):
        """np.ndarray: (B,), the all-point average precision; see :attr:`PRCurve.area`."""
        area = np.einsum("bh,bh->b", self.copies, self.envelope)
        return self._where_defined(divide(area, self.num_gt))

    @property
    def break_even_point(self):
        """np.ndarray: (B,); see :attr:`PRCurve.break_even_point`."""
        last = self.through[:, -1] if self.through.shape[1] else np.zeros_like(self.num_gt)
        at = _search(self.through, self.num_gt[:, None], "left")
        # Hits before the detection whose copies reach num_gt, and of its own as many as fit.
        index = np.searchsorted(self.hits, at)
        before = np.take_along_axis(_from_zero(self.tp), index, axis=1)[:, 0]
        detections = np.take_along_axis(_from_zero(self.through), at, axis=1)[:, 0]
        is_hit = np.isin(at[:, 0], self.hits)
        share = divide(before + is_hit * (self.num_gt - detections), self.num_gt)
        share[last < self.num_gt] = np.nan
        share[last == 0] = 0
        return self._where_defined(share)

    def sensitivity(self, false_alarms):
        """
        Args:
            false_alarms (np.ndarray): (B, R) float, how many are accepted.

        Returns:
            np.ndarray: (B, R), the best recall with no more of them at any threshold, which lets
            through all detections of a score together.
        """
        cumulated = _from_zero(self.tp)
        tp = np.take(cumulated, np.searchsorted(self.hits, self.ends, side="right"), axis=1)
        index = _search(np.take(self.through, self.ends, axis=1) - tp, false_alarms, "right")
        tp = np.take_along_axis(cumulated, index, axis=1)
        return divide(tp, np.broadcast_to(self.num_gt[:, None], tp.shape))

    def _where_defined(self, figure):
        return np.where(self.num_gt > 0, figure, np.nan)


def weighted_auroc(positive, score, unit, weights):
    """
    Area under the receiver operating characteristic: the share of pairs of a positive and a
    negative case in which the positive one has the higher score; ties count half.

    Args:
        positive (np.ndarray): (M,) bool.
        score (np.ndarray): (M,) float.
        unit (np.ndarray): (M,) int in [0, U), the unit that each case belongs to.
        weights (np.ndarray): (B, U) int, how often each resample holds each unit.

    Returns:
        np.ndarray: (B,) in [0, 1], NaN for resamples without cases of both kinds.
    """
    ascending = np.flatnonzero(~positive)[np.argsort(score[~positive], kind="stable")]
    negatives = np.take(weights, unit[ascending], axis=1)
    positives = np.take(weights, unit[positive], axis=1)
    below = _from_zero(np.cumsum(negatives, axis=1, dtype=np.int64))
    first, last = (
        np.searchsorted(score[ascending], score[positive], side) for side in ("left", "right")
    )
    won = np.take(below, first, axis=1) + np.take(below, last, axis=1)
    pairs = positives.sum(axis=1) * below[:, -1]
    return divide(np.einsum("bp,bp->b", positives, won), 2 * pairs)


def _search(ascending, values, side):
    """(B, K) positions of (B, K) values in the rows of (B, H) ascending numbers, in [0, H]."""
    rows = zip(ascending, values, strict=True)
    found = [np.searchsorted(row, wanted, side) for row, wanted in rows]
    return np.array(found, dtype=np.int64).reshape(values.shape)


def _from_zero(cumulated):
    """(B, N) as (B, N + 1), with a zero before the first."""
    return np.pad(cumulated, ((0, 0), (1, 0)))
