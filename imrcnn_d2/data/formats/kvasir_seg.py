"""Kvasir-SEG: images, binary masks and the bounding boxes that were published with them."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.mask_folder import add_min_area_argument, read_mask_folder
from imrcnn_d2.data.masks import MIN_AREA
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, read_json

# published boxes come from the same masks, so less overlap than this means an error
_MIN_BOX_IOU = 0.9


class KvasirSeg(base.Format):
    name = "kvasir-seg"
    help = "images/ and masks/ in a folder"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--root", type=Path, required=True, help="has images/ and masks/")
        base.add_negatives_argument(parser)
        add_min_area_argument(parser)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        source = read_kvasir_seg(args.root, rejects, args.min_area)
        return base.with_lesion_free(source, args.negatives, rejects)


def read_kvasir_seg(root: Path, rejects: Rejects, min_area: int = MIN_AREA) -> base.Source:
    """Read images/ and masks/, see `read_mask_folder`, and compare with the bounding-box JSON.

    Raises:
        FileNotFoundError: a folder is missing.
        BadInputError: bad input under ``on_error="raise"``, such as an empty mask.
    """
    images, masks = (
        check_inside(root, root / name, rejects.follow_links) for name in ("images", "masks")
    )
    source = read_mask_folder(images, masks, rejects, min_area=min_area, require_lesion=True)
    boxes = _read_boxes(root, rejects)

    def compared() -> Iterator[base.Sample]:
        num_compared = 0
        for sample in source.samples:
            entry = boxes.get(Path(sample.file_name).with_suffix("").as_posix())
            if entry is not None:
                num_compared += 1
                if problem := _compare_boxes(sample, entry):
                    source.notes.append(f"{sample.image.path}: {problem}")
            yield sample
        if boxes:
            source.notes.append(f"{num_compared} images compared with the bounding-box file")

    return replace(
        source,
        samples=compared(),
        categories=[{"id": 1, "name": "polyp", "supercategory": "lesion"}],
        info={
            "description": "from masks: one instance per connected component",
            "source": "kvasir_seg",
        },
    )


def _read_boxes(root: Path, rejects: Rejects) -> dict[str, dict]:
    """The published boxes by image name; the file is called kavsir_bboxes.json in one release."""
    for path in sorted(root.glob("*box*.json")):
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
