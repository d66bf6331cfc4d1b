"""Precision-recall curves and what is read off them."""

from dataclasses import dataclass

import numpy as np

__all__ = ["PRCurve", "pr_curve"]


@dataclass(frozen=True, eq=False)
class PRCurve:
    """
    The precision-recall curve of one class: a point for each detection let through, from the
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
    def area(self):
        """
        float: area in [0, 1] under the envelope, from every recall reached (the all-point average
        precision of Pascal VOC since 2010). 0 without a detection, NaN without ground truth.
        """
        if not self.num_gt:
            return float("nan")
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.envelope))

    @property
    def break_even_point(self):
        """
        float: share in [0, 1] of hits among the n highest-scored detections, n being the number of
        ground truths: there precision equals recall. NaN with fewer than n detections (but 0 with
        none at all) and without ground truth.
        """
        if not self.num_gt:
            return float("nan")
        if not len(self.tp):
            return 0.0
        if len(self.tp) < self.num_gt:
            return float("nan")
        return float(self.tp[self.num_gt - 1] / self.num_gt)


def pr_curve(score, hit, num_gt):
    """
    Args:
        score (np.ndarray): (N,) float, the detections that count, by image id and file order.
        hit (np.ndarray): (N,) bool.
        num_gt (int): ground truths, crowds left out.

    Returns:
        PRCurve:
    """
    order = np.argsort(-score, kind="stable")
    hit = hit[order]
    return PRCurve(score[order], np.cumsum(hit), np.cumsum(~hit), int(num_gt))
