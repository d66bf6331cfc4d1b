"""The metrics of a detector on distorted copies of its test images."""

import contextlib
import json
from itertools import product
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort, distort_mask
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.evaluation.detection.results import evaluate_lesions
from imrcnn_d2.evaluation.output import read_robustness
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically

__all__ = ["CLEAN", "ROBUSTNESS", "choose_subset", "evaluate_robustness", "load_coco"]


ROBUSTNESS = "robustness.json"
CLEAN = "clean"  # the row of the images as they are, of severity 0
LEAST_PART = 0.5  # of a lesion, in an image that was turned


def load_coco(json_file: str | Path) -> COCO:
    """COCO instance annotations, read without output on the terminal."""
    with contextlib.redirect_stdout(None):
        return COCO(str(json_file))


def choose_subset(count: int, num_images: int | None, seed: int) -> list[int]:
    """Ascending indices of ``num_images`` (None for all) of ``count`` images. A larger subset with
    the same seed holds a smaller one."""
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[:num_images].tolist())


def evaluate_robustness(
    predict,
    ground_truth,
    image_root,
    output,
    *,
    tau,
    about,
    distortions=tuple(DISTORTIONS),
    num_images=None,
    seed=0,
    batch_size=1,
):
    """
    Evaluate the images as they are and with each distortion at each severity, and write
    ``robustness.json`` and ``robustness.csv`` after every one. Called again with the same
    arguments, or with other distortions, it continues with what is missing.

    Directions and places are sampled for each image from the seed and the image's id, so that all
    models see the same images. Under a rotation, ground truth turns with the image; a lesion of
    which less than half stays in it is taken as a crowd, neither a hit nor missed.

    Args:
        predict (callable): list of (H, W, 3) uint8 RGB images -> for each a list of COCO records
            with ``category_id`` (ids of the ground truth), ``bbox``, ``score`` and
            ``segmentation``.
        ground_truth (COCO): instances with masks, see :func:`load_coco`.
        image_root (str or Path): folder that ``file_name`` is relative to.
        output (str or Path): folder for the files; made if it does not exist.
        tau (float): score threshold.
        about (dict): what is evaluated, as JSON values: kept in the file, and another one's results
            are not added to it.
        distortions (sequence of str): keys of ``DISTORTIONS``.
        num_images (int or None): see :func:`choose_subset`.
        seed (int): of the subset and the distortions.
        batch_size (int): images handed to ``predict`` at once.

    Returns:
        dict: as in robustness.json: ``meta`` and ``rows``; a row has distortion, severity, level
        and all metrics of ``LesionResults.groups()`` as "group/metric".

    Raises:
        ValueError: for an unknown distortion, or results of something else in the folder.
    """
    unknown = set(distortions) - set(DISTORTIONS)
    if unknown:
        raise ValueError(f"no distortion {unknown.pop()!r}: there are {', '.join(DISTORTIONS)}")
    images = sorted(ground_truth.dataset["images"], key=lambda image: image["id"])
    images = [images[i] for i in choose_subset(len(images), num_images, seed)]
    document = _resume(Path(output), {**about, "tau": tau, "images": len(images), "seed": seed})
    rows = document["rows"]
    done = {(row["distortion"], row["severity"]) for row in rows}
    missing = [
        (name, severity)
        for name, severity in [(CLEAN, 0), *product(distortions, SEVERITIES)]
        if (name, severity) not in done
    ]
    order = [CLEAN, *DISTORTIONS]
    with tqdm(total=len(missing) * len(images), unit="image") as progress:
        for name, severity in missing:
            progress.set_description(f"{name} {severity}")
            copies = _Copies(ground_truth, Path(image_root), name, severity, seed)
            values = _evaluate(predict, copies, images, tau, batch_size, progress)
            level = DISTORTIONS[name].levels[severity - 1] if severity else None
            rows.append({"distortion": name, "severity": severity, "level": level, **values})
            rows.sort(key=lambda row: (order.index(row["distortion"]), row["severity"]))
            write_atomically(Path(output) / "robustness.csv", csv_text(rows, ()))
            write_atomically(Path(output) / ROBUSTNESS, strict_json(document))
    return document


class _Copies:
    """The images of a set at one severity of a distortion, with their annotations."""

    def __init__(self, ground_truth, image_root, name, severity, seed):
        self.ground_truth = ground_truth
        self._image_root = image_root
        self._distortion = () if name == CLEAN else (name, severity)
        self._seed = seed

    def read(self, record):
        """(H, W, 3) uint8 RGB; its COCO image record; its annotations."""
        image = read_image(self._image_root / record["file_name"])
        annotations = self.ground_truth.imgToAnns[record["id"]]
        if not self._distortion:
            return image, record, annotations
        distortion = *self._distortion, (self._seed, record["id"])
        image = distort(image, *distortion)
        if self._distortion[0] == "rotation":
            annotations = self._move(annotations, distortion)
        height, width = image.shape[:2]
        return image, {**record, "height": height, "width": width}, annotations

    def _move(self, annotations, distortion):
        moved = []
        for annotation in annotations:
            before = self.ground_truth.annToMask(annotation).astype(bool)
            mask = distort_mask(before, *distortion)
            if not mask.any():
                continue
            fields = {**annotation, **annotation_from_mask(mask, annotation["category_id"])}
            is_cut = mask.sum() < LEAST_PART * before.sum()
            fields["iscrowd"] = int(is_cut or annotation.get("iscrowd", 0))
            moved.append(fields)
        return moved


def _evaluate(predict, copies, images, tau, batch_size, progress):
    """{"group/metric": value}."""
    records, annotations, results = [], [], []
    for start in range(0, len(images), batch_size):
        batch = [copies.read(record) for record in images[start : start + batch_size]]
        predicted = predict([image for image, _, _ in batch])
        for (_, record, of_image), detections in zip(batch, predicted, strict=True):
            records.append(record)
            annotations += of_image
            results += [{**detection, "image_id": record["id"]} for detection in detections]
        progress.update(len(batch))
    dataset = {**copies.ground_truth.dataset, "images": records, "annotations": annotations}
    groups = evaluate_lesions(dataset, results, tau=tau).groups()
    return {f"{group}/{key}": v for group, values in groups.items() for key, v in values.items()}


def _resume(output, meta):
    """The document that is there, or a new one."""
    path = output / ROBUSTNESS
    meta = json.loads(strict_json(meta))  # as it is read back
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        return {"meta": meta, "rows": []}
    document = read_robustness(path)
    for key in meta.keys() | document["meta"].keys():
        if document["meta"].get(key) != meta.get(key):
            raise ValueError(
                f"{path}: holds results with {key} {document['meta'].get(key)}, not "
                f"{meta.get(key)}; choose another folder, or remove it"
            )
    return document
