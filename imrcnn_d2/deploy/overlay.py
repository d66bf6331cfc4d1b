"""What was found, drawn onto the image."""

from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_overlay", "outline"]

OUTLINE = (240, 228, 66)  # Okabe and Ito's yellow, which no mucosa has
HALO = (0, 0, 0)
FONT_SHARE = 26  # of the image's smaller side
SMALLEST_FONT = 9


def draw_overlay(image, annotations, classes, footer):
    """
    Outline what counts, each with its class and score; boxes where there are no masks; for a
    recognition model, the class of the image.

    Args:
        image (np.ndarray): (H, W, 3) RGB, uint8; left as it is.
        annotations (list[dict]): of the image, see :func:`instance_records` and
            :func:`classification_records`; only those to be shown.
        classes (list[str]): names, by ``category_id`` - 1.
        footer (str): a line at the bottom, which says what the picture is not for.

    Returns:
        np.ndarray: (H, W, 3) RGB, uint8.
    """
    picture = np.ascontiguousarray(image).copy()
    height, width = picture.shape[:2]
    thickness = max(1, round(min(height, width) / 240))
    labels = []
    for annotation in annotations:
        text = f"{classes[annotation['category_id'] - 1]} {annotation['score']:.2f}"
        if "bbox" not in annotation:
            labels.append((text, 0.02 * width, 0.02 * height))
            continue
        lines = outline(annotation)
        for color, wider in ((HALO, 2), (OUTLINE, 0)):
            cv2.polylines(picture, lines, True, color, thickness + wider, cv2.LINE_AA)
        x, y = annotation["bbox"][:2]
        labels.append((text, x, y))
    return _write(picture, labels, footer)


def outline(annotation):
    """
    Args:
        annotation (dict): of a detection; its ``bbox`` is taken where it has no mask.

    Returns:
        sequence of np.ndarray: closed lines, (K, 1, 2) int32, in pixels (x, y).
    """
    if "segmentation" in annotation:
        mask = mask_util.decode(annotation["segmentation"])
        return cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    x, y, width, height = annotation["bbox"]
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    return [np.rint(corners).astype(np.int32)[:, None]]


def _write(picture, labels, footer):
    """Texts last, so that no outline crosses them."""
    height, width = picture.shape[:2]
    size = max(SMALLEST_FONT, min(height, width) // FONT_SHARE)
    font = _font(size)
    small = _font(max(SMALLEST_FONT, int(0.8 * size)))
    share = small.getlength(footer) / (0.97 * width)
    if share > 1:  # it has to be seen whole, however narrow the image is
        small = _font(max(1, int(small.size / share)))
    strip = min(height, int(1.5 * small.size))
    picture[height - strip :] //= 3
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    stroke = max(1, size // 8)
    taken = []
    for text, x, y in labels:
        long = draw.textlength(text, font)
        x = min(max(x, stroke), max(stroke, width - long - stroke))
        y = max(y - 1.4 * size, stroke)
        while any(abs(y - v) < 1.2 * size and u - long < x < u + w for u, v, w in taken):
            y += 0.2 * size  # below what is there
        y = min(y, height - strip - 1.3 * size)
        taken.append((x, y, long))
        # White: of a video's yellow, H.264 keeps a quarter.
        draw.text((x, y), text, "white", font, stroke_width=stroke, stroke_fill=HALO)
    draw.text((0.015 * width, height - strip / 2), footer, "white", small, anchor="lm")
    return np.asarray(image)


@lru_cache
def _font(size):
    # Matplotlib's own: Pillow's has no letters but ASCII's.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
