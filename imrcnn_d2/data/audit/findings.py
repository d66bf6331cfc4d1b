"""The data set under audit, read without refusing what an audit is there to find."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from imrcnn_d2.data.formats.coco import read_coco_json
from imrcnn_d2.data.images import path_inside
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import BadInputError

__all__ = [
    "AREAS",
    "KINDS",
    "LOWEST_FIRST",
    "SEVERITIES",
    "AuditedData",
    "Entry",
    "Finding",
    "Kind",
    "find_prepared",
    "finding",
    "read_entries",
]


# In falling weight. An error makes training or its metrics wrong; a warning should be looked at.
SEVERITIES = ("error", "warning", "info")
# Kinds of which a low score is the stronger: it is a brightness or an area.
LOWEST_FIRST = ("black_frame", "tiny")
AREAS = {
    "files": "Files",
    "annotations": "Annotations",
    "leakage": "Duplicates and leakage",
    "validity": "Validity check",
    "suspects": "Annotations that the models disagree with",
}


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        area: one of `AREAS`.
        severity: that it mostly has, one of `SEVERITIES`.
        title: a few words.
        meaning: one sentence.
        remedy: one sentence.
    """

    area: str
    severity: str
    title: str
    meaning: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        kind: key of `KINDS`.
        severity: one of `SEVERITIES`.
        images: file names it is about, none if about the whole data set; of a suspect, first the
            image to look at.
        splits: of each image, "" where the data set has none.
        annotation_id: the annotation it is about, as in the file; of several the first.
        score: how strong, in the unit that `detail` says, the higher the stronger but for
            `LOWEST_FIRST`; None if there is no degree.
        detail: what was measured and found, one sentence.
    """

    kind: str
    severity: str
    images: tuple[str, ...]
    splits: tuple[str, ...]
    annotation_id: int | None = field(default=None)
    score: float | None = field(default=None)
    detail: str = field(default="")

    def __post_init__(self):
        if self.kind not in KINDS or self.severity not in SEVERITIES:
            raise ValueError(f"{self.kind!r}, {self.severity!r}: no known kind or severity")
        if len(self.images) != len(self.splits):
            raise ValueError(f"{self.kind}: {len(self.images)} images, {len(self.splits)} splits")

    @property
    def flags(self) -> bool:
        """Whether it asks for a look: an error or a warning."""
        return self.severity != "info"

    def as_json(self) -> dict:
        """Its fields, with lists for tuples."""
        return asdict(self) | {"images": list(self.images), "splits": list(self.splits)}


def finding(
    kind: str,
    images: Iterable[str],
    splits: Iterable[str],
    detail: str,
    *,
    severity: str | None = None,
    annotation_id: int | None = None,
    score: float | None = None,
) -> Finding:
    """A `Finding` that has its kind's severity unless given another.

    Raises:
        ValueError: no such kind or severity, or not one split an image.
    """
    if severity is None and kind in KINDS:
        severity = KINDS[kind].severity
    return Finding(kind, severity, tuple(images), tuple(splits), annotation_id, score, detail)


KINDS = {
    "missing_file": Kind(
        "files",
        "error",
        "File missing",
        "The annotations name an image that is not in the folder.",
        "Add the file, correct the name, or take the entry out.",
    ),
    "unreadable": Kind(
        "files",
        "error",
        "Unreadable file",
        "The file is no image, is cut short, or is of a kind that is not read.",
        "Export or copy it again from where it came from.",
    ),
    "wrong_size": Kind(
        "files",
        "error",
        "Size differs from the annotations",
        "Width and height in the JSON are not those of the image, so that masks are misplaced.",
        "Find the version of the image that was annotated, or correct the sizes.",
    ),
    "colour": Kind(
        "files",
        "warning",
        "Unusual colour",
        "The colours differ from the rest: grey, red and blue exchanged, or a strong cast.",
        "See whether it is narrow-band or dyed (keep, and note it as `light`), or a wrong export.",
    ),
    "black_frame": Kind(
        "files",
        "warning",
        "Black frame",
        "Hardly anything in the image is lit.",
        "Take it out, unless such frames are what the model will meet.",
    ),
    "blur": Kind(
        "files",
        "warning",
        "Blurred",
        "There is much less fine detail than in the other images.",
        "Look whether the lesion's border can be seen at all; if not, take it out.",
    ),
    "overexposed": Kind(
        "files",
        "warning",
        "Over-exposed",
        "Much of the view is white without any detail.",
        "Look whether the lesion's border can be seen at all; if not, take it out.",
    ),
    "text_outside_view": Kind(
        "files",
        "warning",
        "Writing outside the view",
        "There is something like text next to the endoscope's view: it may name the patient, and "
        "a model can learn from it.",
        "Prepare the data set anew with --deidentify.",
    ),
    "malformed": Kind(
        "annotations",
        "error",
        "Malformed annotation",
        "The annotation cannot be read: coordinates, run lengths, image or category are wrong; or "
        "another annotation has its id.",
        "Correct it in the annotation tool and export again.",
    ),
    "empty": Kind(
        "annotations",
        "error",
        "Empty annotation",
        "The annotation covers no pixel.",
        "Annotate the lesion, or take the annotation out.",
    ),
    "tiny": Kind(
        "annotations",
        "warning",
        "Tiny annotation",
        "The annotation is smaller than a lesion can be seen: mostly a click or a speck.",
        "Take it out, or annotate the lesion.",
    ),
    "outside_view": Kind(
        "annotations",
        "warning",
        "Outside the view",
        "Much of the annotation lies where the endoscope sees nothing.",
        "See whether the annotation belongs to this image; correct it.",
    ),
    "overlapping": Kind(
        "annotations",
        "warning",
        "Annotated twice",
        "Two annotations of one image and class cover nearly the same area.",
        "Keep one: the other would count as a missed lesion.",
    ),
    "self_crossing": Kind(
        "annotations",
        "warning",
        "Contour crosses itself",
        "The polygon's line crosses itself, so that inside and outside are not what was meant.",
        "Annotate it again in the annotation tool.",
    ),
    "class_imbalance": Kind(
        "annotations",
        "info",
        "Classes of very different size",
        "One class has many times the annotations of another.",
        "Add images of the rare one, or read its metrics with its count in mind.",
    ),
    "exact_duplicate": Kind(
        "leakage",
        "warning",
        "Same image twice",
        "Two files have the same bytes or the same pixels.",
        "Keep one; across splits --fix-splits moves them together.",
    ),
    "near_duplicate": Kind(
        "leakage",
        "warning",
        "Near-duplicate",
        "Two images show the same: a copy that was turned, mirrored or stored anew, or a frame of "
        "a moment later.",
        "Keep them in one split: --fix-splits, or --split-by group of prepare_dataset.",
    ),
    "patient_across_splits": Kind(
        "leakage",
        "error",
        "Patient in several splits",
        "Images of one patient are in more than one split, so that test metrics come out too good.",
        "Run with --fix-splits, or prepare anew with --split-by patient.",
    ),
    "cluster_disagrees": Kind(
        "validity",
        "warning",
        "Looks like another label",
        "Colour, texture and deep features put the image among those of another label.",
        "Look whether the label is right.",
    ),
    "outlier": Kind(
        "validity",
        "warning",
        "Like no other image",
        "Colour, texture and deep features are far from those of every other image.",
        "Look whether it belongs in this data set.",
    ),
    "unlabelled_lesion": Kind(
        "suspects",
        "warning",
        "Confident detection without an annotation",
        "A model that never saw the image is sure of a lesion where none is annotated.",
        "Look whether a lesion was forgotten.",
    ),
    "unmatched_outline": Kind(
        "suspects",
        "warning",
        "Annotation that no model finds",
        "No model that never saw the image finds anything where the annotation is.",
        "Look whether there is a lesion; hard cases are right to be there.",
    ),
    "badly_fitting_outline": Kind(
        "suspects",
        "warning",
        "Annotation fits badly",
        "A confident detection and the annotation overlap, but their borders are far apart.",
        "Look at the border; correct it where the model's is the better one.",
    ),
}


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
        """Whether whole images have a class each, so that there are no masks to check."""
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
        of_file = sorted(content["categories"], key=lambda category: str(category["id"]))
        if categories and _names(of_file) != _names(categories):
            raise BadInputError(
                path, f"has categories {_names(of_file)}, the file before it {_names(categories)}"
            )
        categories = of_file
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
                raise BadInputError(
                    path,
                    f"{record['file_name']} has the patient_id {patient!r}: give text or a number",
                )
            annotations = tuple(of_image.pop(str(record["id"]), ()))
            entries.append(Entry(record["file_name"], split, image, record, annotations))
        strays += [(path.name, annotation) for left in of_image.values() for annotation in left]
    order = {split: place for place, split in enumerate((*SPLITS, *files))}
    entries.sort(key=lambda entry: (order[entry.split], entry.name))
    return AuditedData(title, tuple(entries), tuple(categories), tuple(strays))


def _names(categories: list[dict]) -> dict:
    return {category["id"]: category["name"] for category in categories}
