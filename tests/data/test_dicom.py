"""DICOM files as the images of a data set."""

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from imrcnn_d2.data.dicom import is_dicom, read_still
from imrcnn_d2.data.images import inspect_image, install_image, read_image
from imrcnn_d2.data.rejects import BadInputError


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
