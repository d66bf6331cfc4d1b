"""Public data sets of images with one mask each, as they are downloaded."""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.images import (
    SourceImage,
    by_stem,
    fit_to_image,
    inspect_image,
    is_image_name,
    read_image,
    read_mask,
)
from imrcnn_d2.data.masks import MIN_AREA, annotation_from_mask, components
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, few
from imrcnn_d2.utils.progress import tqdm


@dataclass(frozen=True)
class Folders:
    """A folder of images and that of their masks, as paths in the download."""

    images: str
    masks: str | None  # None: no image shows a lesion
    prefix: str = ""  # of the prepared file names
    image_files: str = "*"  # which files are images, and which are masks
    mask_files: str = "*"
    split: str | None = None  # the official one of its images: train, val or test


class PublicMasks(base.PublicDataSet):
    """A public data set of images in which a mask marks each lesion, 128 or brighter, by one
    connected component (8-connectivity).

    Attributes:
        folders: of each layout, in the same order; those that are there are read.
        mask_names: the names that the mask of an image may have, {} is that of the image; all
            without the file type.
        has_lesion_free: an empty mask says that there is no lesion; else it is bad input.
    """

    folders: Sequence[Sequence[Folders]] = ((Folders("images", "masks"),),)
    mask_names: Sequence[str] = ("{}",)
    has_lesion_free = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        base.add_negatives_argument(parser)
        base.add_min_area_argument(parser)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        source = super().read(args, rejects, scratch)
        return base.with_lesion_free(source, args.negatives, rejects)

    def options(self, args: argparse.Namespace) -> dict:
        return {"min_area": args.min_area}

    @property
    def layouts(self) -> Sequence[Sequence[str]]:
        """All folders of one layout."""
        return [[path for f in folders for path in (f.images, f.masks)] for folders in self.folders]

    def folders_in(self, root: Path) -> Iterable[Folders]:
        """The folders in `root`, which has a layout."""
        layouts = zip(self.layouts, self.folders, strict=True)
        first = next(folders for layout, folders in layouts if base.holds(root, layout))
        return [folders for folders in first if (root / folders.images).is_dir()]

    def fields(self, file_name: str) -> dict:
        """What a prepared file name says of the image, as COCO fields, such as its sequence; also
        ``split``, where the folder does not give it, and ``lesion_id`` of all its lesions. Raise
        ValueError for a name that should say something and does not."""
        return {}

    def read_mask(self, path: Path) -> Iterable[tuple[int, np.ndarray]]:
        """(H, W) bool of each category in a mask."""
        yield 1, read_mask(path)

    def read_layout(self, root: Path, rejects: Rejects, min_area: int = MIN_AREA) -> base.Source:
        """Read the images and their masks; of these, components of fewer than `min_area` pixels
        are specks of JPEG compression, dropped and counted."""
        entries, splits, notes = [], defaultdict(list), []
        for folders in self.folders_in(root):
            for file_name, path, mask in self._pairs(root, folders, rejects):
                with rejects.catch():
                    try:
                        fields = self.fields(file_name)
                    except ValueError as error:
                        raise BadInputError(path, str(error)) from error
                    if split := fields.pop("split", folders.split):
                        splits[split].append(file_name)
                    of_lesions = {key: fields.pop(key) for key in ["lesion_id"] if key in fields}
                    entries.append((file_name, path, mask, fields, of_lesions))

        def samples() -> Iterator[base.Sample]:
            specks = empty = 0
            for entry in tqdm(entries, "Reading images", unit="image"):
                file_name, path, mask, fields, of_lesions = entry
                with rejects.catch():
                    image = inspect_image(path)
                    annotations = []
                    if mask is not None:
                        annotations, count = self._annotations(mask, image, min_area, notes)
                        specks += count
                        if not annotations:
                            self._check_empty(mask, min_area)
                    empty += not annotations
                    annotations = [{**annotation, **of_lesions} for annotation in annotations]
                    yield base.Sample(file_name, image, annotations, fields)
            if specks:
                text = f"specks of fewer than {min_area} pixels left out of the masks"
                notes.append(f"{specks} {text}")
            if empty:
                notes.append(f"{empty} images without a lesion")

        return base.Source(samples(), list(self.categories), {}, notes, splits=dict(splits))

    def _pairs(
        self, root: Path, folders: Folders, rejects: Rejects
    ) -> Iterator[tuple[str, Path, Path | None]]:
        """File name, image and mask of each image with a mask; the others are bad input."""
        images = self._by_name(root, folders.images, folders.image_files, rejects)
        mask_of: dict[str, Path | None] = dict.fromkeys(images)
        if folders.masks is not None:
            masks = self._by_name(root, folders.masks, folders.mask_files, rejects)
            names = {
                name: next((mask for mask in self._masks_of(name) if mask in masks), None)
                for name in images
            }
            where = root / folders.images, root / folders.masks
            self._reject_unpaired(*where, images, masks, names, rejects)
            mask_of = {name: masks[mask] for name, mask in names.items() if mask}
        for name, mask in mask_of.items():
            path = images[name]
            below = path.relative_to(root / folders.images).as_posix()
            yield PurePosixPath(folders.prefix, below).as_posix(), path, mask

    def _masks_of(self, name: str) -> list[str]:
        return [template.format(name) for template in self.mask_names]

    def _reject_unpaired(
        self,
        image_folder: Path,
        mask_folder: Path,
        images: Mapping[str, Path],
        masks: Mapping[str, Path],
        names: Mapping[str, str | None],
        rejects: Rejects,
    ) -> None:
        """Images without a mask, and masks without an image, are bad input. `names` are those of
        the images' masks."""
        without = [name for name, mask in names.items() if mask is None]
        spare = sorted(masks.keys() - names.values())
        source = f"as in {self.title}, downloaded from {self.url}"
        for name in without:
            with rejects.catch():
                expected = " or ".join(self._masks_of(name))
                text = f"has no mask: expected {expected} in {mask_folder}, {source}"
                text += f"; {len(without)} of {len(images)} images have none"
                if spare:
                    text += f", and masks of no image are there: {few(spare)}"
                raise BadInputError(images[name], text)
        for mask in spare:
            with rejects.catch():
                text = f"is the mask of no image in {image_folder}, {source}; {len(spare)} of"
                raise BadInputError(masks[mask], f"{text} {len(masks)} masks are of none")

    def _by_name(self, root: Path, name: str, pattern: str, rejects: Rejects) -> dict[str, Path]:
        """Images of such names by their path in the folder, without the file type."""
        folder = root / name
        if not folder.is_dir():
            raise BadInputError(folder, f"is no folder; {self.expected()}")
        check_inside(root, folder, rejects.follow_links)
        return by_stem(
            folder, rejects, lambda path: is_image_name(path) and fnmatch(path.name, pattern)
        )

    def _annotations(
        self, path: Path, image: SourceImage, min_area: int, notes: list[str]
    ) -> tuple[list[dict], int]:
        """COCO annotations of a mask, and the number of specks left out."""
        annotations, specks = [], 0
        for category_id, mask in self.read_mask(path):
            try:
                parts, count = components(fit_to_image(mask, image, path, notes), min_area)
            except ValueError as error:
                raise BadInputError(path, str(error)) from error
            specks += count
            annotations += [annotation_from_mask(part, category_id) for part in parts]
        return annotations, specks

    def _check_empty(self, path: Path, min_area: int) -> None:
        """Raise BadInputError unless a mask without a lesion says that there is none."""
        highest = int(read_image(path).max())
        is_dark = 0 < highest < 128 and path.suffix.lower() not in (".jpg", ".jpeg")
        if is_dark or not self.has_lesion_free:
            reason = f"empty mask: no {min_area} pixels together are 128 or brighter"
            remedy = "give lesion-free images as --negatives"
            raise BadInputError(path, f"{reason}, the highest is {highest}; {remedy}")
