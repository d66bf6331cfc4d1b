"""What images look like, in numbers: a histogram of colours, and one of textures.

`colour_histogram` and `texture_histogram` take (H, W, 3) uint8 RGB arrays of any size; equal
pictures of other sizes give nearly equal values.
"""

import cv2
import numpy as np

__all__ = ["colour_histogram", "texture_histogram"]

_SIDE = 128  # pixels that images are squeezed to
_HSV_BINS = (12, 4, 4)
_RINGS = ((8, 1), (16, 2), (24, 3))  # points and radius, in pixels, of a local binary pattern


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Shares of the colours by hue, saturation and value: (192,) float, adding up to 1."""
    hsv = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2HSV)
    counts = cv2.calcHist([hsv], [0, 1, 2], None, _HSV_BINS, [0, 180, 0, 256, 0, 256])
    return counts.ravel().astype(float) / counts.sum()


def texture_histogram(image: np.ndarray) -> np.ndarray:
    """Shares of the uniform local binary patterns on three scales: (54,) float, adding up to 3.

    Ojala, Pietikainen and Maenpaa, "Multiresolution gray-scale and rotation invariant texture
    classification with local binary patterns", PAMI 2002.

    Raises:
        ModuleNotFoundError: scikit-image is missing.
    """
    try:
        from skimage.feature import local_binary_pattern
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The texture view needs scikit-image: pip install -e '.[audit]'"
        ) from error
    gray = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2GRAY)
    shares = []
    for points, radius in _RINGS:
        patterns = local_binary_pattern(gray, points, radius, method="uniform")
        counts = np.bincount(patterns.astype(int).ravel(), minlength=points + 2)
        shares.append(counts / counts.sum())
    return np.concatenate(shares)


def _squeezed(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
