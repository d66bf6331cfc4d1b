"""Detections in whole procedures: lesions found and how soon, and false alarms, over time.

The protocol is TRUE-Colon's (Doerrich et al. 2026, arXiv 2608.13711) with its tiers of detections,
frames, lesions and AFROC, and the threshold at a matched rate of false alarms. Added are false
alarms as events, masks, intervals over procedures and the comparison of models. Everything works on
arrays; evaluation/true_colon.py gives the result the form of the package `true-colon`.

An *alarm* is a detection with a score of at least τ and, where the file has an ``alarm`` for it, of
true there; its class does not matter. It *hits* a lesion that it overlaps with an IoU above the
threshold, by default 0: any overlap. The definitions are in docs/metrics.md, "video".
"""

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from imrcnn_d2.data.units import Units
from imrcnn_d2.evaluation.comparison import Difference, holm, model_figures, paired_difference
from imrcnn_d2.evaluation.detection.counts import divide
from imrcnn_d2.evaluation.detection.curves import RankedDetections, Ranking
from imrcnn_d2.evaluation.detection.inputs import MAX_DETECTIONS, Detections, GroundTruth
from imrcnn_d2.evaluation.detection.matching import match, overlaps
from imrcnn_d2.evaluation.detection.metrics import (
    GroupFormulas,
    ResampledMetrics,
    endpoints_in,
)
from imrcnn_d2.evaluation.detection.operating_point import OperatingPoint
from imrcnn_d2.evaluation.output import interleave_intervals, transposed
from imrcnn_d2.evaluation.procedures import Procedures, VideoDetections
from imrcnn_d2.evaluation.statistics import (
    Bootstrap,
    add_intervals,
    confidence_intervals,
    proportion_interval,
)
from imrcnn_d2.evaluation.subgroups import By, Group, GroupedMetrics, group_values

logger = logging.getLogger(__name__)

# TRUE-Colon's settings: the share of clean frames with an alarm that thresholds are matched at; the
# time after a lesion is first visible in which it is to be detected in so many frames.
MATCHED_RULE = "fpr<=4.5"
WINDOWS, FRAMES_IN_WINDOW = (1, 3, 5), 15
# Seconds that a false alarm lasts to be counted as lasting (Holzwanger et al. 2021,
# doi 10.1055/a-1302-2942).
LASTING = 0.5
COCO_IOUS = np.linspace(0.5, 0.95, 10)
# Points of the curves over thresholds; pairs of boxes that are compared at a time.
CURVE_POINTS, PAIRS = 1000, 4_000_000

_FROM_LESIONS = (
    *("lesions", "found", "persistent_25", "persistent_50", "persistence"),
    *("frames_to_detection", "seconds_to_detection"),
    *(f"within_{seconds}s" for seconds in WINDOWS),
)
_FROM_FRAMES = (
    *("procedures", "minutes", "false_alarms", "lasting_false_alarms"),
    *("lesion_frames", "lesion_frames_hit", "clean_frames", "clean_frames_with_alarm"),
)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the detections of a model are worth at every threshold: at τ, all that have a score of
    at least τ. -1 is a score of nothing.

    Attributes:
        claimed_score: (R,) score of the detection that takes it where each takes one at most
            (AFROC).
        frame_score: (F,) highest score of an alarm that hits a lesion, in clean frames of any.
        pair_lesion, pair_frame, pair_score: (V,) a lesion, by number and frame, a frame in which it
            is visible, and the highest score of an alarm that hits it there.
        false: (M,) int, the detections that hit nothing, by frame.
        edges, edge_score: (E, 2) int and (E,) a forest of the overlaps among ``false`` in one frame
            and the next: those that are connected at τ are one false alarm.
    """

    truth: Procedures
    detections: VideoDetections
    iou_threshold: float
    iou_type: str
    rank: np.ndarray  # (N,) int, place of each by falling score in its frame, from 0
    ranked: list[RankedDetections]  # at each of COCO_IOUS
    claimed_score: np.ndarray
    frame_score: np.ndarray
    has_lesion: np.ndarray  # (F,) bool
    clean: np.ndarray  # (F,) bool, without any annotation
    pair_lesion: np.ndarray
    pair_frame: np.ndarray
    pair_score: np.ndarray
    false: np.ndarray
    edges: np.ndarray
    edge_score: np.ndarray

    @property
    def false_score(self) -> np.ndarray:
        return self.detections.score[self.false]


def outcomes(
    truth: Procedures,
    detections: VideoDetections,
    unit_of_procedure: np.ndarray,
    *,
    iou_threshold: float = 0.0,
    iou_type: str = "segm",
) -> Outcomes:
    """Match detections with lesions: of masks ("segm"), but of boxes where not all have masks.

    Raises:
        ValueError: the threshold is not in [0, 1).
    """
    if not 0 <= iou_threshold < 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; for video it must lie in [0, 1).")
    have_masks = truth.regions.masks is not None and detections.regions.masks is not None
    iou_type = iou_type if have_masks else "bbox"
    score, image = detections.score, detections.regions.image
    gt = GroundTruth([], [{}], truth.regions, [], truth.crowd, np.zeros(len(truth.crowd)))
    dt = Detections(detections.regions, score)
    pairs = overlaps(gt, dt, iou_type)
    alarm = detections.alarm & (pairs.rank < MAX_DETECTIONS)

    units = unit_of_procedure[truth.procedure]
    boxes = np.bincount(units[truth.regions.image[~truth.crowd]], minlength=units.max() + 1)
    ranked = []
    for threshold in COCO_IOUS:
        matching = match(gt, dt, pairs, threshold)
        kept = matching.evaluated
        ranking = Ranking(score[kept], units[image[kept]])
        ranked.append(RankedDetections(ranking, matching.hit[kept], boxes))

    near = (pairs.iou > iou_threshold) & alarm[pairs.dt]
    region_score = np.full(len(truth.crowd), -1.0)
    np.maximum.at(region_score, pairs.gt[near], score[pairs.dt[near]])
    in_alarm = replace(pairs, **{k: getattr(pairs, k)[near] for k in ("dt", "gt", "iou")})
    claimed = match(gt, dt, in_alarm, np.nextafter(iou_threshold, 1)).gt
    claimed_score = np.full(len(truth.crowd), -1.0)
    claimed_score[claimed[claimed >= 0]] = score[claimed >= 0]

    is_lesion, in_frame = ~truth.crowd, truth.regions.image
    has_lesion, clean = np.zeros(len(truth.frame), bool), np.ones(len(truth.frame), bool)
    has_lesion[in_frame[is_lesion]], clean[in_frame] = True, False
    frame_score = np.full(len(truth.frame), -1.0)
    np.maximum.at(frame_score, in_frame[is_lesion], region_score[is_lesion])
    in_clean = alarm & clean[image]
    np.maximum.at(frame_score, image[in_clean], score[in_clean])

    # A lesion may have several annotations in a frame.
    named = truth.lesion >= 0
    order = np.lexsort((in_frame[named], truth.lesion[named]))
    lesion, frame = truth.lesion[named][order], in_frame[named][order]
    first = np.flatnonzero((np.diff(lesion, prepend=-1) != 0) | (np.diff(frame, prepend=-1) != 0))
    best = region_score[named][order]
    pair_score = np.maximum.reduceat(best, first) if len(first) else best

    hits = np.zeros(len(score), dtype=bool)
    hits[pairs.dt[near]] = True  # of a crowd: neither a hit nor a false alarm
    false = np.flatnonzero(alarm & ~hits)
    edges = _overlapping(detections.regions.boxes[false], image[false], truth.followed)
    edges, edge_score = _forest(edges, score[false])
    return Outcomes(
        truth=truth,
        detections=detections,
        iou_threshold=iou_threshold,
        iou_type=iou_type,
        rank=pairs.rank,
        ranked=ranked,
        claimed_score=claimed_score,
        frame_score=frame_score,
        has_lesion=has_lesion,
        clean=clean,
        pair_lesion=lesion[first],
        pair_frame=frame[first],
        pair_score=pair_score,
        false=false,
        edges=edges,
        edge_score=edge_score,
    )


def _overlapping(boxes, frame, followed):
    """(E, 2) int, the pairs of M boxes, by (M,) ascending frame, that overlap in a frame or in a
    frame and the next, where ``followed``."""
    # After each box come those of its frame and, if it is the next one, of the frame after it.
    through = np.searchsorted(frame, frame + followed[frame], side="right")
    number = through - np.arange(len(frame)) - 1
    ends, edges, start = np.cumsum(number), [np.zeros((0, 2), dtype=np.int64)], 0
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    while start < len(frame):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS, side="right")))
        count = number[start:stop]
        first = np.repeat(np.arange(start, stop), count)
        skipped = np.repeat(np.cumsum(count) - count, count)
        second = first + 1 + np.arange(len(first)) - skipped
        side = np.minimum(high[first], high[second]) - np.maximum(low[first], low[second])
        edges.append(np.stack([first, second], axis=1)[(side > 0).all(axis=1)])
        start = stop
    return np.concatenate(edges)


def _forest(edges, score):
    """The edges of a maximum spanning forest by the lower score of the two ends, and that score:
    at any threshold they connect the same boxes as all edges do."""
    lower = score[edges].min(axis=1) if len(edges) else np.zeros(0)
    # Weights are whole numbers, the smallest for the highest score, and none is 0.
    values, place = np.unique(lower, return_inverse=True)
    weights = (len(values) - place).astype(float)
    graph = coo_array((weights, edges.T), shape=(len(score), len(score)))
    tree = minimum_spanning_tree(graph.tocsr()).tocoo()
    edges = np.stack([tree.row, tree.col], axis=1)
    return edges, values[(len(values) - tree.data).astype(int)] if len(values) else np.zeros(0)


@dataclass(frozen=True, eq=False)
class AtThreshold:
    """What happened at τ: of L lesions, P procedures and, by frame, the false alarms."""

    lesions: dict[str, np.ndarray]  # columns of the table of lesions, (L,) each
    procedures: dict[str, np.ndarray]  # (P,) each, by _FROM_FRAMES
    lesion_columns: np.ndarray  # (L, K) by _FROM_LESIONS
    alarms: dict[str, np.ndarray]  # procedure, first and last frame, detections, highest score


def at_threshold(scored: Outcomes, tau: float) -> AtThreshold:
    """What happened at a threshold above 0."""
    truth, count = scored.truth, len(scored.truth.lesions)
    fps = truth.fps[truth.procedure_of_lesion]
    lesion, number = scored.pair_lesion, truth.frame[scored.pair_frame]
    hit = scored.pair_score >= tau
    visible = np.bincount(lesion, minlength=count)
    detected = np.bincount(lesion[hit], minlength=count)
    first, first_hit = np.full(count, np.inf), np.full(count, np.inf)
    np.minimum.at(first, lesion, number)
    np.minimum.at(first_hit, lesion[hit], number[hit])
    is_found = detected > 0
    share = divide(detected, visible)
    delay = np.where(is_found, first_hit, np.nan) - first
    columns = [np.ones(count), is_found, share >= 0.25, share >= 0.5, share]
    columns += [np.where(is_found, delay, 0), np.where(is_found, delay / fps, 0)]
    for seconds in WINDOWS:
        early = hit & (number < (first + np.floor(seconds * fps))[lesion])
        columns.append(np.bincount(lesion[early], minlength=count) >= FRAMES_IN_WINDOW)
    lesions = {
        "frames": visible,
        "frames_detected": detected,
        "persistence": 100 * share,
        "found": is_found.astype(int),
        "first_frame": first.astype(int),
        "first_detected_frame": _whole(np.where(is_found, first_hit, np.nan)),
        "frames_to_detection": _whole(delay),
        "seconds_to_detection": delay / fps,
        **{
            f"within_{seconds}s": column.astype(int)
            for seconds, column in zip(WINDOWS, columns[7:], strict=True)
        },
    }
    alarms = _false_alarms(scored, tau)
    procedure, size = truth.procedure, len(truth.names)

    def per_procedure(selected, owners=procedure):
        return np.bincount(owners[selected], minlength=size)

    raised = scored.frame_score >= tau
    step, fps = truth.step, truth.fps
    owner = alarms["procedure"]
    seconds = (alarms["last_frame"] - alarms["first_frame"] + step[owner]) / fps[owner]
    alarms["seconds"] = seconds
    return AtThreshold(
        lesions=lesions,
        procedures={
            "procedures": np.ones(size, dtype=int),
            "minutes": truth.minutes,
            "false_alarms": np.bincount(owner, minlength=size),
            "lasting_false_alarms": per_procedure(seconds >= LASTING - 1e-9, owner),
            "lesion_frames": per_procedure(scored.has_lesion),
            "lesion_frames_hit": per_procedure(scored.has_lesion & raised),
            "clean_frames": per_procedure(scored.clean),
            "clean_frames_with_alarm": per_procedure(scored.clean & raised),
        },
        lesion_columns=np.stack(columns, axis=1).astype(float),
        alarms=alarms,
    )


def _whole(values):
    """Whole numbers for a table, None where NaN."""
    return np.array([None if math.isnan(v) else int(v) for v in values.tolist()], dtype=object)


def _false_alarms(scored, tau):
    """Columns of the false alarms at τ, by procedure and first frame."""
    truth, image = scored.truth, scored.detections.regions.image[scored.false]
    score = scored.false_score
    above = np.flatnonzero(score >= tau)
    edges = np.searchsorted(above, scored.edges[scored.edge_score >= tau])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(above), len(above)))
    number, label = connected_components(graph, directed=False)
    first, last = np.full(number, len(truth.frame)), np.full(number, -1)
    highest = np.zeros(number)
    np.minimum.at(first, label, image[above])
    np.maximum.at(last, label, image[above])
    np.maximum.at(highest, label, score[above])
    order = np.argsort(first, kind="stable")
    return {
        "procedure": truth.procedure[first[order]],
        "first_frame": truth.frame[first[order]],
        "last_frame": truth.frame[last[order]],
        "detections": np.bincount(label, minlength=number)[order],
        "highest_score": highest[order],
    }


def _lesion_formulas(sums):
    """Metrics of (..., K) sums by _FROM_LESIONS."""
    sums = dict(zip(_FROM_LESIONS, np.moveaxis(sums, -1, 0), strict=True))
    n, hits = sums["lesions"], sums["found"]
    shares = ("persistence", "persistent_25", "persistent_50", *(k for k in sums if "within" in k))
    return {
        "lesions": n,
        "lesion_sensitivity": 100 * divide(hits, n),
        **{name: 100 * divide(sums[name], n) for name in shares},
        "frames_to_detection": divide(sums["frames_to_detection"], hits),
        "seconds_to_detection": divide(sums["seconds_to_detection"], hits),
    }


def _lesion_proportions(sums):
    sums = dict(zip(_FROM_LESIONS, np.moveaxis(sums, -1, 0), strict=True))
    names = ("persistent_25", "persistent_50", *(k for k in sums if "within" in k))
    parts = {"lesion_sensitivity": "found", **{name: name for name in names}}
    return {name: (sums[part], sums["lesions"]) for name, part in parts.items()}


def _split(sums):
    """The columns of _FROM_LESIONS, and those of _FROM_FRAMES by name."""
    lesions, frames = np.split(sums, [len(_FROM_LESIONS)], axis=-1)
    return lesions, dict(zip(_FROM_FRAMES, np.moveaxis(frames, -1, 0), strict=True))


def _video_formulas(sums):
    lesions, counts = _split(sums)
    values = {name: 100 * divide(*cases) for name, cases in _frame_shares(counts).items()}
    rates = {name: divide(*cases) for name, cases in _rates(counts).items()}
    return {**_lesion_formulas(lesions), **values, **counts, **rates}


def _video_proportions(sums):
    lesions, counts = _split(sums)
    # Of thousands of frames of a procedure, the interval of a proportion would say as little as of
    # one: resamples say more, unless none or all of the frames have it.
    shares = {
        name: (part, whole)
        for name, (part, whole) in _frame_shares(counts).items()
        if part.sum() in (0, whole.sum()) and whole.any()
    }
    return {**_lesion_proportions(lesions), **shares, **_rates(counts)}


def _frame_shares(counts):
    return {
        "frame_sensitivity": (counts["lesion_frames_hit"], counts["lesion_frames"]),
        "fpr": (counts["clean_frames_with_alarm"], counts["clean_frames"]),
    }


def _rates(counts):
    return {
        "false_alarms_per_minute": (counts["false_alarms"], counts["minutes"]),
        "lasting_false_alarms_per_minute": (counts["lasting_false_alarms"], counts["minutes"]),
        "false_alarms_per_procedure": (counts["false_alarms"], counts["procedures"]),
    }


class VideoMetrics(ResampledMetrics):
    """The metrics of procedures as functions of how often each unit counts: group "video" and, with
    a second threshold, "tau_val.video"; and AP50 of all detections, AP with ``all_coco``.

    Args:
        units: of the procedures.
        columns: group -> the (P, K) columns of the procedures, formulas and proportions.
        ranked: the detections at each of COCO_IOUS; empty for a part of the lesions.
    """

    def __init__(self, units, columns, ranked=()):
        super().__init__(units)
        self.columns = {k: GroupFormulas(self.per_unit(c), *f) for k, (c, *f) in columns.items()}
        self.ranked = ranked

    @property
    def width(self):
        return max([self.num_units, *(len(curve.ranking.ends) for curve in self.ranked[:1])])

    def __call__(self, weights, *, all_coco=False):
        values = super().__call__(weights)
        if self.ranked:
            areas = [
                100 * curve.weigh(weights).sampled_area
                for curve in (self.ranked if all_coco else self.ranked[:1])
            ]
            values["detection"] = {"AP50": areas[0]}
            if all_coco:
                values["detection"]["AP"] = np.mean(areas, axis=0)
        return values


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoResults:
    """What an evaluation of procedures found; as :class:`EvaluationResults` of images.

    Attributes:
        at: what happened at τ, by a prefix of the groups: "" and, at the operating point,
            "tau_val.".
    """

    outcomes: Outcomes
    at: dict[str, AtThreshold]
    metrics: VideoMetrics
    meta: dict
    operating_point: OperatingPoint | None = None
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    undefined_shares: dict[str, float] = field(default_factory=dict)
    by_group: dict[str, GroupedMetrics] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)  # not made of video

    @property
    def has_masks(self) -> bool:
        """Masks were matched."""
        return self.outcomes.iou_type == "segm"

    @property
    def chosen_tau(self) -> float | None:
        return self.operating_point and self.operating_point.tau

    def compared(self) -> dict[str, dict[str, float]]:
        """All groups of metrics."""
        return self.metrics.once(all_coco=True)

    def document(self) -> dict:
        """What metrics.json holds, but for ``meta``."""
        groups = self.compared()
        document = interleave_intervals(groups, self.intervals)
        if self.operating_point is not None:
            point, values = self.operating_point, document.pop("tau_val.video")
            stated = {"tau": point.tau, "rule": point.rule, "dataset": point.dataset}
            document["tau_val"] = {**stated, "video": values}
        if self.by_group:
            document["by_group"] = {
                column: grouped.document() for column, grouped in self.by_group.items()
            }
        return {**document, "undefined_shares": self.undefined_shares}

    def tables(self) -> dict[str, tuple[list[dict], list[str]]]:
        """File name -> rows and columns: of each procedure, lesion and false alarm at τ, and the
        curves over thresholds."""
        truth, at = self.outcomes.truth, self.at[""]
        lesions, _ = _split(_per_procedure(truth, at))
        rates = {name: divide(*cases) for name, cases in _rates(at.procedures).items()}
        columns = {
            "sequence_id": np.array(truth.names, dtype=object),
            "fps": truth.fps,
            "lesions": lesions[:, 0].astype(int),
            "lesions_found": lesions[:, 1].astype(int),
            **{k: v for k, v in at.procedures.items() if k != "procedures"},
            "false_alarms_per_minute": rates["false_alarms_per_minute"],
        }
        procedures = transposed(columns)
        owners = [truth.names[number] for number in truth.procedure_of_lesion]
        lesion_rows, lesion_names = transposed(at.lesions)
        per_lesion = [
            {"sequence_id": owner, **facts, **row}
            for owner, facts, row in zip(owners, truth.lesions, lesion_rows, strict=True)
        ]
        alarms = {**at.alarms}
        names = np.array(truth.names, dtype=object)[alarms.pop("procedure")]
        tables = {
            "per_procedure.csv": (
                [_with_facts(row, f) for row, f in zip(procedures[0], truth.facts, strict=True)],
                procedures[1],
            ),
            "per_lesion.csv": (per_lesion, ["sequence_id", "lesion_id", *lesion_names]),
            "false_alarms.csv": transposed({"sequence_id": names, **alarms}),
            "video_curve.csv": transposed(curves(self.outcomes)),
            "time_to_detection.csv": transposed(time_to_detection(self)),
        }
        if self.by_group:
            rows = [
                row for column, grouped in self.by_group.items() for row in grouped.rows(column)
            ]
            tables["by_group.csv"] = (rows, ["column"])
        return tables


def _with_facts(row, facts):
    """A row with the fields of its video; one with the name of a column, and another value, keeps
    both."""
    others = {k: v for k, v in facts.items() if row.get(k) != v}
    return {**row, **{(f"videos.{k}" if k in row else k): v for k, v in others.items()}}


def _per_procedure(truth, at, lesions=slice(None)):
    """(P, K) columns by _FROM_LESIONS and _FROM_FRAMES, of these lesions."""
    sums = np.zeros((len(truth.names), len(_FROM_LESIONS)))
    np.add.at(sums, truth.procedure_of_lesion[lesions], at.lesion_columns[lesions])
    frames = np.stack([at.procedures[name] for name in _FROM_FRAMES], axis=1)
    return np.hstack([sums, frames])


def evaluate_video(
    truth: Procedures,
    detections: VideoDetections,
    *,
    tau: float,
    iou_threshold: float = 0.0,
    iou_type: str = "segm",
    operating_point: OperatingPoint | None = None,
    bootstrap: Bootstrap | None = None,
    by: list[By] | None = None,
) -> VideoResults:
    """Evaluate detections in procedures.

    Args:
        tau: the score threshold, above 0.
        iou_threshold, iou_type: see :func:`outcomes`.
        operating_point: a second threshold, of :func:`match_operating_point`.
        bootstrap: for intervals over patients, or procedures.
        by: groups of procedures (fields of images or ``videos``) or of lesions.

    Raises:
        ValueError: see :func:`outcomes` and :func:`group_values`; ``tau`` is not above 0.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}; for video it must be above 0.")
    units = Units.of(truth.records)
    options = {"iou_threshold": iou_threshold, "iou_type": iou_type}
    scored = outcomes(truth, detections, units.of_image, **options)
    at = {"": at_threshold(scored, tau)}
    if operating_point is not None:
        at["tau_val."] = at_threshold(scored, operating_point.tau)
    formulas = _video_formulas, _video_proportions
    columns = {f"{k}video": (_per_procedure(truth, a), *formulas) for k, a in at.items()}
    metrics = VideoMetrics(units, columns, scored.ranked)
    meta = {
        "task": "video",
        "tau": tau,
        "iou_threshold": iou_threshold,
        "iou_type": scored.iou_type,
        "frames": len(truth.frame),
        "procedures": len(truth.names),
        "lesions": len(truth.lesions),
        "annotations": len(truth.crowd),
        "detections": len(detections.score),
        "alarm_rule": not bool(detections.alarm.all()),
        **detections.notes,
        **{k: v for k, v in metrics.settings(bootstrap).items() if k in ("patients", "bootstrap")},
    }
    results = VideoResults(
        outcomes=scored, at=at, metrics=metrics, meta=meta, operating_point=operating_point
    )
    results = add_intervals(results, bootstrap)
    return replace(results, by_group={b.column: _grouped(results, b, bootstrap) for b in by or []})


@dataclass(frozen=True)
class _Grouped:
    """What :func:`group_values` reads: a procedure is to it an image."""

    images: list[dict]
    annotations: list[dict]


def _grouped(results, by, bootstrap):
    truth = results.outcomes.truth
    level, names, group = group_values(_Grouped(truth.facts, truth.lesions), by)
    level = {"image": "procedure", "lesion": "unique_lesion"}[level]
    groups = {}
    for number, name in enumerate(names):
        chosen, lesions = group == number, slice(None)
        formulas = _video_formulas, _video_proportions
        if level == "unique_lesion":
            lesions, formulas = chosen, (_lesion_formulas, _lesion_proportions)
        columns = {
            f"{prefix}video": _per_procedure(truth, at, lesions)
            for prefix, at in results.at.items()
        }
        if level == "unique_lesion":  # of the procedures that have such lesions
            columns = {key: _split(values)[0] for key, values in columns.items()}
            chosen = columns["video"][:, 0] > 0
        rows = np.flatnonzero(chosen)
        units = Units.of([truth.records[row] for row in rows])
        columns = {key: values[rows] for key, values in columns.items()}
        part = VideoMetrics(units, {key: (v, *formulas) for key, v in columns.items()})
        values, intervals, shares = part.once(), {}, {}
        if bootstrap is not None:
            intervals, shares = confidence_intervals(part, bootstrap)
        n = {"procedures": len(rows), "lesions": int(columns["video"][:, 0].sum())}
        if len(units.patients):
            n["patients"] = len(units.patients)
        groups[name] = Group(n, values, intervals, shares)
    return GroupedMetrics(level, groups)


def curves(scored: Outcomes) -> dict[str, np.ndarray]:
    """(T,) columns over falling thresholds: of lesions, annotations and lesion frames the percent
    that is found, of clean frames that with an alarm (TRUE-Colon's AFROC is ``box_sensitivity``
    against it), and false alarms per minute."""
    best = np.full(len(scored.truth.lesions), -1.0)
    np.maximum.at(best, scored.pair_lesion, scored.pair_score)
    score = np.sort(np.concatenate([best[best >= 0], scored.detections.score]))
    if not len(score):
        score = np.ones(1)
    places = np.linspace(0, len(score) - 1, CURVE_POINTS).round().astype(int)
    tau = np.unique(np.concatenate([score[places], best[best >= 0]]))[::-1]
    tau = tau[tau > 0]

    def percent(values):
        return 100 * divide(at_least(values, tau), np.full(len(tau), len(values)))

    alarms = at_least(scored.false_score, tau) - at_least(scored.edge_score, tau)
    is_lesion = ~scored.truth.crowd
    return {
        "tau": tau,
        "lesion_sensitivity": percent(best),
        "box_sensitivity": percent(scored.claimed_score[is_lesion]),
        "frame_sensitivity": percent(scored.frame_score[scored.has_lesion]),
        "fpr": percent(scored.frame_score[scored.clean]),
        "false_alarms_per_minute": alarms / scored.truth.minutes.sum(),
    }


def at_least(values, tau):
    """(T,) int, how many of the values reach each threshold."""
    return len(values) - np.searchsorted(np.sort(values), tau, side="left")


def time_to_detection(results: VideoResults, prefix: str = "") -> dict[str, np.ndarray]:
    """(T,) columns: seconds after a lesion is first visible, the percent of lesions detected by
    then, and its 95 % interval over units."""
    truth, delay = results.outcomes.truth, results.at[prefix].lesions["seconds_to_detection"]
    ends = np.array([0.0])
    if np.isfinite(delay).any():
        ends = np.unique(np.concatenate([ends, delay[np.isfinite(delay)]]))
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, 60).round().astype(int))]
    units = results.metrics.unit_of_image[truth.procedure_of_lesion]
    size = results.metrics.num_units
    lesions = np.bincount(units, minlength=size)
    rows = []
    for seconds in ends:
        hits = np.bincount(units[delay <= seconds], minlength=size)
        low, high = proportion_interval(hits, lesions) if len(delay) else (math.nan, math.nan)
        share = hits.sum() / len(delay) if len(delay) else math.nan
        rows.append((seconds, 100 * share, 100 * low, 100 * high))
    return dict(zip(("seconds", "found", "low", "high"), np.array(rows).T, strict=True))


def match_operating_point(
    results: VideoResults, rule: str = MATCHED_RULE, dataset: str | None = None
) -> OperatingPoint:
    """The lowest threshold that keeps false alarms within a limit, on validation procedures:
    "fpr<=4.5", percent of clean frames with an alarm (TRUE-Colon's matched rate), or
    "false_alarms_per_minute<=2". As in TRUE-Colon it is the score of a false alarm; where the
    highest one alone is too many, it lies just above.

    Raises:
        ValueError: another rule, or there is no clean frame.
    """
    name, _, limit = rule.partition("<=")
    scored = results.outcomes
    try:
        limit = float(limit)
    except ValueError:
        limit = -1
    if name not in ("fpr", "false_alarms_per_minute") or not 0 <= limit < math.inf:
        raise ValueError(
            f"--tau-rule is {rule!r}; for video it is 'fpr<=PERCENT' of clean frames, such as "
            f"{MATCHED_RULE}, or 'false_alarms_per_minute<=NUMBER'."
        )
    if name == "fpr":
        scores = scored.frame_score[scored.clean]
        if not len(scores):
            raise ValueError("No frame of the validation procedures is without a lesion.")
        tau = np.unique(scores[scores > 0])
        values = 100 * at_least(scores, tau) / len(scores)
    else:
        tau = np.unique(scored.false_score[scored.false_score > 0])
        number = at_least(scored.false_score, tau) - at_least(scored.edge_score, tau)
        values = number / scored.truth.minutes.sum()
    if not len(tau):  # without a false alarm any threshold is within the limit
        return OperatingPoint(float(scored.detections.score.min(initial=1)), rule, dataset)
    # False alarms may join as the threshold falls: all thresholds above it must be within too.
    within = np.maximum.accumulate(values[::-1])[::-1] <= limit
    highest = np.nextafter(tau[-1], math.inf)
    return OperatingPoint(float(tau[np.argmax(within)] if within.any() else highest), rule, dataset)


def compare_videos(
    first: VideoResults, second: VideoResults, bootstrap: Bootstrap
) -> list[tuple[str, str, float, float, Difference, float]]:
    """Two models on the same procedures, paired over units: group, metric, both values, first minus
    second, and its p adjusted by Holm over all of them.

    Raises:
        ValueError: the results are of different frames.
    """
    truths = [results.outcomes.truth for results in (first, second)]
    same = [(truth.names, truth.procedure.tolist(), truth.frame.tolist()) for truth in truths]
    if truths[0] is not truths[1] and same[0] != same[1]:
        sources = f"{truths[0].source} and {truths[1].source}"
        raise ValueError(f"{sources} have different frames: only models on the same are compared.")
    models = [model_figures([results], bootstrap) for results in (first, second)]
    rows = []
    for endpoint in [*endpoints_in("video", "tau_val.video"), "detection/AP50"]:
        group, _, name = endpoint.partition("/")
        if all(name in model.values.get(group, {}) for model in models):
            pair = [model.values[group][name] for model in models]
            rows.append((group, name, *pair, paired_difference(*models, group, name)))
    adjusted = holm([row[-1].p for row in rows])
    return [(*row, float(p)) for row, p in zip(rows, adjusted, strict=True)]
