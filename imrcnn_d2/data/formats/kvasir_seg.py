"""Kvasir-SEG: images, binary masks and the bounding boxes that were published with them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.public_masks import PublicMasks
from imrcnn_d2.data.masks import MIN_AREA
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, read_json

# published boxes come from the same masks, so less overlap than this means an error
_MIN_BOX_IOU = 0.9


class KvasirSeg(PublicMasks):
    name = "kvasir-seg"
    help = "Kvasir-SEG: images/ and masks/ in a folder"
    title = "Kvasir-SEG (Jha et al. 2020, doi 10.1007/978-3-030-37734-2_37)"
    url = "https://datasets.simula.no/kvasir-seg/"
    terms = "for research and education, the paper to be cited; other use by permission"
    published = {"images": 1000}

    def read_layout(self, root: Path, rejects: Rejects, min_area: int = MIN_AREA) -> base.Source:
        """Read images and masks, with notes where boxes published next to them differ."""
        source = super().read_layout(root, rejects, min_area)
        (folders,) = self.folders_in(root)
        boxes = _read_boxes(root, (root / folders.images).parent, rejects)

        def compared() -> Iterator[base.Sample]:
            num_compared = 0
            for sample in source.samples:
                entry = boxes.get(sample.stem)
                if entry is not None:
                    num_compared += 1
                    if problem := _compare_boxes(sample, entry):
                        source.notes.append(f"{sample.image.path}: {problem}")
                yield sample
            if boxes:
                source.notes.append(f"{num_compared} images compared with the bounding-box file")

        return replace(source, samples=compared())


def _read_boxes(root: Path, folder: Path, rejects: Rejects) -> dict[str, dict]:
    """The published boxes by image name; the file is called kavsir_bboxes.json in one release."""
    for path in sorted(folder.glob("*box*.json")):
        with rejects.catch():
            content = read_json(check_inside(root, path, rejects.follow_links))
            try:
                for entry in content.values():
                    corners = [
                        [box[k] for k in ("xmin", "ymin", "xmax", "ymax")] for box in entry["bbox"]
                    ]
                    entry["bbox"] = [
                        [x, y, right - x, bottom - y] for x, y, right, bottom in corners
                    ]
                return content
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"is no bounding-box file of Kvasir-SEG ({error!r})"
                raise BadInputError(path, reason) from error
    return {}


def _compare_boxes(sample: base.Sample, entry: dict) -> str:
    """How the boxes of the masks differ from the published ones; empty if they do not."""
    size = sample.image.width, sample.image.height
    published_size = entry.get("width", size[0]), entry.get("height", size[1])
    if published_size != size:
        return f"bounding-box file says {published_size[0]}x{published_size[1]}"
    published = np.array(entry["bbox"], dtype=float).reshape(-1, 4)
    boxes = np.array([annotation["bbox"] for annotation in sample.annotations], dtype=float)
    if len(boxes) != len(published):
        return f"{len(boxes)} lesions in the mask, {len(published)} published boxes"
    overlaps = mask_util.iou(boxes, published, np.zeros(len(published), np.uint8))
    worst = min(overlaps.max(axis=0).min(), overlaps.max(axis=1).min())
    if worst < _MIN_BOX_IOU:
        return f"a published box overlaps the mask's box by only {worst:.2f} (IoU)"
    return ""
