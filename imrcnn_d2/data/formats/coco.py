"""COCO: any instance JSON with a folder of images.

An annotation that cannot be used rejects its whole image: dropping only the annotation would leave
its lesion to be learnt as healthy mucosa.
"""

import argparse
import contextlib
import math
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data import masks
from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.images import (
    annotated_on_stored_pixels,
    inspect_image,
    orient,
    orient_box,
    path_inside,
)
from imrcnn_d2.utils.files import BadInputError, Rejects, read_json
from imrcnn_d2.utils.progress import tqdm

_BOX_TOLERANCE = 2.0  # pixels
# COCO's compressed RLE: numbers of six digits, which hold more than any image's pixels.
_COUNTS = re.compile(r"([P-o]{0,5}[0-O])+")
_MOST_DIGITS = 6
_LONGEST_COUNTS = 2**24
_BATCH = 36_000  # bytes of it at once: arrays that stay in the processor's cache
FARTHEST = 1e9  # pixels: areas of boxes farther out would overflow
# Types of fields; those of ids and names, for all records.
NUMBER = (int, float, np.number)
_ID = (*NUMBER, str)
_KINDS = {"id": _ID, "image_id": _ID, "category_id": _ID, "name": str}
_MOST_CATEGORIES = 200  # each takes its passes, and a row and a column in tables and plots
_LONGEST_NAME = 200
_TOP_FIELDS = ("images", "annotations", "categories", "info")


class Coco(Format):
    name = "coco"
    help = "own data: a COCO instance JSON and a folder of images"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--annotations", type=Path, required=True, help="COCO instance JSON")
        help_ = "folder of the file_name entries"
        parser.add_argument("--images", type=Path, required=True, help=help_)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return read_coco(args.annotations, args.images, rejects)


def read_coco(json_file: Path, image_root: Path, rejects: Rejects) -> Source:
    """Read and check a COCO instance file; polygons and RLE, lesion-free images, further fields.

    Areas and boxes are computed anew from the masks, ids are given anew.

    Raises:
        BadInputError: the file as a whole cannot be used.
    """
    content = read_lesions(json_file)
    notes: list[str] = []
    return Source(
        samples=_samples(json_file, content, image_root, rejects, notes),
        categories=sorted(content["categories"], key=lambda category: category["id"]),
        info=content.get("info") or {},
        notes=notes,
        extra={key: value for key, value in content.items() if key not in _TOP_FIELDS},
    )


def read_coco_json(path: Path) -> dict:
    """Read a COCO instance file, checked as a whole but not record by record. An id of a patient,
    sequence or lesion that is an empty text is left out: it is not known, as in a table.

    Raises:
        BadInputError: it cannot be read or is no such file.
    """
    content = read_json(path)
    records = content if isinstance(content, dict) else {}
    check_records(records.get("images"), "images", path, ("file_name", "id"))
    check_records(records.get("annotations"), "annotations", path, ("category_id", "image_id"))
    check_records(records.get("categories"), "categories", path, ("id", "name"), {"id": int})
    for key in ("id", "name"):
        values = Counter(category[key] for category in content["categories"])
        if not values or max(values.values()) > 1:
            reason = f"no categories, or two of the same {key}: {content['categories']}"
            raise BadInputError(path, reason)
    for key in ("images", "annotations"):
        content[key] = [*map(without_empty_ids, content[key])]
    return content


def without_empty_ids(record: dict) -> dict:
    """The record of an image or annotation without the ids of patients, sequences and lesions that
    are "": they would make one of all that have none."""
    empty = {key for key in masks.IDS if record.get(key) == ""}
    return {k: v for k, v in record.items() if k not in empty} if empty else record


def read_lesions(path: Path) -> dict:
    """Read as `read_coco_json`; BadInputError if the annotations are classes of whole images."""
    content = read_coco_json(path)
    annotations = content["annotations"]
    if annotations and not any({"bbox", "segmentation"} & record.keys() for record in annotations):
        reason = "no annotation has a bbox or a segmentation: it has classes of whole images, which"
        raise BadInputError(path, f"{reason} only classifiers read, and no lesions")
    return content


def check_records(
    records: object,
    key: str,
    source: str | Path,
    needed: Sequence[str],
    kinds: Mapping[str, type | tuple[type, ...]] | None = None,
    start: int = 0,
) -> None:
    """Check what every reader of COCO records relies on.

    Args:
        records: the content of a file's `key`: images, annotations, categories or results.
        kinds: types of further fields; of numbers, truth values are none.
        start: the number of the first record.

    Raises:
        BadInputError: no list of objects, one lacks a `needed` field, or one is of another type.
    """
    if not isinstance(records, list) or not {type(record) for record in records} <= {dict}:
        raise BadInputError(source, f"is no COCO instance file: it has no list of {key}")
    for name in needed:
        for i, record in enumerate(records):
            if name not in record:
                missing = ", ".join(name for name in needed if name not in record)
                raise BadInputError(source, f"{key}[{start + i}] lacks {missing}")
    for name, allowed in {**_KINDS, **(kinds or {})}.items():
        types = {type(record[name]) for record in records if name in record}
        if wrong := {kind for kind in types if kind is bool or not issubclass(kind, allowed)}:
            i = next(i for i, r in enumerate(records) if name in r and type(r[name]) in wrong)
            value = reprlib.repr(records[i][name])
            raise BadInputError(source, f"{key}[{start + i}] has the {name} {value}")
    if key != "categories":
        return
    if len(records) > _MOST_CATEGORIES:
        raise BadInputError(source, f"has {len(records)} categories, more than {_MOST_CATEGORIES}")
    for i, name in enumerate(record.get("name", "") for record in records):
        if len(name) > _LONGEST_NAME or not name.isprintable():
            reason = f"categories[{i}] has the name {reprlib.repr(name)}; give it at most "
            reason += f"{_LONGEST_NAME} characters, none of them a control character"
            raise BadInputError(source, reason)


def is_box(value: object) -> bool:
    """Whether it is [x, y, width, height] in pixels, of numbers whose area does not overflow."""
    return (
        type(value) in (list, tuple)
        and len(value) == 4
        and all(kind is not bool and issubclass(kind, NUMBER) for kind in {*map(type, value)})
        and sum(map(abs, value)) <= FARTHEST  # which NaN is not
        and min(value[2:]) >= 0
    )


def first_wrong_box(values: Sequence[object]) -> int | None:
    """The place of the first of many that is not as `is_box` says; None if all are."""
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        if set(map(type, chain.from_iterable(values))) <= {int, float}:
            with contextlib.suppress(OverflowError):  # of an integer beyond what a float can be
                boxes = np.array(values, float).reshape(-1, 4)
                near = np.abs(boxes).sum(axis=1) <= FARTHEST
                if (near & (boxes[:, 2:] >= 0).all(axis=1)).all():
                    return None
    return next((place for place, value in enumerate(values) if not is_box(value)), None)


def _samples(
    json_file: Path, content: dict, image_root: Path, rejects: Rejects, notes: list[str]
) -> Iterator[Sample]:
    records = content["images"]
    ids = Counter(record["id"] for record in records)
    names = Counter(r["file_name"] for r in records if isinstance(r["file_name"], str))
    by_image: dict[object, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        with rejects.catch():
            image_id = annotation["image_id"]
            if image_id not in ids:
                reason = f"{_name(annotation)}: there is no image with id {image_id!r}"
                raise BadInputError(json_file, reason)
            by_image[image_id].append(annotation)

    category_ids = {category["id"] for category in content["categories"]}
    num_moved = 0
    for record in tqdm(records, desc="Reading images", unit="image"):
        with rejects.catch():
            path = path_inside(image_root, record["file_name"], json_file, rejects.follow_links)
            # which annotations belong to which of the two cannot be known
            for key, counts in (("id", ids), ("file_name", names)):
                if counts[record[key]] > 1:
                    reason = f"duplicate: several images with {key} {record[key]!r} in {json_file}"
                    raise BadInputError(path, reason)
            image = inspect_image(path)
            width, height = record.get("width", image.width), record.get("height", image.height)
            turned = annotated_on_stored_pixels(image, width, height)
            if image.orientation != 1 and not turned and by_image[record["id"]]:
                notes.append(f"{path}: EXIF-rotated, annotations taken as of the rotated image")
            annotations, seen = [], set()
            for annotation in by_image[record["id"]]:
                try:
                    checked, moved = _check(annotation, height, width, category_ids)
                    num_moved += moved
                    if turned and "segmentation" not in checked:
                        box = orient_box(checked["bbox"], width, height, image.orientation)
                        checked["bbox"] = list(box)
                    elif turned:
                        mask = mask_util.decode(to_rle(checked["segmentation"], height, width))
                        mask = orient(mask, image.orientation)
                        kept = {key: checked[key] for key in ("category_id", "iscrowd")}
                        checked |= masks.annotation_from_mask(mask, **kept)
                    if (content_of_mask := _content(checked)) in seen:
                        raise ValueError("listed twice")
                except ValueError as error:
                    raise BadInputError(path, f"{_name(annotation)}: {error}") from error
                seen.add(content_of_mask)
                annotations.append(checked)
            fields = {k: v for k, v in record.items() if k not in masks.IMAGE_FIELDS}
            yield Sample(path.relative_to(image_root).as_posix(), image, annotations, fields)
    if num_moved:
        text = f"differed by more than {_BOX_TOLERANCE:g} pixels from their masks' boxes"
        notes.append(f"{num_moved} boxes {text}, which are used instead")


def _content(annotation: dict) -> tuple:
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        return annotation["category_id"], tuple(annotation["bbox"])
    if isinstance(segmentation, list):
        return annotation["category_id"], tuple(map(tuple, segmentation))
    counts = segmentation["counts"]
    return annotation["category_id"], counts if isinstance(counts, str) else tuple(counts)


def _name(annotation: dict) -> str:
    return f"annotation {annotation['id']}" if "id" in annotation else "an annotation without id"


def _check(annotation: dict, height: int, width: int, category_ids: set) -> tuple[dict, bool]:
    """The annotation without ids, with box and area of its mask or, where it has no mask, its box
    cut at the image's borders; whether the box moved from its mask; ValueError."""
    if annotation["category_id"] not in category_ids:
        raise ValueError(f"there is no category with id {annotation['category_id']!r}")
    if annotation.get("ignore"):
        raise ValueError("is marked ignore, which Detectron2 cannot read; mark it iscrowd instead")
    iscrowd = annotation.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise ValueError(f"iscrowd is {iscrowd!r}, neither 0 nor 1")
    checked = {key: value for key, value in annotation.items() if key not in ("id", "image_id")}
    if not annotation.get("segmentation"):
        if "bbox" not in annotation:
            raise ValueError("has neither segmentation nor bbox")
        checked.pop("segmentation", None)
        checked |= masks.annotation_from_box(
            annotation["bbox"], height, width, annotation["category_id"], iscrowd=int(iscrowd)
        )
        return checked, False
    rle = to_rle(annotation["segmentation"], height, width)
    area = int(mask_util.area(rle))
    if area == 0:
        raise ValueError(f"its mask covers no pixel of the {width}x{height} image")
    box = mask_util.toBbox(rle)
    moved = "bbox" in annotation and _check_box(annotation["bbox"], box, height, width)
    return {**checked, "bbox": box.tolist(), "area": area, "iscrowd": int(iscrowd)}, moved


def _check_box(given: object, box: np.ndarray, height: int, width: int) -> bool:
    """Whether a given [x, y, w, h] differs from the mask's; ValueError if it is none or outside."""
    masks.cut_box(given, height, width)
    corners = np.array([given, box])
    corners[:, 2:] += corners[:, :2]
    return bool(np.abs(corners[0] - corners[1]).max() > _BOX_TOLERANCE)


def to_rle(segmentation: object, height: int, width: int) -> dict:
    """Compressed RLE of a COCO segmentation: polygons, or either kind of RLE.

    Every segmentation of a file goes through here, or through `to_rles`: pycocotools itself does
    not check what it is given, and may read on forever, or beyond the end.

    Raises:
        ValueError: it is malformed, or its size is not that of the image.
    """
    rles = [_compressed(segmentation, *masks.check_size(height, width))]
    if _check_counts(rles) is not None:
        raise ValueError(_not_covering(height, width))
    return rles[0]


def to_rles(
    segmentations: Sequence[object], sizes: Sequence[tuple[int, int]], name: Callable[[int], str]
) -> list[dict]:
    """`to_rle` of many, in a small part of the time; `sizes` are as `check_size` returns them.

    Raises:
        ValueError: as `to_rle`; it contains `name` of the segmentation's place.
    """
    rles: list[dict] = []
    for segmentation, size in zip(segmentations, sizes, strict=True):
        try:
            rles.append(_compressed(segmentation, *size))
        except ValueError as error:
            raise ValueError(f"{name(len(rles))}: {error}") from error
    if (wrong := _check_counts(rles)) is not None:
        raise ValueError(f"{name(wrong)}: {_not_covering(*sizes[wrong])}")
    return rles


def _compressed(segmentation: object, height: int, width: int) -> dict:
    """Compressed RLE; one that the file has itself is of the right size, but its text unchecked."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise ValueError(f"its RLE has size {size}, the image [{height}, {width}]")
        if isinstance(counts, str | bytes):
            if len(counts) > _LONGEST_COUNTS:
                raise ValueError(f"its RLE of {len(counts)} characters is too long for any mask")
            whole = set(map(type, size)) == {int}
            return segmentation if whole else {"size": [height, width], "counts": counts}
        whole = isinstance(counts, list) and set(map(type, counts)) <= {int}
        if not whole or min(counts, default=-1) < 0 or sum(counts) != height * width:
            raise ValueError(_not_covering(height, width))
        return _from_runs(counts, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its segmentation is neither a list of polygons nor RLE")
    for polygon in segmentation:
        if not isinstance(polygon, list) or not _are_numbers(polygon) or len(polygon) % 2:
            raise ValueError("a polygon is not a flat list x1, y1, x2, y2, ...")
        masks.check_polygon(polygon, height, width)
    return masks.union(mask_util.frPyObjects(segmentation, height, width))


def _from_runs(runs: Sequence[int], height: int, width: int) -> dict:
    """Compressed RLE without empty runs, for which pycocotools' merge and iou are wrong."""
    runs = np.asarray(runs)
    filled = np.flatnonzero(runs)
    changes = np.flatnonzero(np.diff(filled % 2, prepend=-1))
    counts = np.add.reduceat(runs[filled], changes).tolist()
    size = [height, width]
    return mask_util.frPyObjects({"size": size, "counts": [0] * (filled[0] % 2) + counts}, *size)


def _check_counts(rles: list[dict]) -> int | None:
    """The place of the first compressed RLE that does not cover its image exactly; None if all do.

    Those with empty runs are replaced.
    """
    batches = np.cumsum([len(rle["counts"]) for rle in rles]) // _BATCH
    starts = np.flatnonzero(np.diff(batches, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(rles)]):
        batch = rles[start:end]
        counts = [rle["counts"] for rle in batch]
        texts = [text if isinstance(text, str) else text.decode("latin-1") for text in counts]
        runs, first = run_lengths(texts)
        pixels = [rle["size"][0] * rle["size"][1] for rle in batch]
        wrong = np.add.reduceat(runs, first, dtype=np.int64) != pixels
        wrong |= np.minimum.reduceat(runs, first) < 0
        if wrong.any():
            return start + int(wrong.argmax())
        is_empty = runs == 0
        is_empty[first] = False  # a mask may begin at the first pixel
        if is_empty.any():
            parts = np.split(runs, first[1:])
            for i in np.flatnonzero(np.logical_or.reduceat(is_empty, first)).tolist():
                rles[start + i] = _from_runs(parts[i], *batch[i]["size"])
    return None


def run_lengths(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Decode COCO's compressed RLEs: int32 runs of all, and where those of each text begin.

    Base 32, lowest digit first; bit 5 says that more follow, bit 4 of the last is the sign. From
    the fourth run on, the difference to the run before last. Overflows as in pycocotools. A
    malformed text is decoded as a single run of no pixels.
    """
    joined = "".join(texts)
    lengths = np.array([len(text) for text in texts])
    last = lengths.cumsum() - 1
    digits = np.frombuffer(joined.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    goes_on = digits & 32 != 0
    lower = np.flatnonzero(goes_on)
    number = lower - np.arange(len(lower))  # that each lower digit is of
    heads = np.flatnonzero(np.diff(number, prepend=-1))
    sizes = np.diff(heads, append=len(lower))
    is_sound = joined.isascii() and lengths.all() and digits.max() < 64 and not goes_on[last].any()
    if not is_sound or sizes.max(initial=0) >= _MOST_DIGITS:
        return run_lengths([text if _COUNTS.fullmatch(text) else "0" for text in texts])
    runs = digits[~goes_on].astype(np.int32)
    runs -= (runs & 16) << 1
    if len(lower):
        shifts = 5 * (np.arange(len(lower)) - np.repeat(heads, sizes))
        sums = np.add.reduceat((digits[lower] & 31).astype(np.int32) << shifts, heads)
        runs[number[heads]] = (runs[number[heads]] << 5 * sizes) + sums
    # Sums of every other run, of all texts in one go; then less what the texts before add.
    ends = last + 1 - np.searchsorted(lower, last)
    first = np.append(0, ends[:-1])
    sums = np.empty_like(runs)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        runs[half].cumsum(dtype=np.int32, out=sums[half])
    begins = [np.minimum(first + i, len(runs) - 1) for i in (2, 1)]
    before = [sums[begin] - runs[begin] for begin in begins]
    for half in (0, 1):
        here = (ends + 1 - half) // 2 - (first + 1 - half) // 2
        sums[half::2] -= np.repeat(np.where(first % 2 == half, *before), here)
    sums[first] = runs[first]
    return sums, first


def _not_covering(height: int, width: int) -> str:
    return f"its RLE does not cover the {width}x{height} image exactly"


def _are_numbers(values: list) -> bool:
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
