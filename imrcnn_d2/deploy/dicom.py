"""DICOM files: their frames as RGB images, and nothing about the patient."""

import io
import itertools
import re
from fractions import Fraction

import numpy as np

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.evaluation.files import file_sha256

from .video import Frame, decode_video

__all__ = ["is_dicom", "may_show_patient", "public_name", "read_dicom"]

# Of the UIDs of MPEG-2, H.264 and HEVC, whose frames pydicom does not take apart.
_VIDEO_SYNTAX = "1.2.840.10008.1.2.4.10"
# What a file may be named by that leads back to a person.
_IDENTIFIERS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "OtherPatientIDs",
    "OtherPatientNames",
    "AccessionNumber",
    "StudyID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
)
_TIME_BASE = Fraction(1, 1_000_000)
_SUBSTRING = 4  # characters from which on an identifier is looked for within words


def is_dicom(path):
    """
    Args:
        path (Path): of a file.

    Returns:
        bool: whether it has DICOM's mark behind the preamble, whatever its name.
    """
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _dataset(path, **how):
    import pydicom  # of the extra [deploy]

    try:
        return pydicom.dcmread(path, **how)
    except Exception as error:  # pydicom raises nearly anything on damaged files
        raise BadInputError(path, f"is no readable DICOM file ({error})") from error


def public_name(path, name):
    """
    Args:
        path (Path): a DICOM file.
        name (str): its name, with the folders it is in.

    Returns:
        str: ``name``, or one made of the file's hash if the patient's or the study's identifiers
        occur in it.
    """
    header = _dataset(path, stop_before_pixels=True)
    name_ = name.casefold()
    words = set(re.split(r"[\W_]+", name_))
    for keyword in _IDENTIFIERS:
        for part in re.split(r"[\^=\\\s]+", str(header.get(keyword) or "").casefold()):
            if part and (part in words or len(part) >= _SUBSTRING and part in name_):
                return f"dicom-{file_sha256(path)[:16]}.dcm"
    return name


def may_show_patient(path):
    """
    Args:
        path (Path): a DICOM file.

    Returns:
        bool: whether the file says that its pixels have the patient's data burned in.
    """
    header = _dataset(path, stop_before_pixels=True)
    return str(header.get("BurnedInAnnotation", "")).upper() == "YES"


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
    from pydicom.encaps import generate_frames
    from pydicom.pixels import iter_pixels

    header = _dataset(path, stop_before_pixels=True)
    if "Rows" not in header or "Columns" not in header:
        raise BadInputError(path, "is a DICOM file without an image")
    syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
    if syntax.startswith(_VIDEO_SYNTAX):
        pixels = _dataset(path).get("PixelData")
        if not pixels:
            raise BadInputError(path, "is a DICOM file without pixels")
        (stream,) = generate_frames(pixels, number_of_frames=1)  # to DICOM it is one
        yield from decode_video(io.BytesIO(stream), path)
        return
    several = int(header.get("NumberOfFrames") or 1) > 1
    times = _times(header) if several else itertools.repeat(None)
    try:
        for number, (pixels, time) in enumerate(zip(iter_pixels(path), times, strict=False)):
            image = _to_rgb(pixels, header, path)
            yield Frame(
                image, number if several else None, time, None if time is None else _TIME_BASE
            )
    except BadInputError:
        raise
    except Exception as error:  # as above; of decoders that are missing too
        raise BadInputError(path, f"its pixels cannot be read ({error})") from error


def _times(header):
    """Of the frames in turn, in seconds; None throughout where the file gives none."""
    vector = header.get("FrameTimeVector")
    if vector:
        return itertools.accumulate(_seconds(step) for step in vector)
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    step = _seconds(header.get("FrameTime") or 0) or (1 / Fraction(str(rate)) if rate else 0)
    return itertools.count(Fraction(0), step) if step else itertools.repeat(None)


def _seconds(milliseconds):
    return Fraction(str(milliseconds)) / 1000


def _to_rgb(pixels, header, path):
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
        raise BadInputError(path, f"is of photometric interpretation {kind!r}, which is not known")
    values = apply_modality_lut(pixels, header)
    windowed = apply_voi_lut(values, header).astype(float)
    # The values that black and white have: windows are scaled to what the bits can hold.
    lowest = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
    black, white = apply_modality_lut(np.array([lowest, lowest + 2**bits - 1]), header).tolist()
    gray = np.clip((windowed - black) / ((white - black) or 1), 0, 1)
    if kind == "MONOCHROME1":
        gray = 1 - gray
    return np.repeat(np.rint(255 * gray).astype(np.uint8)[:, :, None], 3, axis=2)
