"""The data of the gallery of classified images: what they are and what each model calls them."""

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

__all__ = ["embed", "gallery_data", "classification_gallery", "svg_path"]


LONG_SIDE = 512  # pixels of an embedded picture
QUALITY = 82  # of its JPEG
CLOSENESS = 0.5  # pixels of the embedded picture that a drawn outline may be off


def gallery_data(runs, max_images=300):
    """
    Args:
        runs (list[Run]): of one test set.
        max_images (int): if the test set is larger, a choice as that of :func:`choose_images`.

    Returns:
        dict: JSON values.

        - ``runs`` (list[str]): names of the models.
        - ``total`` (int): images in the test set.
        - ``overlap`` (str): "IoU", or "box IoU" where a model gives no masks.
        - ``images`` (list[dict]): ``name``, ``patient`` (str or None), ``width`` and ``height`` (of
          the original, in pixels), ``jpeg`` (base64), ``truth`` (list of SVG paths, a lesion each)
          and ``runs``, for each model ``tp``, ``fp``, ``fn`` (lesions and detections), ``score``
          (or None), ``iou`` (of all that is outlined with all lesions, in percent, or None),
          ``missed`` (positions in ``truth``), ``hits`` and ``alarms`` (SVG paths).

        In the paths, whole numbers are the centres of the original's pixels.

    Raises:
        FileNotFoundError: if one of the images is not there.
        BadInputError: one of them cannot be read, or is no file of the images' folder.
    """
    scored = [run.results for run in runs]
    truth = scored[0].ground_truth
    rows = list(zip(*(results.per_image for results in scored), strict=True))
    overlap = "union_iou" if all(results.meta["iou_type"] == "segm" for results in scored) else None
    root = Path(runs[0].image_root)
    images = []
    for position in tqdm(sorted(choose_images(rows, max_images)), desc="Gallery", delay=2):
        record = truth.images[position]
        path = image_inside(root, record.get("file_name"), runs[0].gt_path)
        picture, (width, height), scale = embed(path)
        outlined = _outlined(truth, position, scale)
        images.append(
            {
                "name": record["file_name"],
                "patient": None if record.get("patient_id") is None else str(record["patient_id"]),
                "width": width,
                "height": height,
                "jpeg": picture,
                "truth": list(outlined.values()),
                "runs": [
                    _found(results, row, position, list(outlined), scale, overlap or "iou_box")
                    for results, row in zip(scored, rows[position], strict=True)
                ],
            }
        )
    return {
        "runs": [run.name for run in runs],
        "total": len(truth.images),
        "overlap": "IoU" if overlap else "box IoU",
        "images": images,
    }


def embed(path, long_side=LONG_SIDE):
    """
    Args:
        path (Path): of an image.
        long_side (int): pixels of the JPEG, at most.

    Returns:
        tuple[str, tuple[int, int], float]: base64 of a JPEG as it is to be seen, width and height
        of the original, and original pixels in one of the JPEG.
    """
    image = Image.fromarray(read_image(path))
    size = image.size
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode(), size, max(size) / max(image.size)


def _outlined(truth, position, scale):
    """{position of a lesion in the ground truth: its SVG path}."""
    lesions = np.flatnonzero((truth.regions.image == position) & ~truth.crowd)
    return {int(lesion): _path(truth.regions, [lesion], scale) for lesion in lesions}


def _found(results, row, position, lesions, scale, overlap):
    """What one model found in an image."""
    chosen = {kind: (regions, own) for kind, regions, own in regions_by_kind(results, position)}
    iou = row[overlap]
    return {
        "tp": row["TP"],
        "fp": row["FP"],
        "fn": row["FN"],
        "score": None if math.isnan(row["score"]) else round(row["score"], 4),
        "iou": None if math.isnan(iou) else round(iou, 2),
        "missed": [lesions.index(int(lesion)) for lesion in chosen["missed lesion"][1]],
        "hits": _path(*chosen["hit"], scale),
        "alarms": _path(*chosen["false alarm"], scale),
    }


def _path(regions, chosen, scale):
    """One SVG path around the chosen regions."""
    return svg_path([line for region in chosen for line in region_contours(regions, region)], scale)


def svg_path(lines, scale):
    """
    Args:
        lines (list[np.ndarray]): closed lines, see :func:`region_contours`.
        scale (float): original pixels in one of the picture that they are drawn on.

    Returns:
        str: one SVG path.
    """
    parts = []
    for line in lines:
        corners = line[:-1].astype(np.float32)
        kept = cv2.approxPolyDP(corners[:, None], CLOSENESS * scale, closed=True)[:, 0]
        points = "L".join(f"{x:.4g},{y:.4g}" for x, y in kept.tolist())
        parts.append(f"M{points}Z")
    return "".join(parts)


def classification_gallery(runs, max_images=300):
    """
    Args:
        runs (list[Run]): of classifiers, on one test set.
        max_images (int): if the test set is larger, half of them are those whose class got the
            lowest probability, the others are spread evenly over the rest.

    Returns:
        dict: JSON values.

        - ``runs`` (list[str]), ``classes`` (list[str]): names.
        - ``total`` (int): images in the test set.
        - ``images`` (list[dict]): ``name``, ``patient`` (str or None), ``width`` and ``height`` (of
          the original, in pixels), ``jpeg`` (base64), ``label`` (position in ``classes``) and
          ``scores``, for each model the probabilities of the classes.

    Raises:
        FileNotFoundError: if one of the images is not there.
        BadInputError: one of them cannot be read, or is no file of the images' folder.
    """
    truth = runs[0].results.ground_truth
    scores = np.stack([run.results.probability for run in runs], axis=1)
    of_truth = scores[np.arange(len(scores)), :, truth.label].mean(axis=1)
    root = Path(runs[0].image_root)
    images = []
    for position in tqdm(_choose(of_truth, max_images), desc="Gallery", delay=2):
        record = truth.images[position]
        path = image_inside(root, record.get("file_name"), runs[0].gt_path)
        jpeg, (width, height), _ = embed(path)
        patient = record.get("patient_id")
        images.append(
            {
                "name": record["file_name"],
                "patient": None if patient is None else str(patient),
                "width": width,
                "height": height,
                "jpeg": jpeg,
                "label": int(truth.label[position]),
                "scores": scores[position].round(4).tolist(),
            }
        )
    return {
        "runs": [run.name for run in runs],
        "classes": truth.classes,
        "total": len(truth.images),
        "images": images,
    }


def _choose(of_truth, max_images):
    """Positions, ascending."""
    order = np.argsort(of_truth, kind="stable")
    if len(order) > max_images:
        worst = (max_images + 1) // 2
        rest = np.linspace(worst, len(order) - 1, max_images - worst).round().astype(int)
        order = order[[*range(worst), *rest]]
    return sorted(order.tolist())
