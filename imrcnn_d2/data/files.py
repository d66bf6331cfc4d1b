"""Opening files of others: regular ones only, and images of named formats and bounded size."""

import os
import re
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from imrcnn_d2.data.rejects import BadInputError

__all__ = [
    "IMAGE_FORMATS",
    "MAX_SCANS",
    "check_inside",
    "check_no_way_out",
    "check_pixels",
    "image_file",
    "leads_out",
    "open_image",
    "regular_file",
]

# Pillow opens by content. Of the formats left out, some start other programs (EPS: Ghostscript).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_BYTES_PER_PIXEL = 8  # of the largest file: RGBA of 16 bits, not compressed
MAX_SCANS = 100  # of a JPEG; encoders make about ten, and each takes time, however few its bytes
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # those with a length

# `check_pixels` refuses what Pillow warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def regular_file(path: Path) -> Path:
    """Returns `path`, which is a file whose end comes; nothing else is opened.

    Raises:
        BadInputError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise BadInputError(path, f"cannot be opened: is {kind}, not a file; give a copy as a file")
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path`, once links are followed, lies outside `folder`, which may be a link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_inside(folder: Path, path: Path, follow_links: bool = False) -> Path:
    """Returns `path`.

    Raises:
        BadInputError: links lead it out of `folder`, and `follow_links` does not allow that.
    """
    if not follow_links and leads_out(folder, path):
        raise BadInputError(
            path,
            f"is a link that leads out of {folder}, to {os.path.realpath(path)}; put a copy there, "
            "or allow such links with --follow-links",
        )
    return path


def check_no_way_out(folder: str | Path) -> None:
    """Raises BadInputError if a link in `folder` leads out of it, or a pipe lies in it.

    For a folder that programs write into which follow links, and would wait for a pipe's reader.
    """
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if leads_out(Path(folder), path):
                raise BadInputError(
                    path,
                    f"is a link that leads out of {folder}, to {os.path.realpath(path)}, and what "
                    "is written here would land there; remove it, or choose another folder",
                )
            if path.is_fifo():
                raise BadInputError(path, "is a pipe, where a file is to be written; remove it")


def image_file(path: Path) -> Path:
    """Returns `path`, a regular file that is not larger than an image can be.

    Raises:
        BadInputError: it is none.
    """
    size, most = os.path.getsize(regular_file(path)), Image.MAX_IMAGE_PIXELS
    if most is not None and size > _BYTES_PER_PIXEL * most:
        allowed = _BYTES_PER_PIXEL * most
        raise BadInputError(path, f"has {size} bytes, more than the {allowed} allowed of an image")
    return path


def check_pixels(file: str | Path, width: int, height: int) -> None:
    """Raises BadInputError for more pixels than Pillow's ``Image.MAX_IMAGE_PIXELS`` (89 million).

    A few bytes can claim any number of pixels, for which memory is then taken.
    """
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise BadInputError(
            file,
            f"has {width}x{height} = {width * height} pixels, more than the {most} allowed; "
            "scale it down or cut it up",
        )


def _check_scans(name: str | Path, file: BinaryIO) -> None:
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    scans, end = 0, 2
    while (found := _JPEG_MARKER.search(data, end)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        end = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    if scans > MAX_SCANS:
        raise BadInputError(
            name, f"is a JPEG of {scans} scans, more than the {MAX_SCANS} allowed; save it anew"
        )


def open_image(
    file: Path | BinaryIO, formats: Sequence[str] = IMAGE_FORMATS, name: str | Path = "image"
) -> Image.Image:
    """Opens an image without decoding it.

    Args:
        file: its path, or what holds its bytes.
        formats: those to admit, as Pillow calls them.
        name: what errors call an image that has no path.

    Raises:
        FileNotFoundError: there is none.
        BadInputError: it is no regular file, of no such format, damaged, or too large.
    """
    if isinstance(file, Path):
        file.stat()
        name = image_file(file)
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:  # which names an address in memory
        known = ", ".join(formats)
        raise BadInputError(name, f"is no readable image (of no known format: {known})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"has too many pixels ({error}); scale it down or cut it up"
        raise BadInputError(name, reason) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadInputError(name, f"is no readable image ({error})") from error
    try:
        check_pixels(name, *image.size)
        if image.format in ("JPEG", "MPO"):
            _check_scans(name, image.fp)
    except BadInputError:
        image.close()
        raise
    return image
