"""What a config of an image classifier leaves to timm and to the training set."""

import logging

import numpy as np

from imrcnn_d2.data.classification_catalogue import balanced_weights, labels_of
from imrcnn_d2.data.register import load_datasets
from imrcnn_d2.modeling.classifier import ImageClassifier, timm_input

__all__ = ["is_classifier", "resolve_class_weights", "resolve_input"]

logger = logging.getLogger(__name__)


def is_classifier(cfg):
    """
    Args:
        cfg (CfgNode):

    Returns:
        bool: whether MODEL.META_ARCHITECTURE is :class:`ImageClassifier`.
    """
    return cfg.MODEL.META_ARCHITECTURE == ImageClassifier.__name__


def resolve_input(cfg):
    """
    Set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of a classifier, and INPUT.SIZE where it
    is 0, to what timm's data config says for MODEL.TIMM.NAME.

    Args:
        cfg (CfgNode): changed in place; that of another model is left as it is.

    Raises:
        ValueError: timm has no model of that name.
    """
    if not is_classifier(cfg):
        return
    about = timm_input(cfg.MODEL.TIMM.NAME)
    cfg.INPUT.SIZE = cfg.INPUT.SIZE or about["size"]
    cfg.INPUT.FORMAT = ImageClassifier.input_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = about["pixel_mean"], about["pixel_std"]


def resolve_class_weights(cfg):
    """
    Args:
        cfg (CfgNode): not changed.

    Returns:
        CfgNode: ``cfg`` itself, or a copy in which the numbers stand for a
        MODEL.CLASSIFIER.CLASS_WEIGHTS of "balanced".

    Raises:
        ValueError: see :func:`balanced_weights`.
    """
    if not is_classifier(cfg) or cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS != "balanced":
        return cfg
    labels = labels_of(load_datasets(cfg.DATASETS.TRAIN))
    weights = balanced_weights(labels, cfg.MODEL.CLASSIFIER.NUM_CLASSES).tolist()
    logger.info(
        "%s training images of the classes: they weigh %s in the loss",
        np.bincount(labels).tolist(),
        ", ".join(f"{weight:.3g}" for weight in weights),
    )
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = weights
    if frozen:
        cfg.freeze()
    return cfg
