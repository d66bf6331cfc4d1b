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
from imrcnn_d2.data.distortions import DISTORTIONS, distort


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Return Detectron2's resize and flip, and for training those of INPUT.AUG, in order.

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
        for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation):
            augmentations.append(kind(1 - aug.COLOR, 1 + aug.COLOR))
    if aug.HUE > 0:
        augmentations.append(RandomHue(aug.HUE))
    if aug.BLUR_PROB > 0:
        augmentations.append(T.RandomApply(RandomBlur(), aug.BLUR_PROB))
    if aug.JPEG_PROB > 0:
        augmentations.append(T.RandomApply(RandomJPEG(), aug.JPEG_PROB))
    if aug.DISTORTION_PROB > 0:
        augmentations.append(T.RandomApply(RandomDistortion(), aug.DISTORTION_PROB))
    return augmentations


class RandomColour(T.Augmentation):
    """Changes colours by `apply`, a function of image and strength, uniform in [low, high]."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def get_transform(self, image):
        strength = float(self._rand_range(self.low, self.high))
        return T.ColorTransform(lambda image: self.apply(image, strength))


class RandomHue(RandomColour):
    """Shifts the hue, by at most `span` of the colour circle, in (0, 0.5]; of an RGB or BGR image
    alike, since both directions are as likely."""

    def __init__(self, span: float):
        super().__init__(-span, span)
        self.span = span

    def apply(self, image: np.ndarray, shift: float) -> np.ndarray:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        # OpenCV has hues from 0 to 179.
        hsv[..., 0] = (hsv[..., 0].astype(int) + round(shift * 180)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class RandomBlur(RandomColour):
    """Gaussian blur of a random standard deviation in pixels of the resized image."""

    def __init__(self, low: float = 0.2, high: float = 2.0):
        super().__init__(low, high)

    def apply(self, image: np.ndarray, sigma: float) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), sigma)


class RandomJPEG(RandomColour):
    """JPEG compression of a random quality, from 0 (worst) to 100."""

    def __init__(self, low: int = 30, high: int = 95):
        super().__init__(low, high)

    def apply(self, image: np.ndarray, quality: float) -> np.ndarray:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, round(quality)])
        return cv2.imdecode(code, cv2.IMREAD_COLOR)


class RandomDistortion(T.Augmentation):
    """One of `DISTORTIONS` but the rotation, each equally likely, of a random severity up to
    `worst`; of an RGB or BGR image alike, but for the colours of the JPEG's."""

    def __init__(self, worst: int = 3):
        super().__init__()
        self.worst = worst

    def get_transform(self, image):
        names = [name for name in DISTORTIONS if name != "rotation"]
        name, severity = np.random.choice(names), np.random.randint(1, self.worst + 1)
        seed = np.random.randint(2**31)
        return T.ColorTransform(lambda image: distort(image, name, severity, seed))


class CopyPaste:
    """A LesionMapper that pastes, with a probability, the lesions of another, likewise augmented
    training image; raises ValueError unless masks are on and INPUT.MASK_FORMAT is "bitmask"."""

    def __init__(self, mapper: DatasetMapper, records: Sequence[dict], probability: float):
        if not mapper.use_instance_mask:
            raise ValueError(
                f"INPUT.AUG.COPY_PASTE_PROB is {probability}, but MODEL.MASK_ON is False: lesions "
                "are pasted by their masks; set it to 0"
            )
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
    """Return a copy of `sample` with all lesions of `donor`, in their arrangement, at a random
    place; `sample` itself where these are none, or would hide more than half of one of its lesions.

    Both are a mapper's, "image" (C, H, W) and "instances" with bitmasks; their sizes may differ.
    `feather` is the width of the soft edge inside the contour, in pixels.
    """
    lesions, known = donor["instances"], sample["instances"]
    if not len(lesions):
        return sample
    size = sample["image"].shape[1:]
    shift = _random_shift(lesions.gt_masks.tensor.any(0), size)
    pasted = _shifted(lesions.gt_masks.tensor, shift, size)
    cover = pasted.any(0)
    visible = known.gt_masks.tensor & ~cover
    if (visible.sum((1, 2)) * 2 < known.gt_masks.tensor.sum((1, 2))).any():
        return sample

    opacity = torch.from_numpy(cv2.GaussianBlur(cover.numpy().astype(np.float32), (0, 0), feather))
    image = _shifted(donor["image"], shift, size)
    blended = torch.lerp(sample["image"].float(), image.float(), opacity * cover)

    inside = pasted.any(2).any(1)
    instances = Instances(tuple(size))
    instances.gt_masks = BitMasks(torch.cat([visible, pasted[inside]]))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.cat([known.gt_classes, lesions.gt_classes[inside]])
    return {**sample, "image": blended.round().to(torch.uint8), "instances": instances}


def _random_shift(mask: torch.Tensor, size: Sequence[int]) -> list[int]:
    """(dy, dx) that leaves the mask's bounding box inside the image, or the image inside it."""
    shift = []
    for axis, length in enumerate(size):
        (places,) = torch.nonzero(mask.any(1 - axis), as_tuple=True)
        ends = sorted((-int(places[0]), length - 1 - int(places[-1])))
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
