"""Data that a model has not seen, as one ground truth: prepared data sets, all splits of each, or
folders of images and masks."""

import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from imrcnn_d2.data.catalog import prepared_folder
from imrcnn_d2.data.formats.base import distinct_names, prefix_ids
from imrcnn_d2.data.formats.coco import read_lesions
from imrcnn_d2.data.formats.mask_folder import read_mask_folder
from imrcnn_d2.data.images import check_folder, image_inside
from imrcnn_d2.data.prepare.data_set import coco_content
from imrcnn_d2.data.prepare.metadata import with_defaults
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import BadInputError, Rejects, few


@dataclass
class ExternalData:
    """One ground truth. All images have a ``centre``; annotations have the name of their class in
    the data as ``class``."""

    coco: dict
    paths: list[Path]  # of the images
    notes: list[str] = field(default_factory=list)  # for the user

    def _add(
        self,
        content: dict,
        paths: Sequence[Path],
        file: Path,
        centre: str,
        prefix: str = "",
        shared: Set[str] = frozenset(),
    ) -> None:
        """Add the content of a COCO file. Ids of patients, sequences and lesions begin with the
        prefix, and so do centres that are shared with other data sets."""
        classes = [category["name"] for category in self.coco["categories"]]
        labels = {category["id"]: category["name"] for category in content["categories"]}
        ids: dict[object, int] = {}
        for image in content["images"]:
            number = ids[image["id"]] = len(self.coco["images"]) + 1
            given = image.get("centre")
            place = f"{prefix}{given}" if given in shared else given or centre
            record = {**image, "id": number, "centre": place}
            self.coco["images"].append(prefix_ids(record, prefix))
        if len(ids) < len(content["images"]):
            raise BadInputError(file, "has two images with the same id: keep one")
        self.paths += paths
        for annotation in content["annotations"]:
            image, label = ids.get(annotation["image_id"]), labels.get(annotation["category_id"])
            if image is None or label is None:
                name = f"annotation {annotation.get('id')!r}"
                raise BadInputError(file, f"{name} is of an image or a class that it lacks")
            if len(classes) > 1 and label not in classes:
                reason = f"has the class {label!r}, which the model lacks: it knows"
                raise BadInputError(file, f"{reason} {few(classes, 20)}")
            category = 1 + classes.index(label) if len(classes) > 1 else 1
            record = {**annotation, "id": len(self.coco["annotations"]) + 1, "image_id": image}
            record |= {"category_id": category, "class": label}
            self.coco["annotations"].append(prefix_ids(record, prefix))


def _empty(classes: Sequence[str]) -> ExternalData:
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return ExternalData({"images": [], "annotations": [], "categories": categories}, [])


def read_prepared(folders: Sequence[Path], classes: Sequence[str]) -> ExternalData:
    """Read all images of folders of `prepare_dataset`, or of their short names, whatever their
    split: to a model that saw none of them, all are external.

    Images without a centre are of one that is named after their folder. Of several folders, ids of
    patients, sequences and lesions begin with the folder's name, and so do centres that two of them
    have.

    Args:
        classes: the model's. A single one stands for all classes of the data.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks annotations or an image.
        BadInputError: annotations cannot be read, or have classes that the model lacks.
        ValueError: a folder is given twice.
    """
    folders = [prepared_folder(folder) for folder in folders]
    contents = {}
    for name, folder in zip(distinct_names(folders, "--data"), folders, strict=True):
        check_folder(folder)
        files = [folder / "annotations" / f"{split}.json" for split in SPLITS]
        contents[name] = {file: read_lesions(file) for file in files if file.is_file()}
        if not contents[name]:
            raise FileNotFoundError(
                f"{folder}: is no prepared data set, which has annotations/test.json. Prepare the "
                "data with imrcnn prepare-dataset NAME --all-test, or give folders of "
                "images and of masks as --images and --masks"
            )
    centres = Counter(
        centre
        for by_file in contents.values()
        for centre in {i.get("centre") for c in by_file.values() for i in c["images"]} - {None}
    )
    shared = {centre for centre, number in centres.items() if number > 1}
    data = _empty(classes)
    for (name, by_file), folder in zip(contents.items(), folders, strict=True):
        prefix = f"{name}/" if len(folders) > 1 else ""
        for file, content in by_file.items():
            names = [image["file_name"] for image in content["images"]]
            paths = [image_inside(folder / "images", each, file) for each in names]
            data._add(content, paths, file, name, prefix, shared)
    return data


def read_folders(
    images: Sequence[Path], masks: Sequence[Path], classes: Sequence[str]
) -> ExternalData:
    """Read folders of images and of their masks, see `read_mask_folder`. Each is a centre of its
    name, or of the folder's above it where that is "images". The lesions are of the model's class,
    of which it may have one.

    Raises:
        ValueError: the model has several classes, or files cannot be used, of which it names some;
            or as `read_mask_folder`.
    """
    if len(classes) > 1:
        raise ValueError(
            f"--masks name no class, and the model has {len(classes)}: give the data, prepared "
            "with imrcnn prepare-dataset masks --kind classes, as --data"
        )
    rejects = Rejects("reject")
    source = read_mask_folder(images, masks, rejects, classes=classes, suffix=None)
    samples = list(with_defaults(source).samples)
    if rejects.errors:
        listed = few([str(error) for error in rejects.errors], separator="; ")
        raise ValueError(
            f"{len(rejects.errors)} files cannot be used: {listed}. Correct them, or leave them "
            "out with imrcnn prepare-dataset masks --all-test --on-error reject"
        )
    data = _empty(classes)
    data.notes += source.notes
    paths = [sample.image.path for sample in samples]
    folder = Path(os.path.abspath(images[0]))
    centre = folder.parent.name if folder.name.lower() == "images" else folder.name
    data._add(coco_content(samples, source), paths, images[0], centre)
    return data
