"""Own data: any COCO instance JSON with a folder of images.

An annotation that cannot be used rejects its whole image: dropping only the annotation would leave
its lesion to be learnt as healthy mucosa.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from imrcnn_d2.data.images import drawn_on_stored_pixels, inspect_image, orient, path_inside
from imrcnn_d2.data.instances import IMAGE_FIELDS
from imrcnn_d2.data.json_files import read_json
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.rejects import BadInputError, Rejects
from imrcnn_d2.data.shapes import check_extent

__all__ = ["read_coco", "read_coco_json", "to_rle"]

_BOX_TOLERANCE = 2.0  # pixels
_OWN_TOP_FIELDS = ("images", "annotations", "categories", "info")


def read_coco(json_file: Path, image_root: Path, rejects: Rejects) -> Source:
    """Reads and checks a COCO instance file; polygons and RLE, lesion-free images, further fields.

    Areas and boxes are computed anew from the masks, ids are given anew.

    Args:
        json_file: COCO instance JSON.
        image_root: the folder that each ``file_name`` is relative to.
        rejects: takes bad input.

    Raises:
        BadInputError: the file as a whole cannot be used.
    """
    content = read_coco_json(json_file)
    notes: list[str] = []
    return Source(
        samples=_samples(json_file, content, image_root, rejects, notes),
        categories=sorted(content["categories"], key=lambda category: category["id"]),
        info=content.get("info") or {},
        notes=notes,
        extra={key: value for key, value in content.items() if key not in _OWN_TOP_FIELDS},
    )


def read_coco_json(path: Path) -> dict:
    """A COCO instance file, checked as a whole but not record by record.

    Raises:
        BadInputError: it cannot be read or is no such file.
    """
    content = read_json(path)
    for key, needed in (
        ("images", {"id", "file_name"}),
        ("annotations", {"image_id", "category_id"}),
        ("categories", {"id", "name"}),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInputError(path, f"is no COCO instance file: it has no list of {key}")
        for i, entry in enumerate(entries):
            if needed - entry.keys():
                missing = ", ".join(sorted(needed - entry.keys()))
                raise BadInputError(path, f"{key}[{i}] lacks {missing}")
            for name in ("id", "image_id", "category_id"):
                kinds = int if (key, name) == ("categories", "id") else int | float | str
                if name in entry and not isinstance(entry[name], kinds):
                    raise BadInputError(path, f"{key}[{i}] has the {name} {entry[name]!r}")
    for category in content["categories"]:
        if not isinstance(category["name"], str):
            raise BadInputError(path, f"a category has the name {category['name']!r}")
    for key in ("id", "name"):
        values = Counter(category[key] for category in content["categories"])
        if not values or max(values.values()) > 1:
            raise BadInputError(
                path, f"no categories, or two of the same {key}: {content['categories']}"
            )
    return content


def _samples(
    json_file: Path, content: dict, image_root: Path, rejects: Rejects, notes: list[str]
) -> Iterator[Sample]:
    records = content["images"]
    ids = Counter(record["id"] for record in records)
    names = Counter(r["file_name"] for r in records if isinstance(r["file_name"], str))
    by_image: dict[object, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        with rejects.catch():
            if annotation["image_id"] not in ids:
                raise BadInputError(
                    json_file,
                    f"{_called(annotation)}: there is no image with id {annotation['image_id']!r}",
                )
            by_image[annotation["image_id"]].append(annotation)

    category_ids = {category["id"] for category in content["categories"]}
    num_moved = 0
    for record in tqdm(records, desc="Reading images", unit="image"):
        with rejects.catch():
            path = path_inside(image_root, record["file_name"], json_file, rejects.follow_links)
            # which annotations belong to which of the two cannot be known
            for key, counts in (("id", ids), ("file_name", names)):
                if counts[record[key]] > 1:
                    raise BadInputError(
                        path, f"duplicate: several images with {key} {record[key]!r} in {json_file}"
                    )
            image = inspect_image(path)
            width, height = record.get("width", image.width), record.get("height", image.height)
            turned = drawn_on_stored_pixels(image, width, height)
            if image.orientation != 1 and not turned and by_image[record["id"]]:
                notes.append(f"{path}: EXIF-rotated, annotations taken as drawn on what is shown")
            annotations = []
            for annotation in by_image[record["id"]]:
                try:
                    checked, moved = _check(annotation, height, width, category_ids)
                except ValueError as error:
                    raise BadInputError(path, f"{_called(annotation)}: {error}") from error
                num_moved += moved
                if turned:
                    mask = mask_util.decode(to_rle(checked["segmentation"], height, width))
                    checked |= annotation_from_mask(
                        orient(mask, image.orientation),
                        checked["category_id"],
                        iscrowd=checked["iscrowd"],
                    )
                if any(_is_same(checked, other) for other in annotations):
                    raise BadInputError(path, f"{_called(annotation)}: listed twice")
                annotations.append(checked)
            fields = {k: v for k, v in record.items() if k not in IMAGE_FIELDS}
            yield Sample(path.relative_to(image_root).as_posix(), image, annotations, fields)
    if num_moved:
        notes.append(
            f"{num_moved} boxes differed by more than {_BOX_TOLERANCE:g} pixels from their masks' "
            "boxes, which are used instead"
        )


def _is_same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("category_id", "segmentation"))


def _called(annotation: dict) -> str:
    return f"annotation {annotation['id']}" if "id" in annotation else "an annotation without id"


def _check(annotation: dict, height: int, width: int, category_ids: set) -> tuple[dict, bool]:
    """The annotation without ids, box and area computed from its mask; whether the box moved.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if annotation["category_id"] not in category_ids:
        raise ValueError(f"there is no category with id {annotation['category_id']!r}")
    if annotation.get("ignore"):
        raise ValueError("is marked ignore, which Detectron2 cannot read; mark it iscrowd instead")
    iscrowd = annotation.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise ValueError(f"iscrowd is {iscrowd!r}, neither 0 nor 1")
    if not annotation.get("segmentation"):
        raise ValueError("has no segmentation, and a mask cannot be learnt from a box")
    rle = to_rle(annotation["segmentation"], height, width)
    area = int(mask_util.area(rle))
    if area == 0:
        raise ValueError(f"its mask covers no pixel of the {width}x{height} image")
    box = mask_util.toBbox(rle)
    moved = "bbox" in annotation and _check_box(annotation["bbox"], box, height, width)
    checked = {key: value for key, value in annotation.items() if key not in ("id", "image_id")}
    return {**checked, "bbox": box.tolist(), "area": area, "iscrowd": int(iscrowd)}, moved


def _check_box(given: object, box: np.ndarray, height: int, width: int) -> bool:
    """Whether a given [x, y, w, h] differs from the mask's; ValueError if it is none or outside."""
    if not isinstance(given, list) or len(given) != 4 or not _are_numbers(given):
        raise ValueError(f"its box {given!r} is not [x, y, width, height]")
    x, y, w, h = given
    if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError(f"its box {given} [x, y, width, height] is outside {width}x{height}")
    corners = np.array([given, box])
    corners[:, 2:] += corners[:, :2]
    return bool(np.abs(corners[0] - corners[1]).max() > _BOX_TOLERANCE)


def to_rle(segmentation: object, height: int, width: int) -> dict:
    """Compressed RLE of a COCO segmentation: polygons, or either kind of RLE.

    Raises:
        ValueError: it is malformed, or its size is not that of the image.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise ValueError(f"its RLE has size {size}, the image [{height}, {width}]")
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
        valid = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        if not valid or sum(runs) != height * width:
            raise ValueError(f"its RLE does not cover the {width}x{height} image exactly")
        return mask_util.frPyObjects({"size": size, "counts": runs}, height, width)
    if not isinstance(segmentation, list):
        raise ValueError("its segmentation is neither a list of polygons nor RLE")
    for polygon in segmentation:
        if not isinstance(polygon, list) or not _are_numbers(polygon) or len(polygon) % 2:
            raise ValueError("a polygon is not a flat list x1, y1, x2, y2, ...")
        if len(polygon) < 6:
            raise ValueError(f"a polygon has {len(polygon) // 2} points, at least 3 are needed")
        check_extent(polygon, height, width)
    return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))


def _run_lengths(text: str) -> list[int]:
    """Decodes COCO's compressed RLE, which older pycocotools decode without checking.

    Base 32, lowest digit first; bit 5 says that more follow, bit 4 of the last is the sign. From
    the fourth run on, the difference to the run before last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _are_numbers(values: list) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
