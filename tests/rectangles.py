"""Rectangular lesions, on which overlaps can be worked out by hand."""

import numpy as np
import pycocotools.mask as mask_util

__all__ = ["rectangle"]


def rectangle(image_id, x, y, width, height, category_id=1, *, size=(40, 50), **fields):
    """
    A rectangle as a COCO annotation or, with a ``score``, as a COCO result.

    Args:
        image_id (int):
        x, y, width, height (int): pixels.
        category_id (int):
        size (tuple[int, int]): height and width of the image.
        **fields: further fields of the record.
    """
    mask = np.zeros(size, dtype=np.uint8)
    mask[y : y + height, x : x + width] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        **fields,
    }
