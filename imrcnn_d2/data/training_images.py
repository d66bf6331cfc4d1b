"""The images that a model has seen, which its weights carry as hashes."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from imrcnn_d2.data.images import in_threads, pixels_sha256, read_image
from imrcnn_d2.data.prepare.duplicates import MOST_DIFFERENT, fingerprint, fingerprint_bits
from imrcnn_d2.utils.files import BadInputError, few

logger = logging.getLogger(__name__)

KEY = "training_images"  # in the metadata of a file of weights: a sorted list of image hashes
# Hexadecimal, of `pixels_sha256`: of 10 million images, any two share these 64 bits with a
# probability of 3e-6.
_DIGITS = 16
_IMAGE = re.compile(rf"[0-9a-f]{{{_DIGITS + 64}}}")
_BLOCK = 1000  # images that are compared with all of the training at once


class SeenImages(NamedTuple):
    """Image files that weights were trained on."""

    same: list[Path]  # by the hash of their pixels
    alike: list[Path]  # by their fingerprint: scaled or compressed copies


def hash_image(path: Path) -> str:
    """Return 80 hexadecimal digits: the first 64 bits of `pixels_sha256`, and the `fingerprint`,
    which hardly changes when an image is scaled or compressed.

    Raises:
        BadInputError: as `read_image`.
    """
    pixels = read_image(path)
    return pixels_sha256(pixels)[:_DIGITS] + fingerprint(pixels)


def training_hashes(paths: Iterable[str | Path]) -> list[str]:
    """Return what weights trained on these image files carry: each `hash_image`, sorted. Files that
    are no images, as a mapper of one's own may read, are named in a warning and left out."""
    paths = sorted({Path(path) for path in paths})
    hashes = dict(zip(paths, in_threads(_hash, paths, "Hashing images"), strict=True))
    if unread := [path for path in paths if hashes[path] is None]:
        text = "%d of %d training images cannot be read, so `imrcnn validate` will not know: %s"
        logger.warning(text, len(unread), len(paths), few(unread))
    return sorted({value for value in hashes.values() if value is not None})


def _hash(path: Path) -> str | None:
    try:
        return hash_image(path)
    except BadInputError:
        return None


def are_hashes(value: object) -> bool:
    """Whether it is a list of `training_hashes`."""
    return isinstance(value, list) and all(
        isinstance(item, str) and _IMAGE.fullmatch(item) for item in value
    )


def seen_in_training(paths: Sequence[Path], hashes: Sequence[str]) -> SeenImages:
    """Look image files up among `training_hashes`.

    Raises:
        BadInputError: a file is no readable image.
    """
    described = in_threads(hash_image, paths, "Comparing with training images")
    known = {text[:_DIGITS] for text in hashes}
    prints, trained = (
        fingerprint_bits([text[_DIGITS:] for text in texts]) for texts in (described, hashes)
    )
    seen = SeenImages([], [])
    for start in range(0, len(paths), _BLOCK):
        alike = prints[start : start + _BLOCK] @ trained.T >= 256 - 2 * MOST_DIFFERENT
        for i, is_alike in enumerate(alike.any(axis=1), start):
            if described[i][:_DIGITS] in known:
                seen.same.append(paths[i])
            elif is_alike:
                seen.alike.append(paths[i])
    return seen
