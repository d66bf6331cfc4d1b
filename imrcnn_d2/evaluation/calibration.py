"""Does a score mean what it says: of detections scored 0.8, do 80 % hit a lesion?"""

import logging
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger(__name__)

BINS = 10  # of equal width between 0 and 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores as probabilities of a hit, of all evaluated detections at any threshold."""

    score: np.ndarray  # (N,) float in [0, 1]
    hit: np.ndarray  # (N,) bool
    image: np.ndarray  # (N,) int in [0, I), the image of each
    num_images: int  # I

    @classmethod
    def of_scores(
        cls, score: np.ndarray, hit: np.ndarray, image: np.ndarray, num_images: int, scored: bool
    ) -> "Calibration":
        """The arguments are the attributes. Without scores, or with some above 1 (which is logged),
        nothing remains: scores that are no probabilities are not calibrated."""
        if scored and (score > 1).any():
            logger.warning("There are scores above 1: their calibration is undefined.")
            scored = False
        if not scored:
            score, hit, image = score[:0], hit[:0], image[:0]
        return cls(score, hit, image, num_images)

    def diagram(self) -> dict[str, np.ndarray]:
        """The reliability diagram: (BINS,) each, by rising score: "lower" and "upper" (a score on
        an edge belongs to the bin below it, as in scikit-learn), "detections", "hits", "mean_score"
        and "hit_rate" in percent, NaN in bins without a detection."""
        edges = np.arange(BINS + 1) / BINS
        sums, hits, detections = (
            np.bincount(self._bin(), part, minlength=BINS)
            for part in (self.score, self.hit, np.ones(len(self.hit)))
        )
        filled = np.where(detections, detections, np.nan)
        return {
            "lower": edges[:-1],
            "upper": edges[1:],
            "detections": detections.astype(int),
            "hits": hits.astype(int),
            "mean_score": 100 * sums / filled,
            "hit_rate": 100 * hits / filled,
        }

    def values(self) -> dict[str, float]:
        """The metrics in percent: "ece" (expected calibration error: the difference of mean score
        and hit rate in a bin, averaged over detections), "brier" (mean squared difference of score
        and hit), "mean_score", "hit_rate", NaN without a detection; and "n" (detections)."""
        values = self.formulas(self.columns().sum(axis=0))
        return {name: float(value) for name, value in values.items()}

    @staticmethod
    def formulas(total: np.ndarray) -> dict[str, np.ndarray]:
        """(...,) each, as :meth:`values`, of (..., 4 + BINS) sums of :meth:`columns`."""
        number, squared, score, hits = (total[..., i] for i in range(4))
        filled = np.where(number, number, np.nan) / 100
        return {
            "n": number,
            "ece": np.abs(total[..., 4:]).sum(axis=-1) / filled,
            "brier": squared / filled,
            "mean_score": score / filled,
            "hit_rate": hits / filled,
        }

    def columns(self) -> np.ndarray:
        """(I, 4 + BINS) sums over the detections of each image of 1, squared error, score and hit,
        and in each bin of score minus hit."""
        excess = self.score - self.hit
        columns = np.zeros((self.num_images, 4 + BINS))
        for k, part in enumerate((np.ones(len(excess)), excess**2, self.score, self.hit)):
            columns[:, k] = np.bincount(self.image, part, minlength=self.num_images)
        np.add.at(columns, (self.image, 4 + self._bin()), excess)
        return columns

    def _bin(self):
        """(N,) int in [0, BINS)."""
        return np.searchsorted(np.arange(1, BINS) / BINS, self.score)
