"""The free-response receiver operating characteristic: lesions found against false alarms."""

from dataclasses import dataclass

import numpy as np

from .ranking import RankedDetections, Ranking

__all__ = ["RATES", "FROC"]

# Mean false alarms per image at which the sensitivity is read off, as in the LUNA16 challenge.
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class FROC:
    """
    Share of the lesions that are hit against the mean number of false alarms per image, over all
    images and classes, as the threshold falls from the highest score to the lowest. Detections of
    the same score are let through together.

    Attributes:
        score (np.ndarray): (N,) float, falling; the detections that count.
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
    def of(cls, gt, detections, matching):
        """
        Args:
            gt (GroundTruth):
            detections (Detections):
            matching (Matching): of these two.
        """
        order = np.flatnonzero(matching.counts)
        order = order[np.argsort(-detections.score[order], kind="stable")]
        return cls(
            detections.score[order],
            matching.hit[order],
            detections.regions.image[order],
            gt.lesions,
            detections.scored,
        )

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

    def figures(self, weights=None):
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
        figures = self.read_off(ranked.weigh(rows), rows.sum(axis=1))
        if weights is None:
            return {name: float(values[0]) for name, values in figures.items()}
        return figures

    def read_off(self, curve, images):
        """
        Args:
            curve (WeightedCurve): of these detections in B resamples.
            images (np.ndarray): (B,) int, images in each.

        Returns:
            dict[str, np.ndarray]: (B,) each, as :meth:`figures`.
        """
        sensitivity = 100 * curve.sensitivity(np.multiply.outer(images, RATES))
        if not self.scored:
            sensitivity[:] = np.nan
        figures = {f"sensitivity_at_{rate:g}": sensitivity[:, i] for i, rate in enumerate(RATES)}
        return {**figures, "mean": sensitivity.mean(axis=1)}
