"""Writes a data set for annotation tools: LabelMe, CVAT, or a mask file for each instance."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.formats.cvat import cvat_documents
from imrcnn_d2.data.formats.labelme import labelme_document
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS, further_fields
from imrcnn_d2.data.prepare.data_set import Sample, Source, is_empty, staged
from imrcnn_d2.utils.files import BadInputError

__all__ = ["FORMATS", "export"]


NAMES = dict[int, str]  # of the classes, by category id


def export(source: Source, to: str, out: Path) -> list[str]:
    """Writes the annotations of a data set for another tool; images stay where they are.

    - labelme: NAME.json for each image, which points to it.
    - cvat: annotations.xml (CVAT for images 1.1) and labels.json, the labels to make a task with.
    - masks: NAME/CLASS_1.png for each instance, 0 and 255; NAME/0.png, all 0, without one.

    The folder is built beside `out` and renamed at the end.

    Args:
        source: the data set; its samples are used up.
        to: one of `FORMATS`.
        out: the folder to make.

    Returns:
        what the format cannot keep, for the user.

    Raises:
        FileExistsError: `out` holds something.
        BadInputError: what the data set holds cannot be written so, or is bad input.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists; choose another --output or remove it first")
    names = {category["id"]: category["name"] for category in source.categories}
    nested: set[str] = set()
    source = replace(source, samples=_noting_nested(source.samples, nested))
    with staged(out) as stage:
        notes = FORMATS[to](source, names, stage, out)
        os.replace(stage, out)
    if nested:
        notes.append(f"lists and objects cannot be kept: {', '.join(sorted(nested))}")
    return [*source.notes, *notes]


def _noting_nested(samples: Iterable[Sample], names: set[str]) -> Iterator[Sample]:
    """The samples; adds the further fields that are lists or objects to `names`."""
    own = {*IMAGE_FIELDS, *ANNOTATION_FIELDS}
    for sample in samples:
        for record in (sample.fields, *sample.annotations):
            names.update(
                k for k, v in record.items() if k not in own and isinstance(v, list | dict)
            )
        yield sample


def _labelme(source: Source, names: NAMES, stage: Path, out: Path) -> list[str]:
    for sample in _unique(source):
        name = PurePosixPath(sample.file_name).with_suffix(".json")
        path = stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image_path = os.path.relpath(sample.image.path.resolve(), (out / name).parent.resolve())
        document = labelme_document(
            sample.annotations,
            names,
            Path(image_path).as_posix(),
            sample.image.height,
            sample.image.width,
            fields=further_fields(sample.fields, IMAGE_FIELDS),
        )
        text = json.dumps(document, ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    return []


def _cvat(source: Source, names: NAMES, stage: Path, out: Path) -> list[str]:
    lost: set[str] = set()

    def samples() -> Iterator[Sample]:
        for sample in tqdm(source.samples, desc="Writing", unit="image"):
            lost.update(further_fields(sample.fields, IMAGE_FIELDS))
            yield sample

    text, labels = cvat_documents(samples(), names)
    stage.joinpath("annotations.xml").write_text(text, encoding="utf-8")
    text = json.dumps(labels, ensure_ascii=False, indent=2)
    stage.joinpath("labels.json").write_text(text + "\n", encoding="utf-8")
    return [f"not in CVAT's file: {', '.join(sorted(lost))} of the images"] if lost else []


def _masks(source: Source, names: NAMES, stage: Path, out: Path) -> list[str]:
    for name in names.values():
        if re.search(r'[/\\:*?"<>|\0]|^[ ._-]|[ ._-]$|[ ._-]\d+$', name) or name.isdigit():
            raise BadInputError(name, "this class cannot be told from a file's name; rename it")
    lost: set[str] = set()
    for sample in _unique(source):
        folder = stage / PurePosixPath(sample.file_name).with_suffix("")
        folder.mkdir(parents=True)
        height, width = sample.image.height, sample.image.width
        if not sample.annotations:
            Image.fromarray(np.zeros((height, width), np.uint8)).save(folder / "0.png")
        for number, annotation in enumerate(sample.annotations, start=1):
            if annotation["iscrowd"]:
                raise BadInputError(
                    sample.image.path, "has a crowd region, which masks cannot mark as one"
                )
            mask = mask_util.decode(to_rle(annotation["segmentation"], height, width)) * 255
            Image.fromarray(mask).save(folder / f"{names[annotation['category_id']]}_{number}.png")
            lost |= set(further_fields(annotation, ANNOTATION_FIELDS))
        lost |= set(further_fields(sample.fields, IMAGE_FIELDS))
    return [f"not in the masks: {', '.join(sorted(lost))}"] if lost else []


FORMATS: Mapping[str, Callable[[Source, NAMES, Path, Path], list[str]]] = {
    "labelme": _labelme,
    "cvat": _cvat,
    "masks": _masks,
}


def _unique(source: Source) -> Iterator[Sample]:
    """The samples; BadInputError for two whose names differ in the file type alone."""
    seen: dict[str, Path] = {}
    for sample in tqdm(source.samples, desc="Writing", unit="image"):
        stem = str(PurePosixPath(sample.file_name).with_suffix(""))
        if stem in seen:
            raise BadInputError(
                sample.image.path, f"would share its file with {seen[stem]}; rename one of them"
            )
        seen[stem] = sample.image.path
        yield sample
