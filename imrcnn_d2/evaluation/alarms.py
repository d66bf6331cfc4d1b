"""Alarms on video: detections are linked to tracks, and a track raises an alarm once it was
detected in k of the last n frames. Causal, so that it is the same live and on a whole file.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pycocotools.mask as mask_util
from scipy.optimize import linear_sum_assignment

from imrcnn_d2.utils.files import BadInputError, few, read_json
from imrcnn_d2.utils.progress import tqdm

if TYPE_CHECKING:
    from imrcnn_d2.evaluation.procedures import Procedures, VideoDetections

logger = logging.getLogger(__name__)

LEAST_IOU = 0.3  # of the boxes of a lesion in two frames
MEMORY = 25  # frames after which a track that was not detected again has ended
# Seconds between frames, or times the usual if that is more: after a longer gap, or a step back,
# tracks start anew.
LONGEST_GAP, TIMES_USUAL = 1.0, 3
OTHER_RATE = 1.5  # times the frames per second that a rule was chosen at
# Of rules to choose from: n and k, and score thresholds.
WINDOWS = [
    (n, k)
    for n in (1, 2, 3, 5, 8, 12, 18, MEMORY)
    for k in sorted({math.ceil(n * share) for share in (1 / 3, 1 / 2, 2 / 3, 1)})
    if k > 1 or n == 1  # one of any number is each detection
]
TAUS = (*np.arange(5, 95, 5) / 100, 0.95, 0.97, 0.98, 0.99)
NO_TRACK = -1  # of detections below the score threshold


@dataclass(frozen=True)
class AlarmRule:
    """A detection with a score of at least ``tau`` is an alarm if its track has such detections in
    ``k`` of the last ``n`` frames, this one included. Frames are those that the network saw.

    Raises:
        ValueError: a value is out of its range.
    """

    tau: float  # score threshold, in [0, 1]
    k: int = 1
    n: int = 1  # at most MEMORY
    iou: float = LEAST_IOU  # of a track's last box and its next
    fps: float | None = None  # evaluated frames per second of the videos that it was chosen on
    rule: str | None = None  # how it was chosen, see `choose_alarm_rule`
    dataset: str | None = None  # that it was chosen on, and the SHA-256 of its ground truth
    gt_sha256: str | None = None
    weights_sha256: str | None = None  # of the model whose scores ``tau`` is for
    score_map: dict | None = None  # that these scores are mapped by

    def __post_init__(self):
        if not (0 <= self.tau <= 1 and 1 <= self.k <= self.n <= MEMORY and 0 < self.iou <= 1):
            raise ValueError(
                f"The alarm rule has tau {self.tau}, k {self.k}, n {self.n} and iou {self.iou}: "
                f"tau is from 0 to 1, k from 1 to n, n at most {MEMORY}, iou above 0, at most 1"
            )

    def __str__(self):
        return f"{self.k} of {self.n} frames, score ≥ {self.tau:.3g}"

    @classmethod
    def of_file(cls, path: str | Path) -> "AlarmRule":
        """Of a file of `imrcnn alarm-rule`; raises a BadInputError if it is none."""
        content = read_json(Path(path))
        kinds = {
            **dict.fromkeys(("k", "n"), int),
            **dict.fromkeys(("tau", "iou"), (int, float)),
            "fps": (int, float, type(None)),
            "score_map": (dict, type(None)),
        }
        remedy = "make one with imrcnn alarm-rule"
        if not isinstance(content, dict) or content.keys() != {each.name for each in fields(cls)}:
            raise BadInputError(path, f"is no alarm rule: {remedy}")
        for name, value in content.items():
            if isinstance(value, bool) or not isinstance(value, kinds.get(name, (str, type(None)))):
                raise BadInputError(path, f"is no alarm rule: its {name} is {value!r}; {remedy}")
        try:
            return cls(**content)
        except ValueError as error:
            raise BadInputError(path, f"{error}; {remedy}") from error

    def check_weights(self, about: Mapping) -> None:
        """Raises a ValueError if the rule is for the scores of other weights, or by another map,
        than those that the `metadata` of a predictor, or ``info`` of its predictions, names.
        """
        weights, remedy = weights_of(about), "choose one for them with imrcnn alarm-rule"
        if None in (weights, self.weights_sha256):
            return
        if weights != self.weights_sha256:
            raise ValueError(
                f"The alarm rule was chosen for the scores of weights {self.weights_sha256[:8]}, "
                f"and these are {weights[:8]}: {remedy}"
            )
        if about.get("score_map") != self.score_map:
            raise ValueError(
                f"The alarm rule was chosen for scores of weights {weights[:8]} with the score map "
                f"{self.score_map}, and these have {about.get('score_map')}: {remedy}"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def weights_of(about: Mapping) -> str | None:
    """The SHA-256 of the weights that made predictions; of an exported file, of its source's."""
    return about.get("source_sha256") or about.get("weights_sha256")


class Tracker:
    """The tracks of one video, frame by frame. A detection, of whatever class, continues the track
    whose last box it overlaps, one to one, so that the sum of IoUs is the largest.
    """

    def __init__(self, iou: float = LEAST_IOU):
        self._iou, self._number = iou, 0
        self._tracks: dict[int, tuple] = {}  # by id: last box, frames of the last MEMORY

    def restart(self) -> None:
        """Ends all tracks, as after a cut of the video; ids go on."""
        self._tracks.clear()

    def __call__(self, frame: int, boxes: np.ndarray) -> list[int]:
        """The track, numbered from 1, of each of D detections of a frame: boxes (D, 4) XYWH in
        pixels. Frames are numbered in turn; those without detections may be left out.
        """
        tracks = self._tracks
        for track, (_, frames) in list(tracks.items()):
            if frame - frames[-1] > MEMORY:
                del tracks[track]
        ids = [0] * len(boxes)
        if len(boxes) and tracks:
            known = list(tracks)
            last = np.array([box for box, _ in tracks.values()], float)
            overlap = mask_util.iou(np.asarray(boxes, float), last, [0] * len(known))
            overlap[overlap < self._iou] = 0
            for row, column in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
                if overlap[row, column]:
                    ids[row] = known[column]
        for row, box in enumerate(boxes):
            if not ids[row]:
                self._number += 1
                ids[row] = self._number
            recent = tracks.get(ids[row], (box, []))[1]
            tracks[ids[row]] = box, [*(each for each in recent if frame - each < MEMORY), frame]
        return ids

    def detected(self, track: int, frame: int, n: int) -> int:
        """In how many of the ``n`` frames up to ``frame`` the track was detected."""
        return sum(frame - each < n for each in self._tracks[track][1])


class Alarms:
    """The tracks and alarms of one video by a rule, frame by frame."""

    def __init__(self, rule: AlarmRule):
        self.rule, self.tracker, self._frame = rule, Tracker(rule.iou), -1
        self._first = self._last = None
        self._gaps = deque(maxlen=MEMORY)  # seconds between the last frames

    def __call__(self, boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the next frame's D detections, see `Tracker`, with their scores (D,): the tracks (D,)
        int, NO_TRACK below the threshold, and whether each is an alarm (D,) bool.
        """
        self._frame += 1
        tracks, alarms = np.full(len(scores), NO_TRACK), np.zeros(len(scores), bool)
        rows = np.flatnonzero(np.asarray(scores) >= self.rule.tau)
        boxes = np.reshape(boxes, (-1, 4))[rows]
        for row, track in zip(rows, self.tracker(self._frame, boxes), strict=True):
            tracks[row] = track
            count = self.tracker.detected(track, self._frame, self.rule.n)
            alarms[row] = count >= self.rule.k
        return tracks, alarms

    def annotate(self, annotations: list[dict], time: float | None = None) -> None:
        """Adds ``track_id``, if it has a track, and ``alarm`` to the COCO annotations of the next
        frame, which is at a time in seconds.
        """
        if time is not None:
            self._check(float(time))
        boxes = [annotation["bbox"] for annotation in annotations]
        tracks, alarms = self(boxes, [annotation["score"] for annotation in annotations])
        for annotation, track, alarm in zip(annotations, tracks, alarms, strict=True):
            if track != NO_TRACK:
                annotation["track_id"] = int(track)
            annotation["alarm"] = bool(alarm)

    def _check(self, time):
        if self._last is not None:
            gap, usual = time - self._last, np.median(self._gaps) if self._gaps else 0.0
            if not 0 <= gap <= max(LONGEST_GAP, TIMES_USUAL * usual):
                self.tracker.restart()
            self._gaps.append(max(gap, 0.0))
        self._first = time if self._first is None else self._first
        self._last = time
        if self._frame + 1 != MEMORY or self.rule.fps is None or time <= self._first:
            return
        fps = MEMORY / (time - self._first)
        if _is_other(fps, self.rule.fps):
            logger.warning(
                "The video has %.1f frames per second, but the alarm rule was chosen at %.1f: its "
                "%d of the last %d are frames, not seconds. Choose one at this rate",
                *(fps, self.rule.fps, self.rule.k, self.rule.n),
            )


def link(
    sequence: np.ndarray,
    frame: np.ndarray,
    boxes: np.ndarray,
    iou: float = LEAST_IOU,
) -> np.ndarray:
    """The tracks (N,) int of N detections of several videos, numbered from 1 in each: as a
    `Tracker` gives them. ``frame`` numbers the frames that the network saw, in turn.
    """
    tracks = np.full(len(frame), NO_TRACK)
    order = np.lexsort((frame, sequence))  # stable: in file order within a frame
    changes = (np.diff(sequence[order]) != 0) | (np.diff(frame[order]) != 0)
    tracker, current = None, None
    for rows in np.split(order, np.flatnonzero(changes) + 1) if len(order) else ():
        if sequence[rows[0]] != current:
            current, tracker = sequence[rows[0]], Tracker(iou)
        tracks[rows] = tracker(int(frame[rows[0]]), boxes[rows])
    return tracks


def detected_of_last(
    sequence: np.ndarray, frame: np.ndarray, track: np.ndarray, n: int
) -> np.ndarray:
    """(N,) int, in how many of the last ``n`` frames each of N detections' track was detected, its
    own frame included.
    """
    order = np.lexsort((frame, track, sequence))
    # Frames of a track lie within a stretch of the line of all tracks, each farther than n.
    new = np.append(True, (np.diff(sequence[order]) != 0) | (np.diff(track[order]) != 0))
    far = int(frame.max(initial=0)) + n
    line = np.cumsum(new[: len(order)]) * far + frame[order]
    counts = np.empty(len(order), int)
    counts[order] = np.arange(1, len(order) + 1) - np.searchsorted(line, line - n, side="right")
    return counts


def raise_alarms(
    rule: AlarmRule,
    sequence: np.ndarray,
    frame: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The tracks (N,) int and alarms (N,) bool of all detections of several videos, as `Alarms`
    gives them frame by frame; arguments as of `link`.
    """
    tracks, alarms = np.full(len(scores), NO_TRACK), np.zeros(len(scores), bool)
    rows = np.flatnonzero(scores >= rule.tau)
    place = sequence[rows], frame[rows]
    tracks[rows] = link(*place, boxes[rows], rule.iou)
    alarms[rows] = detected_of_last(*place, tracks[rows], rule.n) >= rule.k
    return tracks, alarms


def with_alarms(
    rule: AlarmRule, truth: "Procedures", detections: "VideoDetections"
) -> "VideoDetections":
    """The detections in procedures with the ``alarm`` that the rule gives them, which ``notes``
    state. Its frames are those that the ground truth lists; after a long gap between these, tracks
    start anew, as in `Alarms`.
    """
    rates = truth.fps / truth.step
    if others := [n for n, r in zip(truth.names, rates, strict=True) if _is_other(r, rule.fps)]:
        text = (
            "%d of %d procedures have another rate than the %.1f frames per second that the alarm "
            "rule was chosen at, such as %s: its frames are no seconds. Choose one at this rate"
        )
        logger.warning(text, len(others), len(rates), rule.fps, few([*map(str, others)], 3))
    place = *_places(truth, detections), detections.regions.boxes
    _, alarms = raise_alarms(rule, *place, detections.score)
    return replace(detections, alarm=alarms, notes={**detections.notes, "alarms_by": vars(rule)})


def _is_other(rate, fps):
    """Whether a rule that was chosen at ``fps``, None: not known, is for another rate."""
    return fps is not None and not 1 / OTHER_RATE < rate / fps < OTHER_RATE


def _places(truth, detections):
    """Procedure and place among its frames of each detection; farther than tracks last after a gap
    that is long."""
    longest = np.maximum(LONGEST_GAP * truth.fps, TIMES_USUAL * truth.step)[truth.procedure]
    gaps = np.where(np.diff(truth.procedure, prepend=-1) == 0, np.diff(truth.frame, prepend=0), 0)
    place = np.arange(len(gaps)) + (MEMORY + 1) * np.cumsum(gaps > longest)
    image = detections.regions.image
    return truth.procedure[image], place[image]


@dataclass(frozen=True)
class Candidate:
    """What a rule gives on validation procedures."""

    rule: AlarmRule
    lesion_sensitivity: float  # percent of the lesions
    seconds_to_detection: float  # mean over the lesions that are found; NaN without any
    false_alarms_per_minute: float

    @property
    def rank(self) -> tuple[float, ...]:
        """The larger, the better; of equal ones the rule that asks for less."""
        delay = np.nan_to_num(self.seconds_to_detection, nan=np.inf)
        rule = self.rule
        return self.lesion_sensitivity, -delay, -rule.n, -rule.k, rule.tau


def candidates(truth: "Procedures", detections: "VideoDetections") -> list[Candidate]:
    """What the rules of WINDOWS give at the thresholds TAUS, by the definitions of
    `evaluation.video`; raises a ValueError without a lesion.
    """
    from imrcnn_d2.evaluation.video import at_threshold, outcomes  # not needed to predict

    if not len(truth.lesions):
        raise ValueError(f"{truth.source} has no lesion_id: without a lesion no rule can be chosen")
    units = np.arange(len(truth.names))  # of intervals, which are not needed here
    procedure, frame = _places(truth, detections)
    ret = []
    for tau in tqdm(TAUS, desc="Alarm rules", unit="threshold"):
        rows = np.flatnonzero(detections.score >= tau)
        place = procedure[rows], frame[rows]
        tracks = link(*place, detections.regions.boxes[rows])
        counts = {n: detected_of_last(*place, tracks, n) for n, _ in WINDOWS}
        for n, k in WINDOWS:
            alarms = rows[counts[n] >= k]
            raised = replace(
                detections,
                regions=detections.regions.take(alarms),
                score=detections.score[alarms],
                alarm=np.ones(len(alarms), bool),
            )
            at = at_threshold(outcomes(truth, raised, units), tau)
            found, delay = at.lesions["found"] > 0, at.lesions["seconds_to_detection"]
            rate = at.procedures["false_alarms"].sum() / truth.minutes.sum()
            seconds = float(delay[found].mean()) if found.any() else math.nan
            sensitivity = 100 * float(found.mean())
            rule = AlarmRule(float(tau), k, n)
            ret.append(Candidate(rule, sensitivity, seconds, float(rate)))
    return ret


def choose_alarm_rule(known: list[Candidate], limit: float) -> Candidate:
    """Of the rules with at most ``limit`` false alarms per minute the one that finds the most
    lesions, of equal ones the soonest; where none keeps the limit, a warning says so, and that
    with the fewest false alarms is taken. Only ever on validation procedures.
    """
    within = [each for each in known if each.false_alarms_per_minute <= limit]
    if within:
        return max(within, key=lambda each: each.rank)
    best = max(known, key=lambda each: (-each.false_alarms_per_minute, *each.rank))
    logger.warning(
        f"No alarm rule keeps {limit:g} false alarms per minute: this one gives "
        f"{best.false_alarms_per_minute:.3g}"
    )
    return best
