"""What a format reads into, and the base class of all formats."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from imrcnn_d2.data.images import SourceImage
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS
from imrcnn_d2.data.prepare.splits import FixedTest
from imrcnn_d2.utils.files import BadInputError, Rejects, is_empty, staged

__all__ = ["Format", "Sample", "Source", "add_class_arguments", "export", "unique_samples"]


@dataclass
class Sample:
    """One checked image with its annotations.

    Attributes:
        file_name: relative to the prepared images/.
        image: the file to install there.
        annotations: COCO annotations without ``id`` and ``image_id``.
        fields: further COCO image fields, e.g. ``patient_id``.
        label: id of the image's class in a classification data set; its one annotation then is
            {"category_id": label}.
    """

    file_name: str
    image: SourceImage
    annotations: list[dict]
    fields: dict = field(default_factory=dict)
    label: int | None = None

    @property
    def has_lesion(self) -> bool:
        """Whether there is an annotation other than of a crowd region."""
        return any(not annotation["iscrowd"] for annotation in self.annotations)

    @property
    def stratum(self) -> bool | int:
        """What all splits get their share of."""
        return self.has_lesion if self.label is None else self.label


@dataclass
class Source:
    """A data set as a format reads it.

    Attributes:
        samples: yields every sample once.
        categories: COCO categories.
        info: COCO ``info``, or empty.
        notes: messages for the user, may grow while `samples` is consumed.
        extra: further top-level COCO fields, passed through, e.g. ``licenses``.
        splits: file names by split, where the source states them.
    """

    samples: Iterable[Sample]
    categories: list[dict]
    info: dict
    notes: list[str] = field(default_factory=list)
    extra: dict = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)


class Format:
    """An annotation format or public data set: a command of prepare_dataset.

    Attributes:
        name: of the command.
        help: one line.
        write: writes annotations, see `LabelMe.write`; None where the format is only read.
    """

    name: str
    help: str
    write: Callable[[Source, Mapping[int, str], Path, Path], list[str]] | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the format's arguments to its command."""
        raise NotImplementedError

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        """Reads the data set that the arguments name.

        Args:
            args: of `add_arguments`, and those that all formats share.
            rejects: takes bad input.
            scratch: an empty folder for images to be made; it stays until the samples are read.

        Raises:
            FileNotFoundError: a folder is missing.
            BadInputError: bad input under ``on_error="raise"``.
        """
        raise NotImplementedError

    def ratio(self, args: argparse.Namespace) -> Sequence[int] | FixedTest:
        """Sizes of the splits."""
        return args.ratio or (12, 3, 5)


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that the formats of annotation tools share."""
    parser.add_argument(
        "--negatives", type=Path, metavar="DIR", help="folder of images without a lesion to add"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="LABEL",
        help="the classes in their order (default: those found, sorted; of masks that name none, "
        "lesion)",
    )


def export(source: Source, to: Format, out: Path) -> list[str]:
    """Writes the annotations of a data set for another tool; images stay where they are.

    The folder is built next to `out` and renamed at the end.

    Args:
        source: the data set; its samples are used up.
        to: a format that can be written.
        out: the folder to make.

    Returns:
        notes for the user: what the format cannot keep.

    Raises:
        FileExistsError: `out` holds something.
        BadInputError: the format cannot hold what the data set has, or bad input.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists; choose another --output or remove it first")
    names = {category["id"]: category["name"] for category in source.categories}
    nested: set[str] = set()
    source = replace(source, samples=_noting_nested(source.samples, nested))
    with staged(out) as stage:
        notes = to.write(source, names, stage, out)
        os.replace(stage, out)
    if nested:
        notes.append(f"lists and objects cannot be kept: {', '.join(sorted(nested))}")
    return [*source.notes, *notes]


def _noting_nested(samples: Iterable[Sample], names: set[str]) -> Iterator[Sample]:
    """The samples; adds the further fields that are lists or objects to `names`."""
    standard = {*IMAGE_FIELDS, *ANNOTATION_FIELDS}
    for sample in tqdm(samples, desc="Writing", unit="image"):
        for record in (sample.fields, *sample.annotations):
            names.update(
                key
                for key, value in record.items()
                if key not in standard and isinstance(value, list | dict)
            )
        yield sample


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
