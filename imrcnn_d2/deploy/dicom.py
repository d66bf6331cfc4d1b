"""DICOM files: their frames as RGB images, and nothing about the patient."""

import io
import itertools
import logging
import secrets
from fractions import Fraction

import numpy as np

from imrcnn_d2.data.dicom import iter_rgb, own_words, read_header
from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.evaluation.files import file_sha256

from .identity import DICOM_NAME
from .video import Frame, decode_video

__all__ = ["may_show_patient", "public_name", "read_dicom"]

logger = logging.getLogger(__name__)

# Of the UIDs of MPEG-2, H.264 and HEVC, whose frames pydicom does not take apart.
_VIDEO_SYNTAX = "1.2.840.10008.1.2.4.10"
_TIME_BASE = Fraction(1, 1_000_000)
_LONGEST_STEP = 86_400  # seconds between frames
_LARGEST_VIDEO = 2**31  # bytes, which are held in memory


def public_name(path):
    """
    Args:
        path (Path): a DICOM file. Its name, with the folders it is in, is often the patient's, in
            ways that cannot all be told; a hash of it can be guessed.

    Returns:
        str: one made of the file's SHA-256, by which its owner finds it again; of one that cannot
        be opened, a random one.
    """
    try:
        return DICOM_NAME.format(file_sha256(path)[:16])
    except OSError:
        return DICOM_NAME.format(secrets.token_hex(8))


def may_show_patient(path):
    """
    Args:
        path (Path): a DICOM file.

    Returns:
        bool: whether the file says that its pixels have the patient's data burned in, or says
        something else than that they have not.
    """
    header = read_header(path)
    with own_words(path, "says nothing clear of its pixels"):
        return str(header.get("BurnedInAnnotation") or "NO").strip().upper() != "NO"


def read_dicom(path):
    """
    Read a still, a multi-frame image or a video, a frame at a time.

    Args:
        path (Path): the file.

    Yields:
        Frame: without a time in a still, and where the file gives none.

    Raises:
        BadInputError: no DICOM file, one without pixels, or of a compression that cannot be undone
            here; the error says what to install.
    """
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    header = read_header(path)
    with own_words(path, "is no readable DICOM file"):
        if "Rows" not in header or "Columns" not in header:
            raise BadInputError(path, "is a DICOM file without an image")
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        if syntax.startswith(_VIDEO_SYNTAX):
            if (size := path.stat().st_size) > _LARGEST_VIDEO:
                raise BadInputError(
                    path,
                    f"has {size} bytes, more than the {_LARGEST_VIDEO} allowed of a DICOM video; "
                    "save the video as a file of its own",
                )
            pixels = dcmread(path, specific_tags=["PixelData"]).get("PixelData")
            if not pixels:
                raise BadInputError(path, "is a DICOM file without pixels")
            (stream,) = generate_frames(pixels, number_of_frames=1)  # to DICOM it is one
            yield from decode_video(io.BytesIO(stream), path)
            return
        number = int(header.get("NumberOfFrames") or 1)
        times = _times(header, number) if number > 1 else itertools.repeat(None)
        for i, image in enumerate(iter_rgb(path, header)):
            time = next(times)
            base = None if time is None else _TIME_BASE
            yield Frame(image, i if number > 1 else None, time, base)


def _times(header, number):
    """Of the frames in turn, in seconds; None throughout where the file gives none that can be."""
    vector = header.get("FrameTimeVector")
    if vector is not None and vector != "":
        steps = [_seconds(step) for step in np.atleast_1d(vector)]
        rising = len(steps) == number and steps[0] >= 0 and all(step > 0 for step in steps[1:])
        if rising and max(steps) <= _LONGEST_STEP:
            return itertools.accumulate(steps)
        logger.warning("A DICOM file's FrameTimeVector does not fit its frames: no times")
        return itertools.repeat(None)
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    step = _seconds(header.get("FrameTime") or 0) or (1 / _exact(rate) if rate else 0)
    if not 0 < step <= _LONGEST_STEP:
        return itertools.repeat(None)
    return itertools.count(Fraction(0), step)


def _seconds(milliseconds):
    return _exact(milliseconds) / 1000


def _exact(number):
    """As a float first: the digits of 1e999999999 would fill the memory."""
    return Fraction(str(float(number)))
