"""What an audit measures in an image: colour, light, blur, writing beside the view."""

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from imrcnn_d2.data.endoscope_view import View

__all__ = ["ORIENTATIONS", "ImageMeasures", "Line", "measure_image", "text_lines"]

_SIDE = 352  # pixels of the longer side, to which larger images are reduced to be measured
_MARGIN = 0.02  # of the shorter side: the view's soft border
_WHITE = 245  # gray value from which on a channel is full
_HASH = 16  # side of the perceptual hash, in bits
_TEXT_SIDE = 1024  # pixels of the longer side, to which larger images are reduced to look for text
_TEXT_CONTRAST = 48  # of writing to what is around it, gray values
_MIN_STROKES = 5  # that a row through a line of writing meets

# As `PIL.Image.Transpose`: an image and its copies that were turned or mirrored. None is upright.
ORIENTATIONS = (None, *Image.Transpose)

Line = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageMeasures:
    """Of one image. Gray values are 0 to 255; shares 0 to 1.

    Attributes:
        width, height: pixels as shown.
        file_hash: sha256 of the file's bytes.
        pixel_hash: sha256 of size and pixels.
        hashes: (8, 32) uint8, perceptual hash in each of `ORIENTATIONS`.
        brightness: 95th percentile of the gray values.
        blur: Crete's measure in the view, 0 sharp to 1 blurred.
        white: share of the view that is white in patches.
        colour: mean (L, a, b) of the view.
        chroma: mean difference of a pixel's largest and smallest channel, in the view.
        red_minus_blue: their mean difference in the view.
        view_share: share of the image that is the endoscope's view.
        text: boxes (x0, y0, x1, y1) of what looks like a line of writing beside the view.
    """

    width: int
    height: int
    file_hash: str
    pixel_hash: str
    hashes: np.ndarray
    brightness: float
    blur: float
    white: float
    colour: tuple[float, float, float]
    chroma: float
    red_minus_blue: float
    view_share: float
    text: tuple[Line, ...]


def measure_image(image: np.ndarray, view: View, file_hash: str) -> ImageMeasures:
    """
    Args:
        image: (H, W, 3) uint8 RGB.
        view: of :func:`imrcnn_d2.data.endoscope_view.find_view`.
        file_hash: sha256 of the file's bytes.

    Raises:
        ModuleNotFoundError: scikit-image or imagehash is not installed; the error says how.
    """
    height, width = image.shape[:2]
    small = _reduced(image, _SIDE, cv2.INTER_AREA)
    mask = _reduced(view.mask.astype(np.uint8), _SIDE, cv2.INTER_NEAREST)
    mask = cv2.erode(mask, np.ones((5, 5)), borderValue=1)
    if not mask.any():
        mask[:] = 1
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    # channel by channel: NumPy takes many times as long over short axes
    red, green, blue = cv2.split(small)
    lowest, highest = (of(of(red, green), blue) for of in (cv2.min, cv2.max))
    full = (lowest >= _WHITE).astype(np.uint8)
    full = cv2.morphologyEx(full, cv2.MORPH_OPEN, np.ones((7, 7)))  # leaves out highlights
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    lit = gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return ImageMeasures(
        width=width,
        height=height,
        file_hash=file_hash,
        pixel_hash=hashlib.sha256(bytes(str(image.shape), "ascii") + image.tobytes()).hexdigest(),
        hashes=_perceptual_hashes(gray),
        brightness=float(np.percentile(gray, 95)),
        blur=_blur(lit),
        white=cv2.mean(full, mask)[0],
        colour=cv2.mean(lab, mask)[:3],
        chroma=cv2.mean(highest - lowest, mask)[0],
        red_minus_blue=cv2.mean(red, mask)[0] - cv2.mean(blue, mask)[0],
        view_share=float(view.mask.mean()),
        text=tuple(text_lines(image, view)),
    )


def text_lines(image: np.ndarray, view: View) -> list[Line]:
    """Boxes (x0, y0, x1, y1) around what looks like a line of writing beside the view.

    It is not read: what counts are strokes side by side, in a row, that stand out from the
    background. The frames of insets are no writing.
    """
    gray = _reduced(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _TEXT_SIDE, cv2.INTER_AREA)
    scale = image.shape[1] / gray.shape[1]
    side = min(gray.shape)
    covered = view.mask.astype(np.uint8)
    for box in view.insets:
        covered[box.slices] = 1
    covered = _reduced(covered, _TEXT_SIDE, cv2.INTER_NEAREST)
    margin = 2 * max(1, round(_MARGIN * side)) + 1
    outside = cv2.dilate(covered, np.ones((margin, margin))) == 0
    if outside.mean() < 0.01:
        return []
    background = int(np.median(gray[outside]))
    strokes = (outside & (cv2.absdiff(gray, background) > _TEXT_CONTRAST)).astype(np.uint8)
    reach = max(3, round(0.025 * side))
    joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, reach)))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
    found = []
    for x, y, w, h, _ in boxes[1:count].tolist():
        if not max(4, 0.01 * side) <= h <= 0.1 * side or w < 2 * h:
            continue
        rows = strokes[y : y + h, x : x + w]
        crossings = np.count_nonzero(np.diff(rows.astype(np.int8), axis=1) == 1, axis=1)
        if np.sort(crossings)[h // 2 :].mean() >= _MIN_STROKES and 0.1 < rows.mean() < 0.8:
            found.append(tuple(round(scale * v) for v in (x, y, x + w, y + h)))
    return found


def _reduced(image: np.ndarray, side: int, interpolation: int) -> np.ndarray:
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=interpolation)


def _blur(gray: np.ndarray) -> float:
    """Crete et al., "The blur effect" (SPIE 2007): how little changes if it is blurred again."""
    if min(gray.shape) < 16:
        return 0.0
    return float(_skimage_measure().blur_effect(gray))


def _perceptual_hashes(gray: np.ndarray) -> np.ndarray:
    imagehash = _imagehash()
    tile = Image.fromarray(gray).resize((4 * _HASH, 4 * _HASH), Image.Resampling.LANCZOS)
    views = (tile if turn is None else tile.transpose(turn) for turn in ORIENTATIONS)
    return np.stack(
        [np.packbits(imagehash.phash(view, hash_size=_HASH).hash.ravel()) for view in views]
    )


def _imagehash():
    try:
        import imagehash
    except ModuleNotFoundError as error:
        raise _not_installed("imagehash") from error
    return imagehash


def _skimage_measure():
    try:
        from skimage import measure
    except ModuleNotFoundError as error:
        raise _not_installed("scikit-image") from error
    return measure


def _not_installed(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{name} is not installed: pip install -e '.[audit]'")
