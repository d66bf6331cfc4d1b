"""A folder of images without a lesion, to count false alarms in."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from imrcnn_d2.data.images import (
    SourceImage,
    annotated_on_stored_pixels,
    by_stem,
    inspect_image,
    list_files,
    orient,
    read_mask,
)
from imrcnn_d2.data.masks import annotation_from_mask, components
from imrcnn_d2.data.prepare.data_set import Sample, Source
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, read_json

__all__ = ["MIN_AREA", "read_kvasir_seg", "read_lesion_free", "with_lesion_free"]


# in pixels; JPEG leaves specks of 1 in Kvasir-SEG's masks, its smallest polyps have over 200
MIN_AREA = 16
# published boxes come from the same masks, so less overlap than this means an error
_MIN_BOX_IOU = 0.9


def read_kvasir_seg(
    root: Path, rejects: Rejects, negatives: Path | None = None, min_area: int = MIN_AREA
) -> Source:
    """Reads images and masks; one instance per connected component of a mask.

    Args:
        root: has images/, masks/ and perhaps the bounding-box JSON, then compared with the masks.
        rejects: takes bad input.
        negatives: a folder of images without a lesion.
        min_area: smaller components, in pixels, are dropped and counted.

    Raises:
        FileNotFoundError: a folder is missing (when the samples are read).
    """
    notes: list[str] = []
    return Source(
        samples=_samples(root, rejects, negatives, min_area, notes),
        categories=[{"id": 1, "name": "polyp", "supercategory": "lesion"}],
        info={"description": "from masks: one instance per connected component"},
        notes=notes,
    )


def _samples(
    root: Path, rejects: Rejects, negatives: Path | None, min_area: int, notes: list[str]
) -> Iterator[Sample]:
    images, masks = (
        by_stem(check_inside(root, root / name, rejects.follow_links), rejects)
        for name in ("images", "masks")
    )
    healthy = [] if negatives is None else list_files(negatives, rejects)
    for stem in sorted(masks.keys() - images.keys()):
        with rejects.catch():
            raise BadInputError(masks[stem], f"mask without an image in {root / 'images'}")

    boxes = _read_boxes(root, rejects)
    num_specks = num_compared = 0
    with tqdm(total=len(images) + len(healthy), desc="Reading images", unit="image") as progress:
        for stem, path in images.items():
            progress.update()
            with rejects.catch():
                image = inspect_image(path)
                if stem not in masks:
                    raise BadInputError(path, f"has no mask in {root / 'masks'}")
                annotations, specks = _annotations(image, masks[stem], min_area, notes)
                num_specks += specks
                if stem in boxes:
                    num_compared += 1
                    notes += _compare_boxes(image, annotations, boxes[stem])
                yield Sample(str(path.relative_to(root / "images").as_posix()), image, annotations)
        for path in healthy:
            progress.update()
            with rejects.catch():
                yield Sample(str(path.relative_to(negatives).as_posix()), inspect_image(path), [])
    notes.append(f"{num_specks} specks of fewer than {min_area} pixels left out of the masks")
    if boxes:
        notes.append(f"{num_compared} images compared with the bounding-box file")


def _annotations(
    image: SourceImage, path: Path, min_area: int, notes: list[str]
) -> tuple[list[dict], int]:
    mask = read_mask(path)
    if annotated_on_stored_pixels(image, mask.shape[1], mask.shape[0]):
        mask = orient(mask, image.orientation)
    elif image.orientation != 1:
        notes.append(f"{path}: EXIF-rotated image, mask taken as drawn on what is shown")
    try:
        lesions, specks = components(mask, min_area)
    except ValueError as error:
        raise BadInputError(path, str(error)) from error
    annotations = [annotation_from_mask(lesion) for lesion in lesions]
    if not annotations:
        raise BadInputError(
            path,
            f"empty mask: nothing of at least {min_area} pixels is 128 or brighter; lesion-free "
            "images belong in the folder given as --negatives",
        )
    return annotations, specks


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


def _compare_boxes(image: SourceImage, annotations: list[dict], entry: dict) -> list[str]:
    """What is wrong between the boxes of the masks and the published ones; empty if nothing."""
    published = np.array(entry["bbox"], dtype=float).reshape(-1, 4)
    size = entry.get("width", image.width), entry.get("height", image.height)
    if size != (image.width, image.height):
        return [f"{image.path}: bounding-box file says {size[0]}x{size[1]}"]
    ours = np.array([annotation["bbox"] for annotation in annotations], dtype=float)
    if len(ours) != len(published):
        return [f"{image.path}: {len(ours)} lesions in the mask, {len(published)} published boxes"]
    overlaps = mask_util.iou(ours, published, np.zeros(len(published), np.uint8))
    worst = min(overlaps.max(axis=0).min(), overlaps.max(axis=1).min())
    if worst < _MIN_BOX_IOU:
        return [f"{image.path}: a published box overlaps the mask's box by only {worst:.2f} (IoU)"]
    return []


def read_lesion_free(root: Path, rejects: Rejects) -> Source:
    """Reads images of which none shows a lesion.

    Args:
        root: folder of images, in folders of its own or not.
        rejects: takes bad input.

    Raises:
        FileNotFoundError: no such folder (when the samples are read).
    """
    return Source(
        samples=_lesion_free_samples(root, rejects),
        categories=[{"id": 1, "name": "lesion"}],
        info={"description": "images without a lesion"},
    )


def with_lesion_free(source: Source, root: Path, rejects: Rejects) -> Source:
    """The data set and, behind its images, those of a folder of images without a lesion."""
    return replace(source, samples=chain(source.samples, _lesion_free_samples(root, rejects)))


def _lesion_free_samples(root: Path, rejects: Rejects) -> Iterator[Sample]:
    for path in tqdm(list_files(root, rejects), desc="Reading images", unit="image"):
        with rejects.catch():
            yield Sample(path.relative_to(root).as_posix(), inspect_image(path), [])
