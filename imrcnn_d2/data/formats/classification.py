"""Whole images with a class each: one folder a class, or a CSV.

Prepared, they are COCO image-classification files as iNaturalist's: an annotation is {id, image_id,
category_id}, without a box.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from imrcnn_d2.data.images import inspect_image, list_files, path_inside
from imrcnn_d2.data.prepare.data_set import Sample, Source
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.data.prepare.splits import SPLITS, Item, make_splits
from imrcnn_d2.utils.files import BadInputError, Rejects

__all__ = ["LabelledFile", "carve_validation", "read_class_folders", "read_label_csv"]


# Of class names: what makes a class one of the cancers, unless they are named.
_CANCER = ("cancer", "carcinoma")
# What the prepared files say themselves.
_OWN_COLUMNS = ("file", "label", "split", "id", "file_name", "width", "height")


@dataclass(frozen=True)
class LabelledFile:
    """One row: an image file and what is said of it.

    Attributes:
        path: the image.
        name: relative to the root, for the prepared images/.
        label: name of its class.
        split: "train", "val" or "test"; None to be assigned.
        fields: further COCO image fields, e.g. ``patient_id``.
    """

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
) -> tuple[Source, dict[str, list[str]]]:
    """Reads one folder a class, named as it; folders below these are looked into.

    Args:
        root: has the folders.
        rejects: takes bad input.
        classes: names of the classes in their order; None takes the folders', sorted.
        cancers: classes that are cancer, the others being benign; None for those whose name has
            "cancer" or "carcinoma" in it.

    Returns:
        the data set, and the splits that are given: none.

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
            own = [path for path in paths if path.relative_to(root).parts[0] == folder.name]
            if not own:
                raise BadInputError(folder, "empty class: there is no image in this folder")
            files += [LabelledFile(p, p.relative_to(root).as_posix(), folder.name) for p in own]
    return _source(files, root, rejects, classes, cancers)


def read_label_csv(
    csv_file: Path,
    root: Path,
    rejects: Rejects,
    classes: Sequence[str] | None = None,
    cancers: Sequence[str] | None = None,
) -> tuple[Source, dict[str, list[str]]]:
    """Reads a CSV with the columns file and label and, if there, patient_id and split.

    Further columns are passed through to the prepared image records. An empty split is to be
    assigned. Columns are separated by commas, semicolons or tabs.

    Args:
        csv_file: the table.
        root: the folder that each file is relative to.
        rejects, classes, cancers: as for `read_class_folders`.

    Returns:
        the data set, and file names by split of those whose split is given.

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
            files.append(LabelledFile(path, name, label, split, fields))
    return _source(files, csv_file, rejects, classes, cancers)


def carve_validation(
    source: Source,
    given: Mapping[str, Sequence[str]],
    percent: int,
    seed: int = 0,
    by_patient: bool = True,
) -> dict[str, list[str]]:
    """Takes validation images out of the given training images where none are given.

    Args:
        source: whose samples all are at hand.
        given: file names by split.
        percent: of the training images.
        seed, by_patient: as for `make_splits`.

    Returns:
        file names by split; `given` as it is where it has validation or no training images.

    Raises:
        ValueError: no such share.
    """
    if not 0 < percent < 100:
        raise ValueError(f"{percent} % of the training images for validation: give 1 to 99")
    train = set(given.get("train", ()))
    if given.get("val") or not train:
        return dict(given)
    items = [
        Item(s.file_name, s.stratum, s.fields.get("patient_id"))
        for s in source.samples
        if s.file_name in train
    ]
    carved = make_splits(items, (100 - percent, percent, 0), seed, by_patient)
    return {**given, "train": carved["train"], "val": carved["val"]}


def _source(
    files: list[LabelledFile],
    where: Path,
    rejects: Rejects,
    classes: Sequence[str] | None,
    cancers: Sequence[str] | None,
) -> tuple[Source, dict[str, list[str]]]:
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
    return Source(samples, categories, info, notes), dict(splits)


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


def _inspected(files: Iterable[LabelledFile], rejects: Rejects, classes: Sequence[str]) -> list:
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


def _check_copies(file: LabelledFile, copies: Sequence[LabelledFile]) -> None:
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
