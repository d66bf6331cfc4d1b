"""The data sets in Detectron2's catalogs.

`register_data_set` registers the splits of a prepared folder. Importing this module does so for
the short names, such as ``kvasir_seg``, and touches no disk: their folders are looked for when a
data set is loaded. `register_lesion_dataset` and `register_classification_dataset` give any other
COCO file a name.
"""

import contextlib
import copy
import logging
import operator
import os
import pickle
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import ijson
import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.structures import BoxMode
from torch.utils.data import ConcatDataset, Dataset

from imrcnn_d2.data.formats.coco import check_records, is_box, to_rles
from imrcnn_d2.data.masks import check_polygon, check_size
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import BadInputError

logger = logging.getLogger(__name__)

# What Detectron2 takes from an annotation, next to its segmentation, and what we add.
_ANNOTATION_KEYS = ("iscrowd", "bbox", "keypoints", "category_id", "lesion_id")
_BATCH = 200  # records that are checked at once
# Of each short name the lesions, None for classified images, and what prepare_dataset makes it by.
_SHORT = {
    "kvasir_seg": ("polyp", "kvasir-seg --root DIR"),
    "egc": ("early gastric cancer", "coco --annotations FILE --images DIR"),
    "synthetic": ("lesion", "synthetic --num-images 160 --size 256"),
    "lesion_free": ("lesion", "lesion-free --root DIR"),
    "gastric_recognition": (None, "classification --root DIR"),
}
SHORT_NAMES = tuple(_SHORT)
# What loading sets; Detectron2's Metadata refuses to change a value, so these are cleared first.
_SET_ON_LOADING = ("thing_classes", "thing_dataset_id_to_contiguous_id", "json_file", "image_root")

_loaded = {}  # absolute path of a COCO file -> what shows that it changed, its Catalog
_registered = {}  # name of a prepared data set -> its folder (None: by short name), the kind


class Catalog(Dataset, Sequence):
    """The dataset dicts of a COCO file, as of Detectron2's ``load_coco_json``.

    They have ``lesion_id`` and all fields of the image as well. Each is made anew when it is read:
    changing one changes nothing here. Images and annotations are kept serialized, one after the
    other in one tensor, so that the processes of a DataLoader share them without a copy, and the
    garbage collector has nothing to look through. Detectron2's loaders take it as it is, but do
    not filter it (``filter_empty``), see `load_datasets`.
    """

    def __init__(
        self,
        categories: dict[int, str],  # names by rising id; category_id is the position in it
        image_root: str,
        pieces: torch.Tensor,  # uint8, serialized images and annotations
        starts: torch.Tensor,  # int64, where each of these begins, and the end of the last
        order: torch.Tensor,  # int64, their numbers: an image, its annotations, the next image, ...
        bounds: torch.Tensor,  # (N, 2) int64, the part of `order` that makes a record
        lesion_counts: torch.Tensor,  # (N,) int64, annotations that are no crowd
    ):
        self.categories, self._image_root = categories, image_root
        self._pieces, self._starts, self._order = pieces, starts, order
        self._bounds, self._lesion_counts = bounds, lesion_counts

    @property
    def lesion_counts(self) -> np.ndarray:
        """(N,) int64, annotations of each record that are no crowd."""
        return self._lesion_counts.numpy()

    def with_lesions(self) -> "Catalog":
        """The records with a lesion; it shares this one's memory."""
        kept = self._lesion_counts > 0
        subset = copy.copy(self)
        subset._bounds, subset._lesion_counts = self._bounds[kept], self._lesion_counts[kept]
        return subset

    def __len__(self):
        return len(self._bounds)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self._bounds[operator.index(index)].tolist()
        image, *annotations = map(self._piece, self._order[begin:end].tolist())
        image["file_name"] = os.path.join(self._image_root, image["file_name"])
        for annotation in annotations:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
        image["annotations"] = annotations
        return image

    def _piece(self, number: int) -> dict:
        begin, end = self._starts[number : number + 2].tolist()
        return pickle.loads(self._pieces[begin:end].numpy())  # noqa: S301 (what _add wrote)


def load_catalog(json_file: str | Path, image_root: str | Path) -> Catalog:
    """Stream a COCO instance file into a Catalog, by rising image id.

    The Catalog is kept, and the file read again only when it or ``image_root`` changed.

    Raises:
        ValueError: the file is no COCO instance JSON; it names the file.
    """
    json_file = Path(json_file).absolute()
    stat = json_file.stat()
    state = stat.st_ino, stat.st_size, stat.st_mtime_ns, str(image_root)
    known, catalog = _loaded.get(json_file, (None, None))
    if state != known:
        catalog = _Builder(json_file).build(str(image_root))
        _loaded[json_file] = state, catalog
    return catalog


class _Ignored:
    """A JSON object whose values are not kept."""

    __slots__ = ()

    def __setitem__(self, key, value):
        pass


class _Builder:
    """Streams a COCO file, once for its keys and once for each of its lists."""

    def __init__(self, json_file: Path):
        self._json_file = json_file
        self._bytes = bytearray()
        self._starts = array("q", [0])
        self._sizes: dict[object, tuple[int, int]] = {}  # height and width by image id

    def build(self, image_root: str) -> Catalog:
        self._check_keys()
        categories = self.categories()
        images = self._items("images", ("id", "file_name"), {"file_name": str})
        image_ids = [self._add_image(image) for image in images]
        try:
            places = {image_id: place for place, image_id in enumerate(sorted(image_ids))}
        except TypeError as error:
            raise BadInputError(self._json_file, "image ids are numbers and texts") from error
        if len(places) < len(image_ids):
            raise ValueError(f"Image ids in '{self._json_file}' are not unique!")
        owners = array("q", map(places.get, image_ids))  # of each piece: the record's place
        lesion_counts = np.zeros(len(places), np.int64)
        self._add_annotations(places, list(categories), owners, lesion_counts)

        owners = np.frombuffer(owners, np.int64)
        ends = np.bincount(owners, minlength=len(places)).cumsum()
        bounds = np.stack([np.append(0, ends)[:-1], ends], axis=1)
        text = "%s: %d images with %d annotations, %d images without any; %.1f MiB in memory"
        counts = len(places), lesion_counts.sum(), (lesion_counts == 0).sum()
        logger.info(text, self._json_file, *counts, len(self._bytes) / 2**20)
        pieces, starts = np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._starts, np.int64)
        arrays = pieces, starts, owners.argsort(kind="stable"), bounds, lesion_counts
        return Catalog(categories, image_root, *map(torch.from_numpy, arrays))

    def categories(self) -> dict[int, str]:
        """Names by rising id."""
        categories = self._items("categories", ("id", "name"), {"id": int})
        categories = dict(sorted((c["id"], c["name"]) for c in categories))
        if not categories:
            raise ValueError(f"{self._json_file}: there are no categories in this file")
        return categories

    def _check_keys(self) -> None:
        """A list that is there twice would be streamed as one, while others read the last."""
        seen = set()
        with self._reading() as file:
            for key, value in ijson.kvitems(file, "", use_float=True, map_type=_Ignored):
                if key in seen:
                    raise BadInputError(self._json_file, f"the key {key!r} is there twice")
                if key in ("images", "annotations", "categories") and not isinstance(value, list):
                    raise BadInputError(self._json_file, f"it has no list of {key}")
                seen.add(key)

    def _items(self, key: str, needed: Sequence[str], kinds: Mapping | None = None) -> Iterator:
        """The records of a list, checked a batch at a time."""
        with self._reading() as file:
            records = ijson.items(file, f"{key}.item", use_float=True)
            while batch := [*islice(records, _BATCH)]:
                check_records(batch, key, self._json_file, needed, kinds)
                yield from batch

    @contextlib.contextmanager
    def _reading(self):
        try:
            with open(self._json_file, "rb") as file:
                yield file
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._json_file} is no valid JSON: {error}") from error

    def _add(self, record: dict) -> None:
        self._bytes += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        self._starts.append(len(self._bytes))

    def _add_image(self, image: dict) -> int | str:
        image_id = image.pop("id")
        self._add({**image, "image_id": image_id})
        if "height" in image and "width" in image:
            try:
                self._sizes[image_id] = check_size(image["height"], image["width"])
            except ValueError as error:
                raise BadInputError(self._json_file, f"image {image_id}: {error}") from error
        return image_id

    def _add_annotations(
        self, places: dict, category_ids: list[int], owners: array, lesion_counts: np.ndarray
    ) -> None:
        classes = {category_id: index for index, category_id in enumerate(category_ids)}
        ids, orphans, without_mask = set(), 0, 0
        for count, annotation in enumerate(self._annotations(places), start=1):
            place = places.get(annotation["image_id"])
            if place is None:
                orphans += 1
                continue
            ids.add(annotation["id"])
            if len(ids) + orphans < count:
                raise ValueError(f"Annotation ids in '{self._json_file}' are not unique!")
            record = self._record(annotation, classes)
            if record is None:
                without_mask += 1
                continue
            self._add(record)
            owners.append(place)
            lesion_counts[place] += not record.get("iscrowd", 0)
        for number, problem in (
            (orphans, "belong to images that the file does not have"),
            (without_mask, "have polygons of fewer than three points only"),
        ):
            if number:
                logger.warning("%s: %d annotations %s; left out", self._json_file, number, problem)

    def _annotations(self, places: dict) -> Iterator[dict]:
        """The annotations, those with RLE once it was checked."""
        annotations = self._items("annotations", ("id", "image_id", "category_id"))
        while batch := [*islice(annotations, _BATCH)]:
            encoded = [a for a in batch if isinstance(a.get("segmentation"), dict)]
            encoded = [a for a in encoded if a["image_id"] in places]
            sizes = [self._size(annotation) for annotation in encoded]
            names = [f"annotation {annotation['id']}" for annotation in encoded]
            try:
                rles = to_rles([a["segmentation"] for a in encoded], sizes, names.__getitem__)
            except ValueError as error:
                raise BadInputError(self._json_file, str(error)) from error
            for annotation, rle in zip(encoded, rles, strict=True):
                annotation["segmentation"] = rle
            yield from batch

    def _size(self, annotation: dict) -> tuple[int, int]:
        image_id = annotation["image_id"]
        if image_id not in self._sizes:
            reason = f"image {image_id} has no height and width, which masks need"
            raise BadInputError(self._json_file, reason)
        return self._sizes[image_id]

    def _record(self, annotation: dict, classes: Mapping[int, int]) -> dict | None:
        """What ``load_coco_json`` makes of an annotation; None for one that it leaves out."""
        where = f"{self._json_file}: annotation {annotation['id']}"
        if annotation.get("ignore", 0):
            raise ValueError(f'{where}: "ignore" in COCO json file is not supported.')
        record = {key: annotation[key] for key in _ANNOTATION_KEYS if key in annotation}
        if "bbox" in record and not is_box(record["bbox"]):
            image_id = annotation["image_id"]
            raise ValueError(f"{where} of image {image_id} has no 'bbox' [x, y, width, height]")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise ValueError(f"{where} has an 'iscrowd' that is neither 0 nor 1")
        segmentation = annotation.get("segmentation")
        if segmentation and not isinstance(segmentation, dict):
            is_list = isinstance(segmentation, list)
            if not is_list or not all(isinstance(polygon, list) for polygon in segmentation):
                raise ValueError(f"{where} has neither polygons nor RLE")
            segmentation = [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
            if not segmentation:
                return None
            size = self._size(annotation)
            try:
                for polygon in segmentation:
                    check_polygon(polygon, *size)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if segmentation:
            record["segmentation"] = segmentation
        if keypoints := annotation.get("keypoints"):
            # COCO gives the pixel; coordinates of its centre are half a pixel more.
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        category_id = record["category_id"]
        if category_id not in classes:
            raise KeyError(f"{where}: category_id={category_id} does not exist in 'categories'")
        record["category_id"] = classes[category_id]
        return record


class LabelledCatalog(Dataset, Sequence):
    """As `Catalog`, with ``label``, position of the one class, instead of ``annotations``."""

    def __init__(self, catalog: Catalog):
        self._catalog = catalog
        self.categories = catalog.categories

    def __len__(self):
        return len(self._catalog)

    def __getitem__(self, index: int) -> dict:
        record = self._catalog[index]
        (annotation,) = record.pop("annotations")
        return {**record, "label": annotation["category_id"]}


def load_labelled_catalog(json_file: str | Path, image_root: str | Path) -> LabelledCatalog:
    """Read a COCO image-classification file, by rising image id.

    Raises:
        ValueError: the file is no such JSON, or an image has no class or several.
        KeyError: an annotation's class is not in the file.
    """
    catalog = load_catalog(json_file, image_root)
    wrong = np.flatnonzero(catalog.lesion_counts != 1)
    if len(wrong):
        record = catalog[wrong[0]]
        example = f"{record['file_name']} with {len(record['annotations'])}"
        raise ValueError(f"{json_file}: {len(wrong)} images do not have one class each: {example}")
    return LabelledCatalog(catalog)


def labels_of(records: Sequence[dict]) -> np.ndarray:
    """(N,) int: ``label`` of dataset dicts."""
    return np.array([records[i]["label"] for i in range(len(records))], dtype=int)


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K,) class weights N / (K * images of the class) of (N,) labels, 1 on average over images.

    Raises:
        ValueError: a class has no image.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all() or len(counts) > num_classes:
        text = f"Images of the {num_classes} classes in the training set: {counts.tolist()}"
        raise ValueError(f"{text}. Each class needs some, and there must be no other.")
    return len(labels) / (num_classes * counts)


def register_lesion_dataset(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    thing_classes: list[str] | None = None,
) -> None:
    """Register a COCO instance file under `name`, read when the data set is loaded.

    `thing_classes` are names to know before loading; the file's categories, by rising id, replace
    them. A name that is taken is an AssertionError of Detectron2.
    """
    paths = Path(json_file), Path(image_root)
    _register(name, lambda: paths, f"Check the path given for data set {name!r}.", thing_classes)


def register_classification_dataset(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register a COCO image-classification file, as `register_lesion_dataset`.

    Its dataset dicts have ``label``, the place of the class in the metadata's ``thing_classes``.
    """
    paths = Path(json_file), Path(image_root)
    remedy = f"Check the path given for data set {name!r}."
    _register(name, lambda: paths, remedy, read=load_labelled_catalog)


def _register(
    name: str,
    locate: Callable[[], tuple[Path, Path]],
    remedy: str,
    thing_classes: list[str] | None = None,
    read: Callable[[Path, Path], Catalog | LabelledCatalog] = load_catalog,
) -> None:
    def load() -> Catalog | LabelledCatalog:
        json_file, image_root = locate()
        if not json_file.is_file():
            raise FileNotFoundError(f"{json_file}: no such file. {remedy}")
        if not image_root.is_dir():
            raise FileNotFoundError(f"{image_root}: no such folder. {remedy}")
        catalog = read(json_file, image_root)
        classes = list(catalog.categories.values())
        metadata = MetadataCatalog.get(name)
        known = metadata.get("thing_classes")
        for key in _SET_ON_LOADING:
            vars(metadata).pop(key, None)
        places = {id_: i for i, id_ in enumerate(catalog.categories)}
        metadata.set(thing_classes=classes, thing_dataset_id_to_contiguous_id=places)
        metadata.set(json_file=str(json_file), image_root=str(image_root))
        if known is not None and known != classes:
            text = "Classes of %s are %s (from %s), not %s."
            logger.warning(text, name, classes, json_file, known)
        return catalog

    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name)
    # Detectron2's own scripts choose their evaluator by it.
    metadata.evaluator_type = "coco" if read is load_catalog else "recognition"
    if thing_classes is not None:
        metadata.thing_classes = list(thing_classes)


def check_registered(names: Iterable[str]) -> None:
    """Raise ValueError for a name that no data set has, with similar ones."""
    for name in names:
        if name not in DatasetCatalog:
            ours = [f"{short}_{split}" for short in SHORT_NAMES for split in SPLITS]
            like = get_close_matches(name, DatasetCatalog) or ours
            raise ValueError(
                f"No data set is called {name!r}; similar: {', '.join(like)}. The splits of a "
                "folder of imrcnn prepare-dataset are FOLDER_train, FOLDER_val and FOLDER_test "
                "where the config names it: DATASETS.ROOT, or --data in a training"
            )


def load_datasets(names: str | Sequence[str], filter_empty: bool = False) -> Dataset:
    """One data set of dataset dicts out of those with these names, ours or others.

    It is Detectron2's ``get_detection_dataset_dicts`` for a `Catalog`, which that function
    neither filters nor counts; `filter_empty` leaves out images without lesions.

    Raises:
        ValueError: one of them holds no images, or their classes differ.
    """
    names = [names] if isinstance(names, str) else names
    datasets = []
    for name in names:
        dataset = DatasetCatalog.get(name)
        if filter_empty and isinstance(dataset, Catalog):
            dataset = dataset.with_lesions()
        elif filter_empty and not isinstance(dataset, Dataset):
            dataset = filter_images_with_only_crowd_annotations(dataset)
        if not len(dataset):
            text = f"Data set {name} holds no images{' with lesions' * filter_empty}"
            remedy = "give it a share (imrcnn prepare-dataset --ratio), or name another data set"
            raise ValueError(f"{text}: {remedy}")
        datasets.append(dataset if isinstance(dataset, Dataset) else DatasetFromList(dataset))
    with contextlib.suppress(AttributeError):  # a foreign data set need not name its classes
        check_metadata_consistency("thing_classes", names)
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def prepared_folder(data: str | os.PathLike) -> Path:
    """The folder of a prepared data set, which need not exist: a folder itself, or `named_folder`
    of a short name.
    """
    return named_folder(data) if str(data) in SHORT_NAMES else Path(data)


def named_folder(name: str | os.PathLike) -> Path:
    """The folder of this name in ``$IMRCNN_DATASETS``, if that is set, else in
    ``$DETECTRON2_DATASETS``, if it is there, else in ``datasets/``.
    """
    if root := os.environ.get("IMRCNN_DATASETS"):
        return Path(root) / name
    shared = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / name
    return shared if shared.is_dir() else Path("datasets") / name


def data_set_name(data: str | os.PathLike) -> str:
    """The name of a prepared data set's folder, by which its splits are registered.

    Raises:
        ValueError: a folder without a name.
    """
    name = os.path.basename(os.path.abspath(data))
    if not name:
        raise ValueError(f"{data}: a data set is registered by the name of its folder, give one")
    return name


def read_classes(data: str | os.PathLike) -> list[str] | None:
    """The class names of a prepared data set, or None where it has no annotations.

    Raises:
        ValueError: the annotations cannot be read; it names the file.
    """
    for split in SPLITS:
        path = prepared_folder(data) / "annotations" / f"{split}.json"
        if path.is_file():
            return list(_Builder(path).categories().values())
    return None


def register_data_set(data: str | os.PathLike, classification: bool = False) -> None:
    """Register ``NAME_train``, ``NAME_val`` and ``NAME_test`` of a folder or short name.

    NAME is the folder's name, see `data_set_name`. Another folder of this name is replaced. With
    `classification`, each image has a class, and not annotations.

    Raises:
        ValueError: data sets of other origin have these names.
    """
    name = data_set_name(data)
    short = str(data) in SHORT_NAMES
    state = None if short else os.path.abspath(data), classification
    if _registered.get(name) == state:
        return
    classes = None
    read = load_labelled_catalog if classification else load_catalog
    if short:
        lesion, command = _SHORT[name]
        classes = None if classification or lesion is None else [lesion]
        remedy = f"Make it with: imrcnn prepare-dataset {command} --out "
        remedy += f"$IMRCNN_DATASETS/{name} (or $DETECTRON2_DATASETS/{name}, or datasets/{name})."
    else:
        remedy = "Name a folder that imrcnn prepare-dataset wrote (--data DIR, DATASETS.ROOT), "
        remedy += f"or one of {', '.join(SHORT_NAMES)}."
    for split in SPLITS:
        full_name = f"{name}_{split}"
        if full_name in DatasetCatalog:
            if name not in _registered:
                raise ValueError(f"{data}: {full_name} is another data set; rename this folder")
            DatasetCatalog.remove(full_name)
            MetadataCatalog.remove(full_name)

        def locate(split: str = split) -> tuple[Path, Path]:
            root = prepared_folder(data)
            return root / "annotations" / f"{split}.json", root / "images"

        _register(full_name, locate, remedy, classes, read)
    _registered[name] = state


for _name, (_lesion, _) in _SHORT.items():
    register_data_set(_name, classification=_lesion is None)
