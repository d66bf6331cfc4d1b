"""Augmentation by INPUT.AUG, and copy-paste (Ghiasi et al., CVPR 2021) of lesions."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from imrcnn_d2.config import get_node

__all__ = ["CopyPaste", "build_augmentation", "paste_lesions"]


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Detectron2's resize and flip, and for training those of INPUT.AUG, in order of application.

    An endoscope is held at any angle, so an image may be flipped and turned freely; its light and
    colour vary with the device, so these may vary mildly.
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
    if aug.HUE > 0:
        augmentations.append(RandomHue(aug.HUE))
    if aug.BLUR_PROB > 0:
        augmentations.append(T.RandomApply(RandomBlur(), aug.BLUR_PROB))
    if aug.JPEG_PROB > 0:
        augmentations.append(T.RandomApply(RandomJPEG(), aug.JPEG_PROB))
    return augmentations


class RandomHue(T.Augmentation):
    """Shifts the hue; of an RGB or BGR image alike, since both directions are as likely.

    Args:
        span: largest shift, as a share of the colour circle, in (0, 0.5].
    """

    def __init__(self, span: float):
        super().__init__()
        self.span = span

    def get_transform(self, image):
        # OpenCV has hues from 0 to 179.
        shift = round(float(self._rand_range(-self.span, self.span)) * 180)

        def shift_hue(image):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % 180
            return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

        return T.ColorTransform(shift_hue)


class RandomBlur(T.Augmentation):
    """Gaussian blur of a random width.

    Args:
        sigma_min, sigma_max: standard deviation in pixels of the resized image.
    """

    def __init__(self, sigma_min: float = 0.2, sigma_max: float = 2.0):
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def get_transform(self, image):
        sigma = float(self._rand_range(self.sigma_min, self.sigma_max))
        return T.ColorTransform(lambda image: cv2.GaussianBlur(image, (0, 0), sigma))


class RandomJPEG(T.Augmentation):
    """JPEG compression of a random quality, from 0 (worst) to 100."""

    def __init__(self, quality_min: int = 30, quality_max: int = 95):
        super().__init__()
        self.quality_min, self.quality_max = quality_min, quality_max

    def get_transform(self, image):
        quality = round(float(self._rand_range(self.quality_min, self.quality_max)))

        def compress(image):
            _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            return cv2.imdecode(code, cv2.IMREAD_COLOR)

        return T.ColorTransform(compress)


class CopyPaste:
    """A mapper that at times pastes the lesions of another, likewise augmented training image.

    Args:
        mapper: a LesionMapper with INPUT.MASK_FORMAT "bitmask".
        records: dataset dicts that the pasted lesions come from.
        probability: of pasting, in [0, 1].

    Raises:
        ValueError: the mapper gives polygons.
    """

    def __init__(self, mapper: DatasetMapper, records: Sequence[dict], probability: float):
        if mapper.instance_mask_format != "bitmask":
            raise ValueError(
                f"INPUT.AUG.COPY_PASTE_PROB is {probability}, but INPUT.MASK_FORMAT is "
                f"{mapper.instance_mask_format!r}; copy-paste needs 'bitmask'"
            )
        self._mapper, self._records, self._probability = mapper, records, probability

    def __call__(self, dataset_dict: dict) -> dict:
        sample = self._mapper(dataset_dict)
        if np.random.rand() >= self._probability:
            return sample
        donor = self._mapper(self._records[np.random.randint(len(self._records))])
        return paste_lesions(donor, sample)


def paste_lesions(donor: dict, sample: dict, feather: float = 1.5) -> dict:
    """Pastes all lesions of one image, in their arrangement, at a random place of another.

    Args:
        donor, sample: of a mapper: "image", uint8 tensor (C, H, W), and "instances" with bitmasks;
            their sizes may differ.
        feather: width of the soft edge inside the contour, pixels.

    Returns:
        a copy of ``sample`` with the lesions; ``sample`` itself where the donor has none, or where
        they would hide more than half of a lesion of ``sample``.
    """
    lesions = donor["instances"]
    if not len(lesions):
        return sample
    shift = _random_shift(lesions.gt_masks.tensor.any(0), sample["image"].shape[1:])
    pasted = _shifted(lesions.gt_masks.tensor, shift, sample["image"].shape[1:])
    cover = pasted.any(0)
    known = sample["instances"]
    visible = known.gt_masks.tensor & ~cover
    if (visible.sum((1, 2)) * 2 < known.gt_masks.tensor.sum((1, 2))).any():
        return sample

    opacity = torch.from_numpy(cv2.GaussianBlur(cover.numpy().astype(np.float32), (0, 0), feather))
    opacity *= cover
    image = _shifted(donor["image"], shift, cover.shape)
    blended = torch.lerp(sample["image"].float(), image.float(), opacity)

    instances = Instances(tuple(cover.shape))
    instances.gt_masks = BitMasks(torch.cat([visible, pasted[pasted.any(2).any(1)]]))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    classes = lesions.gt_classes[pasted.any(2).any(1)]
    instances.gt_classes = torch.cat([known.gt_classes, classes])
    return {**sample, "image": blended.round().to(torch.uint8), "instances": instances}


def _random_shift(mask: torch.Tensor, size: Sequence[int]) -> list[int]:
    """(dy, dx) that leaves the mask's bounding box inside the image, or the image inside it."""
    shift = []
    for axis, length in enumerate(size):
        (where,) = torch.nonzero(mask.any(1 - axis), as_tuple=True)
        ends = sorted((-int(where[0]), length - 1 - int(where[-1])))
        shift.append(np.random.randint(ends[0], ends[1] + 1))
    return shift


def _shifted(array: torch.Tensor, shift: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """``array`` (..., h, w) moved by ``shift`` onto zeros of ``size`` (H, W)."""
    out = array.new_zeros((*array.shape[:-2], *size))
    source, target = [], []
    for offset, length, room in zip(shift, array.shape[-2:], size, strict=True):
        start, stop = max(0, -offset), min(length, room - offset)
        source.append(slice(start, stop))
        target.append(slice(start + offset, stop + offset))
    out[..., target[0], target[1]] = array[..., source[0], source[1]]
    return out
