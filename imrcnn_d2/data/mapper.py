"""Mappers: from dataset dicts to the inputs of detectors and classifiers, and back to the frame."""

import copy
import logging
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.logger import log_first_n
from torch.nn.functional import pad

from imrcnn_d2.config import get_node
from imrcnn_d2.data.augmentation import build_augmentation
from imrcnn_d2.data.endoscope_view import View, find_crop
from imrcnn_d2.data.images import open_image

_KEPT_VIEWS = 50_000  # in each process of a loader, of about two kilobytes


class CropToView(T.CropTransform):
    """From a frame to the box of the view in it; images are cropped by `View.crop`, which blanks
    what is not of the view as well."""

    def __init__(self, view: View):
        (x0, y0, x1, y1), (height, width) = view.box, view.size
        super().__init__(x0, y0, x1 - x0, y1 - y0, width, height)

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Moved, not cut at the box, for which Detectron2 needs shapely."""
        return [self.apply_coords(polygon) for polygon in polygons]

    def to_frame(self, instances: Instances) -> Instances:
        """Predictions on the crop, of its size, as those of the frame: boxes are moved, masks
        (N, h, w) are padded to (N, H, W)."""
        frame = Instances((self.orig_h, self.orig_w), **instances.get_fields())
        boxes = instances.pred_boxes.tensor
        frame.pred_boxes = Boxes(boxes + boxes.new_tensor([self.x0, self.y0] * 2))
        if frame.has("pred_masks"):
            back = self.inverse()
            frame.pred_masks = pad(frame.pred_masks, (back.x0, back.x1, back.y0, back.y1))
        return frame


def in_frame(sample: dict, instances: Instances) -> Instances:
    """Predictions on a sample of :class:`LesionMapper` as those of the whole frame."""
    return sample["view"].to_frame(instances) if "view" in sample else instances


class ImageReader:
    """Reads the images of records; of each file it finds the view once, as long as it lives."""

    def __init__(self, image_format: str, crop_to_view: bool):
        self._image_format, self._crop_to_view = image_format, crop_to_view
        self._views: dict[str, View | None] = {}

    def __call__(self, record: dict) -> tuple[np.ndarray, View | None]:
        """The image of a record, (H, W, C), and the view that it was cropped to, if any."""
        name, reversed_ = record["file_name"], self._image_format == "BGR"
        with open_image(Path(name)):  # Detectron2 would open any format
            image = detection_utils.read_image(name, "RGB" if reversed_ else self._image_format)
        detection_utils.check_image_size(record, image)
        view = self._view(name, image) if self._crop_to_view else None
        if view is not None:
            image = view.crop(image)
        return image[:, :, ::-1] if reversed_ else image, view

    def _view(self, name: str, image: np.ndarray) -> View | None:
        if name in self._views:
            return self._views[name]
        view = find_crop(image)
        if len(self._views) < _KEPT_VIEWS:
            self._views[name] = view
        return view


class LesionMapper(DatasetMapper):
    """:class:`DatasetMapper` with the augmentation of INPUT.AUG, and before it the crop to the
    endoscope's view of INPUT.CROP_TO_VIEW; images may have no lesion. No semantic segmentation and
    no precomputed proposals.

    A sample that was cropped has "view", a :class:`CropToView`, and "height" and "width" of the
    crop, to which Detectron2 scales predictions; see :func:`in_frame`.
    """

    @configurable
    def __init__(self, is_train: bool, *, crop_to_view: bool = False, **options):
        super().__init__(is_train, **options)
        self._read = ImageReader(self.image_format, crop_to_view)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        ret = super().from_config(cfg, is_train)
        ret["crop_to_view"] = get_node(cfg, "INPUT.CROP_TO_VIEW")
        # Detectron2 puts its crop, where there is one, before the augmentation.
        crop = ret["augmentations"][: int(is_train and cfg.INPUT.CROP.ENABLED)]
        ret["augmentations"] = crop + build_augmentation(cfg, is_train)
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        record = copy.deepcopy(dataset_dict)
        image, view = self._read(record)
        sample = T.AugInput(image)
        transforms = self.augmentations(sample)
        record["image"] = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        if view is not None:
            record["view"] = crop = CropToView(view)
            record["height"], record["width"] = crop.h, crop.w
            transforms = crop + transforms
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            if view is not None:
                record["annotations"] = _in_view(record, view)
            self._transform_annotations(record, transforms, sample.image.shape[:2])
        return record

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


def _in_view(record: dict, view: View) -> list[dict]:
    """The annotations of a record whose box shows some of the view; the others are logged once."""
    kept, seen = [], view.mask
    for annotation in record["annotations"]:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0 = np.floor(np.maximum(box[:2], 0)).astype(int)
        x1, y1 = np.ceil(box[2:]).astype(int)
        if seen[y0:y1, x0:x1].any():
            kept.append(annotation)
    if lost := len(record["annotations"]) - len(kept):
        text = f"{record['file_name']}: annotations outside the endoscope's view, as far as it is "
        text += f"found: {lost}, left out. Correct them, or set INPUT.CROP_TO_VIEW to False"
        log_first_n(logging.WARNING, text, key="message")
    return kept


class ClassificationMapper:
    """Reads an image, squeezes it into a square and, in training, augments it by INPUT.AUG.

    Of the endoscope's view, to which INPUT.CROP_TO_VIEW crops, nothing is cut off, since a lesion
    may lie at the rim; in training INPUT.CROP crops before the resize, which varies scale and
    shape.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        image_format: str,
        crop_to_view: bool = False,
    ):
        self._augmentations = T.AugmentationList(augmentations)
        self._read = ImageReader(image_format, crop_to_view)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        size = cfg.INPUT.SIZE
        if size <= 0:
            raise ValueError(f"INPUT.SIZE is {size}: give the side in pixels to resize images to")
        # The first resizes, for detectors.
        augmentations = [T.Resize((size, size)), *build_augmentation(cfg, is_train)[1:]]
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        crop_to_view = get_node(cfg, "INPUT.CROP_TO_VIEW")
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "crop_to_view": crop_to_view,
        }

    def __call__(self, record: dict) -> dict:
        """Return the record with "image": (3, H, W) uint8 tensor."""
        image, _ = self._read(record)
        sample = T.AugInput(image)
        self._augmentations(sample)
        pixels = np.ascontiguousarray(sample.image.transpose(2, 0, 1))
        return {**record, "image": torch.as_tensor(pixels)}
