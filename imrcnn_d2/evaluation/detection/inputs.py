"""COCO ground truth and COCO results, checked and turned into parallel arrays.

Everything downstream (matching, counts, curves, COCO's AP) reads these arrays, so whatever is
accepted as input is decided here, once.
"""

import logging
import math
import reprlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from imrcnn_d2.data.formats.coco import FARTHEST, NUMBER, check_records, is_box, to_rles
from imrcnn_d2.data.images import read_values
from imrcnn_d2.data.masks import check_size
from imrcnn_d2.evaluation.detection.matching import MAX_DETECTIONS
from imrcnn_d2.utils.files import BadInputError, read_json

__all__ = [
    "GROUND_TRUTH",
    "Detections",
    "GroundTruth",
    "Regions",
    "by_id",
    "mask_areas",
    "read_ground_truth",
    "read_predicted_masks",
    "read_results",
    "with_ids_of",
]

logger = logging.getLogger(__name__)


def with_ids_of(gt, results):
    """
    Args:
        gt (GroundTruth): whose ids the annotations get.
        results (dict): COCO, with ``annotations`` and, where its ids were given independently,
            ``images`` and ``categories``.

    Returns:
        list[dict]: the annotations, with the ground truth's image and category ids. Records are
        paired by ``file_name`` (without folders if need be) and ``name``; ids of records without a
        name, or not listed, stay as they are.

    Raises:
        ValueError: on images and categories that the ground truth lacks, or has several times.
    """
    image_ids = _translation(results.get("images", ()), gt.images, "file_name", "image")
    if any(id_ is None for id_ in image_ids.values()):  # written with or without folders
        image_ids = _translation(
            results["images"], gt.images, "file_name", "image", lambda n: PurePosixPath(n).name
        )
    category_ids = _translation(results.get("categories", ()), gt.categories, "name", "category")
    translated = []
    for annotation in results["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        for kind, id_, known in (
            ("image", image, image_ids),
            ("category", category, category_ids),
        ):
            if known.get(id_, id_) is None:
                raise ValueError(
                    f"The results have detections for {kind} {id_}, which the ground truth lacks: "
                    f"no {kind} record there has its name. Score them on the data they are for."
                )
        translated.append(
            {
                **annotation,
                "image_id": image_ids.get(image, image),
                "category_id": category_ids.get(category, category),
            }
        )
    return translated


def _translation(records, targets, field, kind, simplify=lambda name: name):
    """{id in the results: id in the ground truth, or None} for the records that have a name."""
    ids = {}
    for target in targets:
        if field in target:
            ids.setdefault(simplify(target[field]), []).append(target["id"])
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


NAMED_AT_MOST = 5


def read_predicted_masks(folder, gt):
    """
    Read masks as detections without scores: one for each connected component (8-connectivity) of
    each class, down to single pixels, the largest first.

    Args:
        folder (str or Path): one PNG an image, ``STEM.png`` for a ``file_name`` of that stem; files
            that are not PNGs are left alone. For one class, the lesion is whatever is not 0 (0 and
            1, or 0 and 255). For several, pixels hold 0 for background and 1, 2, ... for the
            categories by ascending id. Palette images hold indices; of colour images, all channels
            must be the same.
        gt (GroundTruth): what the masks are for. A mask has the size of its image.

    Returns:
        list[dict]: COCO results with ``segmentation`` and ``bbox``, without a ``score``.

    Raises:
        ValueError: naming the file and the remedy, if masks are missing or superfluous, if two
            images would share a mask, and for a mask that can't be read, is of another size than
            its image, or has values that stand for no class.
    """
    folder = Path(folder)
    results = []
    for image, path in tqdm(_pairs(folder, gt.images), desc="Masks", delay=2):
        mask = _read(path, image)
        _check_values(mask, path, gt.categories)
        for value, category in enumerate(gt.categories, 1):
            of_class = mask != 0 if len(gt.categories) == 1 else mask == value
            record = {"image_id": image["id"], "category_id": category["id"]}
            count, components = _components(of_class)
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
    pairs = {}
    missing = []
    for image in images:
        if "file_name" not in image:
            raise ValueError(
                f"Image {image['id']} of the ground truth has no file_name, by which its mask in "
                f"{folder} is named."
            )
        stem = PurePosixPath(image["file_name"]).stem
        if stem in pairs:
            raise ValueError(
                f"The images {pairs[stem][0]['file_name']} and {image['file_name']} would share "
                f"the mask {stem}.png in {folder}: give every image another name."
            )
        if stem in by_stem:
            pairs[stem] = image, by_stem[stem]
        else:
            missing.append(f"{stem}.png")
    spare = sorted(by_stem[stem].name for stem in set(by_stem) - set(pairs))
    if missing:
        raise ValueError(
            f"{folder} lacks the masks of {len(missing)} of {len(images)} images: {_some(missing)}"
            f"{f' (but has {_some(spare)})' if spare else ''}. An image without a detection "
            "needs an empty mask, and a mask the name of its image."
        )
    if spare:
        raise ValueError(
            f"{folder} has {len(spare)} masks that belong to no image of the ground truth: "
            f"{_some(spare)}. Take them out, or score the masks on the data they are for."
        )
    return list(pairs.values())


def _some(names):
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _read(path, image):
    """(H, W) integers or bool."""
    mask, _ = read_values(path)
    size = [image.get("height", mask.shape[0]), image.get("width", mask.shape[1])]
    if list(mask.shape) != size:
        raise ValueError(
            f"{path} is {list(mask.shape)} (height, width), but its image {image['file_name']} is "
            f"{size}: scale the mask to its image, by nearest neighbour."
        )
    return mask


def _check_values(mask, path, categories):
    values = np.unique(mask[mask != 0]).tolist()
    if len(categories) == 1:
        if len(values) > 1:
            raise ValueError(
                f"{path} has the values {_some([str(v) for v in values])} besides 0, but there is "
                "one class: save the mask as 0 and 255, not as probabilities or a JPEG's greys."
            )
    elif values and values[-1] > len(categories):
        names = ", ".join(f"{i} {c['name']}" for i, c in enumerate(categories, 1))
        raise ValueError(
            f"{path} has the value {values[-1]}; the classes are 0 background, {names}: save the "
            "number of the class in each pixel."
        )


def _components(mask):
    """The number of connected components; ``segmentation`` and ``bbox`` of the MAX_DETECTIONS
    largest, the largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    left, top, _, _, area = stats[1:count].T  # labels depend on OpenCV's algorithm; these do not
    components = []
    for label in 1 + np.lexsort((left, top, -area))[:MAX_DETECTIONS]:
        x, y, width, height = stats[label, :4].tolist()
        rle = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        components.append({"segmentation": rle, "bbox": [x, y, width, height]})
    return count - 1, components


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
    """
    N regions of a data set, by ascending image id and in file order within an image.

    Attributes:
        image (np.ndarray): (N,) int, position in ``GroundTruth.images``.
        category (np.ndarray): (N,) int, position in ``GroundTruth.categories``.
        boxes (np.ndarray): (N, 4) float, XYWH in pixels.
        masks (list[dict] or None): N compressed RLEs; None where the file gives boxes only.
    """

    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    masks: list | None

    def __len__(self):
        return len(self.image)

    def of_images(self, positions: np.ndarray) -> tuple[np.ndarray, "Regions"]:
        """
        The (N,) int positions of the regions in the images at (I,) ascending positions; and these
        regions, in images that are numbered by their place in ``positions``.
        """
        rows = np.flatnonzero(np.isin(self.image, positions))
        regions = self.take(rows)
        return rows, replace(regions, image=np.searchsorted(positions, regions.image))

    def take(self, rows: np.ndarray) -> "Regions":
        """Those at (K,) int positions, in this order."""
        masks = None if self.masks is None else [self.masks[row] for row in rows]
        return Regions(self.image[rows], self.category[rows], self.boxes[rows], masks)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """
    Attributes:
        images (list[dict]): the COCO image records, by ascending id, with all their fields.
        categories (list[dict]): the COCO category records, by ascending id.
        regions (Regions): the N annotations.
        annotations (list[dict]): fields of the N annotation records, without box and mask.
        crowd (np.ndarray): (N,) bool, COCO's ``iscrowd``.
        area (np.ndarray): (N,) float in pixels, COCO's ``area``: decides small, medium or large.
    """

    images: list
    categories: list
    regions: Regions
    annotations: list
    crowd: np.ndarray
    area: np.ndarray

    @property
    def lesions(self):
        """np.ndarray: (number of images,) int, lesions in each image, crowds left out."""
        return np.bincount(self.regions.image[~self.crowd], minlength=len(self.images))


@dataclass(frozen=True, eq=False)
class Detections:
    """
    Attributes:
        regions (Regions): the N detections.
        score (np.ndarray): (N,) float, finite and not negative.
        scored (bool): False if the results have no scores (a folder of masks): ``score`` is then 1
            throughout, and metrics that rank detections or units by score are undefined.
    """

    regions: Regions
    score: np.ndarray
    scored: bool = True


def mask_areas(masks: list[dict]) -> np.ndarray:
    """(N,) float, pixels, of compressed RLEs."""
    # One at a time: under numpy 2, pycocotools 2.0.11 overflows on more than 255 masks.
    return np.array([mask_util.area(mask) for mask in masks], dtype=float)


def read_ground_truth(gt, source=None):
    """
    Args:
        gt (dict, pycocotools.coco.COCO, str, Path or GroundTruth): COCO instance annotations, or
            what was read already. Masks are RLE (compressed or not) or polygons. ``iscrowd``,
            ``area`` and one of ``bbox`` and ``segmentation`` may be missing.
        source (str, Path or None): its name in errors; None for the file's name.

    Returns:
        GroundTruth: its ``regions.masks`` is None unless every annotation has a mask.

    Raises:
        BadInputError: on fields of a wrong type, doubled image or category ids, doubled category
            names, annotations for an unknown image or category, malformed masks and such of another
            size than their image, and annotations with neither box nor mask.
    """
    if isinstance(gt, GroundTruth):
        return gt
    source = source or (gt if isinstance(gt, str | Path) else "the ground truth")
    dataset = _load(gt)
    for key, (needed, kinds) in GROUND_TRUTH.items():
        records = dataset.get(key) if isinstance(dataset, dict) else None
        check_records(records, key, source, needed, kinds)
    images, categories = (by_id(dataset[key], key, source) for key in ("images", "categories"))
    names = Counter(category["name"] for category in categories)
    for name, count in names.items():
        if count > 1:
            raise BadInputError(source, f"has several categories {name!r}: rename them")
    annotations, regions = _read_regions(
        dataset["annotations"], "annotations", images, categories, source
    )
    for annotation in annotations:
        for key, is_one in (
            ("iscrowd", annotation.get("iscrowd", 0) in (0, 1)),
            ("area", 0 <= annotation.get("area", 0) <= FARTHEST**2),
        ):
            if not is_one:
                value = reprlib.repr(annotation[key])
                raise BadInputError(
                    source,
                    f"an annotation of image {annotation['image_id']!r} has the {key} {value}",
                )
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    areas = regions.boxes[:, 2] * regions.boxes[:, 3]
    if regions.masks and not all("area" in annotation for annotation in annotations):
        areas = mask_areas(regions.masks)
    area = np.array([a.get("area", o) for a, o in zip(annotations, areas, strict=True)], float)
    fields = [{k: v for k, v in a.items() if k not in _REGION} for a in annotations]
    return GroundTruth(images, categories, regions, fields, crowd, area)


def read_results(results, gt, source=None):
    """
    Args:
        results (list[dict], dict, str or Path): a COCO results list (``image_id``,
            ``category_id``, ``score`` and ``bbox``, ``segmentation`` or both), or a COCO dict whose
            ``annotations`` carry a ``score``, as ``tools/predict.py`` writes. The latter's own
            ``images`` and ``categories`` are matched with those of the ground truth by
            ``file_name`` and ``name``, since its ids may have been given independently. Or a folder
            of masks, see :func:`read_predicted_masks`. Where every ``score`` is null, as
            :func:`coco_results` has it for such a folder, the results have no scores. Detections
            are returned as they are.
        gt (GroundTruth): what the results are for.
        source (str, Path or None): their name in errors; None for the file's name.

    Returns:
        Detections: its ``regions.masks`` is None unless every result has a mask.

    Raises:
        BadInputError: on fields of a wrong type, results for an unknown image or category, a
            missing, NaN, infinite or negative score, malformed masks and such of another size than
            their image, and results with neither box nor mask.
    """
    if isinstance(results, Detections):
        return results
    source = source or (results if isinstance(results, str | Path) else "the results")
    is_folder = isinstance(results, str | Path) and Path(results).is_dir()
    results = read_predicted_masks(results, gt) if is_folder else _load(results)
    if isinstance(results, dict):
        if "annotations" not in results:
            raise BadInputError(
                source, "is an object without 'annotations': give a COCO results list"
            )
        for key, needed in (("images", ("id",)), ("categories", ("id",)), ("annotations", _IDS)):
            if key in results:
                check_records(results[key], key, source, needed, {"file_name": str})
        results = with_ids_of(gt, results)
    check_records(results, "results", source, _IDS)
    unscored = is_folder or bool(results) and all(r.get("score", 0) is None for r in results)
    for number, result in enumerate([] if unscored else results):
        score = result.get("score")
        if not isinstance(score, NUMBER) or type(score) is bool or not 0 <= score < math.inf:
            raise BadInputError(
                source,
                f"results[{number}], of image {result['image_id']!r}, has the score "
                f"{reprlib.repr(score)}: every result needs a finite score that is not negative",
            )
    results, regions = _read_regions(results, "results", gt.images, gt.categories, source)
    score = np.array([1 if unscored else result["score"] for result in results], float)
    return Detections(regions, score, scored=not unscored)


def _load(source):
    if isinstance(source, str | Path):
        return read_json(Path(source))
    return getattr(source, "dataset", source)  # pycocotools' COCO keeps the JSON there


def by_id(records, key, source):
    """Images or categories by ascending id."""
    try:
        records = sorted(records, key=lambda record: record["id"])
    except TypeError as error:
        raise BadInputError(source, f"the ids of its {key} are numbers and texts mixed") from error
    for one, two in zip(records, records[1:], strict=False):
        if one["id"] == two["id"]:
            raise BadInputError(source, f"has two {key} with id {one['id']!r}: keep one")
    return records


def _read_regions(records, key, images, categories, source):
    """The records as (records by image, Regions)."""
    columns = []
    for field, items in (("image_id", images), ("category_id", categories)):
        known = {item["id"]: position for position, item in enumerate(items)}
        column = [known.get(record[field], -1) for record in records]
        if -1 in column:
            number = column.index(-1)
            raise BadInputError(
                source,
                f"{key}[{number}] has the {field} {records[number][field]!r}, which the ground "
                "truth does not list",
            )
        columns.append(np.array(column, dtype=np.int64))
    order = np.argsort(columns[0], kind="stable")
    image, category = (column[order] for column in columns)
    records = [records[number] for number in order.tolist()]

    def name(row):
        return f"{key}[{order[row]}], of image {records[row]['image_id']!r}"

    masked = [r for r, record in enumerate(records) if not _lacks(record, "segmentation")]
    sizes = [_size(record, source) for record in images]
    segmentations = [records[row]["segmentation"] for row in masked]
    mask_sizes = [
        sizes[position] or _stated_size(segmentation, images[position], source)
        for position, segmentation in zip(image[masked].tolist(), segmentations, strict=True)
    ]
    try:
        masks = to_rles(segmentations, mask_sizes, lambda i: name(masked[i]))
    except ValueError as error:
        raise BadInputError(source, str(error)) from error
    mask_of_row = masks
    if len(masks) < len(records):
        mask_of_row = dict(zip(masked, masks, strict=True))
    if 0 < len(masks) < len(records):
        without = next(row for row in range(len(records)) if row not in mask_of_row)
        logger.warning(
            f"{len(records) - len(masks)} of {len(records)} {key} have no segmentation (the first "
            f"is for image {records[without]['image_id']}), so that metrics of masks are undefined."
        )
    boxes = []
    for row, record in enumerate(records):
        if _lacks(record, "bbox"):
            if _lacks(record, "segmentation"):
                raise BadInputError(source, f"{name(row)} has neither bbox nor segmentation")
            boxes.append(mask_util.toBbox(mask_of_row[row]).tolist())
        elif is_box(record["bbox"]):
            boxes.append(record["bbox"])
        else:
            raise BadInputError(
                source,
                f"{name(row)} has the bbox {reprlib.repr(record['bbox'])}, which is not "
                "[x, y, width, height] in pixels",
            )
    boxes = np.array(boxes, float).reshape(-1, 4)
    return records, Regions(image, category, boxes, masks if len(masks) == len(records) else None)


def _lacks(record, field):
    value = record.get(field)
    return value is None or value == []


def _size(image, source):
    """Height and width of an image; None where the record does not say."""
    if "height" not in image and "width" not in image:
        return None
    return _checked_size(image.get("height"), image.get("width"), image, source)


def _checked_size(height, width, image, source):
    try:
        return check_size(height, width)
    except ValueError as error:
        raise BadInputError(source, f"image {image['id']!r}: {error}") from error


def _stated_size(segmentation, image, source):
    """Height and width by the RLE itself."""
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise BadInputError(
            source,
            f"image {image['id']!r} has no height and width, which its masks need",
        )
    return _checked_size(*size, image, source)
