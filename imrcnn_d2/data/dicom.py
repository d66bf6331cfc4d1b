"""DICOM files as RGB images of 8 bits."""

import contextlib
import io
import itertools
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from imrcnn_d2.data.files import MAX_SCANS, check_pixels, regular_file
from imrcnn_d2.data.rejects import BadInputError

__all__ = ["is_dicom", "iter_rgb", "own_words", "read_header", "read_still"]

# What a file without the preamble starts with: an element of group 2 or 8, with its type or length.
_BARE = re.compile(
    rb"[\x02\x08]\0.\0([A-Z]{2}|\x04\0\0\0)|\x08\0[\x05\x08\x12-\x18]\0.\0\0\0", re.DOTALL
)
# Bytes before the pixels; a list of numbers takes 300 times as many in memory, and 8 s each MiB.
_LONGEST_HEADER = 2**22
_PIXELS = (b"\xe0\x7f", b"\x7f\xe0")  # the group of what follows, in either order of bytes
_SILENT = ("ignore", None, Warning, re.compile("pydicom"), 0)  # a filter of warnings


def is_dicom(path: Path) -> bool:
    """Whether it has DICOM's mark after the preamble, whatever its name; or starts without one, as
    `read_header` does not read it."""
    try:
        with open(regular_file(path), "rb") as file:
            head = file.read(132)
            return head[128:] == b"DICM" or bool(_BARE.match(head))
    except (OSError, BadInputError):
        return False


def _silence() -> None:
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", module=_SILENT[3].pattern)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


_silence()  # before another thread sets filters for a block, and these ones again at its end


@contextlib.contextmanager
def own_words(path: Path, problem: str) -> Iterator[None]:
    """Keeps to itself what pydicom says: errors, warnings and log quote the file, so the patient.

    Its warnings and its log stay silent afterwards: filters of warnings that are set for a block
    are those of all threads.

    Raises:
        BadInputError: `problem`, and the type of the error that ended the block.
    """
    _silence()
    try:
        yield
    except (BadInputError, ModuleNotFoundError):
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged files
        kind = getattr(error, "strerror", None) or type(error).__name__
        raise BadInputError(path, f"{problem} ({kind})") from None


def read_header(path: Path, **how) -> Any:
    """The elements before the pixels; what of them with `how`, see `pydicom.dcmread`.

    Raises:
        BadInputError: it is no readable DICOM file, or its elements take too much memory.
        ModuleNotFoundError: pydicom, of the extra [deploy], is not there.
    """
    import pydicom

    regular_file(path)
    with own_words(path, "is no readable DICOM file"):
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(_LONGEST_HEADER))
        pydicom.filereader.read_preamble(head, force=False)
        meta = pydicom.filereader.read_dataset(
            head, False, True, stop_when=lambda tag, *_: tag >> 16 != 2
        )
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise BadInputError(
                path,
                "is no readable DICOM file: it is deflated as a whole, to any size; save it "
                "uncompressed",
            )
        head.seek(0)
        header = pydicom.dcmread(head, stop_before_pixels=True, **how)
        whole = len(head.getbuffer()) < _LONGEST_HEADER
        if not whole and head.read(2) not in _PIXELS:  # of a cut element pydicom says nothing
            raise BadInputError(
                path,
                f"is no readable DICOM file: its elements before the pixels take more than "
                f"{_LONGEST_HEADER} bytes; remove private ones",
            )
        return header


def read_still(path: Path) -> np.ndarray:
    """The image of a DICOM file that holds one.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        BadInputError: it cannot be read, holds a video or several frames.
    """
    frames = list(itertools.islice(iter_rgb(path, read_header(path)), 2))
    if len(frames) != 1:
        raise BadInputError(
            path, f"holds {len(frames) or 'no'} or more frames; save each in a file"
        )
    return frames[0]


def iter_rgb(path: Path, header: Any) -> Iterator[np.ndarray]:
    """Yields the frames of a still or a sequence of stills, (H, W, 3) uint8 RGB as to be shown.

    Raises:
        BadInputError: a file without pixels, or of a compression that cannot be undone here, such
            as that of a video; the error says what to install.
    """
    from pydicom.pixels import get_decoder, iter_pixels
    from pydicom.uid import JPEGTransferSyntaxes

    with own_words(path, "its pixels cannot be read"):
        if "Rows" not in header or "Columns" not in header:
            raise BadInputError(path, "is a DICOM file without an image")
        if not header.Rows or not header.Columns:
            raise BadInputError(path, "says nothing of its rows or columns")
        check_pixels(path, int(header.Columns), int(header.Rows))
        decoder = get_decoder(header.file_meta.TransferSyntaxUID)
        if not decoder.is_available:
            missing = "; ".join(decoder.missing_dependencies)
            raise BadInputError(path, f"its compression needs a decoder that is missing: {missing}")
        frames = iter_pixels(path)
        if decoder.UID in JPEGTransferSyntaxes:
            frames = _few_scans(frames, path, header)
        for pixels in frames:
            yield _to_rgb(pixels, header, path)


def _few_scans(frames: Iterator[np.ndarray], path: Path, header: Any) -> Iterator[np.ndarray]:
    """Yields `frames`, which are decoded from JPEGs, up to one whose few bytes take hours."""
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    number = int(header.get("NumberOfFrames") or 1)
    tables = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
    with open(path, "rb") as file:
        dcmread(file, specific_tags=["Rows"], stop_before_pixels=True)
        file.seek(12, io.SEEK_CUR)  # tag, type and length of what follows
        for data in generate_frames(
            file, number_of_frames=number, extended_offsets=tables if all(tables) else None
        ):
            if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                raise BadInputError(
                    path,
                    f"has a JPEG of {scans} scans, more than the {MAX_SCANS} allowed; save it anew",
                )
            yield from itertools.islice(frames, 1)


def _to_rgb(pixels: np.ndarray, header: Any, path: Path) -> np.ndarray:
    """A frame as it is to be shown, with 8 bits."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = str(header.get("PhotometricInterpretation", ""))
    bits = int(header.get("BitsStored") or 8)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        bits = 8 * pixels.dtype.itemsize
    if pixels.ndim == 3:
        if pixels.shape[2] != 3:
            raise BadInputError(path, f"has {pixels.shape[2]} channels, so no clear colours")
        return (pixels >> bits - 8 if bits > 8 else pixels).astype(np.uint8)
    if not kind.startswith("MONOCHROME"):
        raise BadInputError(path, "is of a photometric interpretation that is not known")
    values = apply_modality_lut(pixels, header)
    windowed = apply_voi_lut(values, header).astype(float)
    # The values that black and white have: windows are scaled to what the bits can hold.
    lowest = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
    black, white = apply_modality_lut(np.array([lowest, lowest + 2**bits - 1]), header).tolist()
    gray = np.clip((windowed - black) / ((white - black) or 1), 0, 1)
    if kind == "MONOCHROME1":
        gray = 1 - gray
    return np.repeat(np.rint(255 * gray).astype(np.uint8)[:, :, None], 3, axis=2)
