"""Precision-recall, receiver operating and free-response curves, also of many resamples at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imrcnn_d2.evaluation.detection.counts import divide

# Recalls at which COCO samples the precision-recall curve.
RECALLS = np.linspace(0, 1, 101)
# Mean false alarms per image at which the sensitivity is read off, as in the LUNA16 challenge.
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)


class Ranking:
    """N detections from the highest score down, given scores by image id and file order and the
    unit in [0, U) that each belongs to."""

    def __init__(self, score: np.ndarray, unit: np.ndarray):
        self.order = np.argsort(-score, kind="stable")  # ties stay in order
        self.unit = unit[self.order]
        falling = -score[self.order]
        # (N,) int, place in the ranking of the last that has the score of each.
        self.ends = np.searchsorted(falling, falling, side="right") - 1

    def copies(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, N) int each, copies of each detection, and of all up to and with it, under (B, U) int
        weights: how often each resample holds each unit."""
        copies = np.take(weights, self.unit, axis=1)
        return copies, np.cumsum(copies, axis=1, dtype=np.int32)


class RankedDetections:
    """The N detections of one class, or of all, whether they hit, in their original order, and the
    (U,) ground truths of each unit, crowds left out."""

    def __init__(self, ranking: Ranking, hit: np.ndarray, lesions: np.ndarray):
        self.ranking, self.lesions = ranking, lesions
        self.hits = np.flatnonzero(hit[ranking.order])

    def weigh(self, weights: np.ndarray, copies: tuple | None = None) -> "WeightedCurve":
        """The curves under (B, U) int weights. ``copies`` are the ranking's, where known."""
        copies, through = copies or self.ranking.copies(weights)
        ends = self.ranking.ends[self.hits]
        copies = np.take(copies, self.hits, axis=1)
        return WeightedCurve(self.hits, ends, through, copies, weights @ self.lesions)

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
    """The precision-recall curves of B resamples, as far as they differ: at each of N detections
    from the highest score down, H of them hits, after all of its copies. All metrics are shares in
    [0, 1], NaN for resamples without ground truth."""

    hits: np.ndarray  # (H,) int, ascending positions of the hits among the detections
    ends: np.ndarray  # (H,) int, position of the last detection that has the score of each hit
    through: np.ndarray  # (B, N) int, detections so far
    copies: np.ndarray  # (B, H) int, of each hit
    num_gt: np.ndarray  # (B,) int, ground truths

    @cached_property
    def tp(self) -> np.ndarray:
        """(B, H) int, hits up to and with each hit."""
        return np.cumsum(self.copies, axis=1, dtype=np.int32)

    @cached_property
    def envelope(self) -> np.ndarray:
        """(B, H) float, the best precision at the recall of each hit or a higher one. Each copy of
        a hit raises the precision, so that all share the value of the last."""
        precision = self.tp / np.maximum(np.take(self.through, self.hits, axis=1), 1)
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
        beyond = np.zeros((len(self.tp), 1))
        sampled = np.take_along_axis(np.hstack([self.envelope, beyond]), reached, axis=1)
        return self._where_defined(sampled.mean(axis=1))

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

    def sensitivity(self, false_alarms: np.ndarray) -> np.ndarray:
        """(B, R), the best recall with no more than (B, R) false alarms at any threshold;
        detections of equal scores are above it together."""
        cumulated = _from_zero(self.tp)
        tp = np.take(cumulated, np.searchsorted(self.hits, self.ends, side="right"), axis=1)
        index = _search(np.take(self.through, self.ends, axis=1) - tp, false_alarms, "right")
        tp = np.take_along_axis(cumulated, index, axis=1)
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
    places = [np.searchsorted(row, row_values, side) for row, row_values in rows]
    return np.array(places, dtype=np.int64).reshape(values.shape)


def _from_zero(cumulated):
    """(B, N) as (B, N + 1), with a zero before the first."""
    return np.pad(cumulated, ((0, 0), (1, 0)))


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
        copies = np.ones((1, len(hits)), int)
        through, num_gt = (self.tp + self.fp)[None], np.array([self.num_gt])
        return WeightedCurve(hits, hits, through, copies, num_gt)


def pr_curve(score: np.ndarray, hit: np.ndarray, num_gt: int) -> PRCurve:
    """The curve of the N evaluated detections, by image id and file order, and the number of ground
    truths without crowds."""
    order = np.argsort(-score, kind="stable")
    hit = hit[order]
    return PRCurve(score[order], np.cumsum(hit), np.cumsum(~hit), int(num_gt))


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
        values = self.read_off(ranked.weigh(once), once.sum(axis=1))
        return {name: float(value[0]) for name, value in values.items()}

    def read_off(self, curve: WeightedCurve, images: np.ndarray) -> dict[str, np.ndarray]:
        """(B,) each, as :meth:`values`, of the curve of these detections in B resamples, given the
        (B,) int number of images in each."""
        sensitivity = 100 * curve.sensitivity(np.multiply.outer(images, RATES))
        if not self.scored:
            sensitivity[:] = np.nan
        values = {f"sensitivity_at_{rate:g}": sensitivity[:, i] for i, rate in enumerate(RATES)}
        return {**values, "mean": sensitivity.mean(axis=1)}
