"""Precision-recall, receiver operating and free-response curves, also of many resamples at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imrcnn_d2.evaluation.detection.counts import divide

__all__ = [
    "FROC",
    "RATES",
    "RECALLS",
    "PRCurve",
    "RankedDetections",
    "Ranking",
    "WeightedCurve",
    "pr_curve",
    "weighted_auroc",
]


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

    def copies(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            weights: (B, U) int, how often each resample holds each unit.

        Returns:
            (B, N) int each, copies of each detection, and copies of all up to and with it.
        """
        copies = np.take(weights, self.unit, axis=1)
        return copies, np.cumsum(copies, axis=1, dtype=np.int32)


class RankedDetections:
    """The detections of one class, or of all, with the ground truth that there is of it."""

    def __init__(self, ranking, hit, lesions):
        """
        Args:
            ranking (Ranking): of the N evaluated detections.
            hit (np.ndarray): (N,) bool, in their original order.
            lesions (np.ndarray): (U,) int, ground truths of each unit, crowds left out.
        """
        self.ranking = ranking
        self.hits = np.flatnonzero(hit[ranking.order])
        self.lesions = lesions

    def weigh(self, weights: np.ndarray, copies: tuple | None = None) -> "WeightedCurve":
        """
        Args:
            weights: (B, U) int, how often each resample holds each unit.
            copies: the ranking's :meth:`Ranking.copies` for them, where known.
        """
        copies, through = copies or self.ranking.copies(weights)
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

    All metrics are shares in [0, 1], NaN for resamples without ground truth.
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
        """
        np.ndarray: (B,), area under the envelope, from every recall reached (the all-point average
        precision of Pascal VOC since 2010). 0 without a detection.
        """
        area = np.einsum("bh,bh->b", self.copies, self.envelope)
        return self._where_defined(divide(area, self.num_gt))

    @property
    def break_even_point(self):
        """
        np.ndarray: (B,), share of hits among the n highest-scored detections, n being the number of
        ground truths: there precision equals recall. NaN with fewer than n detections (but 0 with
        none at all).
        """
        last = self.through[:, -1] if self.through.shape[1] else np.zeros_like(self.num_gt)
        at = _search(self.through, self.num_gt[:, None], "left")
        # Hits before the detection whose copies reach num_gt, and as many of its copies as fit.
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
            np.ndarray: (B, R), the best recall with no more of them at any threshold; detections of
            equal scores are above it together.
        """
        cumulated = _from_zero(self.tp)
        tp = np.take(cumulated, np.searchsorted(self.hits, self.ends, side="right"), axis=1)
        index = _search(np.take(self.through, self.ends, axis=1) - tp, false_alarms, "right")
        tp = np.take_along_axis(cumulated, index, axis=1)
        return divide(tp, np.broadcast_to(self.num_gt[:, None], tp.shape))

    def _where_defined(self, values):
        return np.where(self.num_gt > 0, values, np.nan)


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
    places = [np.searchsorted(row, of_row, side) for row, of_row in rows]
    return np.array(places, dtype=np.int64).reshape(values.shape)


def _from_zero(cumulated):
    """(B, N) as (B, N + 1), with a zero before the first."""
    return np.pad(cumulated, ((0, 0), (1, 0)))


@dataclass(frozen=True, eq=False)
class PRCurve:
    """
    The precision-recall curve of one class: a point for each detection as the threshold, from the
    highest score down.

    Attributes:
        score (np.ndarray): (N,) float, falling; ties by image id, then file order.
        tp (np.ndarray): (N,) int, hits among the detections so far.
        fp (np.ndarray): (N,) int, false alarms among them.
        num_gt (int): ground truths of the class, crowds left out.
    """

    score: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    num_gt: int

    @property
    def precision(self):
        """np.ndarray: (N,) in [0, 1]."""
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self):
        """np.ndarray: (N,) in [0, 1]; NaN without ground truth."""
        return self.tp / self.num_gt if self.num_gt else np.full(len(self.tp), np.nan)

    @property
    def envelope(self):
        """np.ndarray: (N,) in [0, 1], the best precision at this recall or a higher one."""
        return np.maximum.accumulate(self.precision[::-1])[::-1]

    @property
    def area(self) -> float:
        """As :attr:`WeightedCurve.area`."""
        return float(self._weighted.area[0])

    @property
    def break_even_point(self) -> float:
        """As :attr:`WeightedCurve.break_even_point`."""
        return float(self._weighted.break_even_point[0])

    @cached_property
    def _weighted(self):
        """The WeightedCurve of one resample that holds each detection once."""
        hits = np.flatnonzero(np.diff(self.tp, prepend=0))
        return WeightedCurve(
            hits,
            hits,
            (self.tp + self.fp)[None],
            np.ones((1, len(hits)), int),
            np.array([self.num_gt]),
        )


def pr_curve(score: np.ndarray, hit: np.ndarray, num_gt: int) -> PRCurve:
    """
    Args:
        score: (N,) float, the evaluated detections, by image id and file order.
        hit: (N,) bool.
        num_gt: ground truths, crowds left out.
    """
    order = np.argsort(-score, kind="stable")
    hit = hit[order]
    return PRCurve(score[order], np.cumsum(hit), np.cumsum(~hit), int(num_gt))


# Mean false alarms per image at which the sensitivity is read off, as in the LUNA16 challenge.
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class FROC:
    """
    Share of the lesions that are hit against the mean number of false alarms per image, over all
    images and classes, as the threshold falls from the highest score to the lowest. Detections of
    equal scores are above it together.

    Attributes:
        score (np.ndarray): (N,) float, falling; the evaluated detections.
        hit (np.ndarray): (N,) bool.
        image (np.ndarray): (N,) int, the image of each.
        lesions (np.ndarray): (I,) int, lesions in each image.
        scored (bool): False if the results know no scores: there is no curve then.
    """

    score: np.ndarray
    hit: np.ndarray
    image: np.ndarray
    lesions: np.ndarray
    scored: bool = True

    @classmethod
    def by_score(cls, score, hit, image, lesions, scored=True):
        """The arguments are the attributes, in any order of the detections."""
        order = np.argsort(-score, kind="stable")
        return cls(score[order], hit[order], image[order], lesions, scored)

    def curve(self):
        """
        Returns:
            dict[str, np.ndarray]: K values each, for the K scores from the highest down: "score",
            "tp" and "fp" (detections at this score or higher), "sensitivity" in percent,
            "fp_per_image". NaN where there is no lesion; K is 0 without scores.
        """
        last = np.flatnonzero(np.diff(self.score, append=-1.0)) if self.scored else slice(0)
        tp, fp = np.cumsum(self.hit)[last], np.cumsum(~self.hit)[last]
        lesions = self.lesions.sum()
        return {
            "score": self.score[last],
            "tp": tp,
            "fp": fp,
            "sensitivity": 100 * tp / lesions if lesions else np.full(len(tp), np.nan),
            "fp_per_image": fp / max(len(self.lesions), 1),
        }

    def values(self, weights=None):
        """
        The best sensitivity with no more than each of RATES false alarms per image, and the mean of
        the seven (the score of LUNA16). Unlike there, nothing is interpolated: each is reached at a
        threshold.

        Args:
            weights (np.ndarray or None): (B, I) int, how often each image is taken; None is once.

        Returns:
            dict[str, float or np.ndarray]: "sensitivity_at_0.125" ... "sensitivity_at_8" and
            "mean" in percent; (B,) arrays if weights were given. NaN without a lesion and for
            results that know no scores.
        """
        rows = np.ones((1, len(self.lesions)), int) if weights is None else weights
        ranked = RankedDetections(Ranking(self.score, self.image), self.hit, self.lesions)
        values = self.read_off(ranked.weigh(rows), rows.sum(axis=1))
        if weights is None:
            return {name: float(value[0]) for name, value in values.items()}
        return values

    def read_off(self, curve, images):
        """
        Args:
            curve (WeightedCurve): of these detections in B resamples.
            images (np.ndarray): (B,) int, images in each.

        Returns:
            dict[str, np.ndarray]: (B,) each, as :meth:`values`.
        """
        sensitivity = 100 * curve.sensitivity(np.multiply.outer(images, RATES))
        if not self.scored:
            sensitivity[:] = np.nan
        values = {f"sensitivity_at_{rate:g}": sensitivity[:, i] for i, rate in enumerate(RATES)}
        return {**values, "mean": sensitivity.mean(axis=1)}
