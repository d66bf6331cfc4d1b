"""COCO ground truth and COCO results, checked and turned into parallel arrays.

Everything downstream (matching, counts, curves, COCO's AP) reads these arrays, so whatever is
accepted as input is decided here, once.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from .mask_folder import read_mask_folder
from .translation import with_ids_of

__all__ = [
    "Detections",
    "GroundTruth",
    "Regions",
    "mask_areas",
    "read_ground_truth",
    "read_results",
]

logger = logging.getLogger(__name__)

# What an annotation says of its place, which Regions has.
_REGION = ("segmentation", "bbox")


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

    def of_images(self, positions):
        """
        Args:
            positions (np.ndarray): (I,) int, images, ascending.

        Returns:
            tuple: the (N,) int positions of the regions in these images; and Regions, of these
            alone, in images that are numbered by their place in ``positions``.
        """
        rows = np.flatnonzero(np.isin(self.image, positions))
        own = self.take(rows)
        return rows, replace(own, image=np.searchsorted(positions, own.image))

    def take(self, rows):
        """Regions: those at (K,) int positions, in this order."""
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
        """np.ndarray: (number of images,) int, lesions in each image; crowds are none."""
        return np.bincount(self.regions.image[~self.crowd], minlength=len(self.images))


@dataclass(frozen=True, eq=False)
class Detections:
    """
    Attributes:
        regions (Regions): the N detections.
        score (np.ndarray): (N,) float, finite and not negative.
        scored (bool): False if the results know no scores (a folder of masks): ``score`` is then 1
            throughout, and whatever ranks detections or units by score is undefined.
    """

    regions: Regions
    score: np.ndarray
    scored: bool = True


def mask_areas(masks):
    """
    Args:
        masks (list[dict]): compressed RLEs.

    Returns:
        np.ndarray: (N,) float, pixels.
    """
    # One at a time: under numpy 2, pycocotools 2.0.11 overflows on more than 255 masks.
    return np.array([mask_util.area(mask) for mask in masks], dtype=float)


def read_ground_truth(gt):
    """
    Args:
        gt (dict, pycocotools.coco.COCO, str, Path or GroundTruth): COCO instance annotations, or
            what was read already. Masks are RLE (compressed or not) or polygons. ``iscrowd``,
            ``area`` and one of ``bbox`` and ``segmentation`` may be missing.

    Returns:
        GroundTruth: its ``regions.masks`` is None unless every annotation has a mask.

    Raises:
        ValueError: on doubled image or category ids, doubled category names, annotations for an
            unknown image or category, masks of another size than their image, and annotations with
            neither box nor mask.
    """
    if isinstance(gt, GroundTruth):
        return gt
    dataset = _load(gt)
    for key in ("images", "categories", "annotations"):
        if key not in dataset:
            raise ValueError(f"The ground truth has no '{key}': it must be a COCO instance file.")
    images = sorted(dataset["images"], key=lambda image: image["id"])
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    for what, items in (("image", images), ("category", categories)):
        for one, two in zip(items, items[1:], strict=False):
            if one["id"] == two["id"]:
                raise ValueError(f"The ground truth has two {what} records with id {one['id']}.")
    names = [category["name"] for category in categories]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"The ground truth has several categories {name!r}: rename them.")
    annotations, regions = _read_regions(dataset["annotations"], images, categories, "annotation")
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    outline = regions.boxes[:, 2] * regions.boxes[:, 3]
    if regions.masks:
        outline = mask_areas(regions.masks)
    area = np.array([a.get("area", o) for a, o in zip(annotations, outline, strict=True)], float)
    fields = [{k: v for k, v in a.items() if k not in _REGION} for a in annotations]
    return GroundTruth(images, categories, regions, fields, crowd, area)


def read_results(results, gt):
    """
    Args:
        results (list[dict], dict, str or Path): a COCO results list (``image_id``,
            ``category_id``, ``score`` and ``bbox``, ``segmentation`` or both), or a COCO dict whose
            ``annotations`` carry a ``score``, as ``tools/predict.py`` writes. The latter's own
            ``images`` and ``categories`` are matched with those of the ground truth by
            ``file_name`` and ``name``, since its ids may have been given independently. Or a folder
            of masks, see :func:`read_mask_folder`. Where every ``score`` is null, as
            :func:`coco_results` has it for such a folder, the results know no scores. What was read
            already stays as it is.
        gt (GroundTruth): what the results are for.

    Returns:
        Detections: its ``regions.masks`` is None unless every result has a mask.

    Raises:
        ValueError: on results for an unknown image or category, a missing, NaN, infinite or
            negative score, masks of another size than their image, and results with neither box
            nor mask.
    """
    if isinstance(results, Detections):
        return results
    is_folder = isinstance(results, str | Path) and Path(results).is_dir()
    results = read_mask_folder(results, gt) if is_folder else _load(results)
    if isinstance(results, dict):
        if "annotations" not in results:
            raise ValueError(
                "The results are a dict without 'annotations': give a COCO results list."
            )
        results = with_ids_of(gt, results)
    unscored = is_folder or bool(results) and all(r.get("score", 0) is None for r in results)
    for number, result in enumerate([] if unscored else results):
        score = result.get("score")
        if not isinstance(score, int | float | np.number) or not math.isfinite(score) or score < 0:
            raise ValueError(
                f"Result {number} (image {result.get('image_id')}) has the score {score!r}: "
                "every result needs a finite score that is not negative."
            )
    results, regions = _read_regions(results, gt.images, gt.categories, "result")
    score = np.array([1 if unscored else result["score"] for result in results], float)
    return Detections(regions, score, scored=not unscored)


def _load(source):
    if isinstance(source, str | Path):
        try:
            return json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{source} is not a JSON file: {error}") from error
    return getattr(source, "dataset", source)  # pycocotools' COCO keeps the JSON there


def _read_regions(records, images, categories, what):
    """The records as (records by image, Regions)."""
    image_at = {image["id"]: position for position, image in enumerate(images)}
    category_at = {category["id"]: position for position, category in enumerate(categories)}
    for number, record in enumerate(records):
        for key, known in (("image_id", image_at), ("category_id", category_at)):
            if record.get(key) not in known:
                raise ValueError(
                    f"{what.capitalize()} {number} has the {key} {record.get(key)!r}, "
                    "which the ground truth does not list."
                )
    records = sorted(records, key=lambda record: image_at[record["image_id"]])  # a stable sort
    with_mask = [bool(record.get("segmentation")) for record in records]
    masks = None
    if all(with_mask):
        masks = [_to_rle(record, images[image_at[record["image_id"]]], what) for record in records]
    elif any(with_mask):
        logger.warning(
            f"{len(records) - sum(with_mask)} of {len(records)} {what}s have no segmentation (the "
            f"first is for image {records[with_mask.index(False)]['image_id']}), so that figures "
            "of masks are undefined."
        )
    boxes = np.zeros((len(records), 4))
    for row, record in enumerate(records):
        if record.get("bbox"):
            boxes[row] = record["bbox"]
        elif with_mask[row]:
            rle = (
                masks[row] if masks else _to_rle(record, images[image_at[record["image_id"]]], what)
            )
            boxes[row] = mask_util.toBbox(rle)
        else:
            raise ValueError(
                f"One {what} for image {record['image_id']} has neither bbox nor segmentation."
            )
    if not np.isfinite(boxes).all():
        row = int(np.argmin(np.isfinite(boxes).all(axis=1)))
        raise ValueError(
            f"The {what} for image {records[row]['image_id']} has the box {boxes[row].tolist()}: "
            "all four numbers must be finite."
        )
    image = np.array([image_at[record["image_id"]] for record in records], dtype=np.int64)
    category = np.array([category_at[r["category_id"]] for r in records], dtype=np.int64)
    return records, Regions(image, category, boxes, masks)


def _to_rle(record, image, what):
    """The record's segmentation as compressed RLE of its image's size."""
    segmentation = record["segmentation"]
    if isinstance(segmentation, dict):
        size = list(segmentation["size"])
        expected = [image.get("height", size[0]), image.get("width", size[1])]
        if size != expected:
            raise ValueError(
                f"The mask of one {what} for image {image['id']} ({image.get('file_name')}) is "
                f"{size} (height, width), but the image is {expected}."
            )
        if isinstance(segmentation["counts"], list):
            if sum(segmentation["counts"]) != size[0] * size[1]:
                raise ValueError(
                    f"The runs of the mask of one {what} for image {image['id']} add up to "
                    f"{sum(segmentation['counts'])} pixels, but its size {size} has "
                    f"{size[0] * size[1]}."
                )
            return mask_util.frPyObjects(segmentation, *size)
        return segmentation
    if "height" not in image or "width" not in image:
        raise ValueError(
            f"Image {image['id']} has no height and width, which its polygons need to become masks."
        )
    if any(len(polygon) < 6 for polygon in segmentation):
        raise ValueError(
            f"One {what} for image {image['id']} ({image.get('file_name')}) has a polygon of fewer "
            "than three points."
        )
    return mask_util.merge(mask_util.frPyObjects(segmentation, image["height"], image["width"]))
