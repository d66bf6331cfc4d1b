"""DICOM files as the images of a data set."""

import io

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

from imrcnn_d2.data.images import (
    inspect_image,
    install_image,
    is_dicom,
    iter_rgb,
    read_header,
    read_image,
    read_still,
)
from imrcnn_d2.utils.files import BadInputError


def test_a_still_is_an_image(tmp_path, picture):
    path = write_dicom(tmp_path / "Frau.dcm", picture(40, 60))
    assert is_dicom(path) and not is_dicom(tmp_path)
    image = inspect_image(path)
    assert (image.width, image.height, image.orientation) == (60, 40, 1)
    assert image.needs_conversion and image.mode == "DICOM"
    assert (read_image(path) == picture(40, 60)).all()
    install_image(image, tmp_path, "new/a.png")
    with Image.open(tmp_path / "new" / "a.png") as png:
        assert not png.info and (np.asarray(png) == picture(40, 60)).all()


def test_several_frames_are_none(tmp_path, picture):
    path = write_dicom(tmp_path / "a.dcm", np.stack([picture(40, 60)] * 3))
    with pytest.raises(BadInputError, match="2 or more frames; save each in a file"):
        inspect_image(path)


def test_damaged_files_are_named(tmp_path, picture):
    path = write_dicom(tmp_path / "a.dcm", picture(40, 60))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadInputError, match="a.dcm: its pixels cannot be read"):
        read_still(path)
    with pytest.raises(BadInputError, match="without an image"):
        read_image(write_dicom(tmp_path / "b.dcm"))


def test_no_file_may_fill_the_memory(tmp_path, picture, monkeypatch):
    path = write_dicom(tmp_path / "large.dcm", picture(40, 60))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 2399)
    with pytest.raises(BadInputError, match="large.dcm: has 60x40 = 2400 pixels"):
        read_still(path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 2400)
    assert read_still(path).shape == (40, 60, 3)
    syntax = DeflatedExplicitVRLittleEndian
    deflated = write_dicom(tmp_path / "deflated.dcm", picture(40, 60), syntax=syntax)
    with pytest.raises(BadInputError, match="deflated as a whole"):
        read_still(deflated)


def test_no_file_may_fill_the_memory_with_other_elements(tmp_path, picture):
    path = write_dicom(tmp_path / "a.dcm", picture(40, 60))
    data = path.read_bytes()
    for before in (b"\x10\0\x10\0", b"\x02\0\x12\0"):  # PatientName, and one of group 2
        at, tag = data.index(before), b"\x09\0\x10\0" if before[0] == 16 else b"\x02\0\x11\0"
        with open(path, "wb") as file:
            file.write(data[:at] + tag + b"OB\0\0" + (2**31).to_bytes(4, "little"))
            file.seek(2**31, io.SEEK_CUR)  # a hole, which takes no room on the disk
            file.write(data[at:])
        for how in ({}, {"specific_tags": ["PatientID"]}):
            with pytest.raises(BadInputError, match="a.dcm: is no readable .*: its elements"):
                read_header(path, **how)
    large = write_dicom(tmp_path / "large.dcm", np.zeros((1500, 1500, 3), np.uint8))
    assert read_still(large).shape == (1500, 1500, 3)


def test_a_jpeg_of_many_scans(tmp_path, picture):
    stream = io.BytesIO()
    Image.fromarray(picture(40, 60)).save(stream, "JPEG", progressive=True)
    jpeg = stream.getvalue()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    pixels, how = np.stack([picture(40, 60)] * 2), {"PhotometricInterpretation": "YBR_FULL_422"}
    for times, frames in ((50, 2), (150, 1)):
        many = [jpeg, jpeg[:-2] + times * scan + jpeg[-2:]]
        path = write_dicom(tmp_path / "a.dcm", pixels, encoded=many, syntax=JPEGBaseline8Bit, **how)
        images = iter_rgb(path, read_header(path))
        if frames == 1:
            next(images)
            with pytest.raises(BadInputError, match="a.dcm: has a JPEG of 1[0-9][0-9] scans"):
                next(images)
        else:
            assert len(list(images)) == frames


@pytest.mark.parametrize("start", [b"\x02\0\0\0UL\4\0", b"\x08\0\5\0CS", b"\x08\0\5\0\x0a\0\0\0"])
def test_without_a_preamble(tmp_path, start):
    path = tmp_path / "Musterfrau"
    path.write_bytes(start + bytes(200))
    assert is_dicom(path)
    with pytest.raises(BadInputError) as caught:
        read_header(path)
    assert "Muster" not in caught.value.reason
