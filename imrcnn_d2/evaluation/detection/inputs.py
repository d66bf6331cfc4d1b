"""COCO ground truth, COCO results and folders of masks, checked and turned into parallel arrays.

Everything downstream (matching, counts, curves, COCO's AP) reads these arrays, so whatever is
accepted as input is decided here, once.
"""

import contextlib
import logging
import math
import reprlib
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats.coco import FARTHEST, NUMBER, check_records, first_wrong_box, to_rles
from imrcnn_d2.data.images import read_values
from imrcnn_d2.data.masks import check_size
from imrcnn_d2.utils.files import BadInputError, few, file_in, read_json, read_records
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

# Detections considered per image and class, as in COCO.
MAX_DETECTIONS = 100
# A results list of more bytes is read record by record, twice, so that its text and its regions are
# never in memory as a whole; regions in batches of so many, up to so many in all.
_STREAMED, _BATCH, _MOST_RESULTS = 2**29, 500_000, 20_000_000
# The fields of an annotation that Regions holds.
_REGION = ("segmentation", "bbox")
_IDS = ("image_id", "category_id")
_RESULT = {*_IDS, "file_name", "score", "raw_score"}  # what is kept of a record next to its region
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


class _Rles(Sequence):
    """N compressed RLEs in half the memory: (N, 2) int32 sizes, and their N texts as bytes."""

    def __init__(self, sizes: np.ndarray, counts: list[bytes]):
        self.sizes, self.counts = sizes, counts

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return [self[row] for row in range(*key.indices(len(self)))]
        return {"size": self.sizes[key].tolist(), "counts": self.counts[key]}


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
    for key, (needed, kinds) in GROUND_TRUTH.items():
        records = dataset.get(key) if isinstance(dataset, dict) else None
        check_records(records, key, source, needed, kinds)
    images, categories = (by_id(dataset[key], key, source) for key in ("images", "categories"))
    for name, count in Counter(category["name"] for category in categories).items():
        if count > 1:
            raise BadInputError(source, f"has several categories {name!r}: rename them")
    _, annotations, regions = _read_regions(
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
    is_folder = isinstance(results, str | Path) and Path(results).is_dir()
    large = Path(results) if not is_folder and _is_large_list(results) else None
    if is_folder:
        results = read_predicted_masks(results, gt)
    else:
        results = _without_regions(large) if large else _load(results)
    key = "annotations" if isinstance(results, dict) else "results"
    listed = results if isinstance(results, dict) else {"annotations": results}
    if "annotations" not in listed:
        raise BadInputError(source, "has no 'annotations': give a COCO results list")
    check_records(listed["annotations"], key, source, _IDS, {"file_name": str})
    if key == "results" and results and all("file_name" in result for result in results):
        names = {result["image_id"]: result["file_name"] for result in results}
        listed["images"] = [{"id": id_, "file_name": name} for id_, name in names.items()]
    for name in ("images", "categories"):
        check_records(listed.get(name, []), name, source, ("id",), {"file_name": str})
    category_ids, notes = _category_ids(gt, listed, key, source)
    image_ids, image_notes = _image_ids(gt, listed, key, source, ignore_extra_images)
    results = [r for r in listed["annotations"] if r["image_id"] in image_ids]
    mapped = any(result.get("raw_score") is not None for result in results)
    unscored = is_folder or bool(results) and all(r.get("score", 0) is None for r in results)
    fields = ("score", "raw_score") if mapped else () if unscored else ("score",)
    scores = {name: _read_scores(results, name, source) for name in fields}
    ids = image_ids, category_ids
    if large:
        order, regions = _regions_of_large(large, gt, source, ids)
    else:
        order, _, regions = _read_regions(results, "results", gt.images, gt.categories, source, ids)
    score, raw = (
        scores[name][order] if name in scores else None for name in ("score", "raw_score")
    )
    score = np.ones(len(order)) if unscored else score
    notes, info = {**notes, **image_notes}, listed.get("info")
    return Detections(regions, score, not unscored, notes, raw, info)


def _read_scores(results, name, source):
    """(N,) float, a column of the results."""
    scores = [result.get(name) for result in results]
    kinds = {
        kind for kind in set(map(type, scores)) if kind is not bool and issubclass(kind, NUMBER)
    }
    if kinds == set(map(type, scores)):
        with contextlib.suppress(OverflowError):  # of an integer beyond what a float can be
            column = np.array(scores, float)
            if ((column >= 0) & (column < math.inf)).all():
                return column
    largest = sys.float_info.max
    for number, score in enumerate(scores):
        if not isinstance(score, NUMBER) or type(score) is bool or not 0 <= score <= largest:
            record = f"results[{number}], of image {results[number]['image_id']!r},"
            raise BadInputError(
                source, f"{record} has the {name} {score!r:.40}, not a finite one from 0"
            )


def _is_large_list(source):
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return False
    with open(source, "rb") as file:
        return Path(source).stat().st_size > _STREAMED and file.read(99).lstrip()[:1] == b"["


def _without_regions(path):
    """The records of a list, without masks and boxes."""
    results = []
    for record in tqdm(read_records(path, ""), desc="Results", delay=2):
        if len(results) == _MOST_RESULTS:
            raise BadInputError(path, f"has more than {_MOST_RESULTS:,} results; split it")
        results.append({k: v for k, v in record.items() if k in _RESULT})
    return results


def _regions_of_large(path, gt, source, ids):
    """(N,) int, the order by image, and the Regions, as of `_read_regions`."""
    progress = tqdm(read_records(path, ""), desc="Regions of results", delay=2)
    records = (record for record in progress if record["image_id"] in ids[0])
    places, images, classes, boxes, sizes, counts = [], [], [], [], [], []
    have_masks = True
    while batch := list(islice(records, _BATCH)):
        start = sum(map(len, places))
        order, _, regions = _read_regions(
            batch, "results", gt.images, gt.categories, source, ids, start
        )
        places.append(start + order)
        images.append(regions.image)
        classes.append(regions.category)
        boxes.append(regions.boxes)
        have_masks = have_masks and regions.masks is not None
        if have_masks:
            sizes.append(np.array([mask["size"] for mask in regions.masks], np.int32))
            texts = (mask["counts"] for mask in regions.masks)
            counts += [text if isinstance(text, bytes) else text.encode() for text in texts]
    image = np.concatenate(images)
    rows = np.argsort(image, kind="stable")
    masks = (
        _Rles(np.concatenate(sizes)[rows], [counts[row] for row in rows]) if have_masks else None
    )
    regions = Regions(
        image[rows], np.concatenate(classes)[rows], np.concatenate(boxes)[rows], masks
    )
    return np.concatenate(places)[rows], regions


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


def _category_ids(gt, results, key, source):
    """{category id in a COCO dict: id in the ground truth}, by ``name``; ids without a name stay as
    they are. And a note where a single class has another name than that of the ground truth."""
    categories, records = results.get("categories", []), results["annotations"]
    names = {category["id"]: category.get("name", category["id"]) for category in categories}
    for record in records:
        names.setdefault(record["category_id"], record["category_id"])
    ids = {id_: id_ for id_ in names} | _translation(categories, gt.categories, "name", "category")
    known = {category["id"]: category["name"] for category in gt.categories}
    unknown = [n for n, record in enumerate(records) if ids[record["category_id"]] not in known]
    if not unknown:
        return ids, {}
    id_ = records[unknown[0]]["category_id"]
    if len(names) == len(known) == 1:
        ((truth_id, truth),) = known.items()
        logger.warning(
            f"{source}: its class {names[id_]!r} is taken for {truth!r}, the only one of the "
            "ground truth."
        )
        return {id_: truth_id}, {"matched_classes": {str(names[id_]): truth}}
    predicted, annotated = (few([*classes.values()], 20) for classes in (names, known))
    raise BadInputError(
        source,
        f"{key}[{unknown[0]}] has the category_id {id_!r}, {names[id_]!r}: its classes are "
        f"{predicted}, those of the ground truth {annotated}. Give both the same names, of masks "
        "by imrcnn prepare-dataset --classes.",
    )


def _image_ids(gt, results, key, source, ignore_extra):
    """{image id in a COCO dict: id in the ground truth}, by ``file_name``, without folders if need
    be; ids without a name stay as they are. And notes of the images that one of both lacks."""
    images, records, notes = results.get("images", []), results["annotations"], {}
    names = {image["id"]: image.get("file_name", image["id"]) for image in images}
    for record in records:
        names.setdefault(record["image_id"], record["image_id"])
    ids = {id_: id_ for id_ in names} | _translation(images, gt.images, "file_name", "image")
    rest = [image for image in images if ids[image["id"]] is None]
    if rest:  # written with or without folders
        paired = set(ids.values())
        free = [image for image in gt.images if image["id"] not in paired]
        ids |= _translation(rest, free, "file_name", "image", lambda n: PurePosixPath(n).name)
    known = {image["id"]: image.get("file_name", image["id"]) for image in gt.images}
    extra = {id_: name for id_, name in names.items() if ids[id_] not in known}
    is_foreign = len(extra) == len(names)
    for number, record in enumerate(records):
        id_ = record["image_id"]
        if id_ in extra and (is_foreign or not ignore_extra):
            remedy = "leave such images out (--ignore-extra-images)"
            raise BadInputError(
                source,
                f"{key}[{number}] has the image_id {id_!r} ({extra[id_]}), not in the ground "
                f"truth, which lacks {len(extra)} of {len(names)} images: "
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
    if key == "annotations" and images and missing:  # a list names no image without detections
        notes["missing_images"] = missing
        logger.warning(
            f"{source} lacks {len(missing)} of {len(known)} images of the ground truth, which are "
            f"taken as images without a detection: {few(missing, 5)}."
        )
    return {id_: ids[id_] for id_ in names if id_ not in extra}, notes


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


def _read_regions(records, key, images, categories, source, ids=(None, None), start=0):
    """(N,) int, the order of the records by image; the records in this order, and their Regions.
    ``ids`` are {id in the records: id in the ground truth} of images and categories, where these
    may differ; ``start`` is the number of the first record, for errors."""
    columns = []
    fields = ("image_id", images), ("category_id", categories)
    for (id_field, items), translation in zip(fields, ids, strict=True):
        known = {item["id"]: position for position, item in enumerate(items)}
        if translation is not None:
            known = {id_: known.get(truth, -1) for id_, truth in translation.items()}
        column = np.array([known.get(record[id_field], -1) for record in records], dtype=np.int64)
        if (column < 0).any():
            number = int((column < 0).argmax())
            value = records[number][id_field]
            reason = (
                f"{key}[{start + number}] has the {id_field} {value!r}, not in the ground truth"
            )
            raise BadInputError(source, reason)
        columns.append(column)
    order = np.argsort(columns[0], kind="stable")
    image, category = (column[order] for column in columns)
    records = [records[number] for number in order.tolist()]

    def name(row):
        return f"{key}[{start + order[row]}], of image {records[row]['image_id']!r}"

    masks = _read_masks(records, key, image, images, source, name)
    boxes = [record.get("bbox") for record in records]
    for row, box in enumerate(boxes):
        if box is None or box == []:
            if row not in masks:
                raise BadInputError(source, f"{name(row)} has neither bbox nor segmentation")
            boxes[row] = mask_util.toBbox(masks[row]).tolist()
    if (wrong := first_wrong_box(boxes)) is not None:
        box = reprlib.repr(boxes[wrong])
        raise BadInputError(source, f"{name(wrong)} has the bbox {box}, not [x, y, width, height]")
    boxes = np.array(boxes, float).reshape(-1, 4)
    has_masks = len(masks) == len(records)
    masks = list(masks.values()) if has_masks else None
    return order, records, Regions(image, category, boxes, masks)


def _read_masks(records, key, image, images, source, name):
    """{row: RLE} of the records that have a mask."""
    segmentations = {row: record.get("segmentation") for row, record in enumerate(records)}
    segmentations = {row: s for row, s in segmentations.items() if s is not None and s != []}
    rows, segmentations = list(segmentations), list(segmentations.values())
    sizes = [  # also of those without a mask
        _size(record, None, source) if "height" in record or "width" in record else None
        for record in images
    ]
    positions = image[rows].tolist()
    sizes = [
        sizes[i] or _size(images[i], s, source)
        for i, s in zip(positions, segmentations, strict=True)
    ]
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
