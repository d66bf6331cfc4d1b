"""Mappers: from dataset dicts to the inputs of detectors and classifiers."""

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, PolygonMasks

from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.images import open_image


class LesionMapper(DatasetMapper):
    """:class:`DatasetMapper` with the augmentation of INPUT.AUG; images may have no lesion."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        ret = super().from_config(cfg, is_train)
        # Detectron2 puts its crop, where there is one, before the augmentation.
        crop = ret["augmentations"][: int(is_train and cfg.INPUT.CROP.ENABLED)]
        ret["augmentations"] = crop + build_augmentation(cfg, is_train)
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        with open_image(Path(dataset_dict["file_name"])):  # Detectron2 would open any format
            return super().__call__(dataset_dict)

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if any(not obj.get("iscrowd", 0) for obj in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Detectron2 would leave out gt_masks here, and then fail to recompute boxes after a crop.
        del dataset_dict["annotations"]
        instances = detection_utils.annotations_to_instances([], image_shape)
        if self.use_instance_mask:
            no_masks = PolygonMasks([])
            if self.instance_mask_format == "bitmask":
                no_masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
            instances.gt_masks = no_masks
        dataset_dict["instances"] = instances


class ClassificationMapper:
    """Reads an image, squeezes it into a square and, in training, augments it by INPUT.AUG.

    Nothing is cut off, since a lesion may lie at the rim; in training INPUT.CROP crops before the
    resize, which varies scale and shape.
    """

    @configurable
    def __init__(self, *, augmentations: list[T.Augmentation], image_format: str):
        self._augmentations = T.AugmentationList(augmentations)
        self._image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        size = cfg.INPUT.SIZE
        if size <= 0:
            raise ValueError(f"INPUT.SIZE is {size}: give the side in pixels to resize images to")
        # The first resizes, for detectors.
        augmentations = [T.Resize((size, size)), *build_augmentation(cfg, is_train)[1:]]
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {"augmentations": augmentations, "image_format": cfg.INPUT.FORMAT}

    def __call__(self, record: dict) -> dict:
        """Return the record with "image": (3, H, W) uint8 tensor."""
        with open_image(Path(record["file_name"])):  # Detectron2 would open any format
            image = detection_utils.read_image(record["file_name"], self._image_format)
        detection_utils.check_image_size(record, image)
        sample = T.AugInput(image)
        self._augmentations(sample)
        pixels = np.ascontiguousarray(sample.image.transpose(2, 0, 1))
        return {**record, "image": torch.as_tensor(pixels)}
