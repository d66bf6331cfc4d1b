"""What a format reads into, the base classes of formats and of public data sets, and images
without a lesion."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath

from imrcnn_d2.data.images import (
    SourceImage,
    inspect_image,
    is_image_name,
    list_files,
    without_suffix,
)
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IDS, IMAGE_FIELDS, MIN_AREA, named_categories
from imrcnn_d2.data.prepare.splits import DEFAULT_RATIO, FixedTest
from imrcnn_d2.utils.files import BadInputError, Rejects, few, is_archive, is_empty, staged
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
    defaults: dict = field(default_factory=dict)  # of fields that nothing else gives

    @property
    def stem(self) -> str:
        """Its name without the file type, with its folders."""
        return without_suffix(PurePosixPath(self.file_name)).as_posix()

    @property
    def installed_name(self) -> str:
        """Its name in a prepared data set: of a PNG where the image is converted."""
        return f"{self.stem}.png" if self.image.needs_conversion else self.file_name


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
    default_ratio: Sequence[int] | None = DEFAULT_RATIO  # None: images have their splits
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

    def ratio(self, args: argparse.Namespace) -> Sequence[int] | FixedTest | None:
        """Sizes of the splits; None where all images have theirs."""
        return self.default_ratio if args.ratio is None else args.ratio


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


class PublicDataSet(Format):
    """A published data set as it is downloaded.

    Attributes:
        title: its name in print.
        url: where it is downloaded.
        terms: of its use, in short; printed, and kept with `url` in the annotations' info.
        layouts: what its folder holds, one of these in whole; paths in it, of which * is any part.
        published: the number of images in the folders, or of the files, that match a path.
        categories: of its lesions, where it is a detection data set.
        note: what else the user should know of it.
    """

    title: str
    url: str
    terms: str
    layouts: Sequence[Sequence[str]]
    published: Mapping[str, int] = {}
    categories: tuple[dict, ...] = ({"id": 1, "name": "polyp", "supercategory": "lesion"},)
    note: str = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        layouts = " or ".join(", ".join(layout) for layout in self.layouts)
        help_ = f"folder of the download, which holds {layouts}; downloaded from {self.url}"
        parser.add_argument("--root", type=Path, required=True, metavar="DIR", help=help_)
        parser.epilog = f"Terms of use: {self.terms}"

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        source = self.read_folder(args.root, rejects, **self.options(args))
        if source.splits and (args.splits or args.ratio):
            source.notes.append("other splits than the official ones, as requested")
            source.splits = {}
        return source

    def options(self, args: argparse.Namespace) -> dict:
        """The arguments of `read_layout` that are the user's to choose."""
        return {}

    def read_folder(self, root: Path, rejects: Rejects, **options) -> Source:
        """Read the data set in `root`; `options` are those of `read_layout`.

        Of images with the same bytes the first is taken, but for frames of one video: published
        sets have such copies. The others are listed with the rejects, whatever `on_error` says.

        Raises:
            FileNotFoundError: there is no such folder.
            BadInputError: it is laid out otherwise; bad input under ``on_error="raise"``.
        """
        self.check_layout(root)
        source = self.read_layout(root, rejects, **options)
        source.notes.insert(0, f"{self.title}, from {self.url}. Terms of use: {self.terms}")
        source.notes += [*filter(None, [self.note]), *self._count(root)]
        info = {"description": self.title, "source": self.name.replace("-", "_")}
        info |= {"url": self.url, "terms": self.terms}
        samples = self._without_copies(source.samples, rejects)
        return replace(source, samples=samples, info={**source.info, **info})

    def read_layout(self, root: Path, rejects: Rejects, **options) -> Source:
        """Read a folder that has the layout."""
        raise NotImplementedError

    def check_layout(self, root: Path) -> None:
        """Raise FileNotFoundError without such a folder; BadInputError for an archive, or a folder
        without the layout, with what was found, what was expected and where it is downloaded."""
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such folder; {self.expected()}")
        if not root.is_dir():
            kind = "an archive: extract it first, and" if is_archive(root) else "no folder:"
            raise BadInputError(root, f"is {kind} give the folder; {self.expected()}")
        if self._has_layout(root):
            return
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        present = few([path.name for path in entries], 8) or "nothing"
        below = (path for path in (*root.glob("*/"), *root.glob("*/*/")) if path.is_dir())
        near = [path for path in (*root.absolute().parents[:2], *below) if self._has_layout(path)]
        if near:
            remedy = f"give --root {' or '.join(map(str, near))}, which holds these"
        elif archives := [path.name for path in entries if is_archive(path)]:
            remedy = f"extract {few(archives)} first"
        else:
            remedy = "give the folder that holds these"
        raise BadInputError(root, f"holds {present}; {self.expected()}; {remedy}")

    def expected(self) -> str:
        """What the folder should hold, in words."""
        layouts = ", or ".join(" and ".join(layout) for layout in self.layouts)
        return f"expected {layouts}, as in {self.title}, downloaded from {self.url}"

    def _has_layout(self, folder: Path) -> bool:
        return any(holds(folder, layout) for layout in self.layouts)

    def _count(self, root: Path) -> Iterator[str]:
        """A warning for each kind of path with another number of images than published."""
        for pattern, number in self.published.items():
            paths = [*root.glob(pattern)]
            files = [p for path in paths for p in (path.iterdir() if path.is_dir() else [path])]
            count = sum(map(is_image_name, files))
            if count not in (0, number):
                problem = "the download is not complete" if count < number else "files were added"
                text = f"{count} images in {pattern}, {number} were published"
                yield f"Warning: {text}: {problem}, or it is another release"

    def _without_copies(self, samples: Iterable[Sample], rejects: Rejects) -> Iterator[Sample]:
        first: dict[str, Sample] = {}
        for sample in samples:
            other = first.setdefault(sample.image.sha256, sample)
            if other is sample or is_repeated_frame(sample, other):
                yield sample
                continue
            same = "equal" if sample.annotations == other.annotations else "different"
            reason = f"copy of {other.image.path} with {same} annotations; the first is taken"
            rejects.leave_out(BadInputError(sample.image.path, reason))


def holds(folder: Path, layout: Sequence[str]) -> bool:
    """Whether a folder holds something of each of these paths, of which * is any part."""
    return all(any(folder.glob(pattern)) for pattern in layout)


def is_repeated_frame(sample: Sample, other: Sample) -> bool:
    """Whether two images with the same bytes are frames of one video, which may stand still."""
    sequence = sample.fields.get("sequence_id")
    return sequence is not None and sequence == other.fields.get("sequence_id")


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


def add_min_area_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-area",
        type=int,
        default=MIN_AREA,
        help="smaller parts of a mask, in pixels, are dropped as specks (default %(default)s)",
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


def distinct_names(folders: Sequence[Path], option: str) -> list[str]:
    """As many last parts of the paths as make them different: what file names begin with.

    Raises:
        ValueError: a folder is given twice by `option`.
    """
    parts = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names}) == len(names):
            return names
    raise ValueError(f"{option} {' '.join(map(str, folders))}: a folder is given twice")


def prefix_ids(record: dict, prefix: str) -> dict:
    """Begin the ids of a record of images or annotations that are unique in its data set only, with
    a prefix of that data set; returns the record."""
    for key in IDS:
        if record.get(key) is not None:
            record[key] = f"{prefix}{record[key]}"
    return record


def unique_samples(source: Source) -> Iterator[Sample]:
    """The samples; BadInputError for two whose names differ in the file type alone."""
    seen: dict[str, Path] = {}
    for sample in source.samples:
        if sample.stem in seen:
            raise BadInputError(
                sample.image.path,
                f"would share its file with {seen[sample.stem]}; rename one of them",
            )
        seen[sample.stem] = sample.image.path
        yield sample
