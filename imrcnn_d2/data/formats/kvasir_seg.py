"""Kvasir-SEG: images, binary masks and the bounding boxes that were published with them."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.formats.mask_folder import add_min_area_argument, read_mask_folder
from imrcnn_d2.data.masks import MIN_AREA
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, read_json

__all__ = ["KvasirSeg", "read_kvasir_seg"]


# published boxes come from the same masks, so less overlap than this means an error
_MIN_BOX_IOU = 0.9


class KvasirSeg(Format):
    name = "kvasir-seg"
    help = "images/ and masks/ in a folder"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--root", type=Path, required=True, help="has images/ and masks/")
        parser.add_argument(
            "--negatives", type=Path, help="folder of images without a lesion to add"
        )
        add_min_area_argument(parser)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return read_kvasir_seg(args.root, rejects, args.min_area)


def read_kvasir_seg(root: Path, rejects: Rejects, min_area: int = MIN_AREA) -> Source:
    """Reads images and masks; one instance per connected component of a mask.

    Args:
        root: has images/, masks/ and perhaps the bounding-box JSON, then compared with the masks.
        rejects: takes bad input, such as an empty mask.
        min_area: smaller components, in pixels, are dropped and counted.

    Raises:
        FileNotFoundError: a folder is missing.
        BadInputError: bad input under ``on_error="raise"``.
    """
    images, masks = (
        check_inside(root, root / name, rejects.follow_links) for name in ("images", "masks")
    )
    source = read_mask_folder(images, masks, rejects, min_area=min_area, require_lesion=True)
    return replace(
        source,
        samples=_compared(source, _read_boxes(root, rejects)),
        categories=[{"id": 1, "name": "polyp", "supercategory": "lesion"}],
        info={"description": "from masks: one instance per connected component"},
    )


def _compared(source: Source, boxes: dict[str, dict]) -> Iterator[Sample]:
    """The samples; notes where their boxes differ from the published ones."""
    num_compared = 0
    for sample in source.samples:
        stem = Path(sample.file_name).with_suffix("").as_posix()
        if stem in boxes:
            num_compared += 1
            source.notes += _compare_boxes(sample, boxes[stem])
        yield sample
    if boxes:
        source.notes.append(f"{num_compared} images compared with the bounding-box file")


def _read_boxes(root: Path, rejects: Rejects) -> dict[str, dict]:
    """The published boxes by image name; the file is called kavsir_bboxes.json in one release."""
    for path in sorted(root.glob("*box*.json")):
        with rejects.catch():
            content = read_json(check_inside(root, path, rejects.follow_links))
            try:
                for entry in content.values():
                    entry["bbox"] = [
                        [
                            box["xmin"],
                            box["ymin"],
                            box["xmax"] - box["xmin"],
                            box["ymax"] - box["ymin"],
                        ]
                        for box in entry["bbox"]
                    ]
                return content
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadInputError(
                    path, f"is no bounding-box file of Kvasir-SEG ({error!r})"
                ) from error
    return {}


def _compare_boxes(sample: Sample, entry: dict) -> list[str]:
    """How the boxes of the masks differ from the published ones; empty if they do not."""
    image = sample.image
    published = np.array(entry["bbox"], dtype=float).reshape(-1, 4)
    size = entry.get("width", image.width), entry.get("height", image.height)
    if size != (image.width, image.height):
        return [f"{image.path}: bounding-box file says {size[0]}x{size[1]}"]
    boxes = np.array([annotation["bbox"] for annotation in sample.annotations], dtype=float)
    if len(boxes) != len(published):
        return [f"{image.path}: {len(boxes)} lesions in the mask, {len(published)} published boxes"]
    overlaps = mask_util.iou(boxes, published, np.zeros(len(published), np.uint8))
    worst = min(overlaps.max(axis=0).min(), overlaps.max(axis=1).min())
    if worst < _MIN_BOX_IOU:
        return [f"{image.path}: a published box overlaps the mask's box by only {worst:.2f} (IoU)"]
    return []
