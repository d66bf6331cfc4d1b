"""Segmentations as a folder of masks, as nnU-Net and others write them."""

import logging
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from ..data.files import open_image
from .matching import MAX_DETECTIONS

__all__ = ["read_mask_folder"]

logger = logging.getLogger(__name__)

NAMED_AT_MOST = 5


def read_mask_folder(folder, gt):
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
        ValueError: naming the file and the remedy, if masks are missing or to spare, if two images
            would share a mask, and for a mask that can't be read, is of another size than its
            image, or has values that stand for no class.
    """
    folder = Path(folder)
    results = []
    for image, path in tqdm(_pairs(folder, gt.images), desc="Masks", delay=2):
        mask = _read(path, image)
        _check_values(mask, path, gt.categories)
        for value, category in enumerate(gt.categories, 1):
            of_class = mask != 0 if len(gt.categories) == 1 else mask == value
            record = {"image_id": image["id"], "category_id": category["id"]}
            count, found = _components(of_class)
            if count > MAX_DETECTIONS:
                logger.warning(
                    f"{path} has {count} regions of '{category['name']}': only the "
                    f"{MAX_DETECTIONS} largest are scored, as of any detector."
                )
            results += [{**record, **component} for component in found]
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
                f"{folder} would be found."
            )
        stem = PurePosixPath(image["file_name"]).stem
        if stem in pairs:
            raise ValueError(
                f"The images {pairs[stem][0]['file_name']} and {image['file_name']} would share "
                f"the mask {stem}.png in {folder}: give images names of their own."
            )
        if stem in by_stem:
            pairs[stem] = image, by_stem[stem]
        else:
            missing.append(f"{stem}.png")
    spare = sorted(by_stem[stem].name for stem in set(by_stem) - set(pairs))
    if missing:
        raise ValueError(
            f"{folder} lacks the masks of {len(missing)} of {len(images)} images: {_some(missing)}"
            f"{f' (but has {_some(spare)})' if spare else ''}. An image in which nothing was found "
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
    try:
        with open_image(path) as file:
            mask = np.asarray(file)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = getattr(error, "reason", error)
        raise ValueError(f"{path} can't be read: {reason}. Write it again.") from error
    if mask.ndim == 3:
        if not (mask == mask[..., :1]).all():
            raise ValueError(
                f"{path} is in colour: save it with one channel that holds the number of the class."
            )
        mask = mask[..., 0]
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
    found = []
    for label in 1 + np.lexsort((left, top, -area))[:MAX_DETECTIONS]:
        x, y, width, height = stats[label, :4].tolist()
        rle = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        found.append({"segmentation": rle, "bbox": [x, y, width, height]})
    return count - 1, found
