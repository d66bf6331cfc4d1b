"""Augmentation of training images, each step switched by a config key."""

from detectron2.data import detection_utils
from detectron2.data import transforms as T

from imrcnn_d2.config import get_node

__all__ = ["build_augmentation"]


def build_augmentation(cfg, is_train):
    """
    Detectron2's resize and flip, and for training what INPUT.AUG adds.

    An endoscope is held at any angle, so an image may be flipped and turned freely; its light and
    colour vary with the device, so these may vary mildly.

    Args:
        cfg (CfgNode): INPUT is read.
        is_train (bool): whether the images are for training.

    Returns:
        list[Augmentation]: in the order in which they are applied.
    """
    augmentations = detection_utils.build_augmentation(cfg, is_train)
    if not is_train:
        return augmentations
    aug = get_node(cfg, "INPUT.AUG")
    if aug.VFLIP_PROB > 0:
        augmentations.append(T.RandomFlip(aug.VFLIP_PROB, horizontal=False, vertical=True))
    if aug.ROT90:
        augmentations.append(T.RandomRotation([0, 90, 180, 270], sample_style="choice"))
    if aug.COLOR > 0:
        span = (1 - aug.COLOR, 1 + aug.COLOR)
        augmentations += [
            T.RandomBrightness(*span),
            T.RandomContrast(*span),
            T.RandomSaturation(*span),
        ]
    return augmentations
