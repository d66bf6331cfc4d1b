"""What others sent is opened only if it is a file, an image of a known format, and small enough."""

import io
import os
import re
import socket
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from matplotlib.figure import Figure
from PIL import EpsImagePlugin, Image

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.data import images
from imrcnn_d2.data import images as files
from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.images import is_dicom, read_header
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper
from imrcnn_d2.data.prepare.duplicates import describe_image
from imrcnn_d2.data.prepare.metadata import read_metadata
from imrcnn_d2.data.prepare.splits import read_splits
from imrcnn_d2.report.html.gallery import embed
from imrcnn_d2.report.plots.images import plot_review_sheets, show_tile
from imrcnn_d2.utils.files import BadInputError, Rejects, read_json

ROOT = Path(files.__file__).parents[2]


def train(mapper, path):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.INPUT.SIZE = 32
    mapper(cfg, is_train=False)({"file_name": str(path), "annotations": []})


OPENERS = {
    "inspect_image": images.inspect_image,
    "read_image": images.read_image,
    "read_mask": images.read_mask,
    "read_values": images.read_values,
    "near_duplicates": describe_image,
    "detector": lambda path: train(LesionMapper, path),
    "classifier": lambda path: train(ClassificationMapper, path),
    "report": embed,
    "contact sheet": lambda path: show_tile(Figure().subplots(), path.parent, path.name, ""),
    "review sheets": lambda path: plot_review_sheets(path.parent, path.parent.parent / "review"),
}


@pytest.fixture(params=OPENERS)
def opener(request):
    return OPENERS[request.param]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("kind", files.IMAGE_FORMATS)
def test_formats_that_are_opened(folder, picture, kind, opener):
    pixels = picture(48, 64)
    Image.fromarray(pixels).save(folder / "a.png", format=kind)
    if opener is not OPENERS["read_values"]:
        opener(folder / "a.png")
    with files.open_image(folder / "a.png") as image:
        assert image.format == kind and image.size == (64, 48)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "DDS", "IM", "SGI", "PSD", "SVG"])
def test_other_formats_are_not(folder, picture, kind, opener):
    data = io.BytesIO()
    if kind == "PSD":
        data.write(b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + b"\0" * 250)
    elif kind == "SVG":
        data.write(b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>")
    else:
        Image.fromarray(picture(16, 16)).save(data, format=kind)
    path = folder / "innocent.jpg"
    path.write_bytes(data.getvalue())
    with pytest.raises(ValueError, match=r"innocent.jpg.* is no readable image.*WEBP"):
        opener(path)


def test_postscript_starts_no_program(folder, picture, opener, monkeypatch):
    """Pillow would decode it with Ghostscript, where there is one."""
    program, ran = folder.parent / "bin" / "gs", folder.parent / "ran"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.fromarray(picture(16, 16)).save(folder / "innocent.jpg", format="EPS")
    with pytest.raises(ValueError, match=r"innocent.jpg.* is no readable image"):
        opener(folder / "innocent.jpg")
    assert not ran.exists()


def test_images_are_opened_in_one_place():
    opened = re.compile(r"\bImage\.open\(|\bcv2\.imread|VideoCapture")
    paths = [*ROOT.glob("imrcnn_d2/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    found = {path.name for path in paths if opened.search(path.read_text(encoding="utf-8"))}
    assert found == {"images.py"}


def png(width, height, mode=2, bits=8):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, mode, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def resized(kind, width, height):
    """An image of 64x48 that claims another size in its header."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, format=kind, no_jp2=True)
    data = stream.getvalue()
    for order, code in (("<", "H"), (">", "H"), ("<", "I"), (">", "I")):
        limit = 2**16 if code == "H" else 2**32
        if width >= limit:
            continue
        for old, new in (((64, 48), (width, height)), ((48, 64), (height, width))):
            place = data.find(struct.pack(f"{order}2{code}", *old))
            if place >= 0:
                size = struct.calcsize(f"2{code}")
                return data[:place] + struct.pack(f"{order}2{code}", *new) + data[place + size :]
    raise AssertionError(kind)


BOMBS = {
    "png": png(9460, 9460),  # more than allowed, less than Pillow refuses
    "huge.png": png(2**31 - 1, 2**31 - 1),
    "bits.png": png(40_000, 40_000, 0, 1),
    "bmp": resized("BMP", 30_000, 30_000),
    "gif": resized("GIF", 65_000, 65_000),
    "jpg": resized("JPEG", 65_000, 65_000),
    "jp2": resized("JPEG2000", 1_000_000, 1_000_000),
    "pgm": b"P5 100000 100000 255\n",
    "tif": b"II*\0\x08\0\0\0\x04\0"
    + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 100_000), (257, 100_000), (262, 1), (273, 8))
    )
    + b"\0" * 4,
    "webp": b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0"
    + b"\0\0\0\0"
    + (16_000).to_bytes(3, "little") * 2
    + b"VP8L\x0c\0\0\0\x2f\0\0\0\0\0\x88\x88\x08\0\0\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_too_large(folder, name, opener):
    path = folder / f"bomb.{name}"
    path.write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=f"bomb.{name}.* (has .* pixels|is no readable image)"):
        opener(path)


def jpeg_of_scans(number):
    """A progressive JPEG whose last scan is there again and again: each takes time."""
    stream = io.BytesIO()
    image = Image.effect_noise((64, 64), 50)
    image.save(stream, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 1000)
    data = stream.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + data[-2:]


def tiff_of_pages(number):
    """A TIFF whose pages are counted in quadratic time."""
    tags = (256, 4), (257, 4), (258, 8), (262, 1), (273, 0), (277, 1), (278, 4), (279, 16)
    page = struct.pack("<H", len(tags))
    page += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    size = len(page) + 4
    pages = [page + struct.pack("<I", 8 + size * (i + 1)) for i in range(number)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages)[:-4] + b"\0" * 4


def test_what_takes_hours_to_decode(folder, opener):
    path = folder / "slow.jpg"
    path.write_bytes(jpeg_of_scans(5))
    files.open_image(path)
    path.write_bytes(jpeg_of_scans(100))
    with pytest.raises(ValueError, match=r"slow.jpg.* is a JPEG of 1\d\d scans"):
        opener(path)


def test_pages_are_not_counted(folder):
    (folder / "slow.tif").write_bytes(tiff_of_pages(200_000))
    began = time.monotonic()
    with pytest.raises(BadInputError, match="slow.tif: holds several images"):
        images.read_image(folder / "slow.tif")
    assert time.monotonic() - began < 5


def test_the_largest_image(folder, monkeypatch):
    Image.new("RGB", (64, 48)).save(folder / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48)
    files.open_image(folder / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pytest drops ours
    with pytest.raises(BadInputError, match=r"a.png: has 64x48 = 3072 pixels, more than the 3071"):
        files.open_image(folder / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    files.open_image(folder / "a.png")


def test_a_sparse_file(folder, opener):
    path = folder / "sparse.png"
    Image.new("RGB", (64, 48)).save(path)
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=r"sparse.png.* has 1099511627776 bytes, more than"):
        opener(path)


READERS = {
    **{name: OPENERS[name] for name in ("inspect_image", "detector", "report")},
    "json": read_json,
    "table": lambda path: read_metadata(path, Rejects()),
    "splits": read_splits,
    "dicom": read_header,
    "coco": lambda path: read_coco(path, path.parent, Rejects()),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to a device"])
@pytest.mark.parametrize("reader", READERS)
def test_what_never_ends_is_never_opened(folder, kind, reader, monkeypatch):
    path = folder / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(folder)  # their names are short
        socket.socket(socket.AF_UNIX).bind("a.png")
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    assert not is_dicom(path)
    with pytest.raises(ValueError, match=f"{path.name}.* cannot be opened"):
        READERS[reader](path)


def tree(folder):
    """A folder with a link to a file and a folder inside it, and to such outside."""
    for name in ("in/a/1.png", "out/b/2.png", "out/b/3.png", "out/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), ord(name[-5]), np.uint8)).save(folder / name)
    (folder / "in" / "same.png").symlink_to("a/1.png")
    (folder / "in" / "again").symlink_to("a")
    (folder / "in" / "there").symlink_to(folder / "out" / "b")
    (folder / "in" / "5.png").symlink_to("../out/4.png")
    (folder / "in" / "gone.png").symlink_to("nowhere.png")
    (folder / "out" / "b" / "round").symlink_to(".")
    (folder / "out" / "b" / "back").symlink_to("../../in")
    os.mkfifo(folder / "in" / "pipe.png")
    (folder / "root").symlink_to("in")
    return folder / "root"


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes")
def test_links_out_of_a_folder(tmp_path):
    root = tree(tmp_path)

    def listed(rejects):
        paths = images.list_files(root, rejects)
        return [path.relative_to(root).as_posix() for path in paths]

    def refused(rejects):
        return {Path(error.file).name for error in rejects.errors}

    with pytest.raises(BadInputError, match="5.png: is a link that leads out .*--follow-links"):
        listed(Rejects())
    rejects = Rejects("reject")
    assert listed(rejects) == ["a/1.png", "same.png"]
    assert refused(rejects) == {"5.png", "there", "gone.png", "pipe.png"}
    rejects = Rejects("reject", follow_links=True)
    assert listed(rejects) == [
        *("5.png", "a/1.png", "same.png", "there/2.png", "there/3.png"),
    ]
    assert refused(rejects) == {"gone.png", "pipe.png"}

    for name in ("5.png", "there/2.png"):
        with pytest.raises(BadInputError, match=r"--follow-links"):
            images.path_inside(root, name, tmp_path)
        assert images.path_inside(root, name, tmp_path, follow_links=True) == root / name
    for name in ("same.png", "again/1.png", "none.png"):
        assert images.path_inside(root, name, tmp_path) == root / name
