"""Distortions of endoscopic images at five severities: functions of an image and a seed.

Blur and exposure act on linear light, as in a camera. Lengths are relative to the longer side of
the image, so that a severity means the same at any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)

# sRGB to linear light, for each of 256 values (IEC 61966-2-1)
_VALUES = np.arange(256) / 255
_LINEAR = np.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4)
_LINEAR = _LINEAR.astype(np.float32)


@dataclass(frozen=True)
class Distortion:
    """One way to distort an image."""

    title: str
    unit: str
    levels: tuple[float, ...]  # in the unit, at each of `SEVERITIES`
    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]  # of image, level


def distort(
    image: np.ndarray, name: str, severity: int, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """Return an (H, W, 3) uint8 RGB image distorted; after a rotation a square of the longer side,
    whose corners are black. The seed decides directions and places, the same at all severities."""
    level = DISTORTIONS[name].levels[SEVERITIES.index(severity)]
    return DISTORTIONS[name].apply(image, level, np.random.default_rng(seed))


def distort_mask(
    mask: np.ndarray, name: str, severity: int, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """Move an (H, W) bool mask with its image, as `distort` does. Only a rotation moves it."""
    if name != "rotation":
        return mask
    level = DISTORTIONS[name].levels[SEVERITIES.index(severity)]
    rng = np.random.default_rng(seed)
    return _rotate(mask.astype(np.uint8), level, rng, cv2.INTER_NEAREST).astype(bool)


def _defocus(image: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Blur with a disc, the image of a point out of focus; radius in percent of the side."""
    pixels = radius / 100 * max(image.shape)
    return _filter(image, np.clip(pixels + 0.5 - np.hypot(*_grid(pixels)), 0, 1))


def _motion(image: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """Blur along a line in any direction; length in percent of the side."""
    half = length / 200 * max(image.shape)
    angle = rng.uniform(0, np.pi)
    y, x = _grid(half)
    along = np.abs(x * np.cos(angle) + y * np.sin(angle))
    across = np.abs(y * np.cos(angle) - x * np.sin(angle))
    return _filter(image, np.clip(half + 0.5 - along, 0, 1) * np.clip(1 - across, 0, 1))


def _exposure(image: np.ndarray, stops: float, rng: np.random.Generator) -> np.ndarray:
    """Double the light with each stop, or halve it with each below 0; values above 1 are cut."""
    return _encode(_LINEAR * np.float32(2.0**stops))[image]


def _highlights(image: np.ndarray, percent: float, rng: np.random.Generator) -> np.ndarray:
    """Put soft white ellipses on the tissue until they cover that share of it."""
    height, width = image.shape[:2]
    side = max(height, width)
    tissue = image.max(axis=2) > 40
    places = np.flatnonzero(tissue)
    light = np.zeros((height, width), np.float32)
    while np.count_nonzero(light[tissue]) < percent / 100 * len(places):
        y, x = divmod(int(rng.choice(places)), width)
        long = side * np.exp(rng.uniform(np.log(0.006), np.log(0.03)))
        axes = max(round(long), 1), max(round(long * rng.uniform(0.3, 0.9)), 1)
        cv2.ellipse(light, (x, y), axes, rng.uniform(0, 180), 0, 360, 1.0, -1)
    light = cv2.GaussianBlur(light, (0, 0), 0.003 * side)[..., None]
    return np.rint(image + (255 - image.astype(np.float32)) * light).astype(np.uint8)


def _jpeg(image: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    options = [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    encoded = cv2.imencode(".jpg", image[..., ::-1], options)[1]
    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])


def _rotate(
    image: np.ndarray, angle: float, rng: np.random.Generator, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Turn about the centre, to either side; angle in degrees."""
    height, width = image.shape[:2]
    side = max(height, width)
    angle = rng.choice((-1, 1)) * angle
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
    matrix[:, 2] += (side - width) / 2, (side - height) / 2
    return cv2.warpAffine(image, matrix, (side, side), flags=interpolation)


def _grid(reach: float) -> np.ndarray:
    """Rows and columns around the middle of a kernel, (2, K, K)."""
    half = int(np.ceil(reach))
    return np.mgrid[-half : half + 1, -half : half + 1].astype(float)


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    kernel = (kernel / kernel.sum()).astype(np.float32)
    return _encode(cv2.filter2D(_LINEAR[image], -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def _encode(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB, uint8."""
    light = np.clip(light, 0, 1)
    curved = 1.055 * light ** (1 / 2.4) - 0.055
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, curved)).astype(np.uint8)


DISTORTIONS = {
    "defocus": Distortion("Defocus", "radius, % of side", (0.4, 0.8, 1.2, 1.8, 2.6), _defocus),
    "motion": Distortion("Motion blur", "length, % of side", (1.5, 3, 5, 8, 12), _motion),
    "over_exposure": Distortion("Over-exposure", "stops", (0.5, 1, 1.5, 2, 3), _exposure),
    "under_exposure": Distortion("Under-exposure", "stops", (-1, -2, -3, -4, -5), _exposure),
    "highlights": Distortion("Highlights", "% of tissue", (1, 2, 4, 8, 16), _highlights),
    "jpeg": Distortion("JPEG compression", "quality", (50, 30, 20, 10, 5), _jpeg),
    "rotation": Distortion("Rotation", "degrees", (15, 45, 90, 135, 180), _rotate),
}
