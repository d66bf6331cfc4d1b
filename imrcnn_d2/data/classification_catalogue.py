"""COCO image-classification files as sequences of dataset dicts."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from imrcnn_d2.data.catalogue import load_catalogue

__all__ = ["LabelledCatalogue", "balanced_weights", "labels_of", "load_labelled_catalogue"]


class LabelledCatalogue(Dataset, Sequence):
    """
    The dataset dicts of a COCO file with one annotation an image: as of :class:`Catalogue`, with
    ``label`` (int, place of the class in ``categories``) instead of ``annotations``.
    """

    def __init__(self, catalogue):
        """
        Args:
            catalogue (Catalogue): with one annotation an image.
        """
        self._catalogue = catalogue
        self.categories = catalogue.categories

    def __len__(self):
        return len(self._catalogue)

    def __getitem__(self, index):
        """
        Args:
            index (int):

        Returns:
            dict:
        """
        record = self._catalogue[index]
        (annotation,) = record.pop("annotations")
        return {**record, "label": annotation["category_id"]}


def load_labelled_catalogue(json_file, image_root):
    """
    Args:
        json_file (str or Path): COCO image-classification JSON, as ``tools/prepare_dataset.py
            classification`` writes it.
        image_root (str or Path): the folder that each ``file_name`` is relative to.

    Returns:
        LabelledCatalogue: by rising image id.

    Raises:
        ValueError: the file is no such JSON, or an image has no class or several.
        KeyError: an annotation's class is not in the file.
    """
    catalogue = load_catalogue(json_file, image_root)
    wrong = np.flatnonzero(catalogue.lesion_counts != 1)
    if len(wrong):
        record = catalogue[wrong[0]]
        raise ValueError(
            f"{json_file}: {len(wrong)} images do not have exactly one class, such as "
            f"{record['file_name']} with {len(record['annotations'])}; make the file with "
            "tools/prepare_dataset.py classification"
        )
    return LabelledCatalogue(catalogue)


def labels_of(records):
    """
    Args:
        records (sequence of dict): dataset dicts with ``label``.

    Returns:
        np.ndarray: (N,) int.
    """
    return np.array([records[i]["label"] for i in range(len(records))], dtype=int)


def balanced_weights(labels, num_classes):
    """
    Weights of the classes under which all weigh the same together, and an image 1 on average.

    Args:
        labels (np.ndarray): (N,) int, the class of each training image.
        num_classes (int): K.

    Returns:
        np.ndarray: (K,) float, N / (K * images of the class).

    Raises:
        ValueError: a class has no image.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all() or len(counts) > num_classes:
        raise ValueError(
            f"Images of the {num_classes} classes in the training set: {counts.tolist()}. Each "
            "class needs some, and there must be no other."
        )
    return len(labels) / (num_classes * counts)
