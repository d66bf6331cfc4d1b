"""DICOM: stills, sequences and videos as RGB, and nobody's name."""

import hashlib
import io
import os
import re
import resource
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit

from imrcnn_d2.data.formats import Sample
from imrcnn_d2.data.images import inspect_image, is_dicom, read_header, read_image, read_still
from imrcnn_d2.data.prepare.metadata import patients_from_dicom
from imrcnn_d2.deploy import predict_files
from imrcnn_d2.deploy.inputs import may_show_patient, public_name, read_dicom
from imrcnn_d2.utils.files import BadInputError, Rejects

from .conftest import random_image, some_hundred, write_video

H264 = "1.2.840.10008.1.2.4.102"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"


def jpeg(path):
    """A still, compressed as endoscopes write it."""
    stream = io.BytesIO()
    Image.fromarray(random_image(0)).save(stream, "JPEG", quality=95)
    fields = {"syntax": JPEGBaseline8Bit, "PhotometricInterpretation": "YBR_FULL_422"}
    return write_dicom(path, random_image(0), encoded=[stream.getvalue()], **fields)


def test_stills_and_videos(tmp_path):
    path = write_dicom(tmp_path / "still", random_image(0))
    assert is_dicom(path)
    (frame,) = read_dicom(path)
    assert (frame.image == random_image(0)).all() and frame.number is frame.time is None
    (frame,) = read_dicom(jpeg(tmp_path / "jpeg.dcm"))
    assert abs(frame.image.astype(int) - random_image(0)).mean() < 4, "its colours are right"
    video = write_video(tmp_path / "v.mp4", 5)
    frames = np.stack([random_image(number) for number in range(5)])
    path = write_dicom(tmp_path / "v.dcm", frames, encoded=[video.read_bytes()], syntax=H264)
    decoded = list(read_dicom(path))
    assert [frame.time for frame in decoded] == [Fraction(number, 25) for number in range(5)]
    assert all(abs(f.image.astype(int) - frames[f.number]).mean() < 12 for f in decoded)


TIMES = [
    ({"FrameTime": "33.25"}, [Fraction(133, 4000) * n for n in range(3)]),
    ({"FrameTimeVector": ["0", "40", "80"]}, [0, Fraction(1, 25), Fraction(3, 25)]),
    ({"CineRate": "25"}, [Fraction(n, 25) for n in range(3)]),
    *((fields, [None] * 3) for fields in ({}, {"FrameTime": "-40"}, {"FrameTime": "1e300"})),
    *(
        ({"FrameTimeVector": values}, [None] * 3)
        for values in ("40", ["0", "40"], ["0", "-40", "40"], ["0", "40", "1e300"])
    ),
]


@pytest.mark.parametrize("fields, times", TIMES)
def test_several_frames(tmp_path, fields, times):
    frames = np.stack([random_image(seed) for seed in range(3)])
    stack = list(read_dicom(write_dicom(tmp_path / "a.dcm", frames, **fields)))
    assert [(frame.number, frame.time) for frame in stack] == list(enumerate(times))
    assert all((frame.image == frames[n]).all() for n, frame in enumerate(stack))


def test_gray_of_many_bits(tmp_path):
    ramp = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16)
    window = {"WindowCenter": "1024", "WindowWidth": "2048"}
    for pixels, fields, gray in (
        (ramp, {}, expected),
        (ramp, {"PhotometricInterpretation": "MONOCHROME1"}, expected[::-1, ::-1]),
        (ramp.astype(np.int16) - 2048, {}, expected),
        (ramp, window, np.clip(2 * expected, 0, 255)),
    ):
        path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11, **fields)
        (frame,) = read_dicom(path)
        assert abs(frame.image - gray[:, :, None]).max() <= 1


def damaged(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def test_names_of_patients_and_of_bad_files(tmp_path):
    path, pixels = write_dicom(tmp_path / "file", random_image(0)), random_image(0)
    name = f"dicom-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.dcm"
    assert public_name(path) == public_name(path.rename(tmp_path / "ERIKA.dcm")) == name
    assert len({public_name(tmp_path / "erika.dcm") for _ in range(2)}) == 2, "not from the name"
    assert may_show_patient(write_dicom(tmp_path / "a", pixels, BurnedInAnnotation="YES"))
    assert not may_show_patient(write_dicom(tmp_path / "a", pixels))
    assert not may_show_patient(write_dicom(tmp_path / "b", BurnedInAnnotation="NO"))

    lossless = {"encoded": [b"\xff\xd8\xff\xd9"], "syntax": JPEG_LOSSLESS}
    digits = write_dicom(tmp_path / "digits", np.stack([pixels, pixels]), FrameTime="1e1")
    damaged(digits, b"DS\4\x001e1 ", b"DS\x0c\x001e9999999999")
    (tmp_path / "junk").write_bytes(b"junk")
    for path, reason in {
        write_dicom(tmp_path / "report"): "without an image",
        write_dicom(tmp_path / "cut", pixels, Rows=1000): "pixels",
        write_dicom(tmp_path / "x", pixels, **lossless): "gdcm",
        write_dicom(tmp_path / "rows", pixels, Rows=None): "rows or columns",
        write_dicom(tmp_path / "columns", pixels, Columns=0): "rows or columns",
        digits: "no readable DICOM file",
        tmp_path / "junk": "no readable DICOM file",
        tmp_path / "Musterfrau": "No such file",
    }.items():
        with pytest.raises(BadInputError, match=reason) as caught:
            list(read_dicom(path))
        assert caught.value.file == str(path) and "Musterfrau" not in caught.value.reason
    assert not is_dicom(tmp_path / "junk") and not is_dicom(tmp_path / "none")


# Of one element its length, or what it is: what follows is then read as a part of it.
MONOCHROME = b"\x28\0\x04\0CS\x0c\0MONOCHROME2 ", b"\x28\0\x04\0CS\x0c\0MUSTERFRAU  "
DAMAGES = {
    "length of a syntax": (b"\x02\0\x10\0UI\x14\0", b"\x02\0\x10\0UI\xff\0"),
    "name for a number": (b"\x10\0\x10\0PN", b"\x28\0\x08\0IS"),
    "name for an interpretation": MONOCHROME,
    "a syntax": (b"1.2.840.10008.1.2.1\0", b"1.2.840.Musterfrau1\0"),
    "a character set": (b"\x10\0\x10\0PN", b"\x08\0\x05\0CS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_message_quotes_the_file(predictor, tmp_path, capfd, caplog, damage):
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    from imrcnn_d2.deploy.web.app import find

    folder, out, messages = tmp_path / "in", tmp_path / "out", []
    folder.mkdir()
    path = damaged(write_dicom(folder / "a.dcm", random_image(0)[:, :, 0]), *DAMAGES[damage])
    os.utime(path, (0, 0))  # else the journal's time could contain such digits by chance
    sample = Sample("a.png", SimpleNamespace(path=path), [], {})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        messages += predict_files(predictor, [folder], out).failed
        rejects, patients = Rejects("reject"), patients_from_dicom()
        for read, argument in ((inspect_image, path), (read_image, path), (patients, sample)):
            with rejects.catch():
                read(argument)
        messages.append(find(predictor, Path(shutil.copy(path, tmp_path / "a")), "a").error)
    messages += [error.reason for error in rejects.errors] + [each.message for each in warned]
    messages += [*capfd.readouterr(), caplog.text, *(file.read_text() for file in out.iterdir())]
    parts = [part for value in PATIENT.values() for part in value.replace("-", "^").split("^")]
    parts += [uid.decode() for uid in re.findall(rb"1\.2\.826\.[0-9.]{20,}", path.read_bytes())]
    everything = " ".join(map(str, messages)).lower()
    for word in parts:
        assert word.lower() not in everything, (word, everything)


MAKERS = {
    "still": lambda path: write_dicom(path, random_image(0), BurnedInAnnotation="NO"),
    "gray": lambda path: write_dicom(path, np.arange(4800, dtype=np.uint16).reshape(60, 80)),
    "frames": lambda path: write_dicom(path, np.stack([random_image(0)] * 2), FrameTime="40"),
    "jpeg": jpeg,
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Of files of each kind, the bytes up to the pixels, of a JPEG all, and the rest."""
    folder, parts = tmp_path_factory.mktemp("kinds"), {}
    for kind, make in MAKERS.items():
        content = make(folder / kind).read_bytes()
        end = len(content) if kind == "jpeg" else content.index(b"\xe0\x7f\x10\0")
        parts[kind] = content[:end], content[end:]
    return parts


@some_hundred
@given(st.data())
def test_fuzz(tmp_path_factory, contents, data):
    root = tmp_path_factory.mktemp("dicom")
    head, pixels = contents[data.draw(st.sampled_from(sorted(contents)))]
    (root / "a.dcm").write_bytes(data.draw(damaged_bytes(head)) + pixels)
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # of this process now
    limits, memory = resource.getrlimit(resource.RLIMIT_AS), pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + 4 * 2**30, limits[1]))
    try:
        for read in (read_header, may_show_patient, read_still, lambda p: list(read_dicom(p))):
            try:
                read(root / "a.dcm")
            except BadInputError as error:
                assert "usterfrau" not in error.reason.lower()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    shutil.rmtree(root)
