"""Whole images with a class each: one folder per class, or a CSV.

Prepared, they are COCO image-classification files as iNaturalist's: an annotation is {id, image_id,
category_id}, without a box.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.images import inspect_image, list_files, path_inside
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.data.prepare.splits import SPLITS, FixedTest, Item, make_splits
from imrcnn_d2.utils.files import BadInputError, Rejects

__all__ = ["Classification", "carve_validation", "read_class_folders", "read_label_csv"]


# Of class names: what makes a class one of the cancers, unless they are named.
_CANCER = ("cancer", "carcinoma")
# What the prepared files say themselves.
_OWN_COLUMNS = ("file", "label", "split", "id", "file_name", "width", "height")


class Classification(Format):
    name = "classification"
    help = "images with a class each: folders or a CSV"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--root", type=Path, required=True, help="has one folder a class, or the files of --csv"
        )
        parser.add_argument(
            "--csv",
            type=Path,
            help="table with the columns file (relative to --root), label and, if known, "
            "patient_id and split (train, val, test or empty)",
        )
        parser.add_argument(
            "--classes", nargs="+", help="the classes in their order (default: those found, sorted)"
        )
        parser.add_argument(
            "--cancer",
            nargs="+",
            metavar="CLASS",
            help="classes that are cancer, for the two-class table of cancer against benign "
            "(default: those with cancer or carcinoma in their name)",
        )
        parser.add_argument(
            "--test-per-class",
            type=int,
            metavar="N",
            help="a test set of N images of each class instead of --ratio; 150 as published",
        )
        parser.add_argument(
            "--val-percent",
            type=int,
            default=10,
            metavar="P",
            help="validation images in percent of those not for testing, with --test-per-class or "
            "where the table has training and no validation images (default %(default)s)",
        )

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        if args.csv is None:
            return read_class_folders(args.root, rejects, args.classes, args.cancer)
        if args.patients or args.patient_pattern or args.patients_from_dicom:
            raise ValueError(f"patients of {args.csv} belong in its column patient_id")
        source = read_label_csv(args.csv, args.root, rejects, args.classes, args.cancer)
        if source.splits and args.splits:
            raise ValueError(
                f"{args.csv} has a split column: leave it empty, or leave out --splits"
            )
        by_patient = args.split_by != "image"
        source.splits = carve_validation(source, args.val_percent, args.seed, by_patient)
        return source

    def ratio(self, args: argparse.Namespace) -> Sequence[int] | FixedTest:
        if args.test_per_class is None:
            return super().ratio(args)
        return FixedTest(args.test_per_class, args.val_percent)


@dataclass(frozen=True)
class _LabelledFile:
    """An image file and its class."""

    path: Path
    name: str
    label: str
    split: str | None = None
    fields: dict = field(default_factory=dict)


def read_class_folders(
    root: Path,
    rejects: Rejects,
    classes: Sequence[str] | None = None,
    cancers: Sequence[str] | None = None,
) -> Source:
    """Reads one folder a class, named as it; folders below these are looked into.

    Args:
        root: has the folders.
        rejects: takes bad input.
        classes: names of the classes in their order; None takes the folders', sorted.
        cancers: classes that are cancer, the others being benign; None for those whose name has
            "cancer" or "carcinoma" in it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no class folders, or they are named as splits are.
        BadInputError: bad input under ``on_error="raise"``, such as a class without images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = [folder.name for folder in folders]
    if not folders:
        raise ValueError(f"{root}: there is no folder in it; one a class is needed, or a --csv")
    if set(names) <= {*SPLITS, "valid", "validation", "testing", "training"}:
        raise ValueError(
            f"{root}: its folders {', '.join(names)} are splits, not classes. Give a --csv with "
            "the columns file, label and split instead."
        )
    paths, files = list_files(root, rejects), []
    for folder in folders:
        with rejects.catch():
            images = [path for path in paths if path.relative_to(root).parts[0] == folder.name]
            if not images:
                raise BadInputError(folder, "empty class: there is no image in this folder")
            files += [_LabelledFile(p, p.relative_to(root).as_posix(), folder.name) for p in images]
    return _source(files, root, rejects, classes, cancers)


def read_label_csv(
    csv_file: Path,
    root: Path,
    rejects: Rejects,
    classes: Sequence[str] | None = None,
    cancers: Sequence[str] | None = None,
) -> Source:
    """Reads a CSV with the columns file and label and, if there, patient_id and split.

    Further columns are passed through to the prepared image records. An empty split is to be
    assigned. Columns are separated by commas, semicolons or tabs.

    Args:
        csv_file: the table.
        root: the folder that each file is relative to.
        rejects, classes, cancers: as for `read_class_folders`.

    Returns:
        the data set; its ``splits`` are those of the table.

    Raises:
        BadInputError: bad input under ``on_error="raise"``; always if the table cannot be read.
    """
    files = []
    seen: dict[str, int] = {}
    table = read_table(csv_file, needed=("file", "label"))
    for row in table.rows:
        with rejects.catch():
            where, cells = table.where(row), row.cells
            path = path_inside(root, cells["file"], Path(where), rejects.follow_links)
            label, split = cells["label"], cells.get("split") or None
            if not label:
                raise BadInputError(where, "has no label")
            if classes is not None and label not in classes:
                raise BadInputError(
                    where, f"unknown label {label!r}; the classes are {', '.join(classes)}"
                )
            if split not in (None, *SPLITS):
                raise BadInputError(where, f"unknown split {split!r}: train, val, test or nothing")
            name = path.relative_to(root).as_posix()
            if name in seen:
                raise BadInputError(where, f"{name} is listed in line {seen[name]} already")
            seen[name] = row.line
            fields = {k: v for k, v in cells.items() if k not in _OWN_COLUMNS and v}
            files.append(_LabelledFile(path, name, label, split, fields))
    return _source(files, csv_file, rejects, classes, cancers)


def carve_validation(
    source: Source, percent: int, seed: int = 0, by_patient: bool = True
) -> dict[str, list[str]]:
    """Takes validation images out of the stated training images where none are stated.

    Args:
        source: of `read_label_csv`.
        percent: of the training images.
        seed, by_patient: as for `make_splits`.

    Returns:
        file names by split; the source's as they are with validation or no training images.

    Raises:
        ValueError: no such share.
    """
    splits = source.splits
    if splits and not 0 < percent < 100:
        raise ValueError(f"{percent} % of the training images for validation: give 1 to 99")
    train = set(splits.get("train", ()))
    if splits.get("val") or not train:
        return splits
    items = [
        Item(s.file_name, s.stratum, s.fields.get("patient_id"))
        for s in source.samples
        if s.file_name in train
    ]
    carved = make_splits(items, (100 - percent, percent, 0), seed, by_patient)
    return {**splits, "train": carved["train"], "val": carved["val"]}


def _source(
    files: list[_LabelledFile],
    where: Path,
    rejects: Rejects,
    classes: Sequence[str] | None,
    cancers: Sequence[str] | None,
) -> Source:
    names = list(classes) if classes is not None else sorted({file.label for file in files})
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInputError(where, f"there must be two classes or more, all different: {names}")
    ids = {name: i for i, name in enumerate(names, start=1)}
    categories = _categories(ids, cancers)
    samples, splits = [], defaultdict(list)
    for file, image in _inspected(files, rejects, names):
        label = ids[file.label]
        name = file.name
        if image.needs_conversion:
            name = str(PurePosixPath(name).with_suffix(".png"))
        samples.append(Sample(name, image, [{"category_id": label}], file.fields, label))
        if file.split is not None:
            splits[file.split].append(name)
    without = set(names) - {file.label for file in files}
    if without:
        raise BadInputError(where, f"empty class: no image of {', '.join(sorted(without))}")
    cancer = [c["name"] for c in categories if c.get("supercategory") == "cancer"]
    notes = [f"cancer: {', '.join(cancer)}; all others are benign" if cancer else "no cancer class"]
    info = {"description": "one class an image"}
    return Source(samples, categories, info, notes, splits=dict(splits))


def _categories(ids: Mapping[str, int], cancers: Sequence[str] | None) -> list[dict]:
    """Their supercategory tells cancer from benign, where some class is cancer."""
    if cancers is None:
        cancers = [name for name in ids if any(word in name.casefold() for word in _CANCER)]
    elif unknown := set(cancers) - set(ids):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such class; there are {', '.join(ids)}")
    if not 0 < len(cancers) < len(ids):
        return [{"id": id_, "name": name} for name, id_ in ids.items()]
    kinds = {name: "cancer" if name in cancers else "benign" for name in ids}
    return [{"id": i, "name": name, "supercategory": kinds[name]} for name, i in ids.items()]


def _inspected(files: Iterable[_LabelledFile], rejects: Rejects, classes: Sequence[str]) -> list:
    """[(file, SourceImage)] of those that can be used."""
    read = []
    for file in tqdm(files, desc="Reading images", unit="image"):
        with rejects.catch():
            if file.label not in classes:
                raise BadInputError(
                    file.path,
                    f"unknown label {file.label!r}; the classes are {', '.join(classes)}",
                )
            read.append((file, inspect_image(file.path)))
    copies = defaultdict(list)
    for file, image in read:
        copies[image.sha256].append(file)
    usable = []
    for file, image in read:
        with rejects.catch():
            _check_copies(file, copies[image.sha256])
            usable.append((file, image))
    return usable


def _check_copies(file: _LabelledFile, copies: Sequence[_LabelledFile]) -> None:
    """Two copies of one image that agree are found later; if not, neither can be trusted."""
    for other in copies:
        if other.label != file.label:
            raise BadInputError(
                file.path,
                f"two labels: {file.label!r} here, {other.label!r} with the same content in "
                f"{other.path}",
            )
        if other.split != file.split:
            raise BadInputError(
                file.path,
                f"in two splits: {file.split or 'none given'} here, {other.split or 'none given'} "
                f"with the same content in {other.path}",
            )
