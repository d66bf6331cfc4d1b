"""The metrics of a detector on distorted copies of its test images."""

import contextlib
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort, distort_mask
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.masks import annotation_from_mask, box_rle
from imrcnn_d2.evaluation.detection.results import evaluate_lesions
from imrcnn_d2.evaluation.output import read_robustness
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically
from imrcnn_d2.utils.progress import tqdm

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
    predict: Callable[[list[np.ndarray]], list[list[dict]]],
    ground_truth: COCO,
    image_root: str | Path,
    output: str | Path,
    *,
    tau: float,
    meta: dict,
    distortions: Sequence[str] = tuple(DISTORTIONS),
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
) -> dict:
    """Evaluate the images as they are and with each distortion at each severity, and write
    ``robustness.json`` and ``robustness.csv`` after every one. Called again with the same
    arguments, or with other distortions, it continues with what is missing.

    Directions and places are sampled for each image from the seed and the image's id, so that all
    models see the same images. Under a rotation, ground truth turns with the image; a lesion of
    which less than half stays in it is taken as a crowd, neither a hit nor missed.

    Args:
        predict: (H, W, 3) uint8 RGB images, at most ``batch_size`` at once -> COCO records of each,
            with ``category_id`` (ids of the ground truth), ``bbox``, ``score``, ``segmentation``.
        ground_truth: instances with masks or boxes, see :func:`load_coco`.
        meta: what is evaluated, as JSON values: kept in the file, and another one's results are not
            added to it.
        num_images, seed: see :func:`choose_subset`; the seed is also of the distortions.

    Returns:
        As in robustness.json: ``meta`` and ``rows``; a row has distortion, severity, level and all
        metrics of ``LesionResults.groups()`` as "group/metric".

    Raises:
        ValueError: for an unknown distortion, or results of something else in the folder.
    """
    unknown = set(distortions) - set(DISTORTIONS)
    if unknown:
        raise ValueError(f"no distortion {unknown.pop()!r}: there are {', '.join(DISTORTIONS)}")
    images = sorted(ground_truth.dataset["images"], key=lambda image: image["id"])
    images = [images[i] for i in choose_subset(len(images), num_images, seed)]
    document = _resume(Path(output), {**meta, "tau": tau, "images": len(images), "seed": seed})
    rows = document["rows"]
    done = {(row["distortion"], row["severity"]) for row in rows}
    steps = [(CLEAN, 0), *product(distortions, SEVERITIES)]
    missing = [step for step in steps if step not in done]
    order = [CLEAN, *DISTORTIONS]
    with tqdm(total=len(missing) * len(images), unit="image") as progress:
        for name, severity in missing:
            progress.set_description(f"{name} {severity}")
            records, annotations, results = [], [], []
            for start in range(0, len(images), batch_size):
                batch = [
                    _copy(ground_truth, Path(image_root), image, name, severity, seed)
                    for image in images[start : start + batch_size]
                ]
                predicted = predict([image for image, _, _ in batch])
                for (_, record, truths), detections in zip(batch, predicted, strict=True):
                    records.append(record)
                    annotations += truths
                    results += [{**detection, "image_id": record["id"]} for detection in detections]
                progress.update(len(batch))
            dataset = {**ground_truth.dataset, "images": records, "annotations": annotations}
            groups = evaluate_lesions(dataset, results, tau=tau).groups()
            level = DISTORTIONS[name].levels[severity - 1] if severity else None
            row = {"distortion": name, "severity": severity, "level": level}
            for group, values in groups.items():
                row.update({f"{group}/{metric}": value for metric, value in values.items()})
            rows.append(row)
            rows.sort(key=lambda row: (order.index(row["distortion"]), row["severity"]))
            write_atomically(Path(output) / "robustness.csv", csv_text(rows, ()))
            write_atomically(Path(output) / ROBUSTNESS, strict_json(document))
    return document


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


def _copy(ground_truth, image_root, record, name, severity, seed):
    """An image distorted, (H, W, 3) uint8 RGB; its COCO image record; its annotations."""
    image = read_image(image_root / record["file_name"])
    annotations = ground_truth.imgToAnns[record["id"]]
    if name == CLEAN:
        return image, record, annotations
    distortion = name, severity, (seed, record["id"])
    if name == "rotation":
        annotations = _turned(ground_truth, annotations, image.shape[:2], distortion)
    image = distort(image, *distortion)
    height, width = image.shape[:2]
    return image, {**record, "height": height, "width": width}, annotations


def _turned(ground_truth, annotations, size, distortion):
    turned = []
    for annotation in annotations:
        if has_mask := bool(annotation.get("segmentation")):
            before = ground_truth.annToMask(annotation).astype(bool)
        else:  # what turns with the image is the box that is filled
            before = mask_util.decode(box_rle(annotation["bbox"], *size)).astype(bool)
        mask = distort_mask(before, *distortion)
        if mask.any():
            is_cut = mask.sum() < LEAST_PART * before.sum()
            fields = annotation_from_mask(mask, annotation["category_id"])
            if not has_mask:
                del fields["segmentation"]
            fields["iscrowd"] = int(is_cut or annotation.get("iscrowd", 0))
            turned.append({**annotation, **fields})
    return turned
