"""Augmentation of training images, each step switched by a config key."""

import cv2
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
    if aug.HUE > 0:
        augmentations.append(RandomHue(aug.HUE))
    if aug.BLUR_PROB > 0:
        augmentations.append(T.RandomApply(RandomBlur(), aug.BLUR_PROB))
    if aug.JPEG_PROB > 0:
        augmentations.append(T.RandomApply(RandomJPEG(), aug.JPEG_PROB))
    return augmentations


class RandomHue(T.Augmentation):
    """Shift the hue; of an RGB or BGR image alike, since both directions are as likely."""

    def __init__(self, span):
        """
        Args:
            span (float): largest shift, as a share of the colour circle, in (0, 0.5].
        """
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
    """Gaussian blur of a random width."""

    def __init__(self, sigma_min=0.2, sigma_max=2.0):
        """
        Args:
            sigma_min, sigma_max (float): standard deviation in pixels of the resized image.
        """
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def get_transform(self, image):
        sigma = float(self._rand_range(self.sigma_min, self.sigma_max))
        return T.ColorTransform(lambda image: cv2.GaussianBlur(image, (0, 0), sigma))


class RandomJPEG(T.Augmentation):
    """JPEG compression of a random quality."""

    def __init__(self, quality_min=30, quality_max=95):
        """
        Args:
            quality_min, quality_max (int): from 0 (worst) to 100.
        """
        super().__init__()
        self.quality_min, self.quality_max = quality_min, quality_max

    def get_transform(self, image):
        quality = round(float(self._rand_range(self.quality_min, self.quality_max)))

        def compress(image):
            _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            return cv2.imdecode(code, cv2.IMREAD_COLOR)

        return T.ColorTransform(compress)
