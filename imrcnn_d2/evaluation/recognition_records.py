"""Images with a class each and the probabilities a model gives them, checked and as arrays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.coco import NUMBER, check_records
from ..data.json_files import read_json
from .records import GROUND_TRUTH, by_id

__all__ = ["LabelledImages", "read_labels", "read_probabilities"]

# Of a sum of probabilities: half-precision softmax is off by less.
SUM_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """
    Attributes:
        images (list[dict]): the COCO image records, by ascending id, with all their fields.
        categories (list[dict]): the COCO category records, by ascending id; K of them.
        label (np.ndarray): (N,) int in [0, K), the class of each image.
        cancer (np.ndarray or None): (K,) bool, classes whose ``supercategory`` is "cancer". None
            where there is no such class, or no other.
    """

    images: list
    categories: list
    label: np.ndarray
    cancer: np.ndarray | None

    @property
    def classes(self):
        """list[str]: K names."""
        return [category["name"] for category in self.categories]


def read_labels(gt):
    """
    Args:
        gt (dict, str, Path or LabelledImages): COCO image classification: images, categories and an
            annotation {id, image_id, category_id} for each image; or what was read already.

    Returns:
        LabelledImages:

    Raises:
        ValueError: on anything else, saying which record is wrong and why.
    """
    if isinstance(gt, LabelledImages):
        return gt
    where = "The ground truth"
    if isinstance(gt, (str, Path)):
        where, gt = str(gt), read_json(Path(gt))
    for key, (needed, kinds) in GROUND_TRUTH.items():
        records = gt.get(key) if isinstance(gt, dict) else None
        check_records(records, key, where, needed, kinds)
        if not records:
            raise ValueError(f"{where} has no {key}: it must be COCO image classification.")
    images, categories = (by_id(gt[key], key, where) for key in ("images", "categories"))
    if len(categories) < 2:
        raise ValueError(f"{where} has one class, {categories[0]['name']}: nothing to tell apart.")
    position = {category["id"]: k for k, category in enumerate(categories)}
    known = {image["id"] for image in images}
    label = {}
    for annotation in gt["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in known:
            raise ValueError(f"{where} gives a class to image {image}, which it does not have.")
        if category not in position:
            raise ValueError(
                f"{where}: unknown label {category} of image {image}; there are {list(position)}."
            )
        if image in label:
            raise ValueError(f"{where} gives several classes to image {image}: one is needed.")
        label[image] = position[category]
    for image in images:
        if image["id"] not in label:
            name = image.get("file_name", image["id"])
            raise ValueError(f"{where} gives no class to image {image['id']} ({name}).")
    cancer = np.array([category.get("supercategory") == "cancer" for category in categories])
    return LabelledImages(
        images,
        categories,
        np.array([label[image["id"]] for image in images]),
        cancer if cancer.any() and not cancer.all() else None,
    )


def read_probabilities(results, truth):
    """
    Args:
        results (list[dict], str, Path or np.ndarray): {image_id, scores} for each image; ``scores``
            are K probabilities, of the classes by ascending category id. Or what was read already.
        truth (LabelledImages): of N images.

    Returns:
        np.ndarray: (N, K) float, in the order of ``truth.images``.

    Raises:
        ValueError: images missing, unknown or given twice; scores that are no K probabilities.
    """
    if isinstance(results, np.ndarray):
        return results
    where = "The results"
    if isinstance(results, (str, Path)):
        where, results = str(results), read_json(Path(results))
    check_records(results, "results", where, ("image_id", "scores"), {"scores": list})
    k, ids = len(truth.categories), {image["id"] for image in truth.images}
    scores = {}
    for result in results:
        image, own = result["image_id"], result["scores"]
        if not all(isinstance(score, NUMBER) and type(score) is not bool for score in own):
            raise ValueError(f"{where} give image {image} the scores {own}: not all are numbers.")
        own = np.array(own, dtype=float)
        if image not in ids:
            raise ValueError(f"{where} have image {image}, which the ground truth lacks.")
        if image in scores:
            raise ValueError(f"{where} have image {image} twice.")
        if own.shape != (k,):
            raise ValueError(
                f"{where} give image {image} {own.size} scores, but there are {k} classes "
                f"({', '.join(truth.classes)}): set MODEL.CLASSIFIER.NUM_CLASSES to that."
            )
        if not (own >= 0).all() or not abs(own.sum() - 1) <= SUM_TOLERANCE:
            raise ValueError(
                f"{where} give image {image} the scores {own.tolist()}, which are no probabilities "
                "that sum to 1."
            )
        scores[image] = own
    missing = [image for image in truth.images if image["id"] not in scores]
    if missing:
        name = missing[0].get("file_name", missing[0]["id"])
        raise ValueError(
            f"{where} lack {len(missing)} of the {len(ids)} images, such as {name}: score all."
        )
    return np.array([scores[image["id"]] for image in truth.images])
