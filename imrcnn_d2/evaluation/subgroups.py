"""Metrics by group: of the images, or of the lesions, that share the value of a column.

A column of images (centre, device, age of the patient) divides the data set: each part is evaluated
as a data set, with every metric. A column of lesions (Paris class, size in mm) divides the lesions
alone; false alarms belong to no lesion, so that there are recall and overlaps only.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from imrcnn_d2.evaluation.detection.counts import add_up
from imrcnn_d2.evaluation.detection.metrics import (
    GroupFormulas,
    ResampledMetrics,
    size_metrics,
    size_proportions,
)
from imrcnn_d2.evaluation.statistics import confidence_intervals

__all__ = [
    "MAX_GROUPS",
    "UNKNOWN",
    "By",
    "Group",
    "GroupedMetrics",
    "group_values",
    "parse_by",
    "with_groups",
]


# Name of the group of those for which the column has no value.
UNKNOWN = "not known"
# More are mostly a column of numbers or names; each takes an evaluation.
MAX_GROUPS = 30
EACH = "each"


@dataclass(frozen=True)
class By:
    """
    How to group.

    Attributes:
        column (str): a field of COCO's images or annotations.
        limits (tuple[float, ...] or None): where bins of numbers begin and end, ascending: with
            (5, 10) they are <5, 5-10 (5 and what is below 10) and >=10. None: a group a value.
        each (bool): a group for each number there is.
    """

    column: str
    limits: tuple | None = None
    each: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """
    Attributes:
        n (dict[str, int]): images, lesions and patients in it, as far as there are such; of a group
            of lesions the images and patients that have such lesions.
        values (dict[str, dict[str, float]]): as of :meth:`LesionResults.compared`; of a group of
            lesions "lesion" alone, with recall iou iou_box iou_all dice.
        intervals (dict[str, dict[str, tuple[float, float]]]), undefined_shares (dict[str, float]):
            as in :class:`LesionResults`.
    """

    n: dict
    values: dict
    intervals: dict
    undefined_shares: dict


@dataclass(frozen=True, eq=False)
class GroupedMetrics:
    """
    Attributes:
        level (str): "image" or "lesion": what the column is of.
        groups (dict[str, Group]): by name, in order; those of unknown value last.
    """

    level: str
    groups: dict


def parse_by(text):
    """
    Args:
        text (str): "COLUMN", "COLUMN:5,10,20" for bins of numbers, or "COLUMN:each".

    Returns:
        By:

    Raises:
        ValueError: the limits do not rise.
    """
    column, colon, rest = text.rpartition(":")
    number = r"[+-]?(\d+\.?\d*|\.\d+)"
    if colon and rest == EACH:
        return By(column, each=True)
    if not colon or not re.fullmatch(rf"{number}(,{number})*", rest, re.ASCII):
        return By(text)
    limits = tuple(map(float, rest.split(",")))
    if sorted(set(limits)) != list(limits):
        raise ValueError(f"--by {text}: the limits of bins must rise, such as {column}:5,10,20.")
    return By(column, limits)


def with_groups(results, bys, *, operating_point=None, bootstrap=None):
    """
    Args:
        results (LesionResults or ClassificationResults): the latter are of images alone.
        bys (list[By]): how to group, each on its own.
        operating_point (OperatingPoint or None), bootstrap (Bootstrap or None): as the results
            were made with. Units that are resampled are those of a group of images, of a group of
            lesions those of the data set.

    Returns:
        the results, with ``by_group``.

    Raises:
        ValueError: no image and no annotation has the column, or both have; it holds numbers and
            no bins are given, or the other way round; there are too many groups.
    """
    gt = results.ground_truth
    by_group = {}
    for by in bys:
        if by.column in by_group:
            raise ValueError(f"{by.column!r} is to be grouped by twice: once is possible.")
        level, names, group = group_values(gt, by)
        if level == "image":
            resampling = {"operating_point": operating_point, "bootstrap": bootstrap}
            groups = {
                name: _of_images(results, np.flatnonzero(group == number), **resampling)
                for number, name in enumerate(names)
            }
        else:
            groups = _of_lesions(results, names, group, bootstrap)
        by_group[by.column] = GroupedMetrics(level, groups)
    return replace(results, by_group=by_group)


def group_values(gt, by):
    """
    Args:
        gt (GroundTruth or LabelledImages): I images, R regions.
        by (By):

    Returns:
        tuple: "image" or "lesion"; list[str], the names of the groups; and (I,) or (R,) int, the
        group of each image or region.

    Raises:
        ValueError: see :func:`with_groups`.
    """
    records_of = {"image": gt.images, "lesion": getattr(gt, "annotations", [])}
    levels = [
        level
        for level, records in records_of.items()
        if any(record.get(by.column) is not None for record in records)
    ]
    if not levels:
        fields = {
            level: ", ".join(sorted({key for record in records for key in record})) or "nothing"
            for level, records in records_of.items()
        }
        raise ValueError(
            f"No image and no annotation has a value of {by.column!r}. Images have "
            f"{fields['image']}; annotations have {fields['lesion']}."
        )
    if len(levels) > 1:
        raise ValueError(
            f"Images and annotations both have {by.column!r}: rename one of the two columns."
        )
    values = [record.get(by.column) for record in records_of[levels[0]]]
    names, group = _grouped(values, by)
    if len(names) > MAX_GROUPS:
        raise ValueError(
            f"{by.column!r} has {len(names)} groups, more than the {MAX_GROUPS} that a reader can "
            "distinguish: group by something coarser."
        )
    return levels[0], names, group


def _grouped(values, by):
    """(names, (N,) int)."""
    known = [value for value in values if value is not None]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
    if by.limits is not None:
        if not numbers:
            odd = next(v for v in known if not isinstance(v, int | float) or isinstance(v, bool))
            raise ValueError(f"{by.column!r} has the value {odd!r}: bins are for numbers.")
        text = [f"{limit:.15g}" for limit in by.limits]
        between = [f"{low}-{high}" for low, high in zip(text, text[1:], strict=False)]
        names = [f"<{text[0]}", *between, f">={text[-1]}"]
        group = [
            len(names) if value is None else np.searchsorted(by.limits, value, side="right")
            for value in values
        ]
        present = sorted(set(group))
        names = [[*names, UNKNOWN][number] for number in present]
        return names, np.searchsorted(present, group)
    if numbers and not by.each:
        raise ValueError(
            f"{by.column!r} holds numbers from {min(known):g} to {max(known):g}: give the limits "
            f"of bins, such as {by.column}:5,10,20, or {by.column}:{EACH} for a group each."
        )
    named = {value: _name(value) for value in dict.fromkeys(_hashable(known, by.column))}
    by_name = sorted(named, key=lambda value: (named[value] == UNKNOWN, named[value]))
    order = sorted(named) if numbers else by_name
    names = list(dict.fromkeys(named[value] for value in order))
    if None in values and UNKNOWN not in names:
        names.append(UNKNOWN)
    group = [names.index(UNKNOWN if v is None else named[v]) for v in values]
    return names, np.array(group, dtype=int)


def _name(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hashable(values, column):
    for value in values:
        if isinstance(value, list | dict):
            raise ValueError(f"{column!r} has the value {value!r}, which is none to group by.")
    return values


def _of_images(results, positions, **resampling):
    """Group of the images at (I,) positions, evaluated alone."""
    part = results.part(positions, **resampling)
    n = {name: part.meta.get(name) for name in ("images", "lesions", "patients")}
    n = {name: number for name, number in n.items() if number is not None}
    return Group(n, part.compared(), part.intervals, part.undefined_shares)


def _of_lesions(results, names, group, bootstrap):
    """{name: Group} of (R,) regions."""
    units = results.metrics
    strata = results.counter.by_stratum(results.above_threshold, group, names)
    metrics = StratumMetrics(strata, units)
    values, intervals, shares = metrics.once(), {}, {}
    if bootstrap is not None:
        intervals, shares = confidence_intervals(metrics, bootstrap)
    groups = {}
    for name, counts in strata.items():
        n = {"images": int((counts.lesions > 0).sum()), "lesions": int(counts.lesions.sum())}
        if units.unit == "patient":
            n["patients"] = len(np.unique(units.unit_of_image[counts.lesions > 0]))
        if not n["lesions"]:  # of crowds
            continue
        of_lesions = {metric: value for metric, value in values[name].items() if metric != "n"}
        undefined = {
            f"lesion.{key.removeprefix(f'{name}.')}": share
            for key, share in shares.items()
            if key.rpartition(".")[0] == name
        }
        groups[name] = Group(
            n, {"lesion": of_lesions}, {"lesion": intervals.get(name, {})}, undefined
        )
    return groups


class StratumMetrics(ResampledMetrics):
    """The metrics of groups of lesions."""

    def __init__(self, strata: dict, units: ResampledMetrics):
        """
        Args:
            strata (dict[str, UnitCounts]): per image, by the name of the group.
            units: whose units are resampled.
        """
        super().__init__(units.unit, units.unit_of_image, units.num_units)
        self.columns = {
            name: GroupFormulas(
                add_up(counts.columns(), self.unit_of_image, self.num_units),
                size_metrics,
                size_proportions,
            )
            for name, counts in strata.items()
        }
