"""What a prepared data set holds, as text."""

import contextlib
import filecmp
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from imrcnn_d2.data.images import SourceImage, install_image
from imrcnn_d2.data.prepare import splits as splitting
from imrcnn_d2.data.prepare.splits import (
    SPLITS,
    Item,
    group_images,
    make_folds,
    splits_from_prefixes,
)
from imrcnn_d2.utils.files import BadInputError, Rejects, read_json

__all__ = [
    "KEPT_TOGETHER",
    "SPLIT_BY",
    "Prepared",
    "Sample",
    "Source",
    "SplitOptions",
    "check_free",
    "check_same",
    "first_difference",
    "fold_settings",
    "is_empty",
    "prepare_dataset",
    "staged",
    "strata_of",
    "summarise",
    "summarise_classes",
    "write_folds",
    "write_json",
    "write_splits",
]


# Grows beside a data set with every evaluation of its test part (evaluation/test_log.py).
TEST_LOG = "test_evaluations.csv"


def write_json(path: Path, content: dict, indent: int | None = None) -> None:
    """Writes strict JSON that is the same byte for byte for the same content; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, sort_keys=True, allow_nan=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to be renamed to it when complete; removed if it was not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    stage.chmod(0o755)  # mkdtemp's is private
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


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
class Sample:
    """One checked image with its annotations.

    Attributes:
        file_name: relative to the prepared images/.
        image: the file to install there.
        annotations: COCO annotations without ``id`` and ``image_id``.
        fields: further COCO image fields, e.g. ``patient_id``.
        label: id of the image's class where whole images are classified; its one annotation then
            is {"category_id": label}.
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
    """Where a data set comes from.

    Attributes:
        samples: yields every sample once.
        categories: COCO categories.
        info: COCO ``info``, or empty.
        notes: what to tell the user, may grow while `samples` is consumed.
        extra: further top-level COCO fields, passed through, e.g. ``licenses``.
    """

    samples: Iterable[Sample]
    categories: list[dict]
    info: dict
    notes: list[str] = field(default_factory=list)
    extra: dict = field(default_factory=dict)


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

    ratio: Sequence[int] | splitting.FixedTest = (12, 3, 5)
    seed: int = 0
    split_by: str = "patient"
    earlier: Mapping[str, Sequence[str]] | None = None
    folds: int = 0

    @property
    def sizes(self) -> dict:
        """How large the splits should be, for splits.json."""
        if self.split_by == "prefix":
            return {}
        if isinstance(self.ratio, splitting.FixedTest):
            of_class, percent = self.ratio.per_stratum, self.ratio.val_percent
            return {"test_per_class": of_class, "val_percent": percent}
        return {"ratio": list(self.ratio)}


@dataclass
class Prepared:
    """What `prepare_dataset` made: COCO contents by split, and what to tell the user."""

    out: Path
    coco: dict[str, dict]
    notes: list[str]
    unchanged: bool


def prepare_dataset(source: Source, out: Path, options: SplitOptions, rejects: Rejects) -> Prepared:
    """Installs the images, splits them and writes the annotations.

    The folder is built beside `out` and renamed at the end, so a failed run leaves nothing behind.
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
    items = [splitting.Item(s.file_name, s.stratum, s.fields.get(unit)) for s in samples]
    gone = sorted({name for part in earlier.values() for name in part} - {i.name for i in items})
    if gone:
        source.notes.append(f"{len(gone)} files of the given splits are gone: {', '.join(gone)}")

    splits = splitting.make_splits(items, options.ratio, options.seed, earlier=earlier)
    _check_classes(samples, splits, source.categories)
    settings = {"seed": options.seed, "split_by": split_by}
    write_splits(stage / "splits.json", splits, {**settings, **options.sizes})
    if options.folds:
        folds = splitting.make_folds(items, options.folds, options.seed)
        for i, fold in enumerate(folds):
            path = stage / "folds" / f"fold{i}.json"
            about = {"fold": i, "folds": options.folds, **fold_settings(settings)}
            write_splits(path, fold, about)

    coco = _coco_by_split(samples, splits, source)
    for split, content in coco.items():
        write_json(stage / "annotations" / f"{split}.json", content)
    return coco


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
    """Where whole images are classified, a split without a class could teach or tell nothing."""
    label_of = {sample.file_name: sample.label for sample in samples}
    if None in label_of.values():
        return
    for split, names in splits.items():
        there = {label_of[name] for name in names}
        missing = [c["name"] for c in categories if c["id"] not in there]
        if missing and names:
            raise ValueError(
                f"{split} has no image of {', '.join(missing)}: every split needs all "
                f"{len(categories)} classes. Add images, change the ratio, or correct the split "
                "column."
            )


def _coco_by_split(
    samples: list[Sample], splits: Mapping[str, Sequence[str]], source: Source
) -> dict[str, dict]:
    """COCO contents by split; ids count from 1 over all splits, in the order of `samples`."""
    split_of = {name: split for split, names in splits.items() for name in names}
    coco = {
        split: {
            **source.extra,
            "info": source.info,
            "categories": source.categories,
            "images": [],
            "annotations": [],
        }
        for split in splits
    }
    annotation_id = 0
    for image_id, sample in enumerate(samples, start=1):
        content = coco[split_of[sample.file_name]]
        size = {"width": sample.image.width, "height": sample.image.height}
        content["images"].append(
            {**sample.fields, "id": image_id, "file_name": sample.file_name, **size}
        )
        for annotation in sample.annotations:
            annotation_id += 1
            content["annotations"].append({**annotation, "id": annotation_id, "image_id": image_id})
    return coco


def write_splits(path: Path, splits: Mapping[str, Sequence[str]], settings: dict) -> None:
    """Writes a splits.json: the lists, how they came about, and their hash."""
    write_json(path, {**splits, **settings, "sha256": splitting.sha256(splits)}, indent=1)


def fold_settings(settings: Mapping) -> dict:
    """Seed and split_by of a data set's folds; file names state no folds."""
    split_by = settings["split_by"]
    return {"seed": settings["seed"], "split_by": "image" if split_by == "prefix" else split_by}


def write_folds(prepared: Path, count: int) -> list[Path]:
    """Writes ``<prepared>.folds<count>/fold<i>/<name>/`` beside a prepared data set, once.

    Each is a prepared data set of its own: annotations with the ids of the original, a splits.json
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
    settings = fold_settings(_read(prepared / "splits.json"))
    parts = [_read(prepared / "annotations" / f"{split}.json") for split in SPLITS]
    images = sorted((i for part in parts for i in part["images"]), key=lambda i: i["file_name"])
    annotations = sorted((a for part in parts for a in part["annotations"]), key=lambda a: a["id"])
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
            write_splits(folder / "splits.json", fold, {**settings, "fold": i, "folds": count})
            for split, names in fold.items():
                wanted = set(names)
                own = [image for image in images if image["file_name"] in wanted]
                ids = {image["id"] for image in own}
                of_fold = [a for a in annotations if a["image_id"] in ids]
                content = {**parts[0], "images": own, "annotations": of_fold}
                write_json(folder / "annotations" / f"{split}.json", content)
            if (prepared / "rejected.csv").is_file():
                shutil.copyfile(prepared / "rejected.csv", folder / "rejected.csv")
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


def strata_of(annotations: Iterable[Mapping]) -> dict:
    """What splits get their share of, by image id; images without a lesion are left out.

    Of classified images, which have no boxes, it is the class; else that there is a lesion.
    """
    return {
        annotation["image_id"]: True if "bbox" in annotation else annotation["category_id"]
        for annotation in annotations
        if not annotation.get("iscrowd")
    }


def _read(path: Path) -> dict:
    return read_json(path)


_EDGES = (0, 1, 2, 5, 10, 20, 50, 100)  # share of the image in percent
_BAR = 40


def summarise(
    coco: Mapping[str, dict],
    ratio: Sequence[int] | None,
    notes: Sequence[str],
    rejects: Sequence[BadInputError],
) -> str:
    """Counts by split, difference to the ratio, size histograms, notes and rejects.

    Args:
        coco: COCO contents by split.
        ratio: what was asked for, in the order of `coco`; None where file names state the splits.
        notes: lines to repeat.
        rejects: what was left out, and why.
    """
    return "\n".join(
        [
            *_counts(coco, ratio),
            "",
            *_image_sizes(coco),
            "",
            *_lesion_sizes(coco),
            *_listed("Notes", notes),
            *_listed("Rejected", [str(error) for error in rejects]),
        ]
    )


def summarise_classes(
    coco: Mapping[str, dict], notes: Sequence[str], rejects: Sequence[BadInputError]
) -> str:
    """As `summarise`, for images with a class each: images of each class by split."""
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
    return "\n".join(
        [
            *lines,
            "",
            *_image_sizes(coco),
            *_listed("Notes", notes),
            *_listed("Rejected", [str(error) for error in rejects]),
        ]
    )


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
    sizes = Counter(
        f"{image['width']}x{image['height']}"
        for content in coco.values()
        for image in content["images"]
    )
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
