"""Precision-recall, receiver operating and free-response curves, also of many resamples at once."""

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from imrcnn_d2.evaluation.detection.counts import divide

# Recalls at which COCO samples the precision-recall curve.
RECALLS = np.linspace(0, 1, 101)
# Mean false alarms per image at which the sensitivity is read off, as in the LUNA16 challenge.
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
_LONGEST = 512  # detections of a part of a ranking, which are counted at once


class Ranking:
    """N detections from the highest score down, given scores by image id and file order and the
    unit in [0, U) that each belongs to.

    Attributes:
        order: (N,) int, the detections in this order; those of equal scores as they were given.
        unit: (N,) int, their units.
        ends: (N,) int, place in the ranking of the last that has the score of each.
    """

    def __init__(self, score: np.ndarray, unit: np.ndarray):
        self.order = np.argsort(-score, kind="stable")
        self.unit, score = unit[self.order], score[self.order]
        last = np.flatnonzero(np.diff(score, append=-1.0))
        self.ends = np.repeat(last, np.diff(last, prepend=-1))

    def part(self, kept: np.ndarray) -> "Ranking":
        """That of the (N,) bool ``kept`` places; ``order`` still counts all detections."""
        part = copy(self)
        part.order, part.unit = self.order[kept], self.unit[kept]
        through = np.cumsum(kept)
        part.ends = through[self.ends[kept]] - 1
        return part


class RankedDetections:
    """The N detections of one class, or of all, whether they hit, in their original order, and the
    (U,) ground truths of each unit, crowds left out."""

    def __init__(self, ranking: Ranking, hit: np.ndarray, lesions: np.ndarray):
        self.ranking, self.lesions = ranking, lesions
        self.hits = np.flatnonzero(hit[ranking.order])

    def is_same(self, other: "RankedDetections") -> bool:
        """Whether the same detections hit, of the same ground truths."""
        arrays = ((r.ranking.order, r.ranking.unit, r.hits, r.lesions) for r in (self, other))
        return all(map(np.array_equal, *arrays))

    @cached_property
    def _parts(self):
        """(P, U) int, the detections of each unit in each part of the ranking, which end with the
        hits and with the last detection of the score of each: with few hits, these are far fewer
        than detections. And (H,) int, the parts that end with these hits and detections."""
        places, number = np.append(self.hits, self.ranking.ends[self.hits]), len(self.ranking.unit)
        limits = np.concatenate([places + 1, np.arange(0, number, _LONGEST), [0, number]])
        limits = np.unique(limits)
        counts = np.ones(number, dtype=np.int16)
        shape = len(limits) - 1, len(self.lesions)
        parts = csr_array((counts, self.ranking.unit, limits), shape=shape)
        return parts, *np.split(np.searchsorted(limits, places, side="right") - 1, 2)

    def weigh(self, weights: np.ndarray) -> "WeightedCurve":
        """The curves under (B, U) int weights, how often each resample holds each unit."""
        parts, hits, ends = self._parts
        # Of the smallest numbers that hold the sum of a part, most units stay in the cache.
        kind = np.int16 if weights.max(initial=0) * _LONGEST < 2**15 else np.int32
        copies = parts.astype(kind, copy=False) @ weights.T.astype(kind, order="C")
        through = np.cumsum(copies.T, axis=1, dtype=np.int32)
        at_hits = np.take(through, hits, axis=1)
        return WeightedCurve(
            copies=np.take(weights, self.ranking.unit[self.hits], axis=1),
            through=at_hits,
            last=np.searchsorted(hits, ends, side="right") - 1,
            through_last=at_hits if (ends == hits).all() else np.take(through, ends, axis=1),
            total=copies.sum(axis=0, dtype=np.int64),
            num_gt=weights @ self.lesions.astype(weights.dtype),
        )

    def tied_areas(self) -> tuple[float, float]:
        """The least and the largest area under the envelope over all orders of detections of equal
        scores: false alarms first, or hits first. In [0, 1]; there must be ground truth."""
        is_hit = np.zeros(len(self.ranking.ends), dtype=bool)
        is_hit[self.hits] = True
        areas = []
        for last in (is_hit, ~is_hit):
            hits = np.flatnonzero(is_hit[np.lexsort((last, self.ranking.ends))])
            precision = np.arange(1, len(hits) + 1) / (hits + 1)
            envelope = np.maximum.accumulate(precision[::-1])
            areas.append(float(envelope.sum() / self.lesions.sum()))
        return areas[0], areas[1]


@dataclass(frozen=True, eq=False)
class WeightedCurve:
    """The precision-recall curves of B resamples at their H hits, from the highest score down: each
    after all of its copies. All metrics are shares in [0, 1], NaN for resamples without ground
    truth."""

    copies: np.ndarray  # (B, H) int, of each hit
    through: np.ndarray  # (B, H) int, detections up to and with each hit
    last: np.ndarray  # (H,) int, the last hit that has the score of each
    through_last: np.ndarray  # (B, H) int, detections of that score or a higher one
    total: np.ndarray  # (B,) int, detections
    num_gt: np.ndarray  # (B,) int, ground truths

    @cached_property
    def tp(self) -> np.ndarray:
        """(B, H) int, hits up to and with each hit."""
        return np.cumsum(self.copies, axis=1, dtype=np.int32)

    @cached_property
    def envelope(self) -> np.ndarray:
        """(B, H) float, the best precision at the recall of each hit or a higher one. Each copy of
        a hit raises the precision, so that all share the value of the last."""
        precision = self.tp / np.maximum(self.through, 1)
        return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]

    @property
    def sampled_area(self) -> np.ndarray:
        """(B,), COCO's average precision: mean of the envelope at 101 recalls."""
        num_gt = np.maximum(self.num_gt, 1)[:, None]
        # The least number of hits for which tp / num_gt >= recall, as floats compare.
        needed = np.ceil(RECALLS * num_gt)
        needed -= (needed - 1) / num_gt >= RECALLS
        needed += needed / num_gt < RECALLS
        reached = _search(self.tp, needed, "left")
        return self._where_defined(_at(self.envelope, reached).mean(axis=1))

    @property
    def area(self) -> np.ndarray:
        """(B,), area under the envelope, from every recall reached (the all-point average precision
        of Pascal VOC since 2010). 0 without a detection."""
        area = np.einsum("bh,bh->b", self.copies, self.envelope)
        return self._where_defined(divide(area, self.num_gt))

    @property
    def break_even_point(self) -> np.ndarray:
        """(B,), share of hits among the n highest-scored detections, n being the number of ground
        truths: there precision equals recall. NaN with fewer than n detections (but 0 with none at
        all)."""
        whole = _search(self.through, self.num_gt[:, None], "right")
        # And as many copies of the next hit as fit.
        room = self.num_gt[:, None] - _at(self.through, whole) + _at(self.copies, whole)
        part = np.where(whole < self.through.shape[1], np.maximum(room, 0), 0)
        share = divide((_at(self.tp, whole - 1) + part)[:, 0], self.num_gt)
        share[self.total < self.num_gt] = np.nan
        share[self.total == 0] = 0
        return self._where_defined(share)

    def sensitivity(self, false_alarms: np.ndarray) -> np.ndarray:
        """(B, R), the best recall with no more than (B, R) false alarms at any threshold;
        detections of equal scores are above it together."""
        alarms = self.through_last - np.take(self.tp, self.last, axis=1)
        tp = _at(self.tp, _search(alarms, false_alarms, "right") - 1)
        return divide(tp, np.broadcast_to(self.num_gt[:, None], tp.shape))

    def _where_defined(self, values):
        return np.where(self.num_gt > 0, values, np.nan)


def weighted_auroc(
    positive: np.ndarray, score: np.ndarray, unit: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Area under the receiver operating characteristic: the share of pairs of a positive and a
    negative case in which the positive one has the higher score; ties count half.

    Args:
        positive, score: (M,), of each case.
        unit: (M,) int in [0, U), the unit that each case belongs to.
        weights: (B, U) int, how often each resample holds each unit.

    Returns:
        (B,) in [0, 1], NaN for resamples without cases of both kinds.
    """
    # Both by rising score, so that neighbours are looked up one after the other.
    ascending, rising = (
        np.flatnonzero(kind)[np.argsort(score[kind], kind="stable")]
        for kind in (~positive, positive)
    )
    negatives, positives = (np.take(weights, unit[rows], axis=1) for rows in (ascending, rising))
    below = np.zeros((len(weights), len(ascending) + 1), dtype=np.int64)
    np.cumsum(negatives, axis=1, out=below[:, 1:])
    first, last = (
        np.searchsorted(score[ascending], score[rising], side) for side in ("left", "right")
    )
    won = np.take(below, first, axis=1) + np.take(below, last, axis=1)
    pairs = positives.sum(axis=1) * below[:, -1]
    return divide(np.einsum("bp,bp->b", positives, won), 2 * pairs)


def _search(ascending, values, side):
    """(B, K) positions of (B, K) values in the rows of (B, H) ascending numbers, in [0, H]."""
    rows = zip(ascending, values, strict=True)
    places = [np.searchsorted(row, row_values, side) for row, row_values in rows]
    return np.array(places, dtype=np.int64).reshape(values.shape)


def _at(rows, places):
    """(B, K) values of the (B, H) rows at (B, K) int places, 0 at those not in [0, H)."""
    inside = (places >= 0) & (places < rows.shape[1])
    values = np.zeros(places.shape, rows.dtype)
    values[inside] = rows[np.nonzero(inside)[0], places[inside]]
    return values


@dataclass(frozen=True, eq=False)
class PRCurve:
    """The precision-recall curve of one class: a point for each detection as the threshold, from
    the highest score down."""

    score: np.ndarray  # (N,) float, falling; ties by image id, then file order
    tp: np.ndarray  # (N,) int, hits among the detections so far
    fp: np.ndarray  # (N,) int, false alarms among them
    num_gt: int  # ground truths of the class, crowds left out

    @property
    def precision(self) -> np.ndarray:
        """(N,) in [0, 1]."""
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self) -> np.ndarray:
        """(N,) in [0, 1]; NaN without ground truth."""
        return self.tp / self.num_gt if self.num_gt else np.full(len(self.tp), np.nan)

    @property
    def envelope(self) -> np.ndarray:
        """(N,) in [0, 1], the best precision at this recall or a higher one."""
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
        through = hits[None] + 1
        return WeightedCurve(
            copies=np.ones_like(through),
            through=through,
            last=np.arange(len(hits)),
            through_last=through,
            total=np.array([len(self.tp)]),
            num_gt=np.array([self.num_gt]),
        )


def pr_curve(score: np.ndarray, hit: np.ndarray, num_gt: int) -> PRCurve:
    """The curve of the N evaluated detections, by image id and file order, and the number of ground
    truths without crowds."""
    order = np.argsort(-score, kind="stable")
    hit = hit[order]
    tp, fp = (np.cumsum(kind, dtype=np.int32) for kind in (hit, ~hit))
    return PRCurve(score[order], tp, fp, int(num_gt))


@dataclass(frozen=True, eq=False)
class FROC:
    """Share of the lesions that are hit against the mean number of false alarms per image, over all
    images and classes, as the threshold falls from the highest score to the lowest. Detections of
    equal scores are above it together. Results without scores have no curve."""

    score: np.ndarray  # (N,), of the evaluated detections, as the next two
    hit: np.ndarray
    image: np.ndarray
    lesions: np.ndarray  # (I,) int, lesions in each image
    scored: bool = True

    def curve(self) -> dict[str, np.ndarray]:
        """K values each, for the K scores from the highest down: "score", "tp" and "fp" (detections
        at this score or higher), "sensitivity" in percent, "fp_per_image". NaN where there is no
        lesion; K is 0 without scores."""
        order = np.argsort(-self.score, kind="stable")
        score, hit = self.score[order], self.hit[order]
        last = np.flatnonzero(np.diff(score, append=-1.0)) if self.scored else slice(0)
        tp, fp = np.cumsum(hit)[last], np.cumsum(~hit)[last]
        lesions = self.lesions.sum()
        return {
            "score": score[last],
            "tp": tp,
            "fp": fp,
            "sensitivity": 100 * tp / lesions if lesions else np.full(len(tp), np.nan),
            "fp_per_image": fp / max(len(self.lesions), 1),
        }

    def values(self) -> dict[str, float]:
        """The best sensitivity in percent with no more than each of RATES false alarms per image,
        and the mean of the seven (the score of LUNA16). Unlike there, nothing is interpolated: each
        is reached at a threshold. NaN without a lesion and for results that know no scores."""
        ranked = RankedDetections(Ranking(self.score, self.image), self.hit, self.lesions)
        once = np.ones((1, len(self.lesions)), int)
        values = self.read_off(ranked.weigh(once), np.array([len(self.lesions)]))
        return {name: float(value[0]) for name, value in values.items()}

    def read_off(self, curve: WeightedCurve, images: np.ndarray) -> dict[str, np.ndarray]:
        """(B,) each, as :meth:`values`, of the curve of these detections in B resamples, given the
        (B,) int number of images in each."""
        sensitivity = 100 * curve.sensitivity(np.multiply.outer(images, RATES))
        if not self.scored:
            sensitivity[:] = np.nan
        values = {f"sensitivity_at_{rate:g}": sensitivity[:, i] for i, rate in enumerate(RATES)}
        return {**values, "mean": sensitivity.mean(axis=1)}
