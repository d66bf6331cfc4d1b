"""From a dataset dict to what the model takes."""

from pathlib import Path

import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.structures import BitMasks, PolygonMasks

from .augmentation import build_augmentation
from .files import open_image

__all__ = ["LesionMapper"]


class LesionMapper(DatasetMapper):
    """
    :class:`DatasetMapper` with the augmentation of INPUT.AUG, for images with and without lesions.
    """

    @configurable
    def __init__(self, is_train, **kwargs):
        """
        Args: as in :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)

    @classmethod
    def from_config(cls, cfg, is_train=True):
        ret = super().from_config(cfg, is_train)
        # Detectron2 puts its crop, where there is one, before the augmentation.
        crop = ret["augmentations"][: int(is_train and cfg.INPUT.CROP.ENABLED)]
        ret["augmentations"] = crop + build_augmentation(cfg, is_train)
        return ret

    def __call__(self, dataset_dict):
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
            instances.gt_masks = (
                BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
                if self.instance_mask_format == "bitmask"
                else PolygonMasks([])
            )
        dataset_dict["instances"] = instances
