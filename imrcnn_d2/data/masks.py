"""COCO annotations from binary masks."""

from collections.abc import Iterator

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = ["MOST_INSTANCES", "annotation_from_mask", "components"]

MOST_INSTANCES = 1000  # of one mask: each takes a pass over all its pixels


def components(mask: np.ndarray, min_area: int) -> tuple[Iterator[np.ndarray], int]:
    """Splits a mask into its connected components (8-connectivity).

    Args:
        mask: (H, W) bool.
        min_area: smaller components, in pixels, are specks and left out.

    Returns:
        the components, (H, W) bool each, in raster order of their boxes' top left corners; the
        number of specks.

    Raises:
        ValueError: more than `MOST_INSTANCES` components.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    kept = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= min_area]
    if len(kept) > MOST_INSTANCES:
        raise ValueError(
            f"has {len(kept)} separate parts of at least {min_area} pixels, more than "
            f"{MOST_INSTANCES}; clean it, or raise --min-area"
        )
    # labels depend on OpenCV's algorithm; the corner does not
    kept.sort(key=lambda i: (*stats[i, [cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT]], i))
    return (labels == i for i in kept), count - 1 - len(kept)


def annotation_from_mask(mask: np.ndarray, category_id: int = 1, **fields) -> dict:
    """A COCO annotation without ids: compressed RLE, area, and box [x, y, w, h] in pixels.

    Args:
        mask: (H, W) bool, not empty.
        category_id: COCO category.
        fields: further fields, e.g. ``lesion_id``.
    """
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": category_id,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        "area": int(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
        "iscrowd": 0,
        **fields,
    }
