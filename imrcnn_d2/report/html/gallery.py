"""The data of the gallery of test images: each image, its ground truth and each model's result."""

import base64
import io
import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from imrcnn_d2.data.images import image_inside, read_image
from imrcnn_d2.report.plots.images import choose_images, region_contours, regions_by_kind
from imrcnn_d2.report.runs import Run

__all__ = ["classification_gallery", "embed", "gallery_data", "svg_path"]


LONG_SIDE = 512  # pixels of an embedded image
QUALITY = 82  # of its JPEG
CLOSENESS = 0.5  # pixels of the embedded image that a contour may be off


def gallery_data(runs: list[Run], max_images: int = 300) -> dict:
    """
    The gallery of detectors on one test set, as JSON values; of a larger test set a choice as that
    of :func:`choose_images`.

    - ``runs`` (list[str]): names of the models.
    - ``total`` (int): images in the test set.
    - ``overlap`` (str): "IoU", or "box IoU" where a model gives no masks.
    - ``images`` (list[dict]): ``name``, ``patient`` (str or None), ``width`` and ``height`` (of
      the original, in pixels), ``jpeg`` (base64), ``truth`` (list of SVG paths, a lesion each)
      and ``runs``, for each model ``tp``, ``fp``, ``fn`` (lesions and detections), ``score``
      (or None), ``iou`` (of all detections with all lesions, in percent, or None), ``missed``
      (positions in ``truth``), ``hits`` and ``alarms`` (SVG paths).

    In the paths, whole numbers are the centres of the original's pixels.

    Raises:
        FileNotFoundError: one of the images does not exist.
        BadInputError: one of them cannot be read, or lies outside the images' folder.
    """
    results = [run.results for run in runs]
    truth = results[0].ground_truth
    rows = list(zip(*(scored.per_image for scored in results), strict=True))
    masks = all(scored.meta["iou_type"] == "segm" for scored in results)

    def describe(position, scale):
        lesions = np.flatnonzero((truth.regions.image == position) & ~truth.crowd).tolist()
        found = [
            _found(scored, row, position, lesions, scale, "union_iou" if masks else "iou_box")
            for scored, row in zip(results, rows[position], strict=True)
        ]
        return {"truth": [_path(truth.regions, [k], scale) for k in lesions], "runs": found}

    return {
        "overlap": "IoU" if masks else "box IoU",
        **_gallery(runs, sorted(choose_images(rows, max_images)), describe),
    }


def classification_gallery(runs: list[Run], max_images: int = 300) -> dict:
    """
    The gallery of classifiers on one test set, as JSON values; of a larger test set half of the
    images are those whose class got the lowest probability, the others are spread evenly over the
    rest.

    As :func:`gallery_data`, but with ``classes`` (list[str]) and, for each image, ``label``
    (position in ``classes``) and ``scores``, for each model the probabilities of the classes.
    """
    truth = runs[0].results.ground_truth
    scores = np.stack([run.results.probability for run in runs], axis=1)
    of_truth = scores[np.arange(len(scores)), :, truth.label].mean(axis=1)
    order = np.argsort(of_truth, kind="stable")
    if len(order) > max_images:
        worst = (max_images + 1) // 2
        rest = np.linspace(worst, len(order) - 1, max_images - worst).round().astype(int)
        order = order[[*range(worst), *rest]]

    def describe(position, scale):
        label, probabilities = truth.label[position], scores[position]
        return {"label": int(label), "scores": probabilities.round(4).tolist()}

    return {"classes": truth.classes, **_gallery(runs, sorted(order.tolist()), describe)}


def _gallery(runs, positions, describe):
    """What both galleries hold; ``describe(position, scale)`` gives the rest of an image."""
    records = runs[0].results.ground_truth.images
    root = Path(runs[0].image_root)
    images = []
    for position in tqdm(positions, desc="Gallery", delay=2):
        record = records[position]
        path = image_inside(root, record.get("file_name"), runs[0].gt_path)
        jpeg, (width, height), scale = embed(path)
        patient = record.get("patient_id")
        images.append(
            {
                "name": record["file_name"],
                "patient": None if patient is None else str(patient),
                "width": width,
                "height": height,
                "jpeg": jpeg,
                **describe(position, scale),
            }
        )
    return {"runs": [run.name for run in runs], "total": len(records), "images": images}


def embed(path: Path, long_side: int = LONG_SIDE) -> tuple[str, tuple[int, int], float]:
    """
    Base64 of an image as a JPEG of at most ``long_side`` pixels, upright; width and height of the
    original, and original pixels per pixel of the JPEG.
    """
    image = Image.fromarray(read_image(path))
    size = image.size
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode(), size, max(size) / max(image.size)


def _found(results, row, position, lesions, scale, overlap):
    """What one model found in an image."""
    chosen = {kind: (regions, rows) for kind, regions, rows in regions_by_kind(results, position)}
    iou = row[overlap]
    return {
        "tp": row["TP"],
        "fp": row["FP"],
        "fn": row["FN"],
        "score": None if math.isnan(row["score"]) else round(row["score"], 4),
        "iou": None if math.isnan(iou) else round(iou, 2),
        "missed": [lesions.index(lesion) for lesion in chosen["missed lesion"][1].tolist()],
        "hits": _path(*chosen["hit"], scale),
        "alarms": _path(*chosen["false alarm"], scale),
    }


def _path(regions, rows, scale):
    return svg_path([line for row in rows for line in region_contours(regions, row)], scale)


def svg_path(lines: list[np.ndarray], scale: float) -> str:
    """
    One SVG path of closed lines, see :func:`region_contours`; ``scale``: original pixels per pixel
    of the image that they are shown on.
    """
    parts = []
    for line in lines:
        corners = line[:-1].astype(np.float32)
        kept = cv2.approxPolyDP(corners[:, None], CLOSENESS * scale, closed=True)[:, 0]
        points = "L".join(f"{x:.4g},{y:.4g}" for x, y in kept.tolist())
        parts.append(f"M{points}Z")
    return "".join(parts)
