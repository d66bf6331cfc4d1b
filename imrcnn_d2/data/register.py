"""The data sets in Detectron2's catalogs.

Importing this module registers ``{kvasir_seg,egc,synthetic,gastric_recognition}_{train,val,test}``
and touches no disk. What ``tools/prepare_dataset.py`` wrote is found under ``$IMRCNN_DATASETS``
(default ``datasets/``) when a data set is loaded. `register_lesion_dataset` gives any other COCO
file a name, `register_classification_dataset` any other file of images with a class each.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.detection_utils import check_metadata_consistency
from torch.utils.data import ConcatDataset, Dataset

from imrcnn_d2.data.catalogue import Catalogue, load_catalogue
from imrcnn_d2.data.classification_catalogue import LabelledCatalogue, load_labelled_catalogue
from imrcnn_d2.data.splits import SPLITS

__all__ = [
    "DATASET_CLASSES",
    "load_datasets",
    "register_classification_dataset",
    "register_lesion_dataset",
]

logger = logging.getLogger(__name__)

DATASET_CLASSES = {
    "kvasir_seg": ["polyp"],
    "egc": ["early gastric cancer"],
    "synthetic": ["lesion"],
    "lesion_free": ["lesion"],
}
_PREPARE = {
    "kvasir_seg": "kvasir-seg --root DIR",
    "egc": "coco --annotations FILE --images DIR",
    "synthetic": "synthetic --num-images 160 --size 256",
    "lesion_free": "lesion-free --root DIR",
    "gastric_recognition": "classification --root DIR",
}
# what loading sets; Detectron2's Metadata refuses to change a value, so these are cleared first
_SET_ON_LOADING = ("thing_classes", "thing_dataset_id_to_contiguous_id", "json_file", "image_root")


def register_lesion_dataset(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    thing_classes: list[str] | None = None,
) -> None:
    """Registers a COCO instance file under `name`, read when the data set is loaded.

    Args:
        name: the name for ``DATASETS.{TRAIN,VAL,TEST}``.
        json_file: COCO instance JSON; what `tools/prepare_dataset.py coco` writes, or any other.
        image_root: the folder that each ``file_name`` is relative to.
        thing_classes: class names to know before loading; the file's categories, by rising id,
            replace them.

    Raises:
        AssertionError: the name is taken (Detectron2's own check).
    """
    paths = Path(json_file), Path(image_root)
    _register(name, lambda: paths, f"Check the path given for data set {name!r}.", thing_classes)


def register_classification_dataset(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Registers a COCO image-classification file under `name`, read when the data set is loaded.

    Its dataset dicts have ``label``, the place of the class in the metadata's ``thing_classes``.

    Args:
        name: the name for ``DATASETS.{TRAIN,VAL,TEST}``.
        json_file: COCO JSON with one annotation an image; what `tools/prepare_dataset.py
            classification` writes, or any other.
        image_root: the folder that each ``file_name`` is relative to.

    Raises:
        AssertionError: the name is taken (Detectron2's own check).
    """
    paths = Path(json_file), Path(image_root)
    remedy = f"Check the path given for data set {name!r}."
    _register(name, lambda: paths, remedy, None, load_labelled_catalogue)


def _register(
    name: str,
    locate: Callable[[], tuple[Path, Path]],
    remedy: str,
    thing_classes: list[str] | None,
    read: Callable[[Path, Path], Catalogue | LabelledCatalogue] = load_catalogue,
) -> None:
    DatasetCatalog.register(name, lambda: _load(name, locate, remedy, read))
    metadata = MetadataCatalog.get(name)
    # Detectron2's own scripts choose their evaluator by it.
    metadata.evaluator_type = "coco" if read is load_catalogue else "recognition"
    if thing_classes is not None:
        metadata.thing_classes = list(thing_classes)


def _load(
    name: str,
    locate: Callable[[], tuple[Path, Path]],
    remedy: str,
    read: Callable[[Path, Path], Catalogue | LabelledCatalogue],
) -> Catalogue | LabelledCatalogue:
    json_file, image_root = locate()
    if not json_file.is_file():
        raise FileNotFoundError(f"{json_file}: no such file. {remedy}")
    if not image_root.is_dir():
        raise FileNotFoundError(f"{image_root}: no such folder. {remedy}")

    catalogue = read(json_file, image_root)
    classes = list(catalogue.categories.values())
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes")
    for key in _SET_ON_LOADING:
        vars(metadata).pop(key, None)
    metadata.set(
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={id_: i for i, id_ in enumerate(catalogue.categories)},
        json_file=str(json_file),
        image_root=str(image_root),
    )
    if known is not None and known != classes:
        logger.warning(
            "Classes of %s are %s (from %s), not %s: MODEL.ROI_HEADS.NUM_CLASSES must be %d.",
            name,
            classes,
            json_file,
            known,
            len(classes),
        )
    return catalogue


def load_datasets(names: str | Sequence[str], filter_empty: bool = False) -> Dataset:
    """One data set of dataset dicts out of those with these names, ours or others.

    It is Detectron2's ``get_detection_dataset_dicts`` for a `Catalogue`, which that function
    neither filters nor counts.

    Args:
        names: as in ``DATASETS.TRAIN``, or a single one.
        filter_empty: leave out images without lesions (``DATALOADER.FILTER_EMPTY_ANNOTATIONS``).

    Raises:
        ValueError: one of them holds no images, or their classes differ.
    """
    names = [names] if isinstance(names, str) else names
    datasets = [_load_dataset(name, filter_empty) for name in names]
    with contextlib.suppress(AttributeError):  # a foreign data set need not name its classes
        check_metadata_consistency("thing_classes", names)
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _load_dataset(name: str, filter_empty: bool) -> Dataset:
    dataset = DatasetCatalog.get(name)
    if filter_empty:
        if isinstance(dataset, Catalogue):
            dataset = dataset.with_lesions()
        elif not isinstance(dataset, Dataset):
            dataset = filter_images_with_only_crowd_annotations(dataset)
    if not len(dataset):
        raise ValueError(f"Data set {name} holds no images{' with lesions' * filter_empty}")
    return dataset if isinstance(dataset, Dataset) else DatasetFromList(dataset)


def _locate_prepared(dataset: str, split: str) -> tuple[Path, Path]:
    root = Path(os.environ.get("IMRCNN_DATASETS", "datasets")) / dataset
    return root / "annotations" / f"{split}.json", root / "images"


def _register_prepared() -> None:
    for dataset, command in _PREPARE.items():
        remedy = (
            f"Make it with: python tools/prepare_dataset.py {command} --out "
            f"$IMRCNN_DATASETS/{dataset} (datasets/{dataset} where the variable is unset)."
        )
        classes = DATASET_CLASSES.get(dataset)  # of classified images the user's own
        read = load_catalogue if classes else load_labelled_catalogue
        for split in SPLITS:
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                locate = functools.partial(_locate_prepared, dataset, split)
                _register(name, locate, remedy, classes, read)


_register_prepared()
