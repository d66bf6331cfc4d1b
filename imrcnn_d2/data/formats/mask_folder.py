"""Folders of mask images: binary, numbering classes or instances, or one file per instance."""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from imrcnn_d2.data.formats.base import (
    Format,
    Sample,
    Source,
    add_class_arguments,
    unique_samples,
)
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import (
    SourceImage,
    annotated_on_stored_pixels,
    by_stem,
    inspect_image,
    list_files,
    orient,
    read_mask,
    read_values,
)
from imrcnn_d2.data.masks import (
    ANNOTATION_FIELDS,
    IMAGE_FIELDS,
    MIN_AREA,
    MOST_INSTANCES,
    annotation_from_mask,
    check_classes,
    components,
    further_fields,
    named_categories,
)
from imrcnn_d2.utils.files import BadInputError, Rejects

__all__ = ["KINDS", "MaskFolder", "add_min_area_argument", "read_mask_folder"]


KINDS = ("binary", "classes", "instances", "files")
# Of an instance's file: its image's name, a separator, perhaps the class, perhaps a number.
_NUMBER = re.compile(r"(^|[ _.-])\d+$", re.ASCII)
_SEPARATORS = " _.-/"
# A class name that could not be read back from a file name.
_UNREADABLE_CLASS = re.compile(r'[/\\:*?"<>|\0]|^[ ._-]|[ ._-]$|[ ._-]\d+$')


class MaskFolder(Format):
    name = "masks"
    help = "own data: mask images, of four kinds"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_class_arguments(parser)
        parser.add_argument("--images", type=Path, required=True, help="folder of images")
        parser.add_argument(
            "--masks", type=Path, required=True, help="folder of masks, named alike"
        )
        parser.add_argument(
            "--kind",
            choices=KINDS,
            default="binary",
            help="binary (default): white is lesion, each connected part an instance; classes: "
            "pixels number the class; instances: pixels number the instance; files: a file for "
            "each instance, NAME_1.png or NAME/1.png, perhaps with its class, NAME_polyp_1.png",
        )
        parser.add_argument(
            "--suffix", default="", metavar="TEXT", help="of the masks' names, e.g. _segmentation"
        )
        add_min_area_argument(parser)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return read_mask_folder(
            args.images,
            args.masks,
            rejects,
            args.kind,
            classes=args.classes,
            suffix=args.suffix,
            min_area=args.min_area,
        )

    def write(self, source: Source, names: Mapping[int, str], stage: Path, out: Path) -> list[str]:
        """Writes NAME/CLASS_1.png for each instance, 0 and 255; NAME/0.png, all 0, without one.

        As `LabelMe.write`.
        """
        for name in names.values():
            if _UNREADABLE_CLASS.search(name) or name.isdigit():
                raise BadInputError(name, "this class cannot be told from a file's name; rename it")
        lost: set[str] = set()
        for sample in unique_samples(source):
            folder = stage / PurePosixPath(sample.file_name).with_suffix("")
            folder.mkdir(parents=True)
            height, width = sample.image.height, sample.image.width
            if not sample.annotations:
                Image.fromarray(np.zeros((height, width), np.uint8)).save(folder / "0.png")
            for number, annotation in enumerate(sample.annotations, start=1):
                if annotation["iscrowd"]:
                    raise BadInputError(
                        sample.image.path, "has a crowd region, which masks cannot mark as one"
                    )
                mask = mask_util.decode(to_rle(annotation["segmentation"], height, width)) * 255
                label = names[annotation["category_id"]]
                Image.fromarray(mask).save(folder / f"{label}_{number}.png")
                lost |= further_fields(annotation, ANNOTATION_FIELDS).keys()
            lost |= further_fields(sample.fields, IMAGE_FIELDS).keys()
        return [f"not in the masks: {', '.join(sorted(lost))}"] if lost else []


def add_min_area_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-area",
        type=int,
        default=MIN_AREA,
        help="smaller parts of a mask, in pixels, are dropped as specks (default %(default)s)",
    )


def read_mask_folder(
    images: Path,
    masks: Path,
    rejects: Rejects,
    kind: str = "binary",
    *,
    classes: Sequence[str] | None = None,
    suffix: str = "",
    min_area: int = MIN_AREA,
    require_lesion: bool = False,
) -> Source:
    """Reads images with masks of the same name, but for the file type and `suffix`.

    - binary: white is lesion. In a JPEG, and where there are grey values, that is 128 or more;
      else everything but 0. Each connected component (8-connectivity) is an instance.
    - classes: pixels are 0 for background, 1 for the first class, and so on; each connected
      component of a class is an instance.
    - instances: pixels are 0 for background, each other value is an instance.
    - files: a file for each instance, whole: NAME_1.png, NAME_polyp_2.png, or NAME/1.png,
      NAME/polyp_2.png. With one class, or none given, the part between needs not be one.

    A mask of nothing but 0 says that its image is lesion-free; an image without a mask is bad
    input.

    Args:
        images, masks: the folders.
        rejects: takes bad input.
        kind: one of `KINDS`.
        classes: their names in order; None is one, "lesion", or with "files" those that the files
            name. "binary" and "instances" take one.
        suffix: of the masks' names, e.g. "_segmentation".
        min_area: with "binary" and "classes", smaller components, in pixels, are dropped and
            counted.
        require_lesion: with "binary", for data sets distributed as JPEG: lesion is 128 or brighter
            in files of any type, and a mask without it is bad input.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: `classes` do not fit `kind`.
        BadInputError: bad input under ``on_error="raise"``.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!r}; choose from {', '.join(KINDS)}")
    if kind in ("binary", "instances") and classes is not None and len(classes) != 1:
        raise ValueError(f"masks of kind {kind} are of one class, not of {len(classes)}")
    image_paths = by_stem(images, rejects)
    files = _assign(masks, image_paths, kind, suffix, rejects)
    if classes is None:
        labels = {label for masks_of_image in files.values() for _, label in masks_of_image}
        classes = sorted(labels - {""}) or ["lesion"]
    categories = named_categories((), classes, masks)
    notes: list[str] = []
    category_ids = {category["name"]: category["id"] for category in categories}
    reader = _Reader(kind, category_ids, min_area, require_lesion)
    samples = _samples(images, image_paths, files, reader, rejects, notes)
    return Source(samples, categories, {"description": f"from masks of kind {kind}"}, notes)


def _assign(
    masks: Path, images: Collection[str], kind: str, suffix: str, rejects: Rejects
) -> dict[str, list[tuple[Path, str]]]:
    """The mask files of each image, with the class that the name gives, or ""."""
    files: dict[str, list[tuple[Path, str]]] = {stem: [] for stem in images}
    for path in list_files(masks, rejects):
        stem = path.relative_to(masks).with_suffix("").as_posix()
        with rejects.catch():
            label = ""
            if kind == "files":
                image, label = _image_and_label(path, stem, images)
            else:
                image = stem.removesuffix(suffix) if stem.endswith(suffix) else None
            if image not in files:
                raise BadInputError(path, "mask without an image")
            if kind != "files" and files[image]:
                raise BadInputError(path, f"duplicate: same image as {files[image][0][0]}")
            files[image].append((path, label))
    return files


def _image_and_label(path: Path, stem: str, images: Collection[str]) -> tuple[str | None, str]:
    """The image name that a mask's name starts with, and the class after it."""
    ends = [i for i, character in enumerate(stem) if character in _SEPARATORS]
    starts = [stem[:end] for end in [len(stem), *reversed(ends)] if stem[:end] in images]
    folders = [start for start in starts if stem[len(start) :].startswith("/")]
    starts = folders[:1] or starts
    if len(starts) > 1:
        raise BadInputError(
            path,
            f"could be of {' or '.join(starts)}; put it into a folder with the name of its image",
        )
    if not starts:
        return None, ""
    return starts[0], _NUMBER.sub("", stem.removeprefix(starts[0]).strip(_SEPARATORS))


def _samples(
    images: Path,
    image_paths: Mapping[str, Path],
    files: Mapping[str, Sequence[tuple[Path, str]]],
    reader: "_Reader",
    rejects: Rejects,
    notes: list[str],
) -> Iterator[Sample]:
    for stem, path in tqdm(image_paths.items(), desc="Reading images", unit="image"):
        with rejects.catch():
            image = inspect_image(path)
            annotations = reader.read(image, files[stem], notes)
            yield Sample(path.relative_to(images).as_posix(), image, annotations)
    if reader.min_area > 1 and reader.kind in ("binary", "classes"):
        notes.append(
            f"{reader.specks} specks of fewer than {reader.min_area} pixels left out of the masks"
        )
    if reader.empty:
        notes.append(f"{reader.empty} images have an empty mask and are taken as lesion-free")


@dataclass
class _Reader:
    """Reads the masks of one image after the other, and counts what is left out."""

    kind: str
    category_ids: dict[str, int]
    min_area: int
    require_lesion: bool
    specks: int = 0
    empty: int = 0

    def read(
        self, image: SourceImage, files: Sequence[tuple[Path, str]], notes: list[str]
    ) -> list[dict]:
        if not files:
            remedy = "give lesion-free images as --negatives"
            if not self.require_lesion:
                remedy += ", or one of nothing but 0"
            raise BadInputError(image.path, f"has no mask; {remedy}")
        annotations: list[dict] = []
        for path, label in files:
            values = self._values(path, image, notes)
            instances = self._instances(values, path, label)
            if not instances and self.require_lesion:
                raise BadInputError(
                    path,
                    f"empty mask: nothing of at least {self.min_area} pixels is 128 or brighter; "
                    "lesion-free images belong in the folder given as --negatives",
                )
            if not instances and (values.any() or len(files) > 1):
                raise BadInputError(path, f"has no part of at least {self.min_area} pixels")
            annotations += instances
        self.empty += not annotations
        return annotations

    def _values(self, path: Path, image: SourceImage, notes: list[str]) -> np.ndarray:
        """(H, W) of the mask in the frame of the image as read."""
        values, lossy = (read_mask(path), False) if self.require_lesion else read_values(path)
        if self.kind in ("binary", "files") and (lossy or len(np.unique(values)) > 2):
            highest = values.max()
            values = values >= 128
            if not lossy and highest < 128:
                raise BadInputError(
                    path,
                    f"no pixel is 128 or brighter, the highest is {highest}; give --kind if they "
                    "number classes or instances",
                )
        elif lossy:
            raise BadInputError(path, "is a JPEG, which does not keep numbers; save it as PNG")
        if annotated_on_stored_pixels(image, values.shape[1], values.shape[0]):
            values = orient(values, image.orientation)
        elif image.orientation != 1:
            notes.append(f"{path}: EXIF-rotated image, mask taken as of the rotated image")
        return values

    def _instances(self, values: np.ndarray, path: Path, label: str) -> list[dict]:
        if not values.any():
            return []
        if self.kind == "files":
            if len(self.category_ids) > 1:
                check_classes([label], self.category_ids, path)
            category_id = self.category_ids.get(label, next(iter(self.category_ids.values())))
            return [annotation_from_mask(values != 0, category_id)]
        if self.kind == "instances":
            numbers = np.unique(values[values != 0])
            if len(numbers) > MOST_INSTANCES:
                raise BadInputError(
                    path, f"has {len(numbers)} instances, more than {MOST_INSTANCES}; check --kind"
                )
            return [annotation_from_mask(values == number, 1) for number in numbers]
        if self.kind == "binary":
            values = values != 0
        if values.max() > len(self.category_ids):
            raise BadInputError(
                path,
                f"has the value {values.max()}; the classes are 0 background, "
                + ", ".join(f"{i} {name}" for name, i in self.category_ids.items()),
            )
        annotations = []
        for category_id in self.category_ids.values():
            try:
                parts, specks = components(values == category_id, self.min_area)
            except ValueError as error:
                raise BadInputError(path, str(error)) from error
            self.specks += specks
            annotations += [annotation_from_mask(part, category_id) for part in parts]
        return annotations
