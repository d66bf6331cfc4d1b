"""The pictures of a training's final evaluation."""

import logging
import os

from detectron2.data import MetadataCatalog

from .pictures import draw_pictures
from .recognition_figures import draw_recognition_pictures

__all__ = ["draw_test_pictures"]

logger = logging.getLogger(__name__)


def draw_test_pictures(output_dir, dataset_names, *, tau):
    """
    Draw the pictures beside each evaluation's files.

    Args:
        output_dir (str): OUTPUT_DIR, with ``inference/<dataset>/``.
        dataset_names (iterable of str): sets that were evaluated, in COCO's format.
        tau (float): score from which on a detection counts.
    """
    for name in dataset_names:
        data = MetadataCatalog.get(name)
        folder = os.path.join(output_dir, "inference", name)
        if data.get("evaluator_type") == "recognition":
            pictures = draw_recognition_pictures(folder, data.json_file)
        else:
            pictures = draw_pictures(folder, data.json_file, data.get("image_root", ""), tau=tau)
        logger.info("Pictures in %s: %s", folder, ", ".join(path.name for path in pictures))
