"""From drawn regions to COCO annotations, as annotation tools need it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pycocotools.mask as mask_util

from imrcnn_d2.data.images import SourceImage, drawn_on_stored_pixels, orient
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.data.shapes import union

__all__ = [
    "ANNOTATION_FIELDS",
    "IMAGE_FIELDS",
    "Region",
    "annotate",
    "check_classes",
    "further_fields",
    "named_categories",
]

# What COCO records say themselves; annotation tools cannot set it by a flag or attribute.
IMAGE_FIELDS = ("id", "file_name", "width", "height")
ANNOTATION_FIELDS = ("id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd")


@dataclass
class Region:
    """One drawn area.

    Attributes:
        label: name of its class.
        rle: compressed COCO RLE in the frame that was drawn on.
        group: areas of one group and label are parts of one instance; None is no group.
        fields: further COCO annotation fields. ``iscrowd`` may be among them.
    """

    label: str
    rle: dict
    group: int | None = None
    fields: dict = field(default_factory=dict)


def named_categories(
    labels: Iterable[str], classes: Sequence[str] | None, where: str | Path
) -> list[dict]:
    """COCO categories, numbered from 1.

    Args:
        labels: all that were found.
        classes: the classes in their order; None takes the labels, sorted.
        where: what is blamed if there is none.

    Raises:
        BadInputError: there is no class, or one is given twice.
    """
    names = sorted(set(labels)) if classes is None else list(classes)
    if not names:
        raise BadInputError(where, "nothing is outlined in it; name the classes with --classes")
    if len(set(names)) < len(names):
        raise BadInputError(where, f"a class is given twice: {', '.join(names)}")
    return [{"id": i, "name": name} for i, name in enumerate(names, start=1)]


def check_classes(labels: Iterable[str], category_ids: Mapping[str, int], path: Path) -> None:
    """Raises BadInputError if a label is none of the classes."""
    unknown = sorted(set(labels) - set(category_ids))
    if unknown:
        raise BadInputError(
            path, f"unknown label {unknown[0]!r}; the classes are {', '.join(category_ids)}"
        )


def further_fields(entry: Mapping, own: Iterable[str]) -> dict:
    """The texts, numbers and truth values of a record that are not among its `own` keys."""
    own = set(own)
    return {k: v for k, v in entry.items() if k not in own and isinstance(v, str | int | float)}


def annotate(
    image: SourceImage,
    size: tuple[int, int],
    regions: Iterable[Region],
    category_ids: Mapping[str, int],
    notes: list[str],
) -> list[dict]:
    """COCO annotations of the instances in an image.

    Args:
        image: what was drawn on.
        size: width and height that the annotation file gives for it.
        regions: in the frame of that size, drawn only after it was found to be the image's.
        category_ids: by label, of all labels there are.
        notes: told if an EXIF-rotated image leaves a choice.

    Raises:
        BadInputError: the size is of no frame of the image, an instance covers no pixel or is there
            twice.
    """
    turned = drawn_on_stored_pixels(image, *size)
    regions = list(regions)
    if image.orientation != 1 and not turned and regions:
        notes.append(f"{image.path}: EXIF-rotated, annotations taken as drawn on what is shown")
    annotations: list[dict] = []
    seen: set[tuple[str, str]] = set()
    for parts in _instances(regions):
        label, rle = parts[0].label, union([part.rle for part in parts])
        if not mask_util.area(rle):
            raise BadInputError(
                image.path, f"a {label!r} covers no pixel of the {size[0]}x{size[1]} image"
            )
        mask = mask_util.decode(rle)
        if turned:
            mask = orient(mask, image.orientation)
        annotation = {**_joined(parts), **annotation_from_mask(mask, category_ids[label])}
        annotation["iscrowd"] = int(any(part.fields.get("iscrowd") for part in parts))
        content = label, annotation["segmentation"]["counts"]
        if content in seen:
            raise BadInputError(image.path, f"a {label!r} is there twice")
        seen.add(content)
        annotations.append(annotation)
    return annotations


def _instances(regions: Sequence[Region]) -> list[list[Region]]:
    groups: dict[object, list[Region]] = {}
    for i, region in enumerate(regions):
        key = (i,) if region.group is None else (region.label, region.group)
        groups.setdefault(key, []).append(region)
    return list(groups.values())


def _joined(parts: Sequence[Region]) -> dict:
    """Fields of an instance: true where it is of some part, else what the first part says."""
    joined: dict = {}
    for part in parts:
        for key, value in part.fields.items():
            if joined.setdefault(key, value) is False:
                joined[key] = value
    return joined
