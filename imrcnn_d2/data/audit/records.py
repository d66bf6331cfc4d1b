"""The data set under audit, read without refusing what an audit is there to find."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imrcnn_d2.data.coco import read_coco_json
from imrcnn_d2.data.images import path_inside
from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.data.splits import SPLITS

__all__ = ["AuditedData", "Entry", "find_prepared", "read_entries"]


@dataclass(frozen=True)
class Entry:
    """One image as the annotation file has it.

    Attributes:
        name: its ``file_name``.
        split: "train", "val" or "test", the stem of its file where there are several others, or "".
        path: the image.
        record: its COCO record.
        annotations: its COCO annotations, as they are.
    """

    name: str
    split: str
    path: Path
    record: dict
    annotations: tuple[dict, ...]


@dataclass(frozen=True)
class AuditedData:
    """A data set as it was read.

    Attributes:
        title: to call it by.
        entries: its images, by split and name.
        categories: COCO categories.
        strays: annotations whose image is not in their file, with the name of the file.
    """

    title: str
    entries: tuple[Entry, ...]
    categories: tuple[dict, ...]
    strays: tuple[tuple[str, dict], ...]

    @property
    def classified(self) -> bool:
        """Whether whole images have a class each, so that there are no outlines to check."""
        annotations = [a for entry in self.entries for a in entry.annotations]
        return bool(annotations) and not any(
            "bbox" in a or "segmentation" in a for a in annotations
        )


def find_prepared(name: str) -> Path:
    """The folder of a prepared data set, under ``$IMRCNN_DATASETS`` (default ``datasets/``).

    Args:
        name: e.g. "kvasir_seg", or the path of such a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(os.environ.get("IMRCNN_DATASETS", "datasets"))
    for folder in (root / name, Path(name)):
        if (folder / "annotations").is_dir() and (folder / "images").is_dir():
            return folder
    raise FileNotFoundError(
        f"{root / name}: no prepared data set is there (annotations/ and images/). Make it with "
        "tools/prepare_dataset.py, or give --annotations FILE --images DIR instead of --dataset."
    )


def read_entries(
    title: str, files: Mapping[str, Path], image_root: Path, follow_links: bool = False
) -> AuditedData:
    """Reads COCO files; what is wrong with single images or annotations is left as it is.

    Args:
        title: to call the data set by.
        files: COCO instance JSON by split; "" for no split.
        image_root: the folder that each ``file_name`` is relative to.
        follow_links: whether links in that folder may lead out of it.

    Raises:
        BadInputError: a file as a whole cannot be used, an image is listed twice in one file, files
            name different categories, a ``file_name`` leads outside the folder, or a ``patient_id``
            is neither text nor a number.
    """
    entries: list[Entry] = []
    strays: list[tuple[str, dict]] = []
    categories: list[dict] = []
    for split, path in files.items():
        content = read_coco_json(path)
        own = sorted(content["categories"], key=lambda category: str(category["id"]))
        if categories and _names(own) != _names(categories):
            raise BadInputError(
                path, f"has categories {_names(own)}, the file before it {_names(categories)}"
            )
        categories = own
        for key in ("id", "file_name"):
            (value, times), *_ = Counter(str(i[key]) for i in content["images"]).most_common(1) or [
                ("", 0)
            ]
            if times > 1:
                raise BadInputError(path, f"lists {times} images with {key} {value!r}; keep one")
        of_image: dict[str, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            of_image[str(annotation["image_id"])].append(annotation)
        for record in content["images"]:
            image = path_inside(image_root, record["file_name"], path, follow_links)
            patient = record.get("patient_id")
            if not isinstance(patient, str | int | float | None):
                told = (
                    f"{record['file_name']} has the patient_id {patient!r}: give text or a number"
                )
                raise BadInputError(path, told)
            annotations = tuple(of_image.pop(str(record["id"]), ()))
            entries.append(Entry(record["file_name"], split, image, record, annotations))
        strays += [(path.name, annotation) for own in of_image.values() for annotation in own]
    order = {split: place for place, split in enumerate((*SPLITS, *files))}
    entries.sort(key=lambda entry: (order[entry.split], entry.name))
    return AuditedData(title, tuple(entries), tuple(categories), tuple(strays))


def _names(categories: list[dict]) -> dict:
    return {category["id"]: category["name"] for category in categories}
