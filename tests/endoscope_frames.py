"""Synthetic frames as endoscopy processors show them, whose content is known."""

import cv2
import numpy as np

SHAPES = ("disc", "octagon", "square", "rounded square", "cut disc", "whole")
BACKGROUNDS = {"black": (0, 0, 0), "nearly black": (5, 4, 6), "gray": (90, 94, 99)}
INSETS = ("none", "map", "blanked", "second", "outside")


def draw_frame(shape, background="black", inset="none", seed=0, height=480, width=640):
    """A frame (H, W, 3) uint8, its view (H, W) bool, and the box of the inset over it, or None.

    Insets lie over the view's lower left corner: "map" is of one colour with lines in it, "second"
    another endoscopic image; "outside" is one that lies outside the view."""
    rng = np.random.default_rng(seed)
    view = _view(shape, height, width)
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = BACKGROUNDS[background]
    if background == "nearly black":
        frame += rng.integers(0, 3, frame.shape, dtype=np.uint8)
    frame[view] = _mucosa(rng, height, width)[view]
    box, other = None, np.random.default_rng(seed + 99)
    if inset in ("map", "blanked", "second"):
        x0, y0, width, height = cv2.boundingRect(view.astype(np.uint8))
        x1, y1 = x0 + round(0.3 * width), y0 + height
        y0 = y1 - round(0.32 * height)
        box = x0, y0, x1, y1
        part = frame[y0:y1, x0:x1]
        part[:] = (20, 165, 135) if inset == "map" else 0
        if inset == "map":
            cv2.ellipse(frame, ((x0 + x1) // 2, (y0 + y1) // 2), (9, 25), 20, 0, 360, (60, 40, 40))
            cv2.putText(frame, "Col 1", (x0 + 4, y0 + 16), 0, 0.45, (235, 235, 235))
        elif inset == "second":
            part[:] = _mucosa(other, *part.shape[:2], hue=(90, 130, 120))
        view[y0:y1, x0:x1] = False
    elif inset == "outside":
        frame[20:100, 8:88] = _mucosa(other, 80, 80)
    return frame, view, box


def patient_banner(frame, view):
    """The frame with a patient's data next to the view; what was written on, (H, W) bool."""
    written = frame.copy()
    for row, line in enumerate(("MUSTERFRAU, ERIKA", "ID 4711", "12.08.1964", "F 62y")):
        cv2.putText(written, line, (4, 130 + 26 * row), 0, 0.5, (240, 240, 240), 1, cv2.LINE_AA)
    written[view] = frame[view]
    return written, (written != frame).any(axis=2)


def _view(shape, height, width):
    y, x = np.mgrid[:height, :width].astype(float)
    u, v = np.abs(x - 0.62 * width), np.abs(y - 0.5 * height)  # the writing is on the left
    r = 0.47 * height if width > height else 0.36 * width
    corner = np.maximum(u - 0.6 * r, 0), np.maximum(v - 0.6 * r, 0)
    return {
        "disc": np.hypot(u, v) < r,
        "octagon": (np.maximum(u, v) < r) & (u + v < 1.45 * r),
        "square": np.maximum(u, v) < r,
        "rounded square": np.hypot(*corner) < 0.4 * r,
        "cut disc": np.hypot(u, v) < 1.3 * r,
        "whole": np.ones((height, width), bool),
    }[shape]


def _mucosa(rng, height, width, hue=(205, 110, 90)):
    """Folds, vessels, a dark lumen and reflections."""

    def noise(cells):
        small = rng.standard_normal((cells, cells)).astype(np.float32)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)

    light = 0.8 + 0.13 * noise(5) + 0.06 * noise(18) + 0.03 * noise(70)
    y, x = np.mgrid[:height, :width]
    cy, cx = rng.uniform(0.3, 0.7, 2) * (height, width)
    lumen = np.hypot((y - cy) / (0.15 * height), (x - cx) / (0.12 * width))
    light *= np.clip(lumen, 0.15, 1)
    image = light[..., None] * np.array(hue, np.float32)
    image[noise(40) > 2.6] = 250
    return np.clip(image + rng.normal(0, 3, image.shape), 12, 255).astype(np.uint8)
