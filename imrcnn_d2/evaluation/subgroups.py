"""Metrics by group: of the images, or of the lesions, that share the value of a column.

A column of images (centre, device, age of the patient) divides the data set: each part is evaluated
as a data set, with every metric. A column of lesions (Paris class, size in mm) divides the lesions
alone; false alarms belong to no lesion, so that there are recall and overlaps only.
"""

import logging
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np

from imrcnn_d2.evaluation.classification import ClassificationResults, LabelledImages
from imrcnn_d2.evaluation.detection.counts import UnitCounts
from imrcnn_d2.evaluation.detection.inputs import GroundTruth
from imrcnn_d2.evaluation.detection.metrics import (
    FEW_CASES,
    GroupFormulas,
    ResampledMetrics,
    denominator,
    stratum_columns,
    stratum_metrics,
    stratum_proportions,
)
from imrcnn_d2.evaluation.detection.operating_point import OperatingPoint
from imrcnn_d2.evaluation.detection.results import LesionResults
from imrcnn_d2.evaluation.output import interleave_intervals
from imrcnn_d2.evaluation.statistics import (
    FEW,
    Bootstrap,
    bootstrap_se,
    confidence_intervals,
    resampled_metrics,
)

logger = logging.getLogger(__name__)

# Name of the group of those for which the column has no value.
UNKNOWN = "not known"
# More are mostly a column of numbers or names; each takes an evaluation.
MAX_GROUPS = 30


@dataclass(frozen=True)
class By:
    """How to group by a field of COCO's images or annotations."""

    column: str
    # Where bins of numbers begin and end, ascending: with (5, 10) they are <5, 5-10 (5 and what is
    # below 10) and >=10. None: one group per value.
    limits: tuple[float, ...] | None = None
    each: bool = False  # one group for each number there is


@dataclass(frozen=True, eq=False)
class Group:
    """A group of images, or of lesions, of which ``values`` has "lesion" alone."""

    n: dict[str, int]  # images, lesions and patients in it, or that have such lesions, where known
    values: dict[str, dict[str, float]]  # as of :meth:`LesionResults.compared`
    intervals: dict[str, dict[str, tuple[float, float]]]
    undefined_shares: dict[str, float]
    # By bootstrap, of all metrics; empty without one.
    standard_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    # The evaluation of these images alone; None of a group of lesions.
    results: LesionResults | ClassificationResults | None = None

    @classmethod
    def of_images(
        cls, results: LesionResults | ClassificationResults, bootstrap: Bootstrap | None
    ) -> "Group":
        """All images of an evaluation as a group."""
        metrics, intervals, shares, errors = results.metrics, {}, {}, {}
        if bootstrap is not None:
            resampled = resampled_metrics(metrics, bootstrap)
            intervals, shares = confidence_intervals(metrics, bootstrap, resampled)
            errors = {
                level: {
                    name: bootstrap_se(samples[~np.isnan(samples)], metrics.num_units)
                    for name, samples in values.items()
                }
                for level, values in resampled.items()
            }
        n = {key: results.meta.get(key) for key in ("images", "lesions", "patients")}
        n = {key: count for key, count in n.items() if count is not None}
        values = {**results.compared(), "calibration": results.calibration}
        return cls(n, values, intervals, shares, errors, results)

    def cases(self, endpoint: str) -> tuple[int, str] | None:
        """As :func:`denominator`, also of classifiers, of whose mean over classes it is the images
        of the rarest class."""
        level, _, metric = endpoint.partition("/")
        if level != "recognition":
            return denominator(self.values, endpoint)
        meta = self.results.meta
        sizes = dict(zip(meta["classes"], meta["images_of_class"], strict=True))
        of_class = metric.removeprefix("accuracy_").removeprefix("recall_")
        if metric in ("top1", "cross_entropy"):
            return sum(sizes.values()), "images"
        if metric in ("balanced_accuracy", "f1", "auroc"):
            return min(filter(None, sizes.values())), "images of the rarest class"
        return (sizes[of_class], "images of the class") if of_class in sizes else None

    def is_few(self, endpoint: str) -> bool:
        """ "group/metric" is of fewer than FEW_CASES cases, as far as is known."""
        cases = self.cases(endpoint)
        return cases is not None and cases[0] < FEW_CASES

    def document(self) -> dict:
        """What metrics.json holds of it."""
        metrics = interleave_intervals(self.values, self.intervals)
        return {"n": self.n, **metrics, "undefined_shares": self.undefined_shares}

    def rows(self) -> list[dict]:
        """One row per metric, for by_group.csv."""
        rows = []
        for level, values in self.values.items():
            for metric, value in values.items():
                row = self.row(f"{level}/{metric}")
                rows.append({"level": level, "figure": metric, "value": value, **row})
        return rows

    def row(self, endpoint: str) -> dict:
        """Interval and cases of "group/metric", as cells of a table of values."""
        level, _, metric = endpoint.partition("/")
        low, high = self.intervals.get(level, {}).get(metric, (math.nan, math.nan))
        number, noun = self.cases(endpoint) or (None, "")
        few = None if number is None else self.is_few(endpoint)
        return {"low": low, "high": high, "cases": number, "cases_are": noun, "few_cases": few}


@dataclass(frozen=True, eq=False)
class GroupedMetrics:
    level: str  # "image" or "lesion": what the column is of
    groups: dict[str, Group]  # by name, in order; those of unknown value last

    def document(self) -> dict:
        """What metrics.json holds of them."""
        groups = {name: group.document() for name, group in self.groups.items()}
        return {"level": self.level, "groups": groups}

    def rows(self, column: str) -> list[dict]:
        """One row per group and metric, for by_group.csv."""
        return [
            {"column": column, "of": self.level, "group": name, **group.n, **row}
            for name, group in self.groups.items()
            for row in group.rows()
        ]


def parse_by(text: str) -> By:
    """Parse "COLUMN", "COLUMN:5,10,20" for bins of numbers, or "COLUMN:each".

    Raises:
        ValueError: the limits do not rise.
    """
    column, colon, rest = text.rpartition(":")
    number = r"[+-]?(\d+\.?\d*|\.\d+)"
    if colon and rest == "each":
        return By(column, each=True)
    if not colon or not re.fullmatch(rf"{number}(,{number})*", rest, re.ASCII):
        return By(text)
    limits = tuple(map(float, rest.split(",")))
    if sorted(set(limits)) != list(limits):
        raise ValueError(f"--by {text}: the limits of bins must rise, such as {column}:5,10,20.")
    return By(column, limits)


def with_groups(
    results: LesionResults | ClassificationResults,
    bys: list[By],
    *,
    operating_point: OperatingPoint | None = None,
    bootstrap: Bootstrap | None = None,
) -> LesionResults | ClassificationResults:
    """The results with ``by_group``.

    Args:
        bys: how to group, each on its own.
        operating_point, bootstrap: as the results were made with. Units that are resampled are
            those of a group of images, of a group of lesions those of the data set.

    Raises:
        ValueError: no image and no annotation has the column, or both have; it holds numbers and
            no bins are given, or the other way round; there are too many groups.
    """
    by_group = {}
    for by in bys:
        if by.column in by_group:
            raise ValueError(f"{by.column!r} is to be grouped by twice: once is possible.")
        level, names, group = group_values(results.ground_truth, by)
        if level == "lesion":
            groups = _of_lesions(results, names, group, bootstrap)
        else:
            groups, few = {}, []
            for number, name in enumerate(names):
                positions = np.flatnonzero(group == number)
                part = results.part(positions, operating_point=operating_point)
                groups[name] = Group.of_images(part, bootstrap)
                few += [name] if bootstrap and part.metrics.num_units < FEW else []
            if few:
                logger.warning(
                    f"{by.column}: intervals are approximate in groups of fewer than {FEW} "
                    f"{results.metrics.units.kind}s: {', '.join(few)}."
                )
        by_group[by.column] = GroupedMetrics(level, groups)
    return replace(results, by_group=by_group)


def group_values(gt: GroundTruth | LabelledImages, by: By) -> tuple[str, list[str], np.ndarray]:
    """Return "image" or "lesion", the names of the groups, and the (I,) or (R,) int group of each
    image or region.

    Raises:
        ValueError: see :func:`with_groups`.
    """
    records = {"image": gt.images, "lesion": getattr(gt, "annotations", [])}
    columns = {level: [r.get(by.column) for r in rows] for level, rows in records.items()}
    levels = [level for level in columns if any(value is not None for value in columns[level])]
    if not levels:
        fields = [", ".join(sorted({key for r in rows for key in r})) for rows in records.values()]
        raise ValueError(
            f"No image and no annotation has a value of {by.column!r}. Images have "
            f"{fields[0] or 'nothing'}; annotations have {fields[1] or 'nothing'}."
        )
    if len(levels) > 1:
        raise ValueError(
            f"Images and annotations both have {by.column!r}: rename one of the two columns."
        )
    names, group = _grouped(columns[levels[0]], by)
    if len(names) > MAX_GROUPS:
        raise ValueError(
            f"{by.column!r} has {len(names)} groups, more than the {MAX_GROUPS} that a reader can "
            "distinguish: group by something coarser."
        )
    return levels[0], names, group


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grouped(values, by):
    """(names, (N,) int)."""
    known = [value for value in values if value is not None]
    others = [value for value in known if not _is_number(value)]
    if by.limits is not None:
        if others:
            raise ValueError(f"{by.column!r} has the value {others[0]!r}: bins are for numbers.")
        text = [f"{limit:.15g}" for limit in by.limits]
        between = [f"{low}-{high}" for low, high in zip(text, text[1:], strict=False)]
        names = [f"<{text[0]}", *between, f">={text[-1]}", UNKNOWN]
        group = [
            len(names) - 1 if value is None else np.searchsorted(by.limits, value, side="right")
            for value in values
        ]
        present = sorted(set(group))
        return [names[number] for number in present], np.searchsorted(present, group)
    if not others and not by.each:
        raise ValueError(
            f"{by.column!r} holds numbers from {min(known):g} to {max(known):g}: give the limits "
            f"of bins, such as {by.column}:5,10,20, or {by.column}:each for a group each."
        )
    for value in others:
        if isinstance(value, list | dict):
            raise ValueError(f"{by.column!r} has the value {value!r}, which is none to group by.")
    named = {value: _name(value) for value in known}
    by_name = sorted(named, key=lambda value: (named[value] == UNKNOWN, named[value]))
    names = list(dict.fromkeys(named[value] for value in (by_name if others else sorted(named))))
    if None in values and UNKNOWN not in names:
        names.append(UNKNOWN)
    group = [names.index(UNKNOWN if value is None else named[value]) for value in values]
    return names, np.array(group, dtype=int)


def _name(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_lesions(results, names, group, bootstrap):
    """{name: Group} of (R,) regions, at each threshold of the results."""
    selected = {"lesion": results.above_threshold}
    if results.chosen_tau is not None:
        selected["tau_val.lesion"] = results.counter.above(results.chosen_tau)
    units, groups = results.metrics, {}
    for level, above in selected.items():
        strata = results.counter.by_stratum(above, group, names)
        metrics = StratumMetrics(strata, units)
        values, intervals, shares = metrics.once(), {}, {}
        if bootstrap is not None:
            intervals, shares = confidence_intervals(metrics, bootstrap)
        for name, counts in strata.items():
            n = {"images": int((counts.lesions > 0).sum()), "lesions": int(counts.lesions.sum())}
            if len(patients := units.units.patients):
                of_lesions = units.unit_of_image[counts.lesions > 0]
                n["patients"] = len(np.intersect1d(of_lesions, patients))
            if not n["lesions"]:  # of crowds
                continue
            of_group = groups.setdefault(name, Group(n, {}, {}, {}))
            hits = int(counts.tp.sum())
            of_group.values[level] = {"TP": hits, "FN": n["lesions"] - hits, **values[name]}
            del of_group.values[level]["n"]
            of_group.intervals[level] = intervals.get(name, {})
            for key, share in shares.items():
                stratum, _, metric = key.rpartition(".")
                if stratum == name:
                    of_group.undefined_shares[f"{level}.{metric}"] = share
    return groups


class StratumMetrics(ResampledMetrics):
    """The metrics of groups of lesions, whose counts per image are given by name; ``units`` has the
    units that are resampled."""

    def __init__(self, strata: dict[str, UnitCounts], units: ResampledMetrics):
        super().__init__(units.units)
        self.columns = {
            name: GroupFormulas(
                self.per_unit(stratum_columns(counts)), stratum_metrics, stratum_proportions
            )
            for name, counts in strata.items()
        }
