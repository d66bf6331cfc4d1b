"""Merge: several prepared data sets as one, whose images keep their centre and their split."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.coco import read_coco
from imrcnn_d2.data.images import pixel_sha256
from imrcnn_d2.data.masks import named_categories
from imrcnn_d2.data.prepare.duplicates import find_near_duplicates
from imrcnn_d2.data.prepare.splits import SPLITS, check_prepared
from imrcnn_d2.utils.files import BadInputError, Rejects


class Merge(base.Format):
    name = "merge"
    help = "several prepared data sets of lesions as one"
    default_ratio = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        help_ = "prepared data sets; file names and ids begin with the folder's name"
        parser.add_argument("roots", type=Path, nargs="+", metavar="DIR", help=help_)
        parser.add_argument(
            "--classes",
            nargs="+",
            metavar="LABEL",
            help="the classes in their order; one alone takes the lesions of all classes as it "
            "(default: those of the data sets, which must agree)",
        )
        parser.add_argument(
            "--without-near-duplicates",
            action="store_true",
            help="of images that show the same scene in two data sets or splits only one is taken: "
            "that of test, else of val, else of the data set named first; rejected.csv lists the "
            "others",
        )

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        source = read_merged(args.roots, rejects, args.classes)
        if args.ratio or args.splits or args.leave_out:  # which assign the images anew
            source.splits = {}
        if args.without_near_duplicates:
            source.samples = _without_near_duplicates(source.samples, source, rejects)
        return source


@dataclass(frozen=True)
class _Part:
    """A split of a prepared data set, as read."""

    name: str  # of the data set
    root: Path
    split: str
    source: base.Source
    categories: dict[int, int]  # merged id by the data set's


def read_merged(
    roots: Sequence[Path], rejects: Rejects, classes: Sequence[str] | None = None
) -> base.Source:
    """Read prepared data sets; the splits of the source are theirs.

    File names, patients, sequences, videos and lesions are prefixed by the name of their data set,
    so that equal ids of two hospitals stay two. An image without a centre gets that name as its
    centre. Of images with the same pixels in two data sets the first is taken; the others are
    listed with the rejects, whatever ``on_error`` says.

    Args:
        classes: their names in order, of which each data set may have some; a single one replaces
            all names. None for the classes of the data sets, which then must have the same.

    Raises:
        FileNotFoundError: a folder is no prepared data set.
        ValueError: a folder is given twice.
        BadInputError: classes do not agree, or bad input under ``on_error="raise"``.
    """
    for root in roots:
        check_prepared(root)
    named = dict(zip(base.distinct_names(roots, "merge"), roots, strict=True))
    sources = {
        (name, split): read_coco(root / "annotations" / f"{split}.json", root / "images", rejects)
        for name, root in named.items()
        for split in SPLITS
    }
    categories = _categories(
        {root: sources[name, "train"].categories for name, root in named.items()}, classes
    )
    parts = [
        _Part(name, named[name], split, source, _new_ids(source, categories))
        for (name, split), source in sources.items()
    ]
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    trains = {name: sources[name, "train"] for name in named}
    info = {"description": f"{', '.join(named)} merged"}
    for key in ("url", "terms"):
        if texts := [f"{n}: {s.info[key]}" for n, s in trains.items() if s.info.get(key)]:
            info[key] = "; ".join(texts)
    merged = base.Source((), categories, info, splits=splits)
    merged.extra = _extra(trains, merged.notes)
    merged.samples = _samples(parts, merged, rejects)
    return merged


def _categories(of_roots: dict[Path, list[dict]], classes: Sequence[str] | None) -> list[dict]:
    """The categories of all data sets, numbered from 1."""
    known = {c["name"]: c for categories in of_roots.values() for c in categories}
    names = {root: [c["name"] for c in categories] for root, categories in of_roots.items()}
    first, *others = names
    if classes is None:
        classes = names[first]
        for root in others:
            if {*names[root]} != {*classes}:
                text = f"has the classes {', '.join(names[root])}, but {first} has "
                text += f"{', '.join(classes)}: --classes lesion takes all as one class, lesion, "
                both = dict.fromkeys([*classes, *names[root]])
                text += f"and --classes {' '.join(both)} keeps them apart"
                raise BadInputError(root, text)
    elif len(classes) > 1:
        for root, names_of_root in names.items():
            if missing := [name for name in names_of_root if name not in classes]:
                reason = f"has the class {missing[0]}, which --classes does not name"
                raise BadInputError(root, reason)
    numbered = named_categories((), classes, "--classes")
    return [{**known.get(category["name"], {}), **category} for category in numbered]


def _new_ids(source: base.Source, categories: Sequence[dict]) -> dict[int, int]:
    ids = {category["name"]: category["id"] for category in categories}
    only = categories[0]["id"] if len(categories) == 1 else None
    return {id_: only or ids[name] for id_, name in source.class_names.items()}


def _extra(sources: dict[str, base.Source], notes: list[str]) -> dict:
    """Further top-level fields: all videos, and what is the same in all data sets that have it."""
    extra: dict = {}
    for key in dict.fromkeys(key for source in sources.values() for key in source.extra):
        values = {name: s.extra[key] for name, s in sources.items() if key in s.extra}
        first, *others = values.values()
        if key == "videos":
            all_ = [(name, video) for name, videos in values.items() for video in videos]
            extra[key] = [{**video, "id": f"{name}/{video['id']}"} for name, video in all_]
        elif all(value == first for value in others):
            extra[key] = first
        else:
            notes.append(f"{key} differs between {', '.join(values)} and is left out")
    return extra


def _samples(
    parts: Sequence[_Part], merged: base.Source, rejects: Rejects
) -> Iterator[base.Sample]:
    first: dict[str, tuple[str, base.Sample]] = {}  # data set and image by hash of the pixels
    copies: Counter[tuple[str, str]] = Counter()  # by the data sets of both
    in_sets: dict[str, dict[str, None]] = defaultdict(dict)  # data sets by centre
    for part in parts:
        for sample in part.source.samples:
            with rejects.catch():
                path = sample.image.path
                name, other = first.setdefault(pixel_sha256(path), (part.name, sample))
                if name != part.name:
                    copies[part.name, name] += 1
                    rejects.leave_out(_copy(sample, other))
                    continue
                _prefix_ids(sample, part.name)
                for annotation in sample.annotations:
                    annotation["category_id"] = part.categories[annotation["category_id"]]
                sample.defaults["centre"] = part.name
                in_sets[sample.fields.get("centre") or part.name][part.name] = None
                if merged.splits:
                    merged.splits[part.split].append(sample.file_name)
                yield sample
        merged.notes += part.source.notes
    for (later, earlier), count in copies.items():
        text = f"{count} images of {later} are in {earlier} as well, pixel for pixel"
        merged.notes.append(f"{text}: taken from {earlier}")
    for centre, names in in_sets.items():
        if len(names) > 1:
            text = "equal ids there are different patients, since ids are those of a data set"
            merged.notes.append(f"the centre {centre} is in {', '.join(names)}: {text}")


def _without_near_duplicates(
    samples: Iterable[base.Sample], merged: base.Source, rejects: Rejects
) -> Iterator[base.Sample]:
    """The samples but those that show the same scene as one of another data set or split which
    ranks before them: test before val before train, then in the order of the data sets."""
    samples = list(samples)
    split_of = {name: split for split, names in merged.splits.items() for name in names}
    places = [(split_of.get(s.file_name), s.defaults["centre"]) for s in samples]
    near: dict[int, dict[int, float]] = defaultdict(dict)
    for a, b, correlation in map(astuple, find_near_duplicates([s.image.path for s in samples])):
        if places[a] != places[b]:
            near[a][b] = near[b][a] = correlation
    order = {split: rank for rank, split in enumerate((*SPLITS[::-1], None))}
    kept = set(range(len(samples))) - near.keys()
    for i in sorted(near, key=lambda i: order[places[i][0]]):  # stable: by data set within a split
        if others := near[i].keys() & kept:
            other = max(others, key=near[i].get)
            reason = f"the same scene as {samples[other].image.path}, which is taken (correlation "
            reason += f"{near[i][other]})"
            rejects.leave_out(BadInputError(samples[i].image.path, reason))
        else:
            kept.add(i)
    taken = {samples[i].file_name for i in kept}
    for split, names in merged.splits.items():
        merged.splits[split] = [name for name in names if name in taken]
    text = "images show the same scene as one of another data set or split, and were left out"
    merged.notes.append(f"{len(samples) - len(kept)} {text}: see rejected.csv")
    yield from (samples[i] for i in sorted(kept))


def _prefix_ids(sample: base.Sample, name: str) -> None:
    """Begin the file name and the ids with the data set's name; its near-duplicates' are gone."""
    sample.file_name = f"{name}/{sample.file_name}"
    sample.fields.pop("group_id", None)
    for record in (sample.fields, *sample.annotations):
        base.prefix_ids(record, f"{name}/")


def _copy(sample: base.Sample, other: base.Sample) -> BadInputError:
    boxes = (sorted(a["bbox"] for a in s.annotations) for s in (sample, other))
    agree = "the same boxes" if len({*map(str, boxes)}) == 1 else "other boxes"
    reason = f"the same pixels as {other.image.path}, and {agree}; the first is taken"
    return BadInputError(sample.image.path, reason)
