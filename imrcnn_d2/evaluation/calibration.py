"""Does a score mean what it says: of detections scored 0.8, do 80 % hit a lesion?"""

import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy import optimize, special

from imrcnn_d2.utils.files import BadInputError

logger = logging.getLogger(__name__)

BINS = 10  # of equal width between 0 and 1
LEAST_SLOPE = 0.01  # of a map of scores
FEW_CASES = 10  # hits, or misses, below which a warning says that such a map is rough
LEAST_PROBABILITY = np.finfo(np.float32).smallest_subnormal  # in place of 0, for its logarithm


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
        and hit rate in a bin, without what chance adds to it, averaged over detections), "brier"
        (mean squared difference of score and hit), "mean_score", "hit_rate", NaN without a
        detection; and "n" (detections)."""
        values = self.formulas(self.columns().sum(axis=0))
        return {name: float(value) for name, value in values.items()}

    @staticmethod
    def formulas(total: np.ndarray) -> dict[str, np.ndarray]:
        """(...,) each, as :meth:`values`, of (..., 4 + 3 BINS) sums of :meth:`columns`.

        Even where scores are right, hit rates of few detections differ from them by chance, and a
        sum of absolute differences adds this up. What it adds is estimated as in Kumar, Liang and
        Ma ("Verified uncertainty calibration", NeurIPS 2019; the estimator of the L1 error in their
        library): with a hit rate that is normal around the one observed, d from the mean score and
        with its binomial standard error s, the mean of the absolute difference exceeds d by a known
        amount, which is subtracted from d. Where scores are right that removes about 40 % of what
        chance adds, where d is far above s it changes nothing; in between it is somewhat too much
        (9.3 for 10 % with 30 detections in a bin). An error below 0 is 0.
        """
        number, squared, score, hits = (total[..., i] for i in range(4))
        filled = np.where(number, number, np.nan) / 100
        excess, in_bin, hits_in_bin = np.split(total[..., 4:], 3, axis=-1)
        rate = hits_in_bin / np.maximum(in_bin, 1)
        # All in numbers of detections, not rates.
        distance, deviation = np.abs(excess), np.sqrt(np.maximum(in_bin * rate * (1 - rate), 0))
        ratio = distance / np.maximum(deviation, 1e-12) / np.sqrt(2)
        folded = deviation * np.sqrt(2 / np.pi) * np.exp(-(ratio**2))
        folded += distance * special.erf(ratio)
        error = (2 * distance - folded).sum(axis=-1)
        return {
            "n": number,
            "ece": np.maximum(error, 0) / filled,
            "brier": squared / filled,
            "mean_score": score / filled,
            "hit_rate": hits / filled,
        }

    def columns(self) -> np.ndarray:
        """(I, 4 + 3 BINS) sums over the detections of each image of 1, squared error, score and
        hit, and in each bin of score minus hit, then of 1, then of hit."""
        excess, ones = self.score - self.hit, np.ones(len(self.score))
        columns = np.zeros((self.num_images, 4 + 3 * BINS))
        for k, part in enumerate((ones, excess**2, self.score, self.hit)):
            columns[:, k] = np.bincount(self.image, part, minlength=self.num_images)
        for k, part in enumerate((excess, ones, self.hit)):
            np.add.at(columns, (self.image, 4 + k * BINS + self._bin()), part)
        return columns

    def _bin(self):
        """(N,) int in [0, BINS)."""
        return np.searchsorted(np.arange(1, BINS) / BINS, self.score)


class FittedMap:
    """Base of the maps that weights carry: dataclasses of numbers, the first of them above 0, and
    of the ``dataset`` that they were fitted on."""

    @classmethod
    def of_file(cls, value: object, path: str | Path) -> "FittedMap":
        """The map of a file of weights, given as a dict of the attributes.

        Raises:
            BadInputError: it is none.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(value, dict) and value.keys() == set(names):
            *numbers, dataset = (value[name] for name in names)
            # In this way also of integers beyond what a float can be.
            finite = all(type(n) in (int, float) and abs(n) <= sys.float_info.max for n in numbers)
            if finite and numbers[0] > 0 and isinstance(dataset, str | None):
                return cls(*map(float, numbers), dataset)
        raise BadInputError(
            path,
            f"its score_map {str(value)[:80]!r} must have {names[0]}, above 0, "
            f"{' and '.join(names[1:])}: get the file anew, or export it again (imrcnn export)",
        )


@dataclass(frozen=True)
class ScoreMap(FittedMap):
    """From a detection's score to its probability of a hit: the sigmoid of ``slope`` times the
    score's logit plus ``offset`` (Platt, "Probabilistic outputs for support vector machines",
    1999). It keeps the order of scores: ``slope`` is above 0."""

    slope: float
    offset: float
    dataset: str | None = None  # the validation set that it was fitted on

    @classmethod
    def fit(
        cls, score: np.ndarray, hit: np.ndarray, dataset: str | None = None
    ) -> "ScoreMap | None":
        """The most likely map, with Platt's targets, which keep it finite where scores separate
        hits from misses; None where all detections hit, or none does.

        Args:
            score: (N,) float in [0, 1].
            hit: (N,) bool.
            dataset: name of the validation set, to be recorded.

        Raises:
            ValueError: a score outside [0, 1].
        """
        score, hit = np.asarray(score, float), np.asarray(hit, bool)
        hits, misses = int(hit.sum()), int((~hit).sum())
        place = f" in {dataset}" if dataset else ""
        numbers = f"Of the detections{place}, {hits} hit a lesion and {misses} do not"
        if not hits or not misses:
            logger.warning(
                f"{numbers}: no map of scores can be fitted, thresholds are of raw ones."
            )
            return None
        if min(hits, misses) < FEW_CASES:
            logger.warning(f"{numbers}: the map of scores that they give is rough.")
        logit = _logit(score)
        target = np.where(hit, (hits + 1) / (hits + 2), 1 / (misses + 2))

        def loss(parameters):
            z = parameters[0] * logit + parameters[1]
            excess = special.expit(z) - target
            value = np.logaddexp(0, z) - target * z
            return value.mean(), np.array([(excess * logit).mean(), excess.mean()])

        bounds = [(LEAST_SLOPE, None), (None, None)]
        slope, offset = optimize.minimize(loss, (1.0, 0.0), jac=True, bounds=bounds).x
        if slope == LEAST_SLOPE:
            logger.warning("Hits do not have higher scores than misses: the scores say nothing.")
        return cls(float(slope), float(offset), dataset)

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Probabilities of a hit, of scores in [0, 1] of any shape."""
        return special.expit(self.slope * _logit(score) + self.offset)

    def inverse(self) -> "ScoreMap":
        """The map from mapped scores back to the network's."""
        return ScoreMap(1 / self.slope, -self.offset / self.slope)

    def map_records(self, records: list[dict]) -> list[dict]:
        """COCO records with the mapped score as ``score`` and their own as ``raw_score``."""
        raw = [record["score"] for record in records]
        return [
            {**record, "score": score, "raw_score": raw_score}
            for record, score, raw_score in zip(records, self(raw).tolist(), raw, strict=True)
        ]


@dataclass(frozen=True)
class Temperature(FittedMap):
    """From a classifier's probabilities to calibrated ones: the softmax of their logarithms over
    ``temperature`` (Guo et al., "On calibration of modern neural networks", ICML 2017, section
    4.2). It keeps the order of the classes, and so which one is predicted."""

    temperature: float
    dataset: str | None = None  # the validation set that it was fitted on

    @classmethod
    def fit(
        cls, probability: np.ndarray, label: np.ndarray, dataset: str | None = None
    ) -> "Temperature | None":
        """The temperature of the least cross-entropy; None where all images are predicted rightly:
        the lower the temperature the better then.

        Args:
            probability: (N, K) float in [0, 1], of all classes.
            label: (N,) int in [0, K), the true class.
            dataset: name of the validation set, to be recorded.
        """
        logs = _log(probability)
        true = logs[np.arange(len(logs)), label]
        if (true == logs.max(axis=1)).all():
            return None

        def loss(parameters):
            z = parameters[0] * logs
            value = special.logsumexp(z, axis=1) - parameters[0] * true
            slope = (special.softmax(z, axis=1) * logs).sum(axis=1) - true
            return value.mean(), slope.mean(keepdims=True)

        # Convex in the reciprocal.
        (factor,) = optimize.minimize(loss, 1.0, jac=True, bounds=[(LEAST_SLOPE, None)]).x
        if factor == LEAST_SLOPE:
            logger.warning("The likeliest class is no likelier than others to be the true one.")
        return cls(float(1 / factor), dataset)

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, of (..., K) probabilities of the classes."""
        return special.softmax(_log(probability) / self.temperature, axis=-1)

    def map_records(self, records: list[dict]) -> list[dict]:
        """Records of :func:`evaluate_classification` with calibrated ``scores``, and their own as
        ``raw_scores``."""
        return [
            {**record, "scores": self(record["scores"]).tolist(), "raw_scores": record["scores"]}
            for record in records
        ]


def _log(probability):
    return np.log(np.maximum(np.asarray(probability, float), LEAST_PROBABILITY))


def _logit(score):
    score = np.asarray(score, float)
    # A graph's softmax may be above 1 by a rounding.
    if not ((score >= 0) & (score <= 1 + 1e-6)).all():
        raise ValueError("Scores must be from 0 to 1 to be mapped to probabilities.")
    return special.logit(np.clip(score, 1e-9, 1 - 1e-9))
