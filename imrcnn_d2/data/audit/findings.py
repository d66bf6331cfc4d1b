"""The kinds of findings, and the data set under audit, read with what is wrong in it."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imrcnn_d2.data.catalog import named_folder
from imrcnn_d2.data.formats.coco import read_coco_json
from imrcnn_d2.data.images import path_inside
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import BadInputError

# In falling weight. An error makes training or its metrics wrong; a warning should be looked at.
SEVERITIES = ("error", "warning", "info")
LOWEST_FIRST = ("black_frame", "tiny")  # kinds whose score is a brightness or an area
AREAS = {
    "files": "Files",
    "annotations": "Annotations",
    "leakage": "Duplicates and leakage",
    "validity": "Validity check",
    "suspects": "Annotations that the models disagree with",
}


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its area, usual severity, and what it means and what to do about it."""

    area: str
    severity: str
    title: str
    meaning: str
    remedy: str


# fmt: off
KINDS = {
    "missing_file": Kind("files", "error", "File missing",
        "The annotations name an image that is not in the folder.",
        "Add the file, correct the name, or take the entry out."),
    "unreadable": Kind("files", "error", "Unreadable file",
        "The file is no image, is cut short, or is of a kind that is not read.",
        "Export or copy it again from where it came from."),
    "wrong_size": Kind("files", "error", "Size differs from the annotations",
        "Width and height in the JSON are not those of the image, so that masks are misplaced.",
        "Find the version of the image that was annotated, or correct the sizes."),
    "colour": Kind("files", "warning", "Unusual colour",
        "The colours differ from the rest: grey, red and blue exchanged, or a strong cast.",
        "See whether it is narrow-band or dyed (keep, and note it as `light`), or a wrong "
        "export."),
    "black_frame": Kind("files", "warning", "Black frame",
        "Hardly anything in the image is lit.",
        "Take it out, unless such frames are what the model will meet."),
    "blur": Kind("files", "warning", "Blurred",
        "There is much less fine detail than in the other images.",
        "Look whether the lesion's border can be seen at all; if not, take it out."),
    "overexposed": Kind("files", "warning", "Over-exposed",
        "Much of the view is white without any detail.",
        "Look whether the lesion's border can be seen at all; if not, take it out."),
    "text_outside_view": Kind("files", "warning", "Writing outside the view",
        "There is something like text next to the endoscope's view: it may name the patient, "
        "and a model can learn from it.",
        "Prepare the data set anew with --deidentify."),
    "overlay": Kind("files", "info", "Writing in many images of a centre",
        "Many images have something like text at the same place next to the endoscope's view, as "
        "a processor adds it: it may name patients, and a model can learn the centre from it.",
        "Look at the example; to remove it, prepare the data set anew with --deidentify."),
    "malformed": Kind("annotations", "error", "Malformed annotation",
        "The annotation cannot be read: coordinates, run lengths, image or category are wrong; "
        "or another annotation has its id.",
        "Correct it in the annotation tool and export again."),
    "empty": Kind("annotations", "error", "Empty annotation",
        "The annotation covers no pixel.",
        "Annotate the lesion, or take the annotation out."),
    "tiny": Kind("annotations", "warning", "Tiny annotation",
        "The annotation is smaller than a lesion can be seen: mostly a click or a speck.",
        "Take it out, or annotate the lesion."),
    "outside_view": Kind("annotations", "warning", "Outside the view",
        "Much of the annotation lies where the endoscope sees nothing.",
        "See whether the annotation belongs to this image; correct it."),
    "overlapping": Kind("annotations", "warning", "Annotated twice",
        "Two annotations of one image and class cover nearly the same area.",
        "Keep one: the other would count as a missed lesion."),
    "self_crossing": Kind("annotations", "warning", "Contour crosses itself",
        "The polygon's line crosses itself, so that inside and outside are not what was meant.",
        "Annotate it again in the annotation tool."),
    "class_imbalance": Kind("annotations", "info", "Classes of very different size",
        "One class has many times the annotations of another.",
        "Add images of the rare one, or read its metrics with its count in mind."),
    "exact_duplicate": Kind("leakage", "warning", "Same image twice",
        "Two files have the same bytes or the same pixels.",
        "Keep one; across splits --fix-splits moves them together."),
    "near_duplicate": Kind("leakage", "warning", "Near-duplicate",
        "Two images show the same: a copy that was turned, mirrored or stored anew, or a frame "
        "of a moment later.",
        "Keep them in one split: --fix-splits, or imrcnn prepare-dataset "
        "--split-by group."),
    "contradicting_labels": Kind("leakage", "warning", "Same image, other label",
        "Two images show the same, but one has a lesion or class that the other has not, or its "
        "mask lies elsewhere.",
        "Look at both: correct the label, or keep the right one only."),
    "patient_across_splits": Kind("leakage", "error", "Patient in several splits",
        "Images of one patient are in more than one split, so that test metrics come out too "
        "good.",
        "Run with --fix-splits, or prepare anew with --split-by patient."),
    "cluster_disagrees": Kind("validity", "warning", "Looks like another label",
        "Colour, texture and deep features put the image among those of another label.",
        "Look whether the label is right."),
    "outlier": Kind("validity", "warning", "Like no other image",
        "Colour, texture and deep features are far from those of every other image.",
        "Look whether it belongs in this data set."),
    "unlabelled_lesion": Kind("suspects", "warning", "Confident detection without an annotation",
        "A model that never saw the image is sure of a lesion where none is annotated.",
        "Look whether a lesion was forgotten."),
    "unmatched_outline": Kind("suspects", "warning", "Annotation that no model finds",
        "No model that never saw the image finds anything where the annotation is.",
        "Look whether there is a lesion; hard cases are right to be there."),
    "badly_fitting_outline": Kind("suspects", "warning", "Annotation fits badly",
        "A confident detection and the annotation overlap, but their borders are far apart.",
        "Look at the border; correct it where the model's is the better one."),
}
# fmt: on


@dataclass
class Finding:
    """One finding of an audit."""

    kind: str
    images: tuple[str, ...]  # file names; none if it is about the whole data set
    splits: tuple[str, ...]  # of each image
    detail: str
    severity: str = ""  # of its kind unless given
    annotation_id: int | None = None  # as in the file; of several annotations the first
    score: float | None = None  # in the unit that `detail` gives

    def __post_init__(self):
        self.severity = self.severity or KINDS[self.kind].severity

    @property
    def flags(self) -> bool:
        """Whether the images should be looked at."""
        return self.severity != "info"

    @property
    def places(self) -> list[tuple[str, str]]:
        """(split, name) of each image."""
        return list(zip(self.splits, self.images, strict=True))

    @property
    def rank(self) -> tuple[int, int, float]:
        """Sorts by kind, severity and strength, the strongest first."""
        strength = math.inf if self.score is None else self.score
        if self.kind in LOWEST_FIRST and self.score is not None:
            strength = -strength
        return [*KINDS].index(self.kind), SEVERITIES.index(self.severity), -strength

    def as_json(self) -> dict:
        keys = ("kind", "severity", "images", "splits", "annotation_id", "score", "detail")
        return {key: getattr(self, key) for key in keys}


def whole_id(annotation: Mapping) -> int | None:
    """Return the id of an annotation; None if it has none or another type."""
    number = annotation.get("id")
    return number if isinstance(number, int) else None


@dataclass(frozen=True)
class Entry:
    """One image as the annotation file has it."""

    name: str  # its ``file_name``
    split: str  # "train", "val", "test", the stem of another file, or ""
    path: Path
    record: dict  # as in the COCO file
    annotations: tuple[dict, ...]

    def finding(self, kind: str, detail: str, annotation: dict | None = None, **fields) -> Finding:
        """Return a finding about this image, or about an annotation of it."""
        number = whole_id(annotation or {})
        return Finding(kind, (self.name,), (self.split,), detail, annotation_id=number, **fields)


@dataclass(frozen=True)
class AuditedData:
    """A data set under audit."""

    title: str
    entries: tuple[Entry, ...]  # by split and name
    categories: tuple[dict, ...]
    strays: tuple[tuple[str, dict], ...]  # name of a file, annotation of an image not in it

    @property
    def classified(self) -> bool:
        """Whether whole images have a class each, so that there are no masks to check."""
        annotations = [a for entry in self.entries for a in entry.annotations]
        return bool(annotations) and not any(
            "bbox" in a or "segmentation" in a for a in annotations
        )


def find_prepared(name: str) -> Path:
    """Return the folder of a prepared data set, of which `name` is the name (`named_folder`) or the
    path; raise FileNotFoundError if there is none."""
    for folder in (named_folder(name), Path(name)):
        if (folder / "annotations").is_dir() and (folder / "images").is_dir():
            return folder
    remedy = "make one with imrcnn prepare-dataset, or give --annotations with --images"
    raise FileNotFoundError(
        f"{named_folder(name)}: no prepared data set (images/ and annotations/); {remedy}"
    )


def read_entries(
    title: str, files: Mapping[str, Path], image_root: Path, follow_links: bool = False
) -> AuditedData:
    """Read COCO instance files by split, "" for none; what is wrong with single images or
    annotations is left as it is. `follow_links` allows links that lead out of `image_root`.

    Raises:
        BadInputError: a file cannot be used as a whole, an image is listed twice in one file, files
            name different categories, a ``file_name`` leads outside the folder, or a ``patient_id``
            is neither text nor a number.
    """
    entries: list[Entry] = []
    strays: list[tuple[str, dict]] = []
    categories, names = [], {}
    for split, path in files.items():
        content = read_coco_json(path)
        categories = sorted(content["categories"], key=lambda category: str(category["id"]))
        previous, names = names, {category["id"]: category["name"] for category in categories}
        if previous and names != previous:
            raise BadInputError(path, f"has categories {names}, the file before it {previous}")
        for key in ("id", "file_name"):
            for value, times in Counter(str(i[key]) for i in content["images"]).most_common(1):
                if times > 1:
                    raise BadInputError(path, f"lists {times} images with {key} {value!r}")
        of_image: dict[str, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            of_image[str(annotation["image_id"])].append(annotation)
        for record in content["images"]:
            name, patient = record["file_name"], record.get("patient_id")
            image = path_inside(image_root, name, path, follow_links)
            if not isinstance(patient, str | int | float | None):
                reason = f"{name} has the patient_id {patient!r}: give text or a number"
                raise BadInputError(path, reason)
            annotations = tuple(of_image.pop(str(record["id"]), ()))
            entries.append(Entry(name, split, image, record, annotations))
        strays += [(path.name, annotation) for rest in of_image.values() for annotation in rest]
    order = {split: place for place, split in enumerate((*SPLITS, *files))}
    entries.sort(key=lambda entry: (order[entry.split], entry.name))
    return AuditedData(title, tuple(entries), tuple(categories), tuple(strays))
