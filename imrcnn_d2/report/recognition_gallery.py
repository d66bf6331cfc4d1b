"""The data of the gallery of classified images: what they are and what each model calls them."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.images import image_inside
from .gallery import embed

__all__ = ["recognition_gallery"]


def recognition_gallery(runs, max_images=300):
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
