"""DICOM: stills, sequences and videos as RGB, and nobody's name."""

import hashlib
import io
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit

from imrcnn_d2.data.formats import Sample
from imrcnn_d2.data.images import inspect_image, is_dicom, read_header, read_image, read_still
from imrcnn_d2.data.prepare.metadata import patients_from_dicom
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.inputs import VideoWriter, may_show_patient, public_name, read_dicom
from imrcnn_d2.deploy.web.page import find
from imrcnn_d2.utils.files import BadInputError, Rejects

from .conftest import random_image

H264 = "1.2.840.10008.1.2.4.102"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.70"


def test_a_still(tmp_path):
    path = write_dicom(tmp_path / "still", random_image(0))
    assert is_dicom(path)
    (frame,) = read_dicom(path)
    assert (frame.image == random_image(0)).all()
    assert frame.number is None and frame.time is None


def test_a_number_of_too_many_digits(tmp_path):
    frames = np.stack([random_image(0)] * 2)
    path = write_dicom(tmp_path / "a.dcm", frames, FrameTime="1e1")
    damaged(path, b"DS\4\x001e1 ", b"DS\x0c\x001e9999999999")
    with pytest.raises(BadInputError, match="a.dcm: is no readable DICOM file"):
        list(read_dicom(path))


def test_several_frames(tmp_path):
    frames = np.stack([random_image(seed) for seed in range(3)])
    timed = list(read_dicom(write_dicom(tmp_path / "a.dcm", frames, FrameTime="33.25")))
    assert [frame.time for frame in timed] == [Fraction(133, 4000) * n for n in range(3)]
    assert all((frame.image == frames[frame.number]).all() for frame in timed)
    vector = write_dicom(tmp_path / "b.dcm", frames, FrameTimeVector=["0", "40", "80"])
    assert [float(frame.time) for frame in read_dicom(vector)] == [0, 0.04, 0.12]
    rated = write_dicom(tmp_path / "c.dcm", frames, CineRate="25")
    assert [float(frame.time) for frame in read_dicom(rated)] == [0, 0.04, 0.08]
    nothing = [{}, {"FrameTimeVector": "40"}, {"FrameTimeVector": ["0", "40"]}]
    nothing += [{"FrameTimeVector": ["0", "-40", "40"]}, {"FrameTime": "-40"}]
    nothing += [{"FrameTimeVector": ["0", "40", "1e300"]}, {"FrameTime": "1e300"}]
    for fields in nothing:
        stack = list(read_dicom(write_dicom(tmp_path / "d.dcm", frames, **fields)))
        assert [(f.number, f.time) for f in stack] == [(0, None), (1, None), (2, None)], fields


@pytest.mark.parametrize("fields", [{"Rows": None}, {"Columns": 0}])
def test_no_size(tmp_path, fields):
    path = write_dicom(tmp_path / "a.dcm", random_image(0), **fields)
    with pytest.raises(BadInputError, match="rows or columns"):
        list(read_dicom(path))


def test_compressed_as_endoscopes_write_it(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(random_image(0)).save(stream, "JPEG", quality=95)
    path = write_dicom(
        tmp_path / "jpeg.dcm",
        random_image(0),
        encoded=[stream.getvalue()],
        syntax=JPEGBaseline8Bit,
        PhotometricInterpretation="YBR_FULL_422",
    )
    (frame,) = read_dicom(path)
    assert abs(frame.image.astype(int) - random_image(0)).mean() < 4, "its colours are right"


def test_a_video_within(tmp_path):
    times = [Fraction(number, 25) for number in range(5)]
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 25)) as video:
        for number, time in enumerate(times):
            video.write(random_image(number), time)
    encoded = [(tmp_path / "v.mp4").read_bytes()]
    frames = np.stack([random_image(number) for number in range(5)])
    path = write_dicom(tmp_path / "video.dcm", frames, encoded=encoded, syntax=H264)
    found = list(read_dicom(path))
    assert [frame.time for frame in found] == times
    assert all(abs(f.image.astype(int) - frames[f.number]).mean() < 12 for f in found)


def test_gray_of_many_bits(tmp_path):
    ramp = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16)
    twelve = {"BitsStored": 12, "HighBit": 11}
    (frame,) = read_dicom(write_dicom(tmp_path / "a.dcm", ramp, **twelve))
    assert abs(frame.image[:, :, 0] - expected).max() <= 1
    assert (frame.image[:, :, 0] == frame.image[:, :, 2]).all()
    (frame,) = read_dicom(
        write_dicom(tmp_path / "b.dcm", ramp, **twelve, PhotometricInterpretation="MONOCHROME1")
    )
    assert abs(frame.image[:, :, 0] - expected[::-1, ::-1]).max() <= 1
    signed = write_dicom(tmp_path / "d.dcm", (ramp.astype(np.int16) - 2048), **twelve)
    (frame,) = read_dicom(signed)
    assert abs(frame.image[:, :, 0] - expected).max() <= 1
    window = {"WindowCenter": "1024", "WindowWidth": "2048"}
    (frame,) = read_dicom(write_dicom(tmp_path / "c.dcm", ramp, **twelve, **window))
    assert abs(frame.image[:, :, 0] - np.clip(2 * expected, 0, 255)).max() <= 1


def test_bad_files_are_named(tmp_path):
    for name, path in {
        "without an image": write_dicom(tmp_path / "report.dcm"),
        "pixels cannot be read": write_dicom(tmp_path / "cut.dcm", random_image(0), Rows=1000),
        "gdcm": write_dicom(
            tmp_path / "x.dcm", random_image(0), encoded=[b"\xff\xd8\xff\xd9"], syntax=JPEG_LOSSLESS
        ),
    }.items():
        with pytest.raises(BadInputError, match=name) as caught:
            list(read_dicom(path))
        assert caught.value.file == str(path)
    (tmp_path / "junk.dcm").write_bytes(b"junk")
    with pytest.raises(BadInputError, match="no readable DICOM file"):
        list(read_dicom(tmp_path / "junk.dcm"))
    assert not is_dicom(tmp_path / "junk.dcm") and not is_dicom(tmp_path / "none")


def test_no_name_of_a_file_is_used(tmp_path):
    path = write_dicom(tmp_path / "file", random_image(0))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert (
        public_name(path)
        == public_name(path.rename(tmp_path / "ERIKA.dcm"))
        == (f"dicom-{digits}.dcm")
    )
    assert len({public_name(tmp_path / "erika.dcm") for _ in range(2)}) == 2, "not from the name"


def test_an_error_does_not_quote_the_name(tmp_path):
    with pytest.raises(BadInputError) as caught:
        read_header(tmp_path / "Musterfrau.dcm")
    assert "No such file" in caught.value.reason and "Musterfrau" not in caught.value.reason


def test_burned_in(tmp_path):
    assert may_show_patient(write_dicom(tmp_path / "a", random_image(0), BurnedInAnnotation="YES"))
    assert not may_show_patient(
        write_dicom(tmp_path / "b", random_image(0), BurnedInAnnotation="NO")
    )
    assert not may_show_patient(write_dicom(tmp_path / "c", random_image(0)))


def damaged(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


# Of one element its length, or what it is: what follows is then read as a part of it.
DAMAGES = {
    "length of a syntax": (b"\x02\0\x10\0UI\x14\0", b"\x02\0\x10\0UI\xff\0"),
    "name for a number": (b"\x10\0\x10\0PN", b"\x28\0\x08\0IS"),
    "name for an interpretation": (
        b"\x28\0\x04\0CS\x0c\0MONOCHROME2 ",
        b"\x28\0\x04\0CS\x0c\0MUSTERFRAU  ",
    ),
    "a syntax": (b"1.2.840.10008.1.2.1\0", b"1.2.840.Musterfrau1\0"),
    "a character set": (b"\x10\0\x10\0PN", b"\x08\0\x05\0CS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_message_quotes_the_file(predictor, tmp_path, capfd, caplog, damage):
    folder = tmp_path / "in"
    folder.mkdir()
    path = damaged(write_dicom(folder / "a.dcm", random_image(0)[:, :, 0]), *DAMAGES[damage])
    messages = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        messages.append(predict_files(predictor, [folder], tmp_path / "out").failed)
        rejects = Rejects("reject")
        for read in (inspect_image, read_image):
            with rejects.catch():
                read(path)
        with rejects.catch():
            patients_from_dicom()(Sample("a.png", SimpleNamespace(path=path), [], {}))
        messages += [error.reason for error in rejects.errors]
        messages.append(find(predictor, Path(shutil.copy(path, tmp_path / "a")), "a").error)
    outputs = [file.read_text() for file in (tmp_path / "out").iterdir()]
    everything = " ".join([*map(str, messages), *capfd.readouterr(), caplog.text, *outputs])
    everything += " ".join(str(warning.message) for warning in warned)
    parts = [part for value in PATIENT.values() for part in value.replace("-", "^").split("^")]
    uids = re.findall(rb"1\.2\.826\.[0-9.]{20,}", path.read_bytes())
    for word in (*parts, *(uid.decode() for uid in uids)):
        assert word.lower() not in everything.lower(), (word, everything)


@pytest.mark.parametrize("name", ["a.dcm", "Musterfrau.jpg"])
def test_an_uploaded_file_is_shown_by_its_content(predictor, tmp_path, name):
    path = write_dicom(tmp_path / "upload", random_image(0), BurnedInAnnotation="YES")
    public = public_name(path)
    finding = find(predictor, path, name)
    assert (finding.name, finding.jpeg, finding.png) == (public, None, None)


def jpeg(path):
    stream = io.BytesIO()
    Image.fromarray(random_image(0)).save(stream, "JPEG")
    encoded, kind = [stream.getvalue()], "YBR_FULL_422"
    return write_dicom(
        path,
        random_image(0),
        encoded=encoded,
        syntax=JPEGBaseline8Bit,
        PhotometricInterpretation=kind,
    )


MAKERS = {
    "still": lambda path: write_dicom(path, random_image(0), BurnedInAnnotation="NO"),
    "gray": lambda path: write_dicom(path, np.arange(4800, dtype=np.uint16).reshape(60, 80)),
    "frames": lambda path: write_dicom(path, np.stack([random_image(0)] * 2), FrameTime="40"),
    "jpeg": jpeg,
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Bytes of files of each kind, the header of each, and what comes after it."""
    folder, parts = tmp_path_factory.mktemp("kinds"), {}
    for kind, make in MAKERS.items():
        content = make(folder / kind).read_bytes()
        # all of the compressed pixels can be damaged, of others the header has it all
        end = None if kind == "jpeg" else content.index(b"\xe0\x7f\x10\0")
        parts[kind] = content[:end], content[end:] if end else b""
    return parts


@pytest.mark.fuzz
@pytest.mark.slow
@given(st.data())
@settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_fuzz(tmp_path_factory, contents, data):
    root = tmp_path_factory.mktemp("dicom")
    head, pixels = contents[data.draw(st.sampled_from(sorted(contents)))]
    (root / "a.dcm").write_bytes(data.draw(damaged_bytes(head)) + pixels)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory() + 4 * 2**30, limits[1]))
    try:
        for read in (read_header, may_show_patient, read_still, lambda p: list(read_dicom(p))):
            try:
                read(root / "a.dcm")
            except BadInputError as error:
                assert "usterfrau" not in error.reason.lower()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    shutil.rmtree(root)


def memory():
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
