"""Colour, blur and compression against what they should do to known pictures."""

import colorsys

import cv2
import numpy as np
import pytest

from imrcnn_d2.data.augmentation import RandomBlur, RandomHue, RandomJPEG


def apply(augmentation, image, seed):
    np.random.seed(seed)
    return augmentation.get_transform(image).apply_image(image)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_hue_moves_within_its_span_and_leaves_the_rest(order):
    image = np.zeros((4, 4, 3), np.uint8)
    image[:] = np.array((200, 90, 60), np.uint8)[list(order)]
    hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 90 / 255, 60 / 255)
    shifts = []
    for seed in range(40):
        pixel = apply(RandomHue(0.05), image, seed)[0, 0][list(order)] / 255
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        shifts.append((h - hue + 0.5) % 1 - 0.5)
        assert (s, v) == pytest.approx((saturation, value), abs=0.01)
    assert max(map(abs, shifts)) < 0.06 and min(shifts) < -0.03 and max(shifts) > 0.03


def test_blur_spreads_a_point_by_its_sigma():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    image = cv2.dilate(image, np.ones((9, 9)))
    before = np.average((np.arange(41) - 20) ** 2, weights=image[20, :, 0])
    for seed in range(10):
        blurred = apply(RandomBlur(1.0, 2.0), image, seed).astype(float)
        after = np.average((np.arange(41) - 20) ** 2, weights=blurred[:, :, 0].sum(0))
        assert 0.8 < after - before < 4.3
        assert blurred.sum() == pytest.approx(image.sum(), rel=0.03)


def test_jpeg_loses_more_at_low_quality():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 1)

    def loss(*quality):
        return np.abs(apply(RandomJPEG(*quality), image, 0).astype(int) - image).mean()

    assert 0 < loss(95, 95) < loss(60, 60) < loss(30, 30)
