"""COCO files of any size as compact sequences of dataset dicts."""

import copy
import logging
import operator
import os
import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path

import ijson
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

__all__ = ["Catalogue", "load_catalogue"]

logger = logging.getLogger(__name__)

# What Detectron2 takes from an annotation besides its segmentation, and what we add.
_ANNOTATION_KEYS = ("iscrowd", "bbox", "keypoints", "category_id", "lesion_id")


class Catalogue(Dataset, Sequence):
    """
    The dataset dicts of a COCO file, as ``load_coco_json`` of Detectron2 gives them, and with
    ``lesion_id`` and all fields of the image.

    Each record is made anew when it is read: changing one changes nothing here. Images and
    annotations are kept serialized, one behind the other in one tensor, so that the processes of a
    DataLoader share them without a copy, and the garbage collector has nothing to look through.
    Being a ``torch.utils.data.Dataset``, it passes through Detectron2's loaders as it is; these do
    not filter such data sets (``filter_empty``), see :func:`load_datasets`.
    """

    def __init__(self, categories, image_root, pieces, starts, order, bounds, lesion_counts):
        """
        Args:
            categories (dict[int, str]): id -> name, by rising id; a record's ``category_id`` is the
                place in it.
            image_root (str): what file names are relative to.
            pieces (Tensor): uint8, serialized images and annotations.
            starts (Tensor): int64, where each of these begins, and the end of the last.
            order (Tensor): int64, their numbers: an image, its annotations, the next image, ...
            bounds (Tensor): (N, 2) int64, the part of ``order`` that makes a record.
            lesion_counts (Tensor): (N,) int64.
        """
        self.categories = categories
        self._image_root = image_root
        self._pieces = pieces
        self._starts = starts
        self._order = order
        self._bounds = bounds
        self._lesion_counts = lesion_counts

    @property
    def lesion_counts(self):
        """(N,) int64 array: annotations of each record that are no crowd."""
        return self._lesion_counts.numpy()

    def with_lesions(self):
        """
        Returns:
            Catalogue: of the records with a lesion; it shares this one's memory.
        """
        kept = self._lesion_counts > 0
        subset = copy.copy(self)
        subset._bounds, subset._lesion_counts = self._bounds[kept], self._lesion_counts[kept]
        return subset

    def __len__(self):
        return len(self._bounds)

    def __getitem__(self, index):
        """
        Args:
            index (int or slice):

        Returns:
            dict, or list[dict] for a slice.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self._bounds[operator.index(index)].tolist()
        image, *annotations = map(self._piece, self._order[begin:end].tolist())
        image["file_name"] = os.path.join(self._image_root, image["file_name"])
        for annotation in annotations:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
        image["annotations"] = annotations
        return image

    def _piece(self, number):
        begin, end = self._starts[number : number + 2].tolist()
        return pickle.loads(self._pieces[begin:end].numpy())  # noqa: S301 (what _add wrote)


_loaded = {}  # absolute path of a COCO file -> what shows that it changed, its Catalogue


def load_catalogue(json_file, image_root):
    """
    A COCO instance file as a Catalogue. The file is streamed: what was read last is kept, and read
    again only when the file or ``image_root`` changed.

    Args:
        json_file (str or Path): COCO instance JSON.
        image_root (str or Path): the folder that each ``file_name`` is relative to.

    Returns:
        Catalogue: by rising image id.

    Raises:
        ValueError: the file is no COCO instance JSON; it names the file.
    """
    json_file = Path(json_file).absolute()
    stat = json_file.stat()
    state = stat.st_ino, stat.st_size, stat.st_mtime_ns, str(image_root)
    known, catalogue = _loaded.get(json_file, (None, None))
    if state != known:
        catalogue = _Builder(json_file).build(str(image_root))
        _loaded[json_file] = state, catalogue
    return catalogue


class _Builder:
    """Streams a COCO file, once for each of its lists."""

    def __init__(self, json_file):
        self._json_file = json_file
        self._bytes = bytearray()
        self._starts = array("q", [0])

    def build(self, image_root):
        categories = dict(sorted((c["id"], c["name"]) for c in self._items("categories")))
        if not categories:
            raise ValueError(f"{self._json_file}: there are no categories in this file")
        image_ids = [self._add_image(image) for image in self._items("images")]
        places = {image_id: place for place, image_id in enumerate(sorted(image_ids))}
        if len(places) < len(image_ids):
            raise ValueError(f"Image ids in '{self._json_file}' are not unique!")
        owners = array("q", map(places.get, image_ids))  # of each piece: the record's place
        lesion_counts = np.zeros(len(places), np.int64)
        self._add_annotations(places, list(categories), owners, lesion_counts)

        owners = np.frombuffer(owners, np.int64)
        ends = np.bincount(owners, minlength=len(places)).cumsum()
        bounds = np.stack([np.append(0, ends)[:-1], ends], axis=1)
        logger.info(
            "%s: %d images with %d annotations, %d images without any; %.1f MiB in memory",
            self._json_file,
            len(places),
            lesion_counts.sum(),
            (lesion_counts == 0).sum(),
            len(self._bytes) / 2**20,
        )
        return Catalogue(
            categories,
            image_root,
            torch.from_numpy(np.frombuffer(self._bytes, np.uint8)),
            torch.frombuffer(self._starts, dtype=torch.int64),
            torch.from_numpy(owners.argsort(kind="stable")),
            torch.from_numpy(bounds),
            torch.from_numpy(lesion_counts),
        )

    def _items(self, key):
        try:
            with open(self._json_file, "rb") as file:
                yield from ijson.items(file, f"{key}.item", use_float=True)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._json_file} is no valid JSON: {error}") from error

    def _add(self, record):
        self._bytes += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        self._starts.append(len(self._bytes))

    def _add_image(self, image):
        image_id = image.pop("id")
        self._add({**image, "image_id": image_id})
        return image_id

    def _add_annotations(self, places, category_ids, owners, lesion_counts):
        classes = {category_id: index for index, category_id in enumerate(category_ids)}
        ids, homeless, without_outline = set(), 0, 0
        for count, annotation in enumerate(self._items("annotations"), start=1):
            place = places.get(annotation["image_id"])
            if place is None:
                homeless += 1
                continue
            ids.add(annotation["id"])
            if len(ids) + homeless < count:
                raise ValueError(f"Annotation ids in '{self._json_file}' are not unique!")
            record = self._record(annotation, classes)
            if record is None:
                without_outline += 1
                continue
            self._add(record)
            owners.append(place)
            lesion_counts[place] += not record.get("iscrowd", 0)
        if homeless:
            logger.warning(
                "%s: %d annotations belong to images that the file does not have; left out",
                self._json_file,
                homeless,
            )
        if without_outline:
            logger.warning(
                "%s: %d annotations have polygons of fewer than three points only; left out",
                self._json_file,
                without_outline,
            )

    def _record(self, annotation, classes):
        """What ``load_coco_json`` makes of an annotation; None for one that it leaves out."""
        where = f"{self._json_file}: annotation {annotation['id']}"
        if annotation.get("ignore", 0):
            raise ValueError(f'{where}: "ignore" in COCO json file is not supported.')
        record = {key: annotation[key] for key in _ANNOTATION_KEYS if key in annotation}
        if "bbox" in record and not record["bbox"]:
            raise ValueError(f"{where} of image {annotation['image_id']} has an empty 'bbox'")
        outline = annotation.get("segmentation")
        if isinstance(outline, dict):
            if isinstance(outline["counts"], list):
                outline = mask_util.frPyObjects(outline, *outline["size"])
        elif outline:
            outline = [p for p in outline if len(p) % 2 == 0 and len(p) >= 6]
            if not outline:
                return None
        if outline:
            record["segmentation"] = outline
        if keypoints := annotation.get("keypoints"):
            # COCO gives the pixel; coordinates of its centre are half a pixel more.
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        if record["category_id"] not in classes:
            raise KeyError(
                f"{where}: category_id={record['category_id']} does not exist in 'categories'"
            )
        record["category_id"] = classes[record["category_id"]]
        return record
