"""Writes a prepared data set: images/, annotations/{train,val,test}.json and splits.json."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from imrcnn_d2.data import splits as splitting
from imrcnn_d2.data.grouping import group_images
from imrcnn_d2.data.images import SourceImage, install_image
from imrcnn_d2.data.output_folder import check_free, check_same, is_empty, staged, write_json
from imrcnn_d2.data.rejects import BadInputError, Rejects
from imrcnn_d2.data.stated_splits import splits_from_prefixes

__all__ = [
    "KEPT_TOGETHER",
    "SPLIT_BY",
    "Prepared",
    "Sample",
    "Source",
    "SplitOptions",
    "fold_settings",
    "prepare_dataset",
    "write_splits",
]

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
    """How to split, see `imrcnn_d2.data.splits.make_splits`.

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
