"""What a format reads into, the base class of all formats, and images without a lesion."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath

from imrcnn_d2.data.images import SourceImage, inspect_image, list_files
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS, named_categories
from imrcnn_d2.data.prepare.splits import FixedTest
from imrcnn_d2.utils.files import BadInputError, Rejects, is_empty, staged
from imrcnn_d2.utils.progress import tqdm

Names = Sequence[str] | None  # of classes, in their order; None takes all that occur, sorted


@dataclass
class Sample:
    """One checked image with its annotations."""

    file_name: str  # relative to the prepared images/
    image: SourceImage
    annotations: list[dict]  # of COCO, without id and image_id
    fields: dict = field(default_factory=dict)  # further COCO image fields, e.g. patient_id
    label: int | None = None  # of a class of the whole image; {"category_id": label} is annotated

    @property
    def installed_name(self) -> str:
        """Its name in a prepared data set: of a PNG where the image is converted."""
        path = PurePosixPath(self.file_name)
        return str(path.with_suffix(".png")) if self.image.needs_conversion else self.file_name


@dataclass
class Source:
    """A data set as a format reads it."""

    samples: Iterable[Sample]  # yields every sample once
    categories: list[dict]
    info: dict
    notes: list[str] = field(default_factory=list)  # for the user, grow while samples are read
    extra: dict = field(default_factory=dict)  # further top-level COCO fields, e.g. licenses
    splits: dict[str, list[str]] = field(default_factory=dict)  # file names, where stated

    @property
    def class_names(self) -> dict[int, str]:
        return {category["id"]: category["name"] for category in self.categories}


class Format:
    """An annotation format or public data set: a command of prepare_dataset.

    Attributes:
        write: ``write(source, stage, out)`` writes annotations into the empty folder `stage`, which
            becomes `out`, and returns notes on what was lost; None where a format is only read.
    """

    name: str
    help: str
    default_ratio = (12, 3, 5)
    write: Callable[[Source, Path, Path], list[str]] | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the format's arguments to its command."""
        raise NotImplementedError

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        """Read the data set that the arguments name.

        `scratch` is an empty folder for images to be made; it stays until the samples are read.

        Raises:
            FileNotFoundError: a folder is missing.
            BadInputError: bad input under ``on_error="raise"``.
        """
        raise NotImplementedError

    def ratio(self, args: argparse.Namespace) -> Sequence[int] | FixedTest:
        """Sizes of the splits."""
        return args.ratio


class LesionFree(Format):
    name = "lesion-free"
    help = "images without a lesion only, all for testing: a detector's false alarms"
    default_ratio = (0, 0, 1)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--root", type=Path, required=True, help="folder of images")
        help_ = "the classes that a model looks for, in its order (lesion)"
        parser.add_argument("--classes", nargs="+", metavar="LABEL", default=["lesion"], help=help_)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        categories = named_categories((), args.classes, "--classes")
        source = Source([], categories, {"description": "images without a lesion"})
        return with_lesion_free(source, args.root, rejects)


def with_lesion_free(source: Source, root: Path | None, rejects: Rejects) -> Source:
    """The data set and, after its images, those of a folder of images without a lesion."""
    if root is None:
        return source

    def samples() -> Iterator[Sample]:
        for path in tqdm(list_files(root, rejects), desc="Reading images", unit="image"):
            with rejects.catch():
                yield Sample(path.relative_to(root).as_posix(), inspect_image(path), [])

    return replace(source, samples=chain(source.samples, samples()))


def add_negatives_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--negatives", type=Path, metavar="DIR", help="folder of images without a lesion to add"
    )


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that the formats of annotation tools share."""
    add_negatives_argument(parser)
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="LABEL",
        help="the classes in their order (default: all labels, sorted; lesion where masks name "
        "none)",
    )


def export(source: Source, to: Format, out: Path) -> list[str]:
    """Write the annotations of a data set for another tool; return notes on what was lost.

    Images stay where they are. The folder is built next to `out` and renamed at the end.

    Raises:
        FileExistsError: `out` holds something.
        BadInputError: the format cannot hold what the data set has, or bad input.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists; choose another --output or remove it first")
    nested: set[str] = set()

    def samples() -> Iterator[Sample]:
        standard = {*IMAGE_FIELDS, *ANNOTATION_FIELDS}
        for sample in tqdm(source.samples, desc="Writing", unit="image"):
            for record in (sample.fields, *sample.annotations):
                nested.update(
                    key
                    for key, value in record.items()
                    if key not in standard and isinstance(value, list | dict)
                )
            yield sample

    with staged(out) as stage:
        notes = to.write(replace(source, samples=samples()), stage, out)
        os.replace(stage, out)
    if nested:
        notes.append(f"lists and objects cannot be kept: {', '.join(sorted(nested))}")
    return [*source.notes, *notes]


def unique_samples(source: Source) -> Iterator[Sample]:
    """The samples; BadInputError for two whose names differ in the file type alone."""
    seen: dict[str, Path] = {}
    for sample in source.samples:
        stem = str(PurePosixPath(sample.file_name).with_suffix(""))
        if stem in seen:
            raise BadInputError(
                sample.image.path, f"would share its file with {seen[stem]}; rename one of them"
            )
        seen[stem] = sample.image.path
        yield sample
