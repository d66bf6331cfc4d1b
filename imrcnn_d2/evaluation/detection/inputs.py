"""COCO ground truth, COCO results and folders of masks, checked and turned into parallel arrays.

Everything downstream (matching, counts, curves, COCO's AP) reads these arrays, so whatever is
accepted as input is decided here, once.
"""

import contextlib
import logging
import math
import operator
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats.coco import (
    FARTHEST,
    NUMBER,
    check_records,
    first_wrong_box,
    to_rles,
    without_empty_ids,
)
from imrcnn_d2.data.images import read_values
from imrcnn_d2.data.masks import check_size
from imrcnn_d2.utils.files import (
    BadInputError,
    few,
    file_in,
    is_json_list,
    read_json,
    read_records,
)
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

# Detections considered per image and class, as in COCO.
MAX_DETECTIONS = 100
# Records are turned into columns in batches of so many, so that those of a results list, of which
# there may be so many, are never in memory as a whole.
_BATCH, _MOST_RECORDS = 2_000, 20_000_000
# The fields of an annotation that Regions holds.
_REGION = ("segmentation", "bbox")
_IDS = ("image_id", "category_id")
# Of each list of ground truth: required fields, and the types of others.
GROUND_TRUTH = {
    "images": (("id",), {"file_name": str, "patient_id": (*NUMBER, str, type(None))}),
    "categories": (("id", "name"), {}),
    "annotations": (_IDS, {"area": NUMBER, "lesion_id": (*NUMBER, str, type(None))}),
}


@dataclass(frozen=True, eq=False)
class Regions:
    """N regions of a data set, by ascending image id and in file order within an image."""

    image: np.ndarray  # (N,) int, position in ``GroundTruth.images``
    category: np.ndarray  # (N,) int, position in ``GroundTruth.categories``
    boxes: np.ndarray  # (N, 4) float, XYWH in pixels
    masks: Sequence[dict] | None  # N compressed RLEs; None where the file gives boxes only

    def __len__(self):
        return len(self.image)

    def of_images(self, positions: np.ndarray) -> tuple[np.ndarray, "Regions"]:
        """The (N,) int positions of the regions in the images at (I,) ascending positions; and
        these regions, in images that are numbered by their place in ``positions``."""
        rows = np.flatnonzero(np.isin(self.image, positions))
        regions = self.take(rows)
        return rows, replace(regions, image=np.searchsorted(positions, regions.image))

    def take(self, rows: np.ndarray) -> "Regions":
        """Those at (K,) int positions, in this order."""
        masks = None if self.masks is None else [self.masks[row] for row in rows]
        return Regions(self.image[rows], self.category[rows], self.boxes[rows], masks)


class Rles(Sequence):
    """N compressed RLEs in a third of the memory of a list: (N, 2) int32 heights and widths, and
    one text, in which ``counts`` of each begin at (N,) int and have a (N,) int length."""

    def __init__(self, sizes: np.ndarray, text: bytearray, begin: np.ndarray, length: np.ndarray):
        self.sizes, self.text, self.begin, self.length = sizes, text, begin, length

    def __len__(self):
        return len(self.begin)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[row] for row in range(*key.indices(len(self)))]
        begin = self.begin[key]
        counts = bytes(self.text[begin : begin + self.length[key]])
        return {"size": self.sizes[key].tolist(), "counts": counts}

    def take(self, rows: np.ndarray) -> "Rles":
        """Those at (K,) int positions, in this order, of the same text."""
        return Rles(self.sizes[rows], self.text, self.begin[rows], self.length[rows])


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """COCO annotations, N of them; records are as in the file."""

    images: list[dict]  # by ascending id
    categories: list[dict]  # by ascending id
    regions: Regions
    annotations: list[dict]  # their fields but for box and mask
    crowd: np.ndarray  # (N,) bool, COCO's ``iscrowd``
    area: np.ndarray  # (N,) float in pixels, COCO's ``area``: decides small, medium or large

    @property
    def lesions(self) -> np.ndarray:
        """(number of images,) int, lesions in each image, crowds left out."""
        return np.bincount(self.regions.image[~self.crowd], minlength=len(self.images))


@dataclass(frozen=True, eq=False)
class Detections:
    """N detections. A folder of masks has no scores: ``scored`` is False, ``score`` 1 throughout,
    and metrics that rank detections or units by score are undefined."""

    regions: Regions
    score: np.ndarray  # (N,) float, finite and not negative
    scored: bool = True
    # What was assumed in reading, for ``meta``: matched_classes, ignored_images, missing_images.
    notes: Mapping[str, dict | list] = field(default_factory=dict)
    # (N,) float, the scores as the network gave them, where ``score`` is what the map of the
    # model's weights made of them; None where a file has no ``raw_score``.
    unmapped: np.ndarray | None = None
    info: dict | None = None  # of a predictions.json

    @property
    def mapped(self) -> bool:
        """Whether ``score`` is the probability of a hit that a map made of the network's score."""
        return self.unmapped is not None

    @property
    def raw_score(self) -> np.ndarray:
        """(N,) float, the scores as the network gave them: ``score`` where there are no others."""
        return self.unmapped if self.mapped else self.score


def check_tau(tau: float) -> float:
    """Return ``tau``; ValueError for what is no score threshold."""
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}; it must be a number that is not negative.")
    return tau


def check_iou_threshold(threshold: float):
    """ValueError for what is no least overlap."""
    if not 0 < threshold <= 1:
        raise ValueError(f"iou_threshold is {threshold}; it must lie in (0, 1].")


def mask_areas(masks: list[dict]) -> np.ndarray:
    """(N,) float, pixels, of compressed RLEs."""
    # Under numpy 2, pycocotools 2.0.11 overflows on more than 255 masks.
    parts = [mask_util.area(masks[i : i + 255]) for i in range(0, len(masks), 255)]
    return np.concatenate(parts or [[]]).astype(float)


def read_ground_truth(gt, source: str | Path | None = None) -> GroundTruth:
    """Read COCO instance annotations (a dict, pycocotools.coco.COCO, str or Path; a GroundTruth is
    returned as it is). Masks are RLE (compressed or not) or polygons; ``regions.masks`` is None
    unless every annotation has one. ``iscrowd``, ``area`` and one of ``bbox`` and ``segmentation``
    may be missing. ``source`` names them in errors, by default as the file.

    Raises:
        BadInputError: naming the record: a field is missing, of a wrong type or malformed, ids or
            category names are doubled, or a mask is of another size than its image.
    """
    if isinstance(gt, GroundTruth):
        return gt
    source = source or (gt if isinstance(gt, str | Path) else "the ground truth")
    dataset = _load(gt)
    dataset = dataset if isinstance(dataset, dict) else {}
    for key in ("images", "categories"):
        check_records(dataset.get(key), key, source, *GROUND_TRUTH[key])
    images, categories = (by_id(dataset[key], key, source) for key in ("images", "categories"))
    for name, count in Counter(category["name"] for category in categories).items():
        if count > 1:
            raise BadInputError(source, f"has several categories {name!r}: rename them")
    reader = _RecordReader(source, "annotations", GROUND_TRUTH["annotations"][1])
    reader.read(dataset.get("annotations"))
    order, regions = reader.regions(images, categories)
    annotations = [without_empty_ids(dataset["annotations"][row]) for row in order.tolist()]
    for annotation in annotations:
        crowd, area = annotation.get("iscrowd", 0), annotation.get("area", 0)
        if crowd not in (0, 1) or not 0 <= area <= FARTHEST**2:
            image, values = annotation["image_id"], f"iscrowd {crowd!r:.40} and area {area!r:.40}"
            raise BadInputError(source, f"an annotation of image {image!r} has {values}")
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    areas = regions.boxes[:, 2] * regions.boxes[:, 3]
    if regions.masks and not all("area" in annotation for annotation in annotations):
        areas = mask_areas(regions.masks)
    area = np.array([a.get("area", o) for a, o in zip(annotations, areas, strict=True)], float)
    fields = [{k: v for k, v in a.items() if k not in _REGION} for a in annotations]
    return GroundTruth(images, categories, regions, fields, crowd, area)


def read_results(
    results, gt: GroundTruth, source: str | Path | None = None, ignore_extra_images: bool = False
) -> Detections:
    """Read a COCO results list (``image_id``, ``category_id``, ``score`` and ``bbox``,
    ``segmentation`` or both), or a COCO dict whose ``annotations`` carry a ``score``, as ``imrcnn
    predict`` writes, or a JSON file of either. The dict's images and categories are matched with
    those of the ground truth by ``file_name`` and ``name``, since its ids may have been given
    independently, and so are the images of a list whose records all have a ``file_name``; a single
    class is matched with a single class whatever the names. Or read a folder of masks, see
    :func:`read_predicted_masks`. Where every ``score`` is null, as :func:`coco_result` has it for
    such a folder, the results have no scores. A ``raw_score``, of the network before any map of
    scores, is read where all have one. Detections are returned as they are. ``source`` names them
    in errors, by default as the file; images that the ground truth lacks are an error unless
    ``ignore_extra_images`` leaves them out.

    Raises:
        BadInputError: as of :func:`read_ground_truth`, and for a score that is missing, NaN,
            infinite or negative, and likewise for a raw_score where others have one.
    """
    if isinstance(results, Detections):
        return results
    source = source or (results if isinstance(results, str | Path) else "the results")
    is_path, listed, key, unscored = isinstance(results, str | Path), {}, "results", False
    if is_path and Path(results).is_dir():
        records, unscored = read_predicted_masks(results, gt), True
    elif is_path and is_json_list(results):
        records = read_records(Path(results), "")
    else:
        records = _load(results)
        if isinstance(records, dict):
            listed, key = records, "annotations"
            if key not in listed:
                raise BadInputError(source, "has no 'annotations': give a COCO results list")
            records = listed[key]
    for name in ("images", "categories"):
        check_records(listed.get(name, []), name, source, ("id",), {"file_name": str})
    reader = _RecordReader(source, key, {"file_name": str})
    reader.read(records)
    if key == "results" and len(reader.file_names) == len(reader.ids["image_id"]):
        names = reader.file_names.items()
        listed = {"images": [{"id": id_, "file_name": name} for id_, name in names]}
    category_ids, notes = _category_ids(gt, listed, reader)
    image_ids, image_notes = _image_ids(gt, listed, reader, ignore_extra_images)
    order, regions = reader.regions(gt.images, gt.categories, image_ids, category_ids)
    score, raw = reader.scores
    unscored = unscored or reader.number > 0 and not score.is_given
    if raw.is_given or not unscored:
        score.check(reader)
    if raw.is_given:
        raw.check(reader)
    return Detections(
        regions,
        np.ones(len(order)) if unscored else score.values[order],
        not unscored,
        {**notes, **image_notes},
        raw.values[order] if raw.is_given else None,
        listed.get("info"),
    )


class _Scores:
    """A column of records; ``is_given`` says whether any is not null."""

    def __init__(self, name: str, missing: str | None):
        self.name, self.missing, self.is_given = name, missing, False
        self._columns, self._wrong = [np.zeros(0)], None

    def add(self, records, start):
        scores = [record.get(self.name, self.missing) for record in records]
        self.is_given = self.is_given or any(score is not None for score in scores)
        column = _as_column(scores)
        right = (column >= 0) & (column < math.inf)
        if self._wrong is None and not right.all():
            row = int(right.argmin())
            self._wrong = start + row, records[row].get(self.name, self.missing)
        self._columns.append(column)

    def check(self, reader):
        """BadInputError if one is no score."""
        if self._wrong is not None:
            number, score = self._wrong
            reason = f"has the {self.name} {score!r:.40}, not a finite one from 0"
            raise BadInputError(reader.source, f"{reader.name(number)}, {reason}")

    @property
    def values(self):
        """(N,) float."""
        return np.concatenate(self._columns)


def _as_column(scores):
    """(N,) float, NaN for what is no number."""
    if set(map(type, scores)) <= {int, float}:
        with contextlib.suppress(OverflowError):  # of an integer beyond what a float can be
            return np.array(scores, float)
    return np.array([score if _is_score(score) else math.nan for score in scores], float)


def _is_score(value):
    return isinstance(value, NUMBER) and type(value) is not bool and value <= sys.float_info.max


class _RecordReader:
    """N COCO records, checked and turned into columns batch by batch.

    Attributes:
        number: N.
        ids: of "image_id" and "category_id", {id: number of the first record that has it}.
        file_names: {image id: file_name} of the images whose records have one.
        scores: the columns "score" and "raw_score".
    """

    def __init__(self, source: str | Path, key: str, kinds: Mapping[str, type | tuple]):
        self.source, self.key, self.kinds, self.number = source, key, kinds, 0
        self.ids, self.file_names = {name: {} for name in _IDS}, {}
        self.scores = _Scores("score", "missing"), _Scores("raw_score", None)
        # Batch by batch, of each record: the first one with its ids; its box; the size of its RLE,
        # and the length of its text, -1 where it has none.
        self._first = {name: [np.zeros(0, int)] for name in _IDS}
        self._boxes, self._sizes = [np.zeros((0, 4))], [np.zeros((0, 2), np.int32)]
        self._lengths, self._text = [np.zeros(0, np.int32)], bytearray()
        self._polygons = {}  # by record, which take the size of their image
        self._lacking = []  # records that have no box

    def read(self, records: Iterable[dict]) -> None:
        """Read a list, or records one after the other."""
        if not isinstance(records, Iterator):
            check_records(records, self.key, self.source, ())
        records = iter(tqdm(records, desc=self.key.capitalize(), delay=2))
        while batch := list(islice(records, _BATCH)):
            if self.number + len(batch) > _MOST_RECORDS:
                reason = f"has more than {_MOST_RECORDS:,} {self.key}; split it"
                raise BadInputError(self.source, reason)
            self._add(batch, self.number)
            self.number += len(batch)

    def name(self, number: int) -> str:
        """A record, for errors."""
        first = np.concatenate(self._first["image_id"])[number]
        image_id = next(id_ for id_, n in self.ids["image_id"].items() if n == first)
        return f"{self.key}[{number}], of image {image_id!r}"

    def _add(self, records, start):
        check_records(records, self.key, self.source, _IDS, self.kinds, start)
        for name, first in self.ids.items():
            numbers = [first.setdefault(r[name], n) for n, r in enumerate(records, start)]
            self._first[name].append(np.array(numbers))
        self.file_names.update((r["image_id"], r["file_name"]) for r in records if "file_name" in r)
        for scores in self.scores:
            scores.add(records, start)
        masks = {n: record.get("segmentation") for n, record in enumerate(records, start)}
        rles = {n: mask for n, mask in masks.items() if isinstance(mask, dict)}
        sizes, lengths = np.zeros((len(records), 2), np.int32), np.full(len(records), -1, np.int32)
        if rles:
            rows = [n - start for n in rles]
            sizes[rows] = stated = [self._stated_size(n, rle) for n, rle in rles.items()]
            lengths[rows] = self._append(rles, stated)
        if len(rles) < len(records):
            others = {n: mask for n, mask in masks.items() if n not in rles}
            self._polygons |= {n: m for n, m in others.items() if m is not None and m != []}
        self._sizes.append(sizes)
        self._lengths.append(lengths)
        boxes = [record.get("bbox") for record in records]
        for n, box in enumerate(boxes, start):
            if box is None or box == []:
                if n not in rles and n not in self._polygons:
                    reason = f"{self.name(n)} has neither bbox nor segmentation"
                    raise BadInputError(self.source, reason)
                self._lacking.append(n)
                boxes[n - start] = [0, 0, 0, 0]
        if (wrong := first_wrong_box(boxes)) is not None:
            reason = f"has the bbox {reprlib.repr(boxes[wrong])}, not [x, y, width, height]"
            raise BadInputError(self.source, f"{self.name(start + wrong)} {reason}")
        self._boxes.append(np.array(boxes, float))

    def _stated_size(self, number, rle):
        try:
            return stated_size(rle)
        except ValueError as error:
            raise BadInputError(self.source, f"{self.name(number)}: {error}") from error

    def _append(self, masks, sizes):
        """Append masks, {number: segmentation}, to the text; return the lengths of theirs."""
        numbers = [*masks]
        try:
            rles = to_rles([*masks.values()], sizes, lambda place: self.name(numbers[place]))
        except ValueError as error:
            raise BadInputError(self.source, str(error)) from error
        texts = [t if isinstance(t := rle["counts"], bytes) else t.encode() for rle in rles]
        self._text += b"".join(texts)
        return [len(text) for text in texts]

    def regions(
        self, images: list[dict], categories: list[dict], image_ids=None, category_ids=None
    ) -> tuple[np.ndarray, Regions]:
        """(M,) int, the numbers of the records by image, and their Regions. Where ids may differ
        from those of the ground truth, {id in the records: id there}; records of other images are
        left out.

        Raises:
            BadInputError: an id is none of the ground truth, or a mask none of its image.
        """
        image = self._positions("image_id", images, image_ids)
        category = self._positions("category_id", categories, category_ids)
        order = np.argsort(image, kind="stable")[np.count_nonzero(image < 0) :]
        image_sizes = np.array([recorded_size(i, self.source) for i in images], np.int32)
        sizes, lengths = np.concatenate(self._sizes), np.concatenate(self._lengths)
        begin = np.cumsum(lengths.clip(0), dtype=np.int64) - lengths.clip(0)
        expected = image_sizes.reshape(-1, 2)[image]
        wrong = (lengths >= 0) & (image >= 0) & (sizes != expected).any(axis=1)
        wrong &= expected.all(axis=1)
        if wrong.any():
            number = int(wrong.argmax())
            both = f"size {sizes[number].tolist()}, the image {expected[number].tolist()}"
            raise BadInputError(self.source, f"{self.name(number)}: its RLE has {both}")
        polygons = {n: mask for n, mask in self._polygons.items() if image[n] >= 0}
        if polygons:
            numbers = [*polygons]
            sizes[numbers] = expected[numbers]
            if not sizes[numbers].all():
                number = numbers[int(sizes[numbers].all(axis=1).argmin())]
                id_ = images[image[number]]["id"]
                reason = f"image {id_!r} has no height and width for masks"
                raise BadInputError(self.source, reason)
            end = len(self._text)
            lengths[numbers] = self._append(polygons, sizes[numbers].tolist())
            begin[numbers] = end + np.cumsum(lengths[numbers]) - lengths[numbers]
        masks, boxes = Rles(sizes, self._text, begin, lengths), np.concatenate(self._boxes)
        for number in self._lacking:
            if image[number] >= 0:
                boxes[number] = mask_util.toBbox(masks[number])
        has_mask = lengths[order] >= 0
        if has_mask.any() and not has_mask.all():
            without = images[image[order[has_mask.argmin()]]]["id"]
            logger.warning(
                f"{np.count_nonzero(~has_mask)} of {len(order)} {self.key} have no segmentation "
                f"(the first is for image {without}), so that metrics of masks are undefined."
            )
        masks = masks.take(order) if has_mask.all() else None
        return order, Regions(image[order], category[order], boxes[order], masks)

    def _positions(self, name, items, translation):
        """(N,) int, positions in the items; -1 where an id has no translation."""
        known = {item["id"]: position for position, item in enumerate(items)}
        positions = np.full(self.number, -1)
        for id_, number in self.ids[name].items():
            if translation is not None and id_ not in translation:
                continue
            truth = id_ if translation is None else translation[id_]
            if truth not in known:
                reason = f"has the {name} {id_!r}, not in the ground truth"
                raise BadInputError(self.source, f"{self.key}[{number}] {reason}")
            positions[number] = known[truth]
        return positions[np.concatenate(self._first[name])]


_known_size = lru_cache(typed=True)(check_size)


def _size(height, width):
    """As `check_size`; most are the same."""
    try:
        return _known_size(height, width)
    except TypeError:  # a list, say
        return check_size(height, width)


def recorded_size(image: dict, source: str | Path) -> tuple[int, int]:
    """Height and width of an image's record; 0 where it has neither.

    Raises:
        BadInputError: they are the size of no image.
    """
    if "height" not in image and "width" not in image:
        return 0, 0
    try:
        return _size(image.get("height"), image.get("width"))
    except ValueError as error:
        raise BadInputError(source, f"image {image['id']!r}: {error}") from error


def stated_size(rle: dict) -> tuple[int, int]:
    """Height and width that an RLE states; ValueError if they are the size of no image."""
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"its RLE has the size {size!r:.40}, not [height, width]")
    return _size(*size)


def _load(source):
    if isinstance(source, str | Path):
        return read_json(Path(source))
    return getattr(source, "dataset", source)  # pycocotools' COCO keeps the JSON there


def by_id(records: list[dict], key: str, source: str | Path) -> list[dict]:
    """Images or categories by ascending id; an empty id of a patient or sequence is left out."""
    try:
        records = sorted(map(without_empty_ids, records), key=lambda record: record["id"])
    except TypeError as error:
        raise BadInputError(source, f"the ids of its {key} are numbers and texts mixed") from error
    for record, following in zip(records, records[1:], strict=False):
        if record["id"] == following["id"]:
            raise BadInputError(source, f"has two {key} with id {record['id']!r}: keep one")
    return records


def _category_ids(gt, listed, reader):
    """{category id in a COCO dict: id in the ground truth}, by ``name``; ids without a name stay as
    they are. And a note where a single class has another name than that of the ground truth."""
    categories = listed.get("categories", [])
    names = {category["id"]: category.get("name", category["id"]) for category in categories}
    for id_ in reader.ids["category_id"]:
        names.setdefault(id_, id_)
    ids = {id_: id_ for id_ in names} | _translation(categories, gt.categories, "name", "category")
    known = {category["id"]: category["name"] for category in gt.categories}
    seen = reader.ids["category_id"]
    id_ = next((id_ for id_ in seen if ids[id_] not in known), None)
    if id_ is None:
        return ids, {}
    number = seen[id_]
    if len(names) == len(known) == 1:
        ((truth_id, truth),) = known.items()
        logger.warning(
            f"{reader.source}: its class {names[id_]!r} is taken for {truth!r}, the only one of "
            "the ground truth."
        )
        return {id_: truth_id}, {"matched_classes": {str(names[id_]): truth}}
    predicted, annotated = (few([*classes.values()], 20) for classes in (names, known))
    raise BadInputError(
        reader.source,
        f"{reader.key}[{number}] has the category_id {id_!r}, {names[id_]!r}: its classes are "
        f"{predicted}, those of the ground truth {annotated}. Give both the same names, of masks "
        "by imrcnn prepare-dataset --classes.",
    )


def _image_ids(gt, listed, reader, ignore_extra):
    """{image id in a COCO dict: id in the ground truth}, by ``file_name``, of which one may have
    more folders above it; ids without a name stay as they are. And notes of the images that one of
    both lacks."""
    images, notes, source = listed.get("images", []), {}, reader.source
    names = {image["id"]: image.get("file_name", image["id"]) for image in images}
    for id_ in reader.ids["image_id"]:
        names.setdefault(id_, id_)
    ids = {id_: id_ for id_ in names} | _translation(images, gt.images, "file_name", "image")
    rest = [image for image in images if ids[image["id"]] is None]
    if rest:  # written with or without folders
        paired = set(ids.values())
        free = [image for image in gt.images if image["id"] not in paired]
        ids |= _translation(rest, free, "file_name", "image", ends_alike)
    named = {}
    for id_, target in ids.items():
        if target is not None and (first := named.setdefault(target, names[id_])) != names[id_]:
            raise BadInputError(
                source,
                f"{first} and {names[id_]} would be one image of the ground truth: give each image "
                "the same file_name in both.",
            )
    known = {image["id"]: image.get("file_name", image["id"]) for image in gt.images}
    extra = {id_: name for id_, name in names.items() if ids[id_] not in known}
    is_foreign = len(extra) == len(names)
    for id_, number in reader.ids["image_id"].items():
        if id_ in extra and (is_foreign or not ignore_extra):
            remedy = "leave such images out (--ignore-extra-images)"
            raise BadInputError(
                source,
                f"{reader.key}[{number}] has the image_id {id_!r} ({extra[id_]}), not in the "
                f"ground truth, which lacks {len(extra)} of {len(names)} images: "
                f"{'score them on the data that they are of' if is_foreign else remedy}.",
            )
    if extra and ignore_extra:
        notes["ignored_images"] = list(extra.values())
        logger.warning(
            f"{source}: {len(extra)} images that the ground truth lacks are left out: "
            f"{few(notes['ignored_images'], 5)}."
        )
    paired = set(ids.values())
    missing = [name for id_, name in known.items() if id_ not in paired]
    # A list names no image without detections.
    if reader.key == "annotations" and images and missing:
        notes["missing_images"] = missing
        logger.warning(
            f"{source} lacks {len(missing)} of {len(known)} images of the ground truth, which are "
            f"taken as images without a detection: {few(missing, 5)}."
        )
    return {id_: ids[id_] for id_ in names if id_ not in extra}, notes


def _translation(records, targets, field, kind, is_alike=operator.eq):
    """{id in the results: id in the ground truth, or None} for the records that have a name."""
    known = defaultdict(list)  # by what two names that are alike have in common
    for target in targets:
        if field in target:
            known[PurePosixPath(str(target[field])).name].append(target)
    translation = {}
    for record in records:
        if field in record:
            candidates = known[PurePosixPath(str(record[field])).name]
            ids = [t["id"] for t in candidates if is_alike(record[field], t[field])]
            if len(ids) > 1:
                raise ValueError(
                    f"The {kind} '{record[field]}' of the results could be any of the ground "
                    f"truth's ids {ids}: give it the same {field} in both."
                )
            translation[record["id"]] = ids[0] if ids else None
    return translation


def ends_alike(first: str | PurePosixPath, second: str | PurePosixPath) -> bool:
    """Whether one path is the other, below more folders."""
    first, second = PurePosixPath(first).parts, PurePosixPath(second).parts
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


def read_predicted_masks(folder: str | Path, gt: GroundTruth) -> list[dict]:
    """Read masks as detections without scores: one for each connected component (8-connectivity) of
    each class, down to single pixels, the largest first.

    The folder has one PNG per image and of its size, ``STEM.png`` for a ``file_name`` of that stem;
    files that are not PNGs are left alone. For one class, the lesion is whatever is not 0 (0 and 1,
    or 0 and 255). For several, pixels hold 0 for background and 1, 2, ... for the categories by
    ascending id. Palette images hold indices; of colour images, all channels must be the same.

    Raises:
        ValueError: masks are missing or superfluous, two images would share a mask, or a mask can't
            be read, is of another size than its image, or has values that stand for no class.
    """
    results = []
    single = len(gt.categories) == 1
    for image, path in tqdm(_pairs(Path(folder), gt.images), desc="Masks", delay=2):
        mask, _ = read_values(path)
        _check_mask(mask, path, image, gt.categories)
        for value, category in enumerate(gt.categories, 1):
            record = {"image_id": image["id"], "category_id": category["id"]}
            count, components = _components(mask != 0 if single else mask == value)
            if count > MAX_DETECTIONS:
                logger.warning(
                    f"{path} has {count} regions of '{category['name']}': only the "
                    f"{MAX_DETECTIONS} largest are scored, as of any detector."
                )
            results += [{**record, **component} for component in components]
    return results


def _pairs(folder, images):
    """[(image record, path of its mask)]."""
    by_stem = {path.stem: path for path in folder.iterdir() if path.suffix.lower() == ".png"}
    if not by_stem:
        raise BadInputError(
            folder, f"holds no PNG file: give the folder of masks, or {file_in(folder)}"
        )
    pairs, missing = {}, []
    for image in images:
        if "file_name" not in image:
            raise ValueError(f"Image {image['id']} has no file_name, by which its mask is named.")
        stem = PurePosixPath(image["file_name"]).stem
        if stem in pairs:
            both = f"{pairs[stem][0]['file_name']} and {image['file_name']}"
            raise ValueError(f"{both} would share the mask {stem}.png in {folder}: rename one.")
        if stem in by_stem:
            pairs[stem] = image, by_stem[stem]
        else:
            missing.append(f"{stem}.png")
    spare = sorted(by_stem[stem].name for stem in set(by_stem) - set(pairs))
    if missing:
        raise ValueError(
            f"{folder} lacks the masks of {len(missing)} of {len(images)} images: {few(missing, 5)}"
            f"{f' (but has {few(spare, 5)})' if spare else ''}; without a detection they are empty."
        )
    if spare:
        raise ValueError(f"{folder} has {len(spare)} masks of no image: take out {few(spare, 5)}.")
    return list(pairs.values())


def _check_mask(mask, path, image, categories):
    size = [image.get("height", mask.shape[0]), image.get("width", mask.shape[1])]
    if list(mask.shape) != size:
        raise ValueError(f"{path} is {list(mask.shape)} (height, width), but its image is {size}.")
    values = np.unique(mask[mask != 0]).tolist()
    if len(categories) == 1 and len(values) > 1:
        raise ValueError(
            f"{path} has the values {few(values, 5)} besides 0, but there is one class: save the "
            "mask as 0 and 255, not as probabilities or a JPEG's greys."
        )
    if len(categories) > 1 and values and values[-1] > len(categories):
        names = ", ".join(f"{i} {c['name']}" for i, c in enumerate(categories, 1))
        raise ValueError(f"{path} has the value {values[-1]}; there are 0 background, {names}.")


def _components(mask):
    """The number of connected components; ``segmentation`` and ``bbox`` of the MAX_DETECTIONS
    largest, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    left, top, _, _, area = stats[1:count].T  # labels depend on OpenCV's algorithm; these do not
    components = []
    for label in 1 + np.lexsort((left, top, -area))[:MAX_DETECTIONS]:
        rle = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        components.append({"segmentation": rle, "bbox": stats[label, :4].tolist()})
    return count - 1, components
