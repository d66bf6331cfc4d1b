"""Whole images with a class each: one folder per class, or a CSV.

Prepared, they are COCO image-classification files as iNaturalist's: an annotation is {id, image_id,
category_id}, without a box.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imrcnn_d2.data.formats.base import Format, Names, Sample, Source
from imrcnn_d2.data.images import inspect_image, list_files, path_inside
from imrcnn_d2.data.prepare.duplicates import find_groups
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.data.prepare.splits import SPLITS, FixedTest, Item, make_splits
from imrcnn_d2.data.units import units_of
from imrcnn_d2.utils.files import BadInputError, Rejects
from imrcnn_d2.utils.progress import tqdm

# A class with one of these in its name is one of the cancers, unless they are named.
_CANCER = ("cancer", "carcinoma")
# Columns that are no further fields of an image.
_OWN_COLUMNS = ("file", "label", "split", "id", "file_name", "width", "height")


class Classification(Format):
    name = "classification"
    help = "images with a class each: folders or a CSV"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        help_ = "has one folder per class, or the files of --csv"
        add("--root", type=Path, required=True, help=help_)
        add(
            "--csv",
            type=Path,
            help="table with the columns file (relative to --root), label and, if known, "
            "patient_id and split (train, val, test or empty)",
        )
        add("--classes", nargs="+", help="the classes in their order (default: all, sorted)")
        add(
            "--cancer",
            nargs="+",
            metavar="CLASS",
            help="classes that are cancer, for the two-class table of cancer against benign "
            "(default: those with cancer or carcinoma in their name)",
        )
        add(
            "--test-per-class",
            type=int,
            metavar="N",
            help="a test set of N images of each class instead of --ratio; 150 as published",
        )
        add(
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
            raise ValueError(f"{args.csv} has a split column: empty it, or leave out --splits")
        if source.splits and (args.ratio or args.test_per_class):
            source.notes.append(f"other splits than those of {args.csv}, as requested")
            source.splits = {}
        source.splits = carve_validation(source, args.val_percent, args.seed, args.split_by)
        return source

    def ratio(self, args: argparse.Namespace) -> Sequence[int] | FixedTest:
        if args.test_per_class is None:
            return super().ratio(args)
        if args.ratio:
            raise ValueError("--test-per-class replaces --ratio and --all-test: give one of them")
        return FixedTest(args.test_per_class, args.val_percent)


@dataclass(frozen=True)
class LabelledFile:
    """An image with its class; `name` is relative to the prepared images/."""

    path: Path
    name: str
    label: str
    split: str | None = None
    fields: dict = field(default_factory=dict)


def read_class_folders(
    root: Path, rejects: Rejects, classes: Names = None, cancers: Names = None
) -> Source:
    """Read one folder per class, which has its name; images may lie in folders in it.

    `cancers` are the classes that are cancer, the others being benign; None for those whose name
    has "cancer" or "carcinoma" in it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no class folders, or they are named as splits are.
        BadInputError: bad input under ``on_error="raise"``, such as a class without images.
    """
    paths = list_files(root, rejects)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = [folder.name for folder in folders]
    if not folders:
        raise ValueError(f"{root}: there is no folder in it; each class needs one, or give a --csv")
    if set(names) <= {*SPLITS, "valid", "validation", "testing", "training"}:
        text = f"{root}: its folders {', '.join(names)} are splits, not classes"
        raise ValueError(f"{text}; give a --csv with the columns file, label and split")
    files = []
    for folder in folders:
        with rejects.catch():
            images = [path for path in paths if path.relative_to(root).parts[0] == folder.name]
            if not images:
                raise BadInputError(folder, "empty class: there is no image in this folder")
            files += [LabelledFile(p, p.relative_to(root).as_posix(), folder.name) for p in images]
    return read_labelled_files(files, root, rejects, classes, cancers)


def read_label_csv(
    csv_file: Path, root: Path, rejects: Rejects, classes: Names = None, cancers: Names = None
) -> Source:
    """Read a CSV with the columns file and label and, if there, patient_id and split.

    Each file is relative to `root`. Images with an empty split are to be assigned; the other splits
    are those of the data set returned. Further columns are passed through to the prepared image
    records. `classes` and `cancers` are as for `read_class_folders`.

    Raises:
        BadInputError: bad input under ``on_error="raise"``; always if the table cannot be read.
    """
    files = []
    seen: dict[str, int] = {}
    table = read_table(csv_file, needed=("file", "label"))
    for row in table.rows:
        with rejects.catch():
            where, cells = row.where, row.cells
            path = path_inside(root, cells["file"], Path(where), rejects.follow_links)
            label, split = cells["label"], cells.get("split") or None
            if not label:
                raise BadInputError(where, "has no label")
            if classes is not None:
                _check_label(label, classes, where)
            if split not in (None, *SPLITS):
                raise BadInputError(where, f"unknown split {split!r}: train, val, test or nothing")
            name = path.relative_to(root).as_posix()
            if name in seen:
                raise BadInputError(where, f"{name} is listed in line {seen[name]} already")
            seen[name] = row.line
            fields = {k: v for k, v in cells.items() if k not in _OWN_COLUMNS and v}
            files.append(LabelledFile(path, name, label, split, fields))
    return read_labelled_files(files, csv_file, rejects, classes, cancers)


def carve_validation(
    source: Source, percent: int, seed: int = 0, split_by: str = "patient"
) -> dict[str, list[str]]:
    """The stated splits, with validation images out of the training images where none are stated;
    ``split_by`` "patient", "image" or "group", which parts no near-duplicates either.

    Raises:
        ValueError: the percentage is no share of the training images.
    """
    splits = source.splits
    if splits and not 0 < percent < 100:
        raise ValueError(f"{percent} % of the training images for validation: give 1 to 99")
    train = set(splits.get("train", ()))
    if splits.get("val") or not train:
        return splits
    samples = [sample for sample in source.samples if sample.file_name in train]
    units = units_of([{} if split_by == "image" else sample.fields for sample in samples])
    if split_by == "group":
        files, fields = zip(*((s.image.path, s.fields) for s in samples), strict=True)
        _, groups = find_groups(files, fields)
        for number, group in enumerate(groups):
            for position in group:
                units[position] = "group", str(number)
    items = [Item(s.file_name, s.label, unit) for s, unit in zip(samples, units, strict=True)]
    carved = make_splits(items, (100 - percent, percent, 0), seed)
    return {**splits, "train": carved["train"], "val": carved["val"]}


def read_labelled_files(
    files: Sequence[LabelledFile],
    where: Path,
    rejects: Rejects,
    classes: Names = None,
    cancers: Names = None,
) -> Source:
    """Read the images of files with a class each; errors about all of them blame `where`."""
    names = list(classes) if classes is not None else sorted({file.label for file in files})
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInputError(where, f"there must be two classes or more, all different: {names}")
    ids = {name: i for i, name in enumerate(names, start=1)}
    categories = _categories(ids, cancers)
    read = []
    for file in tqdm(files, desc="Reading images", unit="image"):
        with rejects.catch():
            _check_label(file.label, names, file.path)
            read.append((file, inspect_image(file.path)))
    copies = defaultdict(list)
    for file, image in read:
        copies[image.sha256].append(file)
    samples, splits = [], defaultdict(list)
    for file, image in read:
        with rejects.catch():
            _check_copies(file, copies[image.sha256])
            label = ids[file.label]
            samples.append(Sample(file.name, image, [{"category_id": label}], file.fields, label))
            if file.split is not None:
                splits[file.split].append(file.name)
    if without := sorted(set(names) - {file.label for file in files}):
        raise BadInputError(where, f"empty class: no image of {', '.join(without)}")
    cancer = [c["name"] for c in categories if c.get("supercategory") == "cancer"]
    notes = [f"cancer: {', '.join(cancer)}; all others are benign" if cancer else "no cancer class"]
    info = {"description": "one class an image"}
    return Source(samples, categories, info, notes, splits=dict(splits))


def _categories(ids: Mapping[str, int], cancers: Names) -> list[dict]:
    """Their supercategory tells cancer from benign, where some class is cancer."""
    if cancers is None:
        cancers = [name for name in ids if any(word in name.casefold() for word in _CANCER)]
    elif unknown := set(cancers) - set(ids):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such class; there are {', '.join(ids)}")
    categories = [{"id": id_, "name": name} for name, id_ in ids.items()]
    if 0 < len(cancers) < len(ids):
        for category in categories:
            category["supercategory"] = "cancer" if category["name"] in cancers else "benign"
    return categories


def _check_label(label: str, classes: Sequence[str], where: str | Path) -> None:
    if label not in classes:
        reason = f"unknown label {label!r}; the classes are {', '.join(classes)}"
        raise BadInputError(where, reason)


def _check_copies(file: LabelledFile, copies: Sequence[LabelledFile]) -> None:
    """Two copies of one image that agree are found later; if not, neither can be trusted."""
    for other in copies:
        for key in ("label", "split"):
            value, copy = getattr(file, key), getattr(other, key)
            if value != copy:
                reason = f"its {key} is {value!r}, but {copy!r} of the same content in {other.path}"
                raise BadInputError(file.path, reason)
