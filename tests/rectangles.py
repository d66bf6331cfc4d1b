"""Rectangular lesions, on which overlaps can be worked out by hand."""

import numpy as np
import pycocotools.mask as mask_util


def rectangle(image_id, x, y, width, height, category_id=1, *, size=(40, 50), **fields):
    """A COCO annotation or, with a ``score``, a result; ``size`` is the image's (height, width)."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[y : y + height, x : x + width] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    rle = {"size": rle["size"], "counts": rle["counts"].decode()}
    box = [x, y, width, height]
    record = {"image_id": image_id, "category_id": category_id, "bbox": box, "segmentation": rle}
    return {**record, **fields}


def rectangles(text):
    """Rectangles from "image x y width height class 2 crowd @0.9; ...", the last three optional."""
    records = []
    for item in text.split(";"):
        words, fields = item.split(), {}
        if "class" in words:
            fields["category_id"] = int(words[words.index("class") + 1])
        if "crowd" in words:
            fields["iscrowd"] = 1
        if words[-1].startswith("@"):
            fields["score"] = float(words[-1][1:])
        records.append(rectangle(*map(int, words[:5]), **fields))
    return records
