"""Folders of mask images: binary, numbering classes or instances, or one file per instance."""

import argparse
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import (
    SourceImage,
    by_stem,
    fit_to_image,
    inspect_image,
    list_files,
    read_values,
    without_suffix,
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
from imrcnn_d2.utils.progress import tqdm

KINDS = ("binary", "classes", "instances", "files")
# An instance's file: the name of its image, a separator, perhaps the class, perhaps a number.
_NUMBER = re.compile(r"(^|[ _.-])\d+$", re.ASCII)
_SEPARATORS = " _.-/"
_IMAGES = re.compile(r"(?<![a-z])(images?|imgs?|frames?)(?![a-z])", re.IGNORECASE)
_LOOKED_AT = 20  # masks whose names are compared with those of all images
# A class name that could not be read back from a file name.
_UNREADABLE_CLASS = re.compile(r'[/\\:*?"<>|\0]|^[ ._-]|[ ._-]$|[ ._-]\d+$')


class MaskFolder(base.Format):
    name = "masks"
    help = "own data: mask images, of four kinds"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        base.add_tool_arguments(parser)
        for name, help_ in (
            ("--images", "folder of images; of several, file names begin with the folder's name"),
            ("--masks", "folder of masks, named alike; as many as --images, in the same order"),
        ):
            options = {"action": "extend", "nargs": "+", "metavar": "DIR", "type": Path}
            parser.add_argument(name, required=True, help=help_, **options)
        parser.add_argument(
            "--kind",
            choices=KINDS,
            default="binary",
            help="binary (default): white is lesion, each connected part an instance; classes: "
            "pixels number the class; instances: pixels number the instance; files: a file for "
            "each instance, NAME_1.png or NAME/1.png, perhaps with its class, NAME_polyp_1.png",
        )
        parser.add_argument(
            "--suffix",
            metavar="TEXT",
            help="of the masks' names, e.g. _segmentation (default: what most masks have after, or "
            "before, the name of an image)",
        )
        base.add_min_area_argument(parser)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        options = {"classes": args.classes, "suffix": args.suffix, "min_area": args.min_area}
        source = read_mask_folder(args.images, args.masks, rejects, args.kind, **options)
        return base.with_lesion_free(source, args.negatives, rejects)

    def write(self, source: base.Source, stage: Path, out: Path) -> list[str]:
        """Write NAME/CLASS_1.png for each instance, 0 and 255; NAME/0.png, all 0, without one."""
        names = source.class_names
        for name in names.values():
            if _UNREADABLE_CLASS.search(name) or name.isdigit():
                raise BadInputError(
                    name, "cannot be read back from a file's name; rename the class"
                )
        lost: set[str] = set()
        for sample in base.unique_samples(source):
            folder = stage / sample.stem
            folder.mkdir(parents=True)
            size = sample.image.height, sample.image.width
            if not sample.annotations:
                Image.fromarray(np.zeros(size, np.uint8)).save(folder / "0.png")
            for number, annotation in enumerate(sample.annotations, start=1):
                if annotation["iscrowd"]:
                    reason = "has a crowd region, which masks cannot mark as one"
                    raise BadInputError(sample.image.path, reason)
                if "segmentation" not in annotation:
                    reason = "has a box without a mask; export it --to labelme or cvat"
                    raise BadInputError(sample.image.path, reason)
                mask = mask_util.decode(to_rle(annotation["segmentation"], *size)) * 255
                label = names[annotation["category_id"]]
                Image.fromarray(mask).save(folder / f"{label}_{number}.png")
                lost |= further_fields(annotation, ANNOTATION_FIELDS).keys()
            lost |= further_fields(sample.fields, IMAGE_FIELDS).keys()
        return [f"not in the masks: {', '.join(sorted(lost))}"] if lost else []


def read_mask_folder(
    images: Path | Sequence[Path],
    masks: Path | Sequence[Path],
    rejects: Rejects,
    kind: str = "binary",
    *,
    classes: Sequence[str] | None = None,
    suffix: str | None = "",
    min_area: int = MIN_AREA,
) -> base.Source:
    """Read images with masks of the same name, but for the file type and `suffix`.

    - binary: white is lesion. In a JPEG, and where there are grey values (a video's black and
      white are 16 and 235), that is 128 or more; else everything but 0. Each connected component
      (8-connectivity) is an instance.
    - classes: pixels are 0 for background, 1 for the first class, and so on; each connected
      component of a class is an instance.
    - instances: pixels are 0 for background, each other value is an instance.
    - files: a file for each instance, whole: NAME_1.png, NAME_polyp_2.png, or NAME/1.png,
      NAME/polyp_2.png. With one class, or none given, the part between can be anything.

    A mask of nothing but 0 says that its image is lesion-free; an image without a mask is bad
    input.

    Args:
        images, masks: a folder of each, or as many of both: then file names begin with the name of
            the folder of images, and with those above it where two have the same name.
        suffix: of the masks' names; None for what most have before or after the name of an image,
            which a note states.
        classes: their names in order; None is one, "lesion", or with "files" those that the files
            name. "binary" and "instances" take one.
        min_area: with "binary" and "classes", smaller components, in pixels, are dropped and
            counted.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: `classes` do not fit `kind`; folders that make no pairs, or one is there twice.
        BadInputError: bad input under ``on_error="raise"``.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!r}; choose from {', '.join(KINDS)}")
    if kind in ("binary", "instances") and classes is not None and len(classes) != 1:
        raise ValueError(f"masks of kind {kind} are of one class, not of {len(classes)}")
    roots = _pairs(images, masks)
    entries: list[tuple[str, Path, list[tuple[Path, str]], dict]] = []
    notes: list[str] = []
    centres = _centres(list(roots)) if len(roots) > 1 else {}
    for name, (image_root, mask_root) in roots.items():
        defaults = {}
        if centres:
            defaults["centre"] = centres[name]
            text = f"centre {centres[name]} where nothing else gives it"
            notes.append(f"{name}/: {image_root} with the masks of {mask_root}; {text}")
        paths, masks = by_stem(image_root, rejects), list_files(mask_root, rejects)
        affixes = "", suffix or ""
        if suffix is None and kind != "files":
            affixes = _guess_affixes([_stem(mask_root, mask) for mask in masks], paths)
            if any(affixes):
                named = "NAME".join(affixes)
                notes.append(f"{mask_root}: the mask of NAME is {named}; --suffix sets another")
        files = _assign(mask_root, masks, paths, kind, affixes, rejects)
        for stem, path in paths.items():
            file_name = PurePosixPath(name, path.relative_to(image_root)).as_posix()
            entries.append((file_name, path, files[stem], defaults))
    if classes is None:
        labels = {label for *_, masks_of_image, _ in entries for _, label in masks_of_image}
        classes = sorted(labels - {""}) or ["lesion"]
    categories = named_categories((), classes, "--classes")
    reader = _Reader(kind, {c["name"]: c["id"] for c in categories}, min_area)
    reader.notes += notes

    def samples() -> Iterator[base.Sample]:
        for file_name, path, files, defaults in tqdm(entries, desc="Reading images", unit="image"):
            with rejects.catch():
                image = inspect_image(path)
                annotations = reader.read(image, files)
                yield base.Sample(file_name, image, annotations, defaults=defaults)
        if reader.specks:
            text = f"specks of fewer than {min_area} pixels left out of the masks"
            reader.notes.append(f"{reader.specks} {text}")
        if reader.empty:
            text = "images have an empty mask and are taken as lesion-free"
            reader.notes.append(f"{reader.empty} {text}")

    info = {"description": f"from masks of kind {kind}"}
    return base.Source(samples(), categories, info, reader.notes)


def _pairs(
    images: Path | Sequence[Path], masks: Path | Sequence[Path]
) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks, by what file names begin with: "" if there is one pair,
    else as many last parts of the path of images as make them different."""
    images, masks = ([paths] if isinstance(paths, Path) else [*paths] for paths in (images, masks))
    if len(images) != len(masks):
        text = f"{len(images)} folders of images and {len(masks)} of masks"
        raise ValueError(f"{text}: give --masks for each --images, in the same order")
    pairs = [*zip(images, masks, strict=True)]
    if same := [
        image for image, mask in pairs if os.path.realpath(image) == os.path.realpath(mask)
    ]:
        text = f"{same[0]} is given as --images and as --masks"
        raise ValueError(f"{text}: move the masks into a folder of their own")
    if len(pairs) == 1:
        return {"": pairs[0]}
    return dict(zip(base.distinct_names(images, "--images"), pairs, strict=True))


def _centres(names: Sequence[str]) -> dict[str, str]:
    """The centre by the name of a folder of images: the name without the word images."""
    centres = {name: _IMAGES.sub("", name).strip(_SEPARATORS) for name in names}
    return centres if len({*centres.values()} - {""}) == len(names) else {n: n for n in names}


def _stem(root: Path, path: Path) -> str:
    return without_suffix(path.relative_to(root)).as_posix()


def _guess_affixes(masks: Sequence[str], images: Collection[str]) -> tuple[str, str]:
    """What most masks have before and after the name of their image; nothing where one is named as
    an image, or no two texts do for half of them."""
    if any(mask in images for mask in masks):
        return "", ""
    candidates: Counter[tuple[str, str]] = Counter()
    for mask in masks[:_LOOKED_AT]:
        folder, slash, name = mask.rpartition("/")
        within = (i.removeprefix(folder + slash) for i in images if i.startswith(folder + slash))
        for image in within:
            before, found, after = name.partition(image)
            candidates[before, after] += bool(found)
    explained = {
        affixes: sum(_image_of(mask, affixes) in images for mask in masks)
        for affixes, _ in candidates.most_common(_LOOKED_AT)
    }
    best = max(explained, key=explained.__getitem__, default=("", ""))
    return best if 2 * explained.get(best, 0) >= len(masks) else ("", "")


def _image_of(mask: str, affixes: tuple[str, str]) -> str | None:
    """The name of the image of a mask that has these texts before and after it."""
    folder, slash, name = mask.rpartition("/")
    before, after = affixes
    if not (name.startswith(before) and name.removeprefix(before).endswith(after)):
        return None
    return folder + slash + name.removeprefix(before).removesuffix(after)


def _assign(
    root: Path,
    masks: Sequence[Path],
    images: Collection[str],
    kind: str,
    affixes: tuple[str, str],
    rejects: Rejects,
) -> dict[str, list[tuple[Path, str]]]:
    """The mask files of each image, with the class that the name gives, or ""."""
    files: dict[str, list[tuple[Path, str]]] = {stem: [] for stem in images}
    for path in masks:
        stem = _stem(root, path)
        with rejects.catch():
            image, label = None, ""
            if kind == "files":
                image, label = _image_and_label(path, stem, images)
            else:
                image = _image_of(stem, affixes)
            if image not in files:
                start = max((name for name in images if stem.startswith(name)), key=len, default="")
                hint = f"; of {start} with --suffix {stem.removeprefix(start)}" if start else ""
                raise BadInputError(path, "mask without an image" + hint)
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
        reason = f"could be of {' or '.join(starts)}; put it into a folder named as its image"
        raise BadInputError(path, reason)
    if not starts:
        return None, ""
    return starts[0], _NUMBER.sub("", stem.removeprefix(starts[0]).strip(_SEPARATORS))


def _is_gray(values: np.ndarray) -> bool:
    """Whether there are more numbers than 0 and one other; a video's black is 16."""
    numbers = np.unique(values)
    return len(numbers[numbers > 0]) > 1 or numbers[0] > 1


class _Reader:
    """Reads the masks of one image after the other, and counts what is left out."""

    def __init__(self, kind: str, category_ids: dict[str, int], min_area: int):
        self.kind, self.category_ids, self.min_area = kind, category_ids, min_area
        self.specks = self.empty = 0
        self.notes: list[str] = []

    def read(self, image: SourceImage, files: Sequence[tuple[Path, str]]) -> list[dict]:
        if not files:
            remedy = "if it is lesion-free, give one of nothing but 0, or prepare it as --negatives"
            raise BadInputError(image.path, f"has no mask; {remedy}")
        annotations: list[dict] = []
        for path, label in files:
            values = self._values(path, image)
            instances = self._instances(values, path, label) if values.any() else []
            if not instances and (values.any() or len(files) > 1):
                raise BadInputError(path, f"has no part of at least {self.min_area} pixels")
            annotations += instances
        self.empty += not annotations
        return annotations

    def _values(self, path: Path, image: SourceImage) -> np.ndarray:
        """(H, W) of the mask in the frame of the image as read."""
        values, lossy = read_values(path)
        if self.kind in ("binary", "files") and (lossy or _is_gray(values)):
            if not lossy and (highest := values.max()) < 128:
                reason = f"no pixel is 128 or brighter, the highest is {highest}; if they number "
                raise BadInputError(path, f"{reason}classes or instances, give --kind")
            values = values >= 128
        elif lossy:
            raise BadInputError(path, "is a JPEG, which does not keep numbers; save it as PNG")
        return fit_to_image(values, image, path, self.notes)

    def _instances(self, values: np.ndarray, path: Path, label: str) -> list[dict]:
        """The annotations of a mask that is not empty."""
        if self.kind == "files":
            if len(self.category_ids) > 1:
                check_classes([label], self.category_ids, path)
            return [annotation_from_mask(values != 0, self.category_ids.get(label, 1))]
        if self.kind == "instances":
            numbers = np.unique(values[values != 0])
            if len(numbers) > MOST_INSTANCES:
                reason = f"has {len(numbers)} instances, more than {MOST_INSTANCES}; check --kind"
                raise BadInputError(path, reason)
            return [annotation_from_mask(values == number, 1) for number in numbers]
        if self.kind == "binary":
            values = values != 0
        if (highest := values.max()) > len(self.category_ids):
            names = ", ".join(f"{id_} {name}" for name, id_ in self.category_ids.items())
            raise BadInputError(
                path, f"has the value {highest}; the classes are 0 background, {names}"
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
