"""Videos of whole procedures and detections in them, read record by record into arrays, since there
may be millions of frames."""

import logging
import math
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import ijson
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats.coco import is_box, to_rles, without_empty_ids
from imrcnn_d2.data.images import VIDEO_SUFFIXES
from imrcnn_d2.evaluation.detection.inputs import (
    Regions,
    ends_alike,
    recorded_size,
    stated_size,
)
from imrcnn_d2.utils.files import BadInputError, few, is_json_list, read_records
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

MASKS = 5000  # that are checked at a time
FARTHEST = 10**9  # frame that a video may have
_FRAME_FIELDS = {"id", "file_name", "sequence_id", "frame", "time", "width", "height", "view"}
_REGION_FIELDS = {"id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"}

USUAL = 1.5  # times the usual step, within which two evaluated frames follow each other


@dataclass(frozen=True, eq=False)
class Procedures:
    """P procedures with F frames that are evaluated, by procedure and frame number, and their
    annotations."""

    names: list[str | int]  # P, their sequence_id
    facts: list[dict]  # P, the fields of ``videos`` and those that all images of each share
    fps: np.ndarray  # (P,) float, frames per second
    procedure: np.ndarray  # (F,) int
    frame: np.ndarray  # (F,) int, frame number in the video
    places: dict  # image id -> position of the frame
    regions: Regions  # R annotations, ``image`` is the position of the frame
    crowd: np.ndarray  # (R,) bool
    lesion: np.ndarray  # (R,) int, number of the lesion, -1 where it has no lesion_id
    lesions: list[dict]  # L, the fields that a lesion's first annotation has
    procedure_of_lesion: np.ndarray  # (L,) int
    sizes: np.ndarray  # (F, 2) int, height and width; 0 where not known
    source: Path

    @property
    def records(self) -> list[dict]:
        """What is known of each procedure, as of an image."""
        pairs = zip(self.names, self.facts, strict=True)
        return [{"sequence_id": name, **facts} for name, facts in pairs]

    @cached_property
    def step(self) -> np.ndarray:
        """(P,) frame numbers from one evaluated frame to the next, 1 for all frames of a video: the
        mean of those up to USUAL of the median, so that 2, 3, 2, 3, ... is 2.5."""
        steps = np.ones(len(self.names))
        limits = np.searchsorted(self.procedure, np.arange(len(self.names) + 1))
        for number, (start, end) in enumerate(zip(limits, limits[1:], strict=False)):
            if end - start > 1:
                differences = np.diff(self.frame[start:end])
                usual = differences <= USUAL * np.median(differences)
                steps[number] = differences[usual].mean()
        return steps

    @property
    def followed(self) -> np.ndarray:
        """(F,) bool, the next frame of the video is evaluated too, at most USUAL steps later."""
        same = np.diff(self.procedure, append=-1) == 0
        return same & (np.diff(self.frame, append=0) <= USUAL * self.step[self.procedure])

    @property
    def minutes(self) -> np.ndarray:
        """(P,) duration of what is evaluated."""
        frames = np.bincount(self.procedure, minlength=len(self.names))
        return frames * self.step / self.fps / 60


@dataclass(frozen=True, eq=False)
class VideoDetections:
    """N detections in the frames of :class:`Procedures`, by frame."""

    regions: Regions  # masks of those in frames without an annotation are None
    score: np.ndarray  # (N,) float
    alarm: np.ndarray  # (N,) bool, true where the file has no ``alarm``
    mapped: bool  # the file has a raw_score next to the score
    notes: dict  # what was left out, for ``meta``
    info: dict | None  # of a predictions.json
    scored = True  # as Detections have it


def _is_id(value):
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _is_frame(value):
    return type(value) is int and abs(value) < FARTHEST


class _RegionReader:
    """The boxes and masks of a file as they are read."""

    def __init__(self, path, key, sizes):
        self.path, self.key, self.sizes = path, key, sizes
        self.frame, self.boxes, self.masks, self._waiting = array("q"), array("d"), [], []
        self.has_masks = True

    def add(self, number, record, frame, keep_mask=True):
        """The ``number``-th record, of the frame at this position."""
        box, mask = record.get("bbox"), record.get("segmentation") or None
        name = f"{self.key}[{number}], of image {record['image_id']!r}"
        if box is None and mask is None:
            raise BadInputError(self.path, f"{name} has neither bbox nor segmentation")
        if box is not None and not is_box(box):
            raise BadInputError(self.path, f"{name} has the bbox {box!r:.60}, not [x, y, w, h]")
        if mask is None:
            self.has_masks = False
        elif keep_mask or box is None:
            self._waiting.append((len(self.masks), mask, name, keep_mask, box is None))
        self.frame.append(frame)
        self.boxes.extend(box or (0, 0, 0, 0))
        self.masks.append(None)
        if len(self._waiting) >= MASKS:
            self._convert()

    def _convert(self):
        waiting, self._waiting = self._waiting, []
        sizes = [self._size(row, mask, name) for row, mask, name, *_ in waiting]
        try:
            masks = [mask for _, mask, *_ in waiting]
            rles = to_rles(masks, sizes, lambda number: waiting[number][2])
        except ValueError as error:
            raise BadInputError(self.path, str(error)) from error
        for rle, (row, *_, keep, lacks_box) in zip(rles, waiting, strict=True):
            if keep:
                self.masks[row] = rle
            if lacks_box:
                self.boxes[4 * row : 4 * row + 4] = array("d", mask_util.toBbox(rle).tolist())

    def _size(self, row, mask, name):
        """Height and width of the image, else of the RLE."""
        size = self.sizes[self.frame[row]].tolist()
        try:
            return size if all(size) else stated_size(mask)
        except (AttributeError, ValueError) as error:  # polygons state none
            reason = f"{name}: its image has no height and width, and neither has its segmentation"
            raise BadInputError(self.path, reason) from error

    def regions(self) -> tuple[np.ndarray, Regions]:
        """(N,) int, the order that regions were read in, and the regions by frame."""
        self._convert()
        frame = np.frombuffer(self.frame, dtype=np.int64)
        boxes = np.frombuffer(self.boxes, dtype=float).reshape(-1, 4)
        order = np.argsort(frame, kind="stable")
        masks = [self.masks[row] for row in order.tolist()] if self.has_masks else None
        category = np.zeros(len(order), dtype=np.int64)
        return order, Regions(frame[order], category, boxes[order], masks)


def read_procedures(path: str | Path, fps: float | None = None) -> Procedures:
    """Read COCO ground truth of videos, record by record. Each image has ``sequence_id`` and
    ``frame``; frames that are not listed are not evaluated. Annotations have a ``lesion_id``, the
    same in all frames of a lesion, and ``bbox``, ``segmentation`` or both. ``videos``, as in
    COCO-VID, has ``id`` (the sequence_id) and ``fps``; ``fps`` is that of videos without.

    Raises:
        BadInputError: naming the record: a field is missing or malformed, a frame is listed twice,
            or a video's frames per second are not known.
    """
    path = Path(path)
    numbers, facts, places = {}, [], {}
    procedure, frame, sizes = array("q"), array("q"), array("q")
    images = map(without_empty_ids, read_records(path, "images"))
    for place, image in enumerate(tqdm(images, desc="Frames", delay=2)):
        sequence, number, image_id = (image.get(k) for k in ("sequence_id", "frame", "id"))
        if not (_is_id(sequence) and _is_frame(number) and _is_id(image_id)):
            raise BadInputError(
                path,
                f"images[{place}] has the id {image_id!r}, sequence_id {sequence!r} and frame "
                f"{number!r}: --video needs all three, frame a whole number, as imrcnn "
                "prepare-dataset writes them for data sets of videos",
            )
        if sequence not in numbers:
            numbers[sequence] = len(facts)
            facts.append({k: v for k, v in image.items() if k not in _FRAME_FIELDS})
        shared = facts[numbers[sequence]]
        for key in [key for key, value in shared.items() if image.get(key) != value]:
            del shared[key]
        places[image_id] = place
        procedure.append(numbers[sequence])
        frame.append(number)
        sizes.extend(recorded_size(image, path))
    if not facts or len(places) < len(frame):
        raise BadInputError(path, "lists no images" if not facts else "has two images of one id")
    procedure, frame = (np.frombuffer(column, dtype=np.int64) for column in (procedure, frame))
    sizes = np.frombuffer(sizes, dtype=np.int64).reshape(-1, 2)
    order = np.lexsort((frame, procedure))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    places = dict(zip(places, position.tolist(), strict=True))
    procedure, frame, sizes = procedure[order], frame[order], sizes[order]
    twice = (np.diff(procedure) == 0) & (np.diff(frame) == 0)
    if twice.any():
        row = int(np.argmax(twice))
        sequence = [*numbers][procedure[row]]
        raise BadInputError(path, f"lists frame {frame[row]} of {sequence!r} twice: keep one")
    videos = map(without_empty_ids, read_records(path, "videos"))
    videos = {record["id"]: record for record in videos if _is_id(record.get("id"))}
    rates = _frame_rates(path, numbers, videos, fps)
    for sequence, number in numbers.items():
        stated = videos.get(sequence, {}).items()
        stated = {k: v for k, v in stated if k != "id" and v is not None}
        facts[number] = {**facts[number], **stated}

    reader, lesions, lesion, crowd = _RegionReader(path, "annotations", sizes), {}, [], []
    records = map(without_empty_ids, read_records(path, "annotations"))
    for number, record in enumerate(tqdm(records, desc="Annotations", delay=2)):
        image, lesion_id = record.get("image_id"), record.get("lesion_id")
        place = places.get(image) if _is_id(image) else None
        if place is None:
            raise BadInputError(path, f"annotations[{number}] has the image_id {image!r}: no image")
        reader.add(number, record, place)
        crowd.append(bool(record.get("iscrowd", 0)))
        key = None
        if lesion_id is not None and not crowd[-1]:
            if not _is_id(lesion_id):
                reason = f"annotations[{number}] has the lesion_id {lesion_id!r:.60}, not a text"
                raise BadInputError(path, reason)
            key = int(procedure[place]), lesion_id
            if key not in lesions:
                kept = {k: v for k, v in record.items() if k not in _REGION_FIELDS}
                lesions[key] = len(lesions), kept
        lesion.append(-1 if key is None else lesions[key][0])
    order, regions = reader.regions()
    lesion, crowd = np.array(lesion, dtype=int)[order], np.array(crowd, dtype=bool)[order]
    if unknown := int(np.sum((lesion < 0) & ~crowd)):
        logger.warning(
            f"{path}: {unknown} of {len(lesion)} annotations have no lesion_id; they count for "
            "frames, not for lesions."
        )
    return Procedures(
        names=[*numbers],
        facts=facts,
        fps=rates,
        procedure=procedure,
        frame=frame,
        places=places,
        regions=regions,
        crowd=crowd,
        lesion=lesion,
        lesions=[kept for _, kept in lesions.values()],
        procedure_of_lesion=np.array([number for number, _ in lesions], dtype=int),
        sizes=sizes,
        source=path,
    )


def _frame_rates(path, numbers, videos, fps):
    rates = [videos.get(sequence, {}).get("fps") or fps for sequence in numbers]
    for sequence, rate in zip(numbers, rates, strict=True):
        if type(rate) not in (int, float) or not 0 < rate < math.inf:
            raise BadInputError(
                path,
                f"videos states the fps {rate!r} for {sequence!r}: give its frames per second "
                "there, or with --fps",
            )
    return np.array(rates, dtype=float)


def read_video_detections(
    path: str | Path, truth: Procedures, ignore_extra: bool = False
) -> VideoDetections:
    """Read detections in these procedures, record by record: a COCO results list, whose image_id is
    that of the ground truth, or a COCO file as `imrcnn predict` writes, whose images are matched by
    ``sequence_id`` (of videos without one the name, with or without its suffix) and ``frame``, else
    by ``file_name``. At most 100 detections of a frame are used, those of the highest scores.

    Args:
        ignore_extra: leave out the detections of a list in images that the ground truth lacks. A
            file's frames that the ground truth does not list are never evaluated.

    Raises:
        BadInputError: naming the record: a field is missing or malformed, or no frame matches.
    """
    path = Path(path)
    is_list = is_json_list(path)
    key, places, notes, info = "" if is_list else "annotations", truth.places, {}, None
    if not is_list:
        with open(path, "rb") as file:
            info = next(ijson.items(file, "info", use_float=True), None)
        places, notes = _predicted_frames(path, truth)
    annotated = np.zeros(len(truth.frame), dtype=bool)
    annotated[truth.regions.image] = True
    reader = _RegionReader(path, key or "results", truth.sizes)
    score, alarm, mapped, extra = array("d"), array("b"), False, 0
    for number, record in enumerate(tqdm(read_records(path, key), desc="Detections", delay=2)):
        image, value = record.get("image_id"), record.get("score")
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            where = f"{reader.key}[{number}], of image {image!r}"
            raise BadInputError(path, f"{where}, has the score {value!r}, not a number from 0")
        place = places.get(image) if _is_id(image) else None
        if place is None:
            if is_list and ignore_extra:
                extra += 1
                continue
            reason = f"{reader.key}[{number}] has the image_id {image!r}, not in the ground truth"
            raise BadInputError(path, f"{reason}; --ignore-extra-images leaves such ones out")
        if place < 0:
            continue
        reader.add(number, record, place, keep_mask=annotated[place])
        score.append(value)
        mapped = mapped or record.get("raw_score") is not None
        alarm.append(record.get("alarm") is not False)
    order, regions = reader.regions()
    if extra:
        notes["ignored_detections"] = extra
    score = np.frombuffer(score, dtype=float)[order]
    alarm = np.frombuffer(alarm, dtype=np.int8)[order].astype(bool)
    return VideoDetections(regions, score, alarm, mapped, notes, info)


def _procedures_of(sequences, names):
    """(S,) int, the position of each sequence in the names, -1 where it is none of them: by its
    name or, of those that no sequence has, the only one that is alike but for the suffix of a
    video or for folders above."""
    numbers = {name: number for number, name in enumerate(names)}
    free = {name: _without_suffix(name) for name in names if name not in sequences}
    positions = np.full(len(sequences), -1)
    for place, sequence in enumerate(sequences):
        path = _without_suffix(sequence)
        alike = [name for name, other in free.items() if ends_alike(path, other)]
        name = sequence if sequence in numbers else alike[0] if len(alike) == 1 else None
        positions[place] = numbers.get(name, -1)
    return positions


def _without_suffix(name):
    path = PurePosixPath(str(name))
    return path.with_suffix("") if path.suffix.lower() in VIDEO_SUFFIXES else path


def _predicted_frames(path, truth):
    """{image id in the file: position of the frame, -1 where it is not evaluated}, and notes."""
    known, ids, by_name = {}, [], {}  # the first: sequence -> its number
    procedure, frame = array("q"), array("q")
    for image in tqdm(read_records(path, "images"), desc="Predicted frames", delay=2):
        sequence, number, name = (image.get(k) for k in ("sequence_id", "frame", "file_name"))
        if sequence is None and isinstance(name, str) and "#" in name:
            sequence = name.rpartition("#")[0]
        if not _is_id(image.get("id")):
            reason = f"images[{len(ids)}] has the id {image.get('id')!r:.60}"
            raise BadInputError(path, reason)
        if not (_is_frame(number) and _is_id(sequence)):
            by_name[len(ids)] = str(name)
            sequence, number = None, 0
        ids.append(image.get("id"))
        procedure.append(-1 if sequence is None else known.setdefault(sequence, len(known)))
        frame.append(number)
    procedure, frame = (np.frombuffer(column, dtype=np.int64) for column in (procedure, frame))
    procedure = np.append(_procedures_of(known, truth.names), -1)[procedure]
    places = np.full(len(ids), -1)
    if len(ids):
        size = max(truth.frame.max(), frame.max()) + 1
        keys = truth.procedure * size + truth.frame
        predicted = procedure * size + frame
        nearest = np.minimum(np.searchsorted(keys, predicted), len(keys) - 1)
        places = np.where((keys[nearest] == predicted) & (procedure >= 0), nearest, -1)
    if by_name:
        names = {
            r.get("file_name"): truth.places[r["id"]] for r in read_records(truth.source, "images")
        }
        for row, name in by_name.items():
            places[row] = names.get(name, -1)
    evaluated = places[places >= 0]
    if not len(evaluated):
        theirs = few([repr(name) for name in known] or [repr(n) for n in by_name.values()])
        raise BadInputError(
            path,
            f"has no frame of the ground truth: its videos or images are {theirs or 'none'}, those "
            f"of {truth.source} are {few([repr(name) for name in truth.names])}. They are matched "
            "by sequence_id and frame, else by file_name",
        )
    if len(np.unique(evaluated)) < len(evaluated):
        place = int(np.argmax(np.bincount(evaluated)))
        name = f"frame {truth.frame[place]} of {truth.names[truth.procedure[place]]!r}"
        raise BadInputError(path, f"has two images for {name}: keep one")
    notes = {}
    if others := int(np.sum(places < 0)):
        notes["frames_not_evaluated"] = others
        logger.info(f"{path}: {others} frames that the ground truth does not list are left out.")
    if missing := len(truth.frame) - len(evaluated):
        notes["frames_without_predictions"] = missing
        logger.warning(
            f"{path} lacks {missing} of {len(truth.frame)} frames of the ground truth, which are "
            "taken as frames without a detection."
        )
    return dict(zip(ids, places.tolist(), strict=True)), notes
