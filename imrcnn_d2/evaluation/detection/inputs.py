"""COCO ground truth, COCO results and folders of masks, checked and turned into parallel arrays.

Everything downstream (matching, counts, curves, COCO's AP) reads these arrays, so whatever is
accepted as input is decided here, once.
"""

import logging
import math
import reprlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from imrcnn_d2.data.formats.coco import FARTHEST, NUMBER, check_records, is_box, to_rles
from imrcnn_d2.data.images import read_values
from imrcnn_d2.data.masks import check_size
from imrcnn_d2.utils.files import BadInputError, read_json

logger = logging.getLogger(__name__)

# Detections considered per image and class, as in COCO.
MAX_DETECTIONS = 100
# The fields of an annotation that Regions holds.
_REGION = ("segmentation", "bbox")
_IDS = ("image_id", "category_id")
# Of each list of ground truth: required fields, and the types of others.
GROUND_TRUTH = {
    "images": (("id",), {"file_name": str, "patient_id": (*NUMBER, str, type(None))}),
    "categories": (("id", "name"), {}),
    "annotations": (_IDS, {"area": NUMBER}),
}


@dataclass(frozen=True, eq=False)
class Regions:
    """N regions of a data set, by ascending image id and in file order within an image."""

    image: np.ndarray  # (N,) int, position in ``GroundTruth.images``
    category: np.ndarray  # (N,) int, position in ``GroundTruth.categories``
    boxes: np.ndarray  # (N, 4) float, XYWH in pixels
    masks: list[dict] | None  # N compressed RLEs; None where the file gives boxes only

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
    # One at a time: under numpy 2, pycocotools 2.0.11 overflows on more than 255 masks.
    return np.array([mask_util.area(mask) for mask in masks], dtype=float)


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
    for key, (needed, kinds) in GROUND_TRUTH.items():
        records = dataset.get(key) if isinstance(dataset, dict) else None
        check_records(records, key, source, needed, kinds)
    images, categories = (by_id(dataset[key], key, source) for key in ("images", "categories"))
    for name, count in Counter(category["name"] for category in categories).items():
        if count > 1:
            raise BadInputError(source, f"has several categories {name!r}: rename them")
    annotations, regions = _read_regions(
        dataset["annotations"], "annotations", images, categories, source
    )
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


def read_results(results, gt: GroundTruth, source: str | Path | None = None) -> Detections:
    """Read a COCO results list (``image_id``, ``category_id``, ``score`` and ``bbox``,
    ``segmentation`` or both), or a COCO dict whose ``annotations`` carry a ``score``, as ``imrcnn
    predict`` writes, or a JSON file of either. The dict's images and categories are matched with
    those of the ground truth by ``file_name`` and ``name``, since its ids may have been given
    independently. Or read a folder of masks, see :func:`read_predicted_masks`. Where every
    ``score`` is null, as :func:`coco_results` has it for such a folder, the results have no scores.
    Detections are returned as they are. ``source`` names them in errors, by default as the file.

    Raises:
        BadInputError: as of :func:`read_ground_truth`, and for a score that is missing, NaN,
            infinite or negative.
    """
    if isinstance(results, Detections):
        return results
    source = source or (results if isinstance(results, str | Path) else "the results")
    is_folder = isinstance(results, str | Path) and Path(results).is_dir()
    results = read_predicted_masks(results, gt) if is_folder else _load(results)
    if isinstance(results, dict):
        if "annotations" not in results:
            raise BadInputError(source, "has no 'annotations': give a COCO results list")
        for key, needed in (("images", ("id",)), ("categories", ("id",)), ("annotations", _IDS)):
            if key in results:
                check_records(results[key], key, source, needed, {"file_name": str})
        results = _with_ids_of(gt, results)
    check_records(results, "results", source, _IDS)
    unscored = is_folder or bool(results) and all(r.get("score", 0) is None for r in results)
    for number, result in enumerate([] if unscored else results):
        score = result.get("score")
        if not isinstance(score, NUMBER) or type(score) is bool or not 0 <= score < math.inf:
            name = f"results[{number}], of image {result['image_id']!r},"
            raise BadInputError(
                source, f"{name} has the score {score!r:.40}, not a finite one from 0"
            )
    results, regions = _read_regions(results, "results", gt.images, gt.categories, source)
    score = np.array([1 if unscored else result["score"] for result in results], float)
    return Detections(regions, score, scored=not unscored)


def _load(source):
    if isinstance(source, str | Path):
        return read_json(Path(source))
    return getattr(source, "dataset", source)  # pycocotools' COCO keeps the JSON there


def by_id(records: list[dict], key: str, source: str | Path) -> list[dict]:
    """Images or categories by ascending id."""
    try:
        records = sorted(records, key=lambda record: record["id"])
    except TypeError as error:
        raise BadInputError(source, f"the ids of its {key} are numbers and texts mixed") from error
    for record, following in zip(records, records[1:], strict=False):
        if record["id"] == following["id"]:
            raise BadInputError(source, f"has two {key} with id {record['id']!r}: keep one")
    return records


def _with_ids_of(gt, results):
    """The annotations of a COCO dict with the ground truth's image and category ids. Records are
    paired by ``file_name`` (without folders if need be) and ``name``; ids of records without a
    name, or not listed, stay as they are."""
    images, categories = results.get("images", ()), results.get("categories", ())
    image_ids = _translation(images, gt.images, "file_name", "image")
    if None in image_ids.values():  # written with or without folders
        image_ids = _translation(
            images, gt.images, "file_name", "image", lambda name: PurePosixPath(name).name
        )
    category_ids = _translation(categories, gt.categories, "name", "category")
    translated = []
    for annotation in results["annotations"]:
        ids = {}
        for kind, known in (("image", image_ids), ("category", category_ids)):
            id_ = annotation[f"{kind}_id"]
            ids[f"{kind}_id"] = known.get(id_, id_)
            if ids[f"{kind}_id"] is None:
                raise ValueError(
                    f"The results are for {kind} {id_}, but no {kind} of the ground truth has its "
                    "name: score them on the data they are for."
                )
        translated.append({**annotation, **ids})
    return translated


def _translation(records, targets, field, kind, simplify=lambda name: name):
    """{id in the results: id in the ground truth, or None} for the records that have a name."""
    ids = defaultdict(list)
    for target in targets:
        if field in target:
            ids[simplify(target[field])].append(target["id"])
    translation = {}
    for record in records:
        if field in record:
            candidates = ids.get(simplify(record[field]), [None])
            if len(candidates) > 1:
                raise ValueError(
                    f"The {kind} '{record[field]}' of the results could be any of the ground "
                    f"truth's ids {candidates}: give it the same {field} in both."
                )
            translation[record["id"]] = candidates[0]
    return translation


def _read_regions(records, key, images, categories, source):
    """The records as (records by image, Regions)."""
    columns = []
    for field, items in (("image_id", images), ("category_id", categories)):
        known = {item["id"]: position for position, item in enumerate(items)}
        column = [known.get(record[field], -1) for record in records]
        if -1 in column:
            number = column.index(-1)
            value = records[number][field]
            reason = f"{key}[{number}] has the {field} {value!r}, not in the ground truth"
            raise BadInputError(source, reason)
        columns.append(np.array(column, dtype=np.int64))
    order = np.argsort(columns[0], kind="stable")
    image, category = (column[order] for column in columns)
    records = [records[number] for number in order.tolist()]

    def name(row):
        return f"{key}[{order[row]}], of image {records[row]['image_id']!r}"

    masks = _read_masks(records, key, image, images, source, name)
    boxes = []
    for row, record in enumerate(records):
        if _lacks(record, "bbox"):
            if row not in masks:
                raise BadInputError(source, f"{name(row)} has neither bbox nor segmentation")
            boxes.append(mask_util.toBbox(masks[row]).tolist())
        elif is_box(record["bbox"]):
            boxes.append(record["bbox"])
        else:
            box = reprlib.repr(record["bbox"])
            raise BadInputError(
                source, f"{name(row)} has the bbox {box}, not [x, y, width, height]"
            )
    boxes = np.array(boxes, float).reshape(-1, 4)
    has_masks = len(masks) == len(records)
    return records, Regions(image, category, boxes, list(masks.values()) if has_masks else None)


def _read_masks(records, key, image, images, source, name):
    """{row: RLE} of the records that have a mask."""
    rows = [row for row, record in enumerate(records) if not _lacks(record, "segmentation")]
    segmentations = [records[row]["segmentation"] for row in rows]
    positions = image[rows].tolist()
    for record in images:  # also those without a mask
        if "height" in record or "width" in record:
            _size(record, None, source)
    sizes = [_size(images[i], s, source) for i, s in zip(positions, segmentations, strict=True)]
    try:
        masks = to_rles(segmentations, sizes, lambda number: name(rows[number]))
    except ValueError as error:
        raise BadInputError(source, str(error)) from error
    if 0 < len(rows) < len(records):
        without = min(set(range(len(records))) - set(rows))
        logger.warning(
            f"{len(records) - len(rows)} of {len(records)} {key} have no segmentation (the first "
            f"is for image {records[without]['image_id']}), so that metrics of masks are undefined."
        )
    return dict(zip(rows, masks, strict=True))


def _lacks(record, field):
    value = record.get(field)
    return value is None or value == []


def _size(image, segmentation, source):
    """Height and width of an image, by its record, else by the RLE."""
    if "height" in image or "width" in image:
        size = image.get("height"), image.get("width")
    else:
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise BadInputError(source, f"image {image['id']!r} has no height and width for masks")
    try:
        return check_size(*size)
    except ValueError as error:
        raise BadInputError(source, f"image {image['id']!r}: {error}") from error


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
        raise ValueError(f"{folder} holds no PNG file: give the folder that the masks lie in.")
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
            f"{folder} lacks the masks of {len(missing)} of {len(images)} images: {_some(missing)}"
            f"{f' (but has {_some(spare)})' if spare else ''}; without a detection they are empty."
        )
    if spare:
        raise ValueError(f"{folder} has {len(spare)} masks of no image: take out {_some(spare)}.")
    return list(pairs.values())


def _some(names, number=5):
    more = len(names) - number
    return ", ".join(map(str, names[:number])) + (f" and {more} more" if more > 0 else "")


def _check_mask(mask, path, image, categories):
    size = [image.get("height", mask.shape[0]), image.get("width", mask.shape[1])]
    if list(mask.shape) != size:
        raise ValueError(f"{path} is {list(mask.shape)} (height, width), but its image is {size}.")
    values = np.unique(mask[mask != 0]).tolist()
    if len(categories) == 1 and len(values) > 1:
        raise ValueError(
            f"{path} has the values {_some(values)} besides 0, but there is one class: save the "
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
