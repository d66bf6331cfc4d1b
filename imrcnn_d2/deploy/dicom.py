"""DICOM files: their frames as RGB images, and nothing about the patient."""

import io
import itertools
import re
from fractions import Fraction

from imrcnn_d2.data.dicom import iter_rgb, read_header
from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.evaluation.files import file_sha256

from .video import Frame, decode_video

__all__ = ["may_show_patient", "public_name", "read_dicom"]

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


def public_name(path, name):
    """
    Args:
        path (Path): a DICOM file.
        name (str): its name, with the folders it is in.

    Returns:
        str: ``name``, or one made of the file's hash if the patient's or the study's identifiers
        occur in it.
    """
    header = read_header(path)
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
    header = read_header(path)
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

    header = read_header(path)
    if "Rows" not in header or "Columns" not in header:
        raise BadInputError(path, "is a DICOM file without an image")
    syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
    if syntax.startswith(_VIDEO_SYNTAX):
        pixels = read_header(path, stop_before_pixels=False).get("PixelData")
        if not pixels:
            raise BadInputError(path, "is a DICOM file without pixels")
        (stream,) = generate_frames(pixels, number_of_frames=1)  # to DICOM it is one
        yield from decode_video(io.BytesIO(stream), path)
        return
    several = int(header.get("NumberOfFrames") or 1) > 1
    times = _times(header) if several else itertools.repeat(None)
    for number, (image, time) in enumerate(zip(iter_rgb(path, header), times, strict=False)):
        yield Frame(image, number if several else None, time, None if time is None else _TIME_BASE)


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
