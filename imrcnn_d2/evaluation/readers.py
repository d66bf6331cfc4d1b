"""Readers with and without AI on the same cases: multi-reader multi-case (MRMC) studies.

Each of J readers gives each of N cases a rating in two modalities, such as without and with AI. A
difference between the modalities holds for other readers and other cases only as far as it is
larger than what readers and cases vary by: the analysis of variance of Obuchowski and Rockette
(1995, doi 10.1080/03610919508813243), with the degrees of freedom of Hillis (2007, doi
10.1002/sim.2532), by which it agrees with Dorfman, Berbaum and Metz (DBM).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from imrcnn_d2.data.prepare.metadata import Row, read_table
from imrcnn_d2.evaluation.comparison import Difference, difference_by_t, non_inferiority
from imrcnn_d2.evaluation.detection.counts import divide
from imrcnn_d2.evaluation.output import package_versions
from imrcnn_d2.evaluation.statistics import LEVEL, NAN
from imrcnn_d2.utils.files import BadInputError, csv_text, few, strict_json, write_texts

COLUMNS = ("reader", "modality", "case", "truth", "rating")
# Optional: of the lesions of a case, those that the reader marked, and marks elsewhere.
MARKS = ("lesions", "hits", "false_marks")
# The metrics in percent, of which more is better: a margin in points is for them.
PERCENT = ("auc", "sensitivity", "specificity", "lesion_sensitivity")
# Of the variance of a reader's metric; a difference with less has none but by rounding.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class ReaderStudy:
    """The ratings of N cases by J readers in two modalities, the baseline first."""

    modalities: tuple[str, str]
    readers: list[str]
    cases: list[str]
    positive: np.ndarray  # (N,) bool, of the truth
    unit: np.ndarray  # (N,) int in [0, G), the patient of a case, else its own
    rating: np.ndarray  # (2, J, N) float, larger is more suspicious
    lesions: np.ndarray | None = None  # (N,)
    hits: np.ndarray | None = None  # (2, J, N)
    false_marks: np.ndarray | None = None  # (2, J, N)


@dataclass(frozen=True, eq=False)
class ReaderMetric:
    """A metric of a study, in percent but for false marks per case.

    Attributes:
        values: (2, J) of each modality and reader.
        means: of each modality, over the readers.
        intervals: the 95 % intervals of the means, for other readers and other cases; NaN where
            neither varies.
        difference: of the means, the other modality minus the baseline.
        components: variances and covariances, in the squared unit of the metric: ``reader``,
            ``reader_modality``, ``error``, ``cov1`` (one reader, two modalities), ``cov2`` (two
            readers, one modality), ``cov3`` (neither the same).
    """

    values: np.ndarray
    means: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    difference: Difference
    components: dict[str, float]


def read_readers(path: str | Path, baseline: str | None = None) -> ReaderStudy:
    """Read a table with one row for each reader, modality and case, in any order: COLUMNS, of which
    truth is 1 (with a lesion) or 0, perhaps ``patient_id``, and MARKS for lesions that were marked.

    Args:
        baseline: the modality to compare with, such as "without"; None takes the first row's.

    Raises:
        BadInputError: the table cannot be read; a cell holds another value; there are not two
            modalities, two readers, and cases of both kinds; a reader lacks a case in a modality,
            or has it twice; a case has two truths, patients or numbers of lesions.
    """
    path = Path(path)
    table = read_table(path, COLUMNS)
    rows = [row.cells for row in table.rows]
    readers, modalities, cases = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("reader", "modality", "case")
    )
    if len(modalities) != 2 or len(readers) < 2:
        raise BadInputError(
            path,
            f"has {len(modalities)} modalities ({few(modalities)}) and {len(readers)} readers: a "
            "study needs two modalities and at least two readers",
        )
    if baseline not in (None, *modalities):
        raise BadInputError(
            path, f"the baseline {baseline!r} is not one of its modalities: {few(modalities)}"
        )
    if baseline == modalities[1]:
        modalities.reverse()
    position = {case: number for number, case in enumerate(cases)}
    places = [
        (modalities.index(row["modality"]), readers.index(row["reader"]), position[row["case"]])
        for row in rows
    ]
    shape = len(modalities), len(readers), len(cases)
    times = Counter(places)
    for place in np.ndindex(shape):
        if times[place] != 1:
            m, r, c = place
            raise BadInputError(
                path,
                f"has {times[place]} rows, not one, of case {cases[c]!r} by reader {readers[r]!r} "
                f"in {modalities[m]!r}: every reader rates every case once in each modality",
            )

    def numbers(column: str) -> np.ndarray:
        values = np.empty(shape)
        for place, row in zip(places, table.rows, strict=True):
            values[place] = _number(row, column, path)
        return values

    def of_cases(column: str, values: np.ndarray) -> np.ndarray:
        differs = np.flatnonzero((values != values[0, 0]).any(axis=(0, 1)))
        if len(differs):
            raise BadInputError(path, f"case {cases[differs[0]]!r} has two values of {column}")
        return values[0, 0]

    truth = of_cases("truth", numbers("truth"))
    if set(truth) != {0, 1}:
        raise BadInputError(path, "truth must be 1 (with a lesion) or 0, and cases of both needed")
    patients = np.array([row.get("patient_id") or f"case {row['case']}" for row in rows])
    of_place = np.empty(shape, dtype=int)
    of_place[tuple(np.transpose(places))] = np.unique(patients, return_inverse=True)[1]
    marks = {}
    if given := [name for name in MARKS if name in table.columns]:
        if len(given) < len(MARKS):
            raise BadInputError(path, f"has the columns {', '.join(given)} of {', '.join(MARKS)}")
        marks = {name: numbers(name) for name in MARKS}
        marks["lesions"] = of_cases("lesions", marks["lesions"])
        if (marks["hits"] > marks["lesions"]).any() or min(v.min() for v in marks.values()) < 0:
            raise BadInputError(path, "hits must be at most the lesions of the case, none below 0")
    return ReaderStudy(
        modalities=tuple(modalities),
        readers=readers,
        cases=cases,
        positive=truth == 1,
        unit=of_cases("patient_id", of_place),
        rating=numbers("rating"),
        **marks,
    )


def _number(row: Row, column: str, path: Path) -> float:
    try:
        value = float(row.cells[column])
    except ValueError:
        value = NAN
    if not np.isfinite(value):
        text = row.cells[column]
        raise BadInputError(path, f"line {row.line}: {column} is {text!r}; it must be a number")
    return value


def reader_metrics(
    study: ReaderStudy, positive_from: float | None = None
) -> dict[str, ReaderMetric]:
    """Compare the modalities by the area under the ROC curve ("auc") and, where they are known, by
    "sensitivity" and "specificity" of cases, "lesion_sensitivity" and "false_marks" per case.

    Args:
        positive_from: the least rating that counts as positive. None: 1 where all ratings are 0 or
            1, else there is no sensitivity and specificity.

    Raises:
        ValueError: all ratings are, or none is, at least ``positive_from``.
    """
    if positive_from is None and set(study.rating.ravel()) <= {0, 1}:
        positive_from = 1
    metrics = {"auc": _anova(100 * _auc_without(study))}
    if positive_from is not None:
        rated_positive = study.rating >= positive_from
        if rated_positive.all() or not rated_positive.any():
            lowest, highest = study.rating.min(), study.rating.max()
            raise ValueError(
                f"--positive-from {positive_from:g}: ratings are from {lowest:g} to {highest:g}, "
                f"so that {'every' if rated_positive.all() else 'no'} case is positive"
            )
        right = {"sensitivity": rated_positive, "specificity": ~rated_positive}
        for (name, values), among in zip(
            right.items(), (study.positive, ~study.positive), strict=True
        ):
            metrics[name] = _anova(100 * _share_without(study.unit, values & among, among))
    if study.lesions is not None:
        shares = 100 * _share_without(study.unit, study.hits, study.lesions)
        metrics["lesion_sensitivity"] = _anova(shares)
        ones = np.ones(len(study.cases))
        marks = _share_without(study.unit, study.false_marks, ones)
        metrics["false_marks"] = _anova(marks, np.inf)
    return metrics


def _sums(unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(..., G) sums over the cases of each unit of (..., N)."""
    sums = np.zeros((*values.shape[:-1], unit.max() + 1))
    np.add.at(sums, (..., unit), values)
    return sums


def _share_without(unit, part, whole):
    """(2, J, 1 + G'): sum of (2, J, N) ``part`` over sum of (N,) ``whole``, and the same without
    each of the G' units that have a part of the whole."""
    part, whole = _sums(unit, part), _sums(unit, whole)
    part, whole = part[..., whole > 0], whole[whole > 0]
    all_but = divide(part.sum(axis=-1, keepdims=True) - part, whole.sum() - whole)
    return np.concatenate([part.sum(axis=-1, keepdims=True) / whole.sum(), all_but], axis=-1)


def _auc_without(study):
    """(2, J, 1 + G): the empirical area under the ROC curve in [0, 1], and without each unit."""
    units = study.unit.max() + 1
    positives, negatives = (
        np.eye(units)[study.unit[cases]] for cases in (study.positive, ~study.positive)
    )
    pairs = np.outer(positives.sum(axis=0), negatives.sum(axis=0))
    areas = np.empty((*study.rating.shape[:2], 1 + units))
    for place in np.ndindex(areas.shape[:2]):
        rating = study.rating[place]
        above = np.sign(rating[study.positive][:, None] - rating[~study.positive]) / 2 + 0.5
        areas[place] = divide(*map(_all_and_without, (positives.T @ above @ negatives, pairs)))
    return areas


def _all_and_without(sums):
    """Of (G, G) sums over pairs of units: over all pairs, and over those without each unit."""
    parts = sums.sum(axis=0) + sums.sum(axis=1) - np.diag(sums)
    return np.append(sums.sum(), sums.sum() - parts)


def _anova(values, highest=100.0):
    """The ReaderMetric of (2, J, 1 + G): of all units, and without each of them."""
    theta, without = values[..., 0], values[..., 1:].reshape(-1, values.shape[-1] - 1)
    # Of the jackknife over units (Efron and Stein 1981).
    units = without.shape[1]
    covariances = np.cov(without, bias=True) * (units - 1)
    return obuchowski_rockette(theta, covariances, highest)


def obuchowski_rockette(
    values: np.ndarray, covariances: np.ndarray, highest: float = 100.0
) -> ReaderMetric:
    """Compare two modalities for random readers and random cases.

    The variance of a mean over J readers is (MS_reader·modality + J max(Cov2 - Cov3, 0)) / J, the
    mean square having J - 1 degrees of freedom (Hillis 2007; equations 22 to 25 of Hillis,
    Berbaum and Metz 2008, doi 10.1016/j.acra.2007.12.015).

    Args:
        values: (2, J), of each modality, the baseline first, and reader.
        covariances: (2 J, 2 J) of these over the choice of cases, modality by modality.
        highest: value that the metric can have; intervals are cut at it and at 0.
    """
    _, readers = values.shape
    covariance = covariances.reshape(2, readers, 2, readers)
    same_modality = np.eye(2, dtype=bool)[:, None, :, None]
    same_reader = np.eye(readers, dtype=bool)[None, :, None, :]
    error, cov1, cov2, cov3 = (
        float(covariance[kind & np.ones_like(covariance, bool)].mean())
        for kind in (
            same_modality & same_reader,
            ~same_modality & same_reader,
            same_modality & ~same_reader,
            ~same_modality & ~same_reader,
        )
    )
    by_modality, by_reader = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_modality[:, None] - by_reader + values.mean()
    interaction = (rest**2).sum() / (readers - 1)
    between = 2 * by_reader.var(ddof=1)
    variance = interaction + readers * max(cov2 - cov3, 0)
    if variance < ROUNDING * error:
        variance = interaction = 0.0
    df = variance**2 / (interaction**2 / (readers - 1)) if interaction else np.inf
    se = np.sqrt(2 * variance / readers)
    intervals = []
    for modality, mean in enumerate(by_modality):
        of_pairs = covariance[modality, :, modality][~np.eye(readers, dtype=bool)]
        square = values[modality].var(ddof=1)
        total = square + readers * max(float(of_pairs.mean()), 0)
        freedom = total**2 / (square**2 / (readers - 1)) if square else np.inf
        if total <= ROUNDING * error:  # readers and cases that do not vary tell of no others
            intervals.append((np.nan, np.nan))
            continue
        half = np.sqrt(total / readers) * stats.t.ppf((1 + LEVEL) / 2, freedom)
        intervals.append((float(max(mean - half, 0)), float(min(mean + half, highest))))
    return ReaderMetric(
        values=values,
        means=tuple(map(float, by_modality)),
        intervals=tuple(intervals),
        difference=difference_by_t(by_modality[1] - by_modality[0], se, df),
        components={
            "reader": (between - interaction) / 2 - cov1 + cov3,
            "reader_modality": interaction - error + cov1 + cov2 - cov3,
            **{"error": error, "cov1": cov1, "cov2": cov2, "cov3": cov3},
        },
    )


def write_readers(
    study: ReaderStudy,
    metrics: dict[str, ReaderMetric],
    folder: str | Path,
    margin: float | None = None,
    **meta,
) -> list[Path]:
    """Write ``readers.json`` (means, differences, variances) and ``readers.csv`` (one row per
    metric, modality and reader), and return their paths. ``meta`` are JSON values to record."""
    document, rows = {}, []
    for name, metric in metrics.items():
        means = zip(study.modalities, metric.means, metric.intervals, strict=True)
        difference = metric.difference
        document[name] = {
            "means": {m: {"mean": mean, "ci": interval} for m, mean, interval in means},
            "difference": difference.estimate,
            "difference_ci": (difference.low, difference.high),
            **{"p": difference.p, "se": difference.se, "df": difference.df},
            "components": metric.components,
        }
        if margin is not None and name in PERCENT:
            document[name]["non_inferiority_p"] = non_inferiority(difference, margin)
        for modality, values in zip(study.modalities, metric.values.tolist(), strict=True):
            for reader, value in zip(study.readers, values, strict=True):
                row = {"metric": name, "modality": modality, "reader": reader, "value": value}
                rows.append(row)
    meta = {
        **meta,
        **{"baseline": study.modalities[0], "margin": margin},
        **{"readers": len(study.readers), "cases": len(study.cases)},
        **{"positive": int(study.positive.sum()), "units": int(study.unit.max() + 1)},
        "versions": package_versions(),
    }
    texts = {
        "readers.json": strict_json({"metrics": document, "meta": meta}),
        "readers.csv": csv_text(rows, ["metric", "modality", "reader", "value"]),
    }
    return write_texts(folder, texts)
