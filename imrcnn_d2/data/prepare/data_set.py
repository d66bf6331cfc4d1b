"""Prepared data sets: images, COCO annotations by split, splits.json; folds; corrected splits."""

import filecmp
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from imrcnn_d2.data.formats.base import Sample, Source, is_repeated_frame
from imrcnn_d2.data.images import check_utf8, install_image, link_or_copy, without_suffix
from imrcnn_d2.data.prepare import duplicates
from imrcnn_d2.data.prepare.duplicates import joined_groups, positions
from imrcnn_d2.data.prepare.splits import (
    DEFAULT_RATIO,
    SPLITS,
    FixedTest,
    Item,
    Where,
    check_prepared,
    leave_out,
    make_folds,
    make_splits,
    read_splits,
    sha256,
    splits_from_prefixes,
)
from imrcnn_d2.data.units import units_of
from imrcnn_d2.utils.files import (
    BadInputError,
    Rejects,
    check_inside,
    few,
    is_empty,
    read_json,
    staged,
)

# Images of a patient, else sequence, stay together; near-duplicates too; none; as file names state.
SPLIT_BY = ("patient", "group", "image", "prefix")
_TEST_LOG = "test_evaluations.csv"  # grows in a data set with every evaluation of its test part
_EDGES = (0, 1, 2, 5, 10, 20, 50, 100)  # share of the image in percent
_BAR = 40
_SHOWN = 20  # rejects


@dataclass
class SplitOptions:
    """How to split, see `make_splits`."""

    ratio: Sequence[int] | FixedTest | None = DEFAULT_RATIO  # None: `earlier` has all images
    seed: int = 0
    split_by: str = "patient"  # see SPLIT_BY
    earlier: Mapping[str, Sequence[str]] | None = None  # file names that stay in their splits
    folds: int = 0  # of cross-validation, 0 for none
    leave_out: Sequence[Where] = ()  # images that are the test split, all of it
    stratify_by: str | None = None  # a field of images, whose values every split gets its share of
    # The present names in `earlier`, once all images were read: before, no new name is known.
    renamed: Callable[[Mapping], Mapping] = dict

    @property
    def sizes(self) -> dict:
        """How large the splits should be, for splits.json; empty where they are stated."""
        if self.split_by == "prefix" or self.ratio is None:
            return {}
        if self.leave_out:
            return {"ratio": [*self.ratio[:2], 0]}
        if isinstance(self.ratio, FixedTest):
            test = self.ratio
            return {"test_per_class": test.per_stratum, "val_percent": test.val_percent}
        return {"ratio": list(self.ratio)}


@dataclass
class Prepared:
    """What `prepare_dataset` made: COCO contents by split, and notes for the user."""

    out: Path
    coco: dict[str, dict]
    notes: list[str]
    unchanged: bool


def prepare_dataset(
    source: Source, out: Path, options: SplitOptions, rejects: Rejects, dry_run: bool = False
) -> Prepared:
    """Install the images, split them and write the annotations.

    The folder is built next to `out` and renamed at the end, so a failed run leaves nothing, nor
    does a `dry_run`. If `out` holds exactly what would be written it stays as it is; nothing else
    is overwritten.

    Raises:
        FileExistsError: `out` holds something else.
        BadInputError: bad input under ``on_error="raise"``, or no image was left.
    """
    is_new = not out.exists() or is_empty(out)
    if not is_new and not (out / "splits.json").is_file():
        raise FileExistsError(f"{out}: exists and is no prepared data set; choose another --out")
    # A dry run makes no folders above `out` either.
    place = next(p for p in out.absolute().parents if p.is_dir()) if dry_run else out.parent
    with staged(place / out.name) as stage:
        samples = _install(source.samples, stage / "images", rejects, source.notes)
        if not samples:
            raise BadInputError(out, "no usable image was found, nothing to write")
        samples.sort(key=lambda sample: sample.file_name)
        coco = _write_splits_and_annotations(stage, samples, source, options)
        if dry_run:
            return Prepared(out, coco, source.notes, unchanged=False)
        if rejects.on_error == "reject" or rejects.errors:
            rejects.write_csv(stage / "rejected.csv")
        if is_new:
            os.replace(stage, out)  # also onto an empty folder
        elif name := _first_difference(stage, out):
            text = f"{out}: holds a data set of other data or settings ({name} would change)"
            remedy = f"another --out, with --splits {out / 'splits.json'} to keep its assignments"
            raise FileExistsError(f"{text}; choose {remedy}")
    return Prepared(out, coco, source.notes, unchanged=not is_new)


def _first_difference(a: Path, b: Path) -> str | None:
    """The first file, by name, that only one of two folders has or whose content differs."""
    files = {
        str(path.relative_to(folder))
        for folder in (a, b)
        for path in folder.rglob("*")
        if path.is_file() and path.name != _TEST_LOG
    }
    for name in sorted(files):
        pair = a / name, b / name
        if not all(path.is_file() for path in pair) or not filecmp.cmp(*pair, shallow=False):
            return name
    return None


def _install(
    samples: Iterable[Sample], folder: Path, rejects: Rejects, notes: list[str]
) -> list[Sample]:
    """Put the images in place; of two with one name, or with the same bytes that are not of one
    video, the second is bad input."""
    folder.mkdir()
    kept: list[Sample] = []
    origins: dict[str, Sample] = {}  # by name, and by hash of the content
    converted: dict[str, list[Path]] = defaultdict(list)  # by mode
    for sample in samples:
        with rejects.catch():
            image = sample.image
            check_utf8(sample.file_name, image.path)
            name = sample.file_name = sample.installed_name
            if name in origins:
                reason = f"duplicate: {name} was already made from {origins[name].image.path}"
                raise BadInputError(image.path, reason)
            other = origins.setdefault(image.sha256, sample)
            if other is not sample and not is_repeated_frame(sample, other):
                raise BadInputError(image.path, f"duplicate: same content as {other.image.path}")
            install_image(image, folder, name)
            origins[name] = sample
            if image.needs_conversion:
                converted[image.mode].append(image.path)
            kept.append(sample)
    for mode, paths in converted.items():
        notes.append(f"{few(paths)}: {len(paths)} images ({mode}) converted to 8-bit RGB PNG")
    return kept


def _write_splits_and_annotations(
    stage: Path, samples: list[Sample], source: Source, options: SplitOptions
) -> dict[str, dict]:
    """Write everything but the images; return the COCO contents by split."""
    split_by, earlier = options.split_by, options.renamed(options.earlier or {})
    earlier = _of_converted(earlier, samples)
    if split_by == "prefix":
        if earlier:
            raise ValueError("file names cannot state the splits where earlier ones are given")
        earlier = splits_from_prefixes(sample.file_name for sample in samples)
    elif split_by == "group":
        _group(stage, samples, source.notes)
    elif split_by == "patient" and not any(units_of([s.fields for s in samples])):
        split_by = "image"
    coco = coco_content(samples, source)
    boxes = sum("bbox" in a and "segmentation" not in a for a in coco["annotations"])
    if boxes:
        source.notes.append(
            f"{boxes} of {len(coco['annotations'])} annotations have a box and no mask: set "
            "MODEL.MASK_ON to False to train with them, which makes a detector of boxes"
        )
    items = _items(coco, split_by, options.stratify_by)
    given = {name for part in earlier.values() for name in part}
    gone = sorted(given - {i.name for i in items})
    if gone:
        source.notes.append(f"{len(gone)} files of the given splits are gone: {', '.join(gone)}")

    settings = {"seed": options.seed, "split_by": split_by}
    if options.leave_out:
        splits = _leave_out(coco["images"], items, options, earlier)
        settings["left_out"] = " ".join(map(str, options.leave_out))
    else:
        splits = make_splits(items, options.ratio or DEFAULT_RATIO, options.seed, earlier)
    if options.stratify_by:
        settings["stratify_by"] = options.stratify_by
    if given and (added := [i.name for i in items if i.name not in given]):
        text = "images have no given split, and were assigned by the ratio"
        source.notes.append(f"{len(added)} {text}: {few(added)}")
    if given and split_by != "prefix":
        settings["given"] = len(given) - len(gone)  # images whose split was not chosen here
    if options.folds:
        of_folds = _fold_settings(settings, coco["images"])
        items = _items(coco, of_folds["split_by"], options.stratify_by)
        for i, fold in enumerate(make_folds(items, options.folds, options.seed)):
            fold_info = {"fold": i, "folds": options.folds, **of_folds}
            write_splits(stage / "folds" / f"fold{i}.json", fold, fold_info)
    contents = write_split_files(stage, splits, {**settings, **options.sizes}, coco)
    if samples[0].label is not None:
        _check_classes(contents)
    return contents


def _leave_out(
    images: Sequence[Mapping], items: Sequence[Item], options: SplitOptions, earlier: Mapping
) -> dict[str, list[str]]:
    """The splits of `options.leave_out`."""
    if isinstance(options.ratio, FixedTest):
        raise ValueError("--leave-out and --test-per-class both choose the test images: give one")
    ratio = (options.ratio or DEFAULT_RATIO)[:2]
    test = {image["file_name"] for where in options.leave_out for image in where.select(images)}
    if len(test) == len(items) or not any(ratio):
        rest = f"{len(items) - len(test)} images to share by {':'.join(map(str, ratio))}"
        raise ValueError(f"--leave-out leaves {rest} as train and val; leave out less")
    return leave_out(items, test, ratio, options.seed, earlier)


def _write_json(path: Path, content: dict, indent: int | None = None) -> None:
    """Write strict JSON that is the same byte for byte for the same content; make the folder."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, sort_keys=True, allow_nan=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


def write_splits(path: Path, splits: Mapping[str, Sequence[str]], settings: dict) -> None:
    """Write a splits.json: the lists, their settings, and their hash."""
    _write_json(path, {**splits, **settings, "sha256": sha256(splits)}, indent=1)


def write_split_files(
    folder: Path, splits: Mapping[str, Sequence[str]], settings: dict, coco: Mapping
) -> dict[str, dict]:
    """Write splits.json and the part of the COCO content of each split; return the parts."""
    write_splits(folder / "splits.json", splits, settings)
    contents = {split: {**coco, "images": [], "annotations": []} for split in splits}
    split_of = {name: split for split, names in splits.items() for name in names}
    split_of_id = {image["id"]: split_of[image["file_name"]] for image in coco["images"]}
    for image in coco["images"]:
        contents[split_of_id[image["id"]]]["images"].append(image)
    for annotation in coco["annotations"]:
        contents[split_of_id[annotation["image_id"]]]["annotations"].append(annotation)
    for split, content in contents.items():
        _write_json(folder / "annotations" / f"{split}.json", content)
    return contents


def _of_converted(
    splits: Mapping[str, Sequence[str]], samples: Iterable[Sample]
) -> dict[str, list[str]]:
    """The splits with the present names of images that were converted to PNG."""

    def stem(name: str) -> PurePath:
        return without_suffix(PurePosixPath(name))

    names = {stem(s.file_name): s.file_name for s in samples if s.image.needs_conversion}
    return {split: [names.get(stem(name), name) for name in part] for split, part in splits.items()}


def _group(stage: Path, samples: list[Sample], notes: list[str]) -> None:
    """Set ``group_id`` of images with a near-duplicate or a unit; list them in a file."""
    names = [sample.file_name for sample in samples]
    fields = [sample.fields for sample in samples]
    pairs, groups = duplicates.find_groups([stage / "images" / name for name in names], fields)
    for number, group in enumerate(groups, start=1):
        for i in group:
            samples[i].fields["group_id"] = number
    listed = [{"images": [names[p.a], names[p.b]], "correlation": p.correlation} for p in pairs]
    named = [[names[i] for i in group] for group in groups]
    content = {"min_correlation": duplicates.MIN_CORRELATION, "groups": named, "pairs": listed}
    _write_json(stage / "near_duplicates.json", content, indent=1)
    text = f"{sum(map(len, groups))} images in {len(groups)} groups that stay together"
    notes.append(f"{len(pairs)} pairs of near-duplicates; {text}, see near_duplicates.json")


def _check_classes(contents: Mapping[str, dict]) -> None:
    """Raise ValueError for a split without images of a class, in a classification data set."""
    for split, content in contents.items():
        labels = {annotation["category_id"] for annotation in content["annotations"]}
        missing = [c["name"] for c in content["categories"] if c["id"] not in labels]
        if missing and labels:
            text = f"{split} has no image of {', '.join(missing)}; every split needs all classes"
            raise ValueError(f"{text}: add images, change the ratio, or correct the split column")


def coco_content(samples: list[Sample], source: Source) -> dict:
    """COCO content of all splits; ids count from 1, in the order of `samples`."""
    images, annotations = [], []
    for image_id, sample in enumerate(samples, start=1):
        size = {"width": sample.image.width, "height": sample.image.height}
        images.append({**sample.fields, "id": image_id, "file_name": sample.file_name, **size})
        for annotation in sample.annotations:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**annotation, **ids})
    content = {**source.extra, "info": source.info, "categories": source.categories}
    return {**content, "images": images, "annotations": annotations}


def _items(coco: Mapping, split_by: str, stratify_by: str | None = None) -> list[Item]:
    """The images to split, and what they stay together by.

    The stratum of a classified image, which has no box, is its class; else whether it has a lesion;
    and the value of the field `stratify_by`.

    Raises:
        ValueError: no image has this field.
    """
    strata = {
        annotation["image_id"]: True if "bbox" in annotation else annotation["category_id"]
        for annotation in coco["annotations"]
        if not annotation.get("iscrowd")
    }
    images = coco["images"]
    if stratify_by and all(image.get(stratify_by) is None for image in images):
        fields = ", ".join(sorted({field for image in images for field in image}))
        raise ValueError(f"--stratify-by {stratify_by}: no image has it; they have {fields}")

    def item(image: Mapping, unit: tuple[str, str] | None) -> Item:
        if split_by == "group" and image.get("group_id") is not None:
            unit = "group", str(image["group_id"])
        stratum = strata.get(image["id"], False), str(image.get(stratify_by))
        return Item(image["file_name"], stratum, unit)

    units = units_of(images) if split_by == "patient" else [None] * len(images)
    return [item(image, unit) for image, unit in zip(images, units, strict=True)]


def _fold_settings(settings: Mapping, images: Sequence[Mapping]) -> dict:
    """Seed, split_by and stratify_by, if any, of a data set's folds; file names state no folds, but
    patients do."""
    split_by = settings["split_by"]
    if split_by == "prefix":
        split_by = "patient" if any(units_of(images)) else "image"
    of_folds = {"seed": settings["seed"], "split_by": split_by}
    if "stratify_by" in settings:
        of_folds["stratify_by"] = settings["stratify_by"]
    return of_folds


def folds_folder(prepared: Path, folds: int | str) -> Path:
    """Where `write_folds` writes: DATA.folds5, DATA.folds_by_centre."""
    kind = folds if isinstance(folds, int) else f"_by_{folds}"
    return prepared.with_name(f"{prepared.name}.folds{kind}")


def left_out_by(prepared: Path, field: str) -> list[Where]:
    """What each fold by a field of images, such as the centre, leaves out for testing.

    Raises:
        FileNotFoundError: no prepared data set.
        ValueError: an image has no value of the field, or all have the same.
    """
    check_prepared(prepared)
    images = _records(_read_contents(prepared), "images")
    unknown = [image["file_name"] for image in images if image.get(field) is None]
    values = sorted({str(image[field]) for image in images if image.get(field) is not None})
    if unknown or len(values) < 2:
        text = f"{prepared}: folds by {field} need its value in all images, and two or more values;"
        text += f" they have {', '.join(values) or 'none'}"
        if values and unknown:
            text += f", {len(unknown)} of {len(images)} have none: {few(unknown)}"
        raise ValueError(f"{text}. Give them with imrcnn prepare-dataset --metadata")
    return [Where(field, value) for value in values]


def write_folds(prepared: Path, folds: int | str) -> list[Path]:
    """Write ``fold<i>/<name>/`` into `folds_folder` next to a prepared data set, once: so many
    folds, or one per value of a field of images, such as the centre, whose images it tests.

    Each is a prepared data set, with the ids, seed, ``split_by`` and ``stratify_by`` of the
    original, and ``images`` as a relative link to the original's. Equal folds that are already
    there stay as they are. Return for each fold the folder to use as ``$IMRCNN_DATASETS``.

    Raises:
        FileNotFoundError: no prepared data set.
        FileExistsError: other folds are there, e.g. of an earlier state of the data.
        ValueError: fewer than 2 folds, or so many that one has no image to train, validate or test;
            see `left_out_by`.
    """
    check_prepared(prepared)
    coco = _merged(prepared, _read_contents(prepared))
    coco["images"].sort(key=lambda image: image["file_name"])
    settings = _fold_settings(read_json(prepared / "splits.json"), coco["images"])
    items = _items(coco, settings["split_by"], settings.get("stratify_by"))
    if isinstance(folds, int):
        parts = make_folds(items, folds, settings["seed"])
        facts = [{} for _ in parts]
    else:
        left_out = left_out_by(prepared, folds)
        names = [[i["file_name"] for i in where.select(coco["images"])] for where in left_out]
        parts = [leave_out(items, test, seed=settings["seed"]) for test in names]
        facts = [{"left_out": str(where)} for where in left_out]
    count = len(parts)
    empty = [f"fold {i}'s {s}" for i, part in enumerate(parts) for s in SPLITS if not part[s]]
    if empty:
        kept = f"{len(items)} images kept together by {settings['split_by']}"
        text = f"{count} folds of {prepared} ({kept}) leave nothing for {', '.join(empty)}"
        raise ValueError(f"{text}: take fewer folds")

    out = folds_folder(prepared, folds)
    with staged(out) as stage:
        for i, (part, fact) in enumerate(zip(parts, facts, strict=True)):
            folder = stage / f"fold{i}" / prepared.name
            folder.mkdir(parents=True)
            (folder / "images").symlink_to(Path("..", "..", "..", prepared.name, "images"))
            write_split_files(folder, part, {**settings, **fact, "fold": i, "folds": count}, coco)
            _copy_rejected(prepared, folder)
        if not out.exists():
            os.replace(stage, out)
        elif name := _first_difference(stage, out):
            text = f"{out}: holds folds of other data ({name} would change)"
            raise FileExistsError(f"{text}; remove it, and all runs on the old folds")
    return [out / f"fold{i}" for i in range(count)]


@dataclass(frozen=True)
class Move:
    """An image that changes its split from `source` to `target`."""

    name: str
    source: str
    target: str


def check_can_fix(prepared: Path, out: Path) -> None:
    """Refuse what `write_fixed_splits` would refuse whatever the groups, before a long audit.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: `out` is not empty; there is no splits.json;
            it cannot be read.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists already; choose another folder for --fix-splits")
    path = prepared / "splits.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there; --fix-splits needs a data set of imrcnn prepare-dataset"
        )
    read_splits(path)


def write_fixed_splits(
    prepared: Path,
    out: Path,
    groups: Sequence[Sequence[str]],
    pairs: Sequence[Mapping] = (),
    follow_links: bool = False,
) -> list[Move]:
    """Write a prepared data set in which no group is in two splits; without moves write nothing.

    Images of no group, and groups in one split, stay where they are; the others are assigned so
    that the splits keep their sizes as well as may be. The prepared data set stays as it is, for
    the runs that were trained on it. Images are hard links where possible. Folds are not copied:
    they are made of the new splits. Images with one ``group_id`` are a group as well; groups that
    share an image become one. `pairs` are listed in near_duplicates.json.

    Raises:
        BadInputError: an image is in two splits, an id occurs twice, or an annotation's image is
            missing.
        FileExistsError, FileNotFoundError, ValueError: see `check_can_fix`.
    """
    check_can_fix(prepared, out)
    contents = _read_contents(prepared)
    old = read_splits(prepared / "splits.json")
    settings = read_json(prepared / "splits.json")
    split_of: dict[str, str] = {}
    for split, content in contents.items():
        for image in content["images"]:
            name = image["file_name"]
            if (other := split_of.setdefault(name, split)) != split:
                reason = f"is in {other} and {split} of {prepared}; take one out"
                raise BadInputError(name, reason)
    coco = _merged(prepared, contents)
    groups = _with_old_groups(coco["images"], groups)
    group_of = {name: i for i, group in enumerate(groups, start=1) for name in group}
    crossing = {name for group in groups if len({split_of[n] for n in group}) > 1 for name in group}
    if not crossing:
        return []

    for image in coco["images"]:
        image.pop("group_id", None)
        if image["file_name"] in group_of:
            image["group_id"] = group_of[image["file_name"]]
    kept = {split: [n for n in names if n not in crossing] for split, names in old.items()}
    sizes = [len(contents[split]["images"]) for split in SPLITS]
    new = make_splits(_items(coco, "group"), sizes, settings.get("seed", 0), kept)

    with staged(out) as stage:
        for path in sorted((prepared / "images").rglob("*")):
            if path.is_file():
                check_inside(prepared / "images", path, follow_links)
                target = stage / path.relative_to(prepared)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
        replaced = (*SPLITS, "sha256", "fold", "folds", "left_out")
        settings = {key: value for key, value in settings.items() if key not in replaced}
        settings |= {"split_by": "group", "fixed_from": sha256(old)}
        write_split_files(stage, new, settings, coco)
        listed = {"groups": groups, "pairs": list(pairs)}
        _write_json(stage / "near_duplicates.json", listed, indent=1)
        _copy_rejected(prepared, stage)
        os.replace(stage, out)
    target_of = {name: split for split, names in new.items() for name in names}
    moves = (Move(name, split_of[name], target_of[name]) for name in sorted(crossing))
    return [move for move in moves if move.source != move.target]


def _with_old_groups(images: Sequence[Mapping], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """The groups and those that the images had, joined where they share an image."""
    names = [image["file_name"] for image in images]
    indices = {name: i for i, name in enumerate(names)}
    old_ids = (image.get("group_id") for image in images)
    together = list(positions(None if i is None else str(i) for i in old_ids).values())
    together += [[indices[name] for name in group] for group in groups]
    joined = joined_groups(len(names), together)
    return sorted(sorted(names[i] for i in group) for group in joined)


def _read_contents(prepared: Path) -> dict[str, dict]:
    return {split: read_json(prepared / "annotations" / f"{split}.json") for split in SPLITS}


def _merged(prepared: Path, contents: Mapping[str, dict]) -> dict:
    """COCO content of all splits, by rising id; BadInputError unless ids differ over all splits."""
    ids = {"images": set(), "annotations": set()}
    for key, (split, content) in product(ids, contents.items()):
        path = prepared / "annotations" / f"{split}.json"
        for record in content[key]:
            if record["id"] in ids[key]:
                reason = f"{key} has the id {record['id']!r} twice; number all three files anew"
                raise BadInputError(path, reason)
            ids[key].add(record["id"])
            if key == "annotations" and record["image_id"] not in ids["images"]:
                reason = f"annotation {record['id']!r} is of image {record['image_id']!r}, which no"
                raise BadInputError(path, f"{reason} split has; take it out")
    records = {key: sorted(_records(contents, key), key=lambda record: record["id"]) for key in ids}
    return {**contents["train"], **records}


def _records(contents: Mapping[str, dict], key: str) -> list[dict]:
    return [record for content in contents.values() for record in content[key]]


def _copy_rejected(prepared: Path, folder: Path) -> None:
    if (prepared / "rejected.csv").is_file():
        shutil.copyfile(prepared / "rejected.csv", folder / "rejected.csv")


def summarise(
    coco: Mapping[str, dict],
    ratio: Sequence[int] | None,
    notes: Sequence[str],
    rejects: Sequence[BadInputError],
) -> str:
    """Counts by split, difference to the ratio, size histograms, notes and rejects.

    `coco` has the contents by split, `ratio` as requested, None where the splits are stated. With a
    class per image, the images of each class are counted.
    """
    if any("bbox" not in annotation for annotation in _records(coco, "annotations")):
        lines = [*_class_counts(coco), "", *_image_sizes(coco)]
    else:
        lines = [*_lesion_counts(coco, ratio), "", *_image_sizes(coco), "", *_lesion_sizes(coco)]
    shown = [*rejects[:_SHOWN]]
    if len(rejects) > _SHOWN:
        shown.append(f"and {len(rejects) - _SHOWN} more: rejected.csv")
    for title, all_, listed in (("Notes", notes, notes), ("Rejected", rejects, shown)):
        if listed:
            lines += ["", f"{title} ({len(all_)}):", *(f"  {line}" for line in listed)]
    return "\n".join(lines)


def _class_counts(coco: Mapping[str, dict]) -> list[str]:
    categories = next(iter(coco.values()))["categories"]
    widths = {category["id"]: max(len(category["name"]), 7) for category in categories}
    names = "  ".join(category["name"].rjust(widths[category["id"]]) for category in categories)
    lines = [f"split   images  patients  {names}"]
    for split, content in coco.items():
        labels = Counter(annotation["category_id"] for annotation in content["annotations"])
        counts = "  ".join(f"{labels[id_]:{width}}" for id_, width in widths.items())
        images = content["images"]
        lines.append(f"{split:6} {len(images):7} {_patients(images):>9}  {counts}")
    return lines


def _patients(images: Sequence[dict]) -> int | str:
    return len({i["patient_id"] for i in images if i.get("patient_id") is not None}) or "-"


def _lesion_counts(coco: Mapping[str, dict], ratio: Sequence[int] | None) -> list[str]:
    total = len(_records(coco, "images"))
    title = "" if ratio is None else "  images expected by ratio"
    lines = [f"split   images  instances  lesion-free  patients{title}"]
    for i, (split, content) in enumerate(coco.items()):
        images, annotations = content["images"], content["annotations"]
        with_lesion = {a["image_id"] for a in annotations if not a["iscrowd"]}
        healthy = len(images) - len(with_lesion)
        counts = f"{len(images):7} {len(annotations):10} {healthy:12} {_patients(images):>9}"
        lines.append(f"{split:6} {counts}")
        if ratio is not None:
            expected = total * ratio[i] / sum(ratio)
            lines[-1] += f"  {expected:.1f} ({len(images) - expected:+.1f})"
    return lines


def _image_sizes(coco: Mapping[str, dict]) -> list[str]:
    sizes = Counter(f"{i['width']}x{i['height']}" for i in _records(coco, "images"))
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    lines = ["Image sizes in pixels:"] + _bars(ranked[:8])
    if len(ranked) > 8:
        lines.append(f"  and {len(ranked) - 8} more sizes, {sum(n for _, n in ranked[8:])} images")
    return lines


def _lesion_sizes(coco: Mapping[str, dict]) -> list[str]:
    areas = {image["id"]: image["width"] * image["height"] for image in _records(coco, "images")}
    shares = [100 * a["area"] / areas[a["image_id"]] for a in _records(coco, "annotations")]
    counts = np.histogram(shares, bins=_EDGES)[0].tolist()
    labels = [f"{low}-{high} %" for low, high in pairwise(_EDGES)]
    return ["Instances by share of the image's area:"] + _bars([*zip(labels, counts, strict=True)])


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    most = max(n for _, n in rows)
    width = max(len(label) for label, _ in rows)
    return [f"  {label:>{width}} {n:6} {'#' * round(_BAR * n / max(most, 1))}" for label, n in rows]
