"""Prepared data sets: images, COCO annotations by split, splits.json; folds; corrected splits."""

import filecmp
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from imrcnn_d2.data.formats.base import Sample, Source
from imrcnn_d2.data.images import install_image, link_or_copy
from imrcnn_d2.data.prepare.duplicates import joined_groups, positions
from imrcnn_d2.data.prepare.splits import (
    SPLITS,
    FixedTest,
    Item,
    group_images,
    make_folds,
    make_splits,
    read_splits,
    sha256,
    splits_from_prefixes,
)
from imrcnn_d2.utils.files import (
    BadInputError,
    Rejects,
    check_inside,
    is_empty,
    read_json,
    staged,
)

__all__ = [
    "KEPT_TOGETHER",
    "Move",
    "SPLIT_BY",
    "Prepared",
    "SplitOptions",
    "check_can_fix",
    "prepare_dataset",
    "strata_of",
    "summarise",
    "write_fixed_splits",
    "write_folds",
    "write_json",
    "write_splits",
]


# Grows next to a data set with every evaluation of its test part (evaluation/test_log.py).
TEST_LOG = "test_evaluations.csv"


def write_json(path: Path, content: dict, indent: int | None = None) -> None:
    """Writes strict JSON that is the same byte for byte for the same content; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, sort_keys=True, allow_nan=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    """Raises FileExistsError if `out` is something else than a prepared data set or nothing."""
    if out.exists() and not is_empty(out) and not (out / "splits.json").is_file():
        raise FileExistsError(f"{out}: exists and is no prepared data set; choose another --out")


def check_same(stage: Path, out: Path) -> None:
    """Raises FileExistsError, naming a file that differs, unless both hold the same files."""
    name = first_difference(stage, out)
    if name is not None:
        raise FileExistsError(
            f"{out}: holds a data set made from other data or with other settings ({name} "
            "would change). Choose another --out or remove it first; "
            f"--splits {out / 'splits.json'} keeps its assignments in a new one."
        )


def first_difference(a: Path, b: Path) -> str | None:
    """The first file, by name, that only one of two folders has or whose content differs."""
    files = {
        str(path.relative_to(folder))
        for folder in (a, b)
        for path in folder.rglob("*")
        if path.is_file() and path.name != TEST_LOG
    }
    for name in sorted(files):
        pair = a / name, b / name
        if not all(path.is_file() for path in pair) or not filecmp.cmp(*pair, shallow=False):
            return name
    return None


SPLIT_BY = ("patient", "group", "image", "prefix")
# the field of COCO images by which they stay in one split, where they have it
KEPT_TOGETHER = {"patient": "patient_id", "group": "group_id"}


@dataclass
class SplitOptions:
    """How to split, see `imrcnn_d2.data.prepare.splits.make_splits`.

    Attributes:
        ratio: train : val : test, or a test set of fixed size.
        seed: of the assignment.
        split_by: one of `SPLIT_BY`. "patient": a patient's images stay together; "group": those of
            a patient and near-duplicates do; "image": every image for itself; "prefix": as the
            file names state.
        earlier: file names by split that stay as they were.
        folds: of cross-validation, 0 for none.
    """

    ratio: Sequence[int] | FixedTest = (12, 3, 5)
    seed: int = 0
    split_by: str = "patient"
    earlier: Mapping[str, Sequence[str]] | None = None
    folds: int = 0

    @property
    def sizes(self) -> dict:
        """How large the splits should be, for splits.json."""
        if self.split_by == "prefix":
            return {}
        if isinstance(self.ratio, FixedTest):
            of_class, percent = self.ratio.per_stratum, self.ratio.val_percent
            return {"test_per_class": of_class, "val_percent": percent}
        return {"ratio": list(self.ratio)}


@dataclass
class Prepared:
    """What `prepare_dataset` made: COCO contents by split, and notes for the user."""

    out: Path
    coco: dict[str, dict]
    notes: list[str]
    unchanged: bool


def prepare_dataset(source: Source, out: Path, options: SplitOptions, rejects: Rejects) -> Prepared:
    """Installs the images, splits them and writes the annotations.

    The folder is built next to `out` and renamed at the end, so a failed run leaves nothing.
    If `out` holds exactly what would be written it stays as it is; nothing else is overwritten.

    Raises:
        FileExistsError: `out` holds something else.
        BadInputError: bad input under ``on_error="raise"``, or no image was left.
    """
    check_free(out)
    with staged(out) as stage:
        samples = _install(source.samples, stage / "images", rejects, source.notes)
        if not samples:
            raise BadInputError(out, "no usable image was found, nothing to write")
        samples.sort(key=lambda sample: sample.file_name)
        coco = _write_splits_and_annotations(stage, samples, source, options)
        if rejects.on_error == "reject":
            rejects.write_csv(stage / "rejected.csv")
        if out.exists() and not is_empty(out):
            check_same(stage, out)
            return Prepared(out, coco, source.notes, unchanged=True)
        os.replace(stage, out)  # also onto an empty folder
    return Prepared(out, coco, source.notes, unchanged=False)


def _install(
    samples: Iterable[Sample], folder: Path, rejects: Rejects, notes: list[str]
) -> list[Sample]:
    """Puts the images in place; of two with one name or the same bytes, the second is bad input."""
    folder.mkdir()
    kept: list[Sample] = []
    by_name: dict[str, Path] = {}
    by_content: dict[str, Path] = {}
    for sample in samples:
        with rejects.catch():
            image = sample.image
            if image.needs_conversion:
                sample.file_name = str(PurePosixPath(sample.file_name).with_suffix(".png"))
            if sample.file_name in by_name:
                other = by_name[sample.file_name]
                raise BadInputError(
                    image.path, f"duplicate: {sample.file_name} was already made from {other}"
                )
            if image.sha256 in by_content:
                raise BadInputError(
                    image.path, f"duplicate: same content as {by_content[image.sha256]}"
                )
            install_image(image, folder, sample.file_name)
            by_name[sample.file_name] = by_content[image.sha256] = image.path
            if image.needs_conversion:
                notes.append(f"{image.path}: {image.mode} converted to 8-bit RGB PNG")
            kept.append(sample)
    return kept


def _write_splits_and_annotations(
    stage: Path, samples: list[Sample], source: Source, options: SplitOptions
) -> dict[str, dict]:
    """Writes everything but the images; returns the COCO contents by split."""
    split_by, earlier = options.split_by, options.earlier or {}
    if split_by == "prefix":
        if earlier:
            raise ValueError("file names cannot state the splits where earlier ones are given")
        earlier = splits_from_prefixes(sample.file_name for sample in samples)
    elif split_by == "group":
        _group(stage, samples, source.notes)
    elif split_by == "patient" and all(
        sample.fields.get("patient_id") is None for sample in samples
    ):
        split_by = "image"
    unit = KEPT_TOGETHER.get(split_by)
    items = [Item(s.file_name, s.stratum, s.fields.get(unit)) for s in samples]
    gone = sorted({name for part in earlier.values() for name in part} - {i.name for i in items})
    if gone:
        source.notes.append(f"{len(gone)} files of the given splits are gone: {', '.join(gone)}")

    splits = make_splits(items, options.ratio, options.seed, earlier=earlier)
    _check_classes(samples, splits, source.categories)
    settings = {"seed": options.seed, "split_by": split_by}
    if options.folds:
        for i, fold in enumerate(make_folds(items, options.folds, options.seed)):
            fold_info = {"fold": i, "folds": options.folds, **fold_settings(settings)}
            write_splits(stage / "folds" / f"fold{i}.json", fold, fold_info)
    return _write_split_files(stage, splits, {**settings, **options.sizes}, _coco(samples, source))


def _write_split_files(
    folder: Path, splits: Mapping[str, Sequence[str]], settings: dict, coco: Mapping
) -> dict[str, dict]:
    """Writes splits.json and the part of the COCO content of each split; returns the parts."""
    write_splits(folder / "splits.json", splits, settings)
    contents = {split: {**coco, "images": [], "annotations": []} for split in splits}
    split_of = {name: split for split, names in splits.items() for name in names}
    split_of_id = {image["id"]: split_of[image["file_name"]] for image in coco["images"]}
    for image in coco["images"]:
        contents[split_of_id[image["id"]]]["images"].append(image)
    for annotation in coco["annotations"]:
        contents[split_of_id[annotation["image_id"]]]["annotations"].append(annotation)
    for split, content in contents.items():
        write_json(folder / "annotations" / f"{split}.json", content)
    return contents


def _group(stage: Path, samples: list[Sample], notes: list[str]) -> None:
    """Sets ``group_id`` of images that have a near-duplicate; lists them in a file."""
    groups, listed = group_images(
        stage / "images",
        [sample.file_name for sample in samples],
        [sample.fields.get("patient_id") for sample in samples],
    )
    for sample in samples:
        if sample.file_name in groups:
            sample.fields["group_id"] = groups[sample.file_name]
    write_json(stage / "near_duplicates.json", listed, indent=1)
    notes.append(
        f"{len(listed['pairs'])} pairs of near-duplicates; {len(groups)} images in "
        f"{len(listed['groups'])} groups that stay together, see near_duplicates.json"
    )


def _check_classes(
    samples: list[Sample], splits: Mapping[str, Sequence[str]], categories: list[dict]
) -> None:
    """Raises ValueError for a split without images of a class, in a classification data set."""
    label_of = {sample.file_name: sample.label for sample in samples}
    if None in label_of.values():
        return
    for split, names in splits.items():
        labels = {label_of[name] for name in names}
        missing = [c["name"] for c in categories if c["id"] not in labels]
        if missing and names:
            raise ValueError(
                f"{split} has no image of {', '.join(missing)}: every split needs all "
                f"{len(categories)} classes. Add images, change the ratio, or correct the split "
                "column."
            )


def _coco(samples: list[Sample], source: Source) -> dict:
    """COCO content of all splits; ids count from 1, in the order of `samples`."""
    images, annotations = [], []
    for image_id, sample in enumerate(samples, start=1):
        size = {"width": sample.image.width, "height": sample.image.height}
        images.append({**sample.fields, "id": image_id, "file_name": sample.file_name, **size})
        for annotation in sample.annotations:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**annotation, **ids})
    return {
        **source.extra,
        "info": source.info,
        "categories": source.categories,
        "images": images,
        "annotations": annotations,
    }


def write_splits(path: Path, splits: Mapping[str, Sequence[str]], settings: dict) -> None:
    """Writes a splits.json: the lists, their settings, and their hash."""
    write_json(path, {**splits, **settings, "sha256": sha256(splits)}, indent=1)


def fold_settings(settings: Mapping) -> dict:
    """Seed and split_by of a data set's folds; file names state no folds."""
    split_by = settings["split_by"]
    return {"seed": settings["seed"], "split_by": "image" if split_by == "prefix" else split_by}


def write_folds(prepared: Path, count: int) -> list[Path]:
    """Writes ``<prepared>.folds<count>/fold<i>/<name>/`` next to a prepared data set, once.

    Each is a prepared data set: annotations with the ids of the original, a splits.json
    with ``fold`` and ``folds``, and ``images`` as a relative link to the original's. The folds are
    those of `make_folds` with the seed and the ``split_by`` of the original. What is already there
    stays as it is if it is what would be written.

    Args:
        prepared: folder of the prepared data set; its name is the data set's.
        count: how many folds, at least 2.

    Returns:
        for each fold the folder to use as ``$IMRCNN_DATASETS``.

    Raises:
        FileNotFoundError: no prepared data set.
        FileExistsError: other folds are there, e.g. of an earlier state of the data.
        ValueError: fewer than 2 folds, or so many that one has no image to train, validate or test.
    """
    if not (prepared / "splits.json").is_file():
        raise FileNotFoundError(
            f"{prepared}: no prepared data set is there (no splits.json). Make it with "
            "tools/prepare_dataset.py, or set IMRCNN_DATASETS to the folder that it lies in."
        )
    settings = fold_settings(read_json(prepared / "splits.json"))
    contents = _read_contents(prepared)
    _check_ids(prepared, contents)
    images = sorted(_records(contents, "images"), key=lambda image: image["file_name"])
    annotations = sorted(_records(contents, "annotations"), key=lambda record: record["id"])
    coco = {**contents["train"], "images": images, "annotations": annotations}
    strata = strata_of(annotations)
    unit = KEPT_TOGETHER.get(settings["split_by"])
    items = [Item(i["file_name"], strata.get(i["id"], False), i.get(unit)) for i in images]
    folds = make_folds(items, count, settings["seed"])
    empty = [f"fold {i}'s {s}" for i, fold in enumerate(folds) for s in SPLITS if not fold[s]]
    if empty:
        raise ValueError(
            f"{count} folds of {prepared} ({len(items)} images, kept together by "
            f"{settings['split_by']}) leave nothing for {', '.join(empty)}: take fewer folds"
        )

    out = prepared.with_name(f"{prepared.name}.folds{count}")
    with staged(out) as stage:
        for i, fold in enumerate(folds):
            folder = stage / f"fold{i}" / prepared.name
            folder.mkdir(parents=True)
            (folder / "images").symlink_to(Path("..", "..", "..", prepared.name, "images"))
            _write_split_files(folder, fold, {**settings, "fold": i, "folds": count}, coco)
            _copy_rejected(prepared, folder)
        if out.exists():
            difference = first_difference(stage, out)
            if difference is not None:
                raise FileExistsError(
                    f"{out}: holds folds of other data ({difference} would change). Remove it to "
                    f"make the folds of {prepared} as it is now, and all runs on the old ones."
                )
        else:
            os.replace(stage, out)
    return [out / f"fold{i}" for i in range(count)]


@dataclass(frozen=True)
class Move:
    """An image that changes its split: its name, from where, and to where."""

    name: str
    source: str
    target: str


def check_can_fix(prepared: Path, out: Path) -> None:
    """Refuses what `write_fixed_splits` would refuse whatever the groups, before a long audit.

    Raises:
        FileExistsError: `out` is there and not empty.
        FileNotFoundError: the data set has no splits.json.
        ValueError: splits.json cannot be read.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists already; choose another folder for --fix-splits")
    if not (prepared / "splits.json").is_file():
        raise FileNotFoundError(
            f"{prepared / 'splits.json'}: not there; --fix-splits needs a data set made with "
            "tools/prepare_dataset.py"
        )
    read_splits(prepared / "splits.json")


def write_fixed_splits(
    prepared: Path,
    out: Path,
    groups: Sequence[Sequence[str]],
    pairs: Sequence[Mapping] = (),
    follow_links: bool = False,
) -> list[Move]:
    """Writes a prepared data set in which no group is in two splits.

    Images of no group, and groups in one split, stay where they are; the others are assigned so
    that the splits keep their sizes as well as may be. The prepared data set stays as it is, for
    the runs that were trained on it. Images are hard links where possible. Folds are not taken
    over: they are made of the new splits.

    Args:
        prepared: folder of a prepared data set.
        out: folder to make.
        groups: file names that must not be parted. Images with one ``group_id`` are such a group
            as well; groups that share an image become one.
        pairs: to list in near_duplicates.json, JSON values.
        follow_links: whether links among the images may lead out of their folder.

    Returns:
        the moves, by name; without any nothing is written.

    Raises:
        BadInputError: an image is in two splits, an id is there twice, or an annotation's image is
            not there.
        FileExistsError, FileNotFoundError, ValueError: see :func:`check_can_fix`.
    """
    check_can_fix(prepared, out)
    contents = _read_contents(prepared)
    old = read_splits(prepared / "splits.json")
    settings = read_json(prepared / "splits.json")
    split_of: dict[str, str] = {}
    for split, content in contents.items():
        for image in content["images"]:
            other = split_of.setdefault(image["file_name"], split)
            if other != split:
                raise BadInputError(
                    image["file_name"], f"is in {other} and {split} of {prepared}; take one out"
                )
    _check_ids(prepared, contents)
    images = _records(contents, "images")
    groups = _with_old_groups(images, groups)
    group_of = {name: i for i, group in enumerate(groups, start=1) for name in group}
    crossing = {name for group in groups if len({split_of[n] for n in group}) > 1 for name in group}
    if not crossing:
        return []

    annotations = _records(contents, "annotations")
    strata = strata_of(annotations)
    items = [
        Item(i["file_name"], strata.get(i["id"], False), group_of.get(i["file_name"]))
        for i in images
    ]
    kept = {split: [n for n in names if n not in crossing] for split, names in old.items()}
    sizes = [len(contents[split]["images"]) for split in SPLITS]
    new = make_splits(items, sizes, settings.get("seed", 0), earlier=kept)
    target_of = {name: split for split, names in new.items() for name in names}

    with staged(out) as stage:
        for path in sorted((prepared / "images").rglob("*")):
            if path.is_file():
                check_inside(prepared / "images", path, follow_links)
                target = stage / "images" / path.relative_to(prepared / "images")
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
        left_out = (*SPLITS, "sha256", "fold", "folds")
        settings = {k: v for k, v in settings.items() if k not in left_out}
        settings |= {"split_by": "group", "fixed_from": sha256(old)}
        for image in images:
            image.pop("group_id", None)
            if image["file_name"] in group_of:
                image["group_id"] = group_of[image["file_name"]]
        coco = {
            **contents["train"],
            "images": sorted(images, key=lambda image: image["id"]),
            "annotations": sorted(annotations, key=lambda annotation: annotation["id"]),
        }
        _write_split_files(stage, new, settings, coco)
        listed = {"groups": groups, "pairs": list(pairs)}
        write_json(stage / "near_duplicates.json", listed, indent=1)
        _copy_rejected(prepared, stage)
        os.replace(stage, out)
    return [
        Move(name, split_of[name], target_of[name])
        for name in sorted(crossing)
        if split_of[name] != target_of[name]
    ]


def _check_ids(prepared: Path, contents: Mapping[str, dict]) -> None:
    """Raises BadInputError unless ids are unique over all splits."""
    seen = {"images": set(), "annotations": set()}
    for key, ids in seen.items():
        for split, content in contents.items():
            path = prepared / "annotations" / f"{split}.json"
            for record in content[key]:
                if record["id"] in ids:
                    raise BadInputError(
                        path,
                        f"{key} has the id {record['id']!r} twice in the splits; number them anew "
                        "over the three files",
                    )
                ids.add(record["id"])
                if key == "annotations" and record["image_id"] not in seen["images"]:
                    raise BadInputError(
                        path,
                        f"annotation {record['id']!r} is of image {record['image_id']!r}, which no "
                        "split has; take it out",
                    )


def _with_old_groups(images: Sequence[Mapping], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """The groups and those that the images had, joined where they share an image."""
    names = [image["file_name"] for image in images]
    indices = {name: i for i, name in enumerate(names)}
    old_ids = (image.get("group_id") for image in images)
    together = list(positions(None if i is None else str(i) for i in old_ids).values())
    together += [[indices[name] for name in group] for group in groups]
    joined = joined_groups(len(names), together)
    return sorted(sorted(names[i] for i in group) for group in joined)


def strata_of(annotations: Iterable[Mapping]) -> dict:
    """The stratum of each image by id; images without a lesion are left out.

    Of classified images, which have no boxes, it is the class; else that there is a lesion.
    """
    return {
        annotation["image_id"]: True if "bbox" in annotation else annotation["category_id"]
        for annotation in annotations
        if not annotation.get("iscrowd")
    }


def _read_contents(prepared: Path) -> dict[str, dict]:
    """COCO contents of a prepared data set by split."""
    return {split: read_json(prepared / "annotations" / f"{split}.json") for split in SPLITS}


def _records(contents: Mapping[str, dict], key: str) -> list[dict]:
    return [record for content in contents.values() for record in content[key]]


def _copy_rejected(prepared: Path, folder: Path) -> None:
    if (prepared / "rejected.csv").is_file():
        shutil.copyfile(prepared / "rejected.csv", folder / "rejected.csv")


_EDGES = (0, 1, 2, 5, 10, 20, 50, 100)  # share of the image in percent
_BAR = 40


def summarise(
    coco: Mapping[str, dict],
    ratio: Sequence[int] | None,
    notes: Sequence[str],
    rejects: Sequence[BadInputError],
) -> str:
    """Counts by split, difference to the ratio, size histograms, notes and rejects.

    Of images with a class each, it is the images of each class by split.

    Args:
        coco: COCO contents by split.
        ratio: as requested, in the order of `coco`; None where the splits are stated.
        notes: lines to repeat.
        rejects: what was left out, and why.
    """
    annotations = _records(coco, "annotations")
    classified = any("bbox" not in annotation for annotation in annotations)
    counts = _class_counts(coco) if classified else _counts(coco, ratio)
    return "\n".join(
        [
            *counts,
            "",
            *_image_sizes(coco),
            *([] if classified else ["", *_lesion_sizes(coco)]),
            *_listed("Notes", notes),
            *_listed("Rejected", [str(error) for error in rejects]),
        ]
    )


def _class_counts(coco: Mapping[str, dict]) -> list[str]:
    categories = next(iter(coco.values()))["categories"]
    widths = [max(len(category["name"]), 7) for category in categories]
    names = [category["name"].rjust(w) for category, w in zip(categories, widths, strict=True)]
    lines = [f"split   images  patients  {'  '.join(names)}"]
    for split, content in coco.items():
        labels = Counter(annotation["category_id"] for annotation in content["annotations"])
        counts = [
            f"{labels[category['id']]:{width}}"
            for category, width in zip(categories, widths, strict=True)
        ]
        images = content["images"]
        lines.append(
            f"{split:6} {len(images):7} {_patients(images) or '-':>9}  {'  '.join(counts)}"
        )
    return lines


def _patients(images: Sequence[dict]) -> int:
    return len({i["patient_id"] for i in images if i.get("patient_id") is not None})


def _counts(coco: Mapping[str, dict], ratio: Sequence[int] | None) -> list[str]:
    total = sum(len(content["images"]) for content in coco.values())
    wanted_title = "" if ratio is None else "  images wanted by ratio"
    lines = [f"split   images  instances  lesion-free  patients{wanted_title}"]
    for i, (split, content) in enumerate(coco.items()):
        images, annotations = content["images"], content["annotations"]
        with_lesion = {a["image_id"] for a in annotations if not a["iscrowd"]}
        lines.append(
            f"{split:6} {len(images):7} {len(annotations):10} {len(images) - len(with_lesion):12} "
            f"{_patients(images) or '-':>9}"
        )
        if ratio is not None:
            wanted = total * ratio[i] / sum(ratio)
            lines[-1] += f"  {wanted:.1f} ({len(images) - wanted:+.1f})"
    return lines


def _image_sizes(coco: Mapping[str, dict]) -> list[str]:
    sizes = Counter(f"{i['width']}x{i['height']}" for i in _records(coco, "images"))
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    lines = ["Image sizes in pixels:"] + _bars(ranked[:8])
    if len(ranked) > 8:
        lines.append(f"  and {len(ranked) - 8} more sizes, {sum(n for _, n in ranked[8:])} images")
    return lines


def _lesion_sizes(coco: Mapping[str, dict]) -> list[str]:
    shares = []
    for content in coco.values():
        areas = {image["id"]: image["width"] * image["height"] for image in content["images"]}
        shares += [100 * a["area"] / areas[a["image_id"]] for a in content["annotations"]]
    counts = np.histogram(shares, bins=_EDGES)[0]
    rows = [
        (f"{low}-{high} %", int(n))
        for low, high, n in zip(_EDGES[:-1], _EDGES[1:], counts, strict=True)
    ]
    return ["Instances by share of the image's area:"] + _bars(rows)


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    most = max(n for _, n in rows)
    width = max(len(label) for label, _ in rows)
    return [f"  {label:>{width}} {n:6} {'#' * round(_BAR * n / max(most, 1))}" for label, n in rows]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return ["", f"{title} ({len(lines)}):", *(f"  {line}" for line in lines)]
