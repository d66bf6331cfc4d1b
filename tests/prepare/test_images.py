"""Detectron2 reads every installed image as the viewer of the original would see it."""

import os
import struct
import zlib

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from imrcnn_d2.data.images import (
    annotated_on_stored_pixels,
    inspect_image,
    install_image,
    list_files,
    orient,
    read_mask,
    read_values,
)
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def as_trained_on(tmp_path):
    """Returns a function: what Detectron2 reads after the image was installed, (H, W, 3) RGB."""

    def read(path):
        image = inspect_image(path)
        target = "sub/image.png" if image.needs_conversion else "sub/" + path.name
        install_image(image, tmp_path / "out", target)
        array = read_image(str(tmp_path / "out" / target), "RGB")
        assert array.shape == (image.height, image.width, 3)
        return array

    return read


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.bmp", "image.tif"])
def test_rgb_is_linked_as_it_is(tmp_path, picture, name):
    Image.fromarray(picture(20, 30)).save(tmp_path / name)
    image = inspect_image(tmp_path / name)
    assert (image.width, image.height, image.orientation) == (30, 20, 1)
    assert not image.needs_conversion
    install_image(image, tmp_path / "out", name)
    assert os.path.samefile(tmp_path / name, tmp_path / "out" / name)


def test_copied_where_no_link_is_possible(tmp_path, picture, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("other file system")

    monkeypatch.setattr(os, "link", refuse)
    Image.fromarray(picture(20, 30)).save(tmp_path / "a.png")
    install_image(inspect_image(tmp_path / "a.png"), tmp_path / "out", "a.png")
    copy = tmp_path / "out" / "a.png"
    assert copy.read_bytes() == (tmp_path / "a.png").read_bytes()
    assert not os.path.samefile(copy, tmp_path / "a.png")


def test_a_symbolic_link_is_followed(tmp_path, picture):
    Image.fromarray(picture(20, 30)).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    install_image(inspect_image(tmp_path / "link.png"), tmp_path / "out", "a.png")
    assert not (tmp_path / "out" / "a.png").is_symlink()
    assert os.path.samefile(tmp_path / "out" / "a.png", tmp_path / "real.png")


def test_grayscale_and_binary(tmp_path, picture, as_trained_on):
    gray = picture(20, 30)[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(as_trained_on(tmp_path / "gray.png"), np.stack([gray] * 3, axis=-1))
    Image.fromarray(gray > 99).save(tmp_path / "binary.png")
    assert np.array_equal(as_trained_on(tmp_path / "binary.png")[..., 1], (gray > 99) * 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled(tmp_path, as_trained_on, suffix):
    gray = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / f"deep.{suffix}")
    array = as_trained_on(tmp_path / f"deep.{suffix}")
    assert np.abs(array[..., 0] - gray / 257).max() <= 0.5


def test_16_bit_rgb(tmp_path, as_trained_on):
    # Pillow cannot write these, so the PNG is made by hand
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0))
    data = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert np.abs(as_trained_on(tmp_path / "deep.png") - deep / 257.0).max() <= 1


def test_16_bit_with_fewer_bits_used(tmp_path):
    Image.fromarray(np.full((20, 30), 4095, np.uint16)).save(tmp_path / "12bit.png")
    with pytest.raises(BadInputError, match="12bit.png: 16-bit image with values up to 4095"):
        inspect_image(tmp_path / "12bit.png")


def test_float_pixels(tmp_path):
    Image.fromarray(np.ones((20, 30), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadInputError, match="float.tif: .*no fixed range"):
        inspect_image(tmp_path / "float.tif")


@pytest.mark.parametrize("read", [inspect_image, read_mask, read_values])
def test_several_pages(tmp_path, picture, read):
    pages = [Image.fromarray(picture(20, 30)[..., 0]) for _ in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(BadInputError, match="stack.tif: holds several images; save each in a file"):
        read(tmp_path / "stack.tif")
    pages[0].save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=pages[1:])
    read(tmp_path / "camera.jpg")  # a photograph and previews of it


def test_transparency_lies_on_black(tmp_path, picture, as_trained_on):
    rgba = np.dstack([picture(20, 30), np.full((20, 30), 255, np.uint8)])
    rgba[:, :10, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    array = as_trained_on(tmp_path / "rgba.png")
    assert (array[:, :10] == 0).all()
    assert np.array_equal(array[:, 10:], rgba[:, 10:, :3])


def test_a_transparent_colour_is_black(tmp_path, picture, as_trained_on):
    rgb = picture(20, 30)
    rgb[0, 0] = rgb[5, 5] = (1, 255, 3)
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(1, 255, 3))
    array = as_trained_on(tmp_path / "rgb.png")
    assert array[0, 0].tolist() == array[5, 5].tolist() == [0, 0, 0]
    assert np.array_equal(array[10:], rgb[10:])


def test_palette(tmp_path, as_trained_on):
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8) % 4)
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.info["transparency"] = 2
    image.save(tmp_path / "palette.png", transparency=2)
    array = as_trained_on(tmp_path / "palette.png")
    assert [array[0, i].tolist() for i in range(4)] == [
        [10, 20, 30],
        [40, 50, 60],
        [0] * 3,
        [100, 110, 120],
    ]


def test_cmyk(tmp_path, as_trained_on):
    cmyk = np.zeros((16, 48, 4), np.uint8)
    for i in range(3):  # cyan, magenta, yellow ink
        cmyk[:, 16 * i : 16 * i + 16, i] = 255
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    array = as_trained_on(tmp_path / "cmyk.jpg").astype(int)
    for i, colour in enumerate([(0, 255, 255), (255, 0, 255), (255, 255, 0)]):
        assert np.abs(array[8, 16 * i + 8] - colour).max() < 20


def grey_ink_profile():
    """A CMYK profile (ICC.1:2001 lut8): L* is 0 with black ink, else 50 with cyan ink, else 100."""
    lightness = [0 if node & 1 else 128 if node & 8 else 255 for node in range(16)]
    grid = b"".join(bytes([value, 128, 128]) for value in lightness)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * identity + grid + 3 * identity
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    header = struct.pack(">I4sI", 144 + len(lut), b"\0" * 4, 0x02400000) + b"prtrCMYKLab "
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28
    header += struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + tags + lut


def test_cmyk_with_a_profile(tmp_path, as_trained_on):
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, 16:, 0] = 255
    image = Image.fromarray(cmyk, mode="CMYK")
    image.save(tmp_path / "cmyk.tif", icc_profile=grey_ink_profile())
    array = as_trained_on(tmp_path / "cmyk.tif").astype(int)
    assert np.abs(array[8, 8] - 255).max() <= 3
    assert np.abs(array[8, 24] - 119).max() <= 3  # sRGB of L* 50
    image.save(tmp_path / "broken.tif", icc_profile=b"no profile")
    with pytest.raises(BadInputError, match="broken.tif: its CMYK profile"):
        inspect_image(tmp_path / "broken.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, picture, as_trained_on, orientation):
    stored = picture(16, 24)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    shown = as_trained_on(tmp_path / "turned.png")
    # EXIF 2.3: where the stored first row and first column are shown
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    assert np.array_equal(shown, expected)
    mask = stored[..., 0] > 127
    assert np.array_equal(orient(mask, orientation), expected[..., 0] > 127)

    image = inspect_image(tmp_path / "turned.png")
    assert not annotated_on_stored_pixels(image, image.width, image.height)
    assert annotated_on_stored_pixels(image, 24, 16) == (orientation >= 5)
    with pytest.raises(BadInputError, match="turned.png: is .* its annotation says 25x16"):
        annotated_on_stored_pixels(image, 25, 16)


def test_a_converted_image_is_upright(tmp_path, picture, as_trained_on):
    rgba = np.dstack([picture(16, 24), np.full((16, 24), 255, np.uint8)])
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(rgba).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(as_trained_on(tmp_path / "turned.png"), np.rot90(rgba, -1)[..., :3])


def test_unreadable(tmp_path, picture):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(picture(200, 300)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    Image.fromarray(picture(200, 300)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    for name in ("text.jpg", "empty.jpg", "cut.jpg", "cut.png", "missing.jpg"):
        with pytest.raises(BadInputError, match=name):
            inspect_image(tmp_path / name)


def test_masks_are_thresholded_at_128(tmp_path):
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[False, False], [True, True]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "binary.png")
    assert read_mask(tmp_path / "binary.png").tolist() == [[True, False]]
    with pytest.raises(BadInputError, match="none.png"):
        read_mask(tmp_path / "none.png")


def test_list_files(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png", ".hidden.png", ".thumbnails/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_files(tmp_path)] == ["a.png", "b.png", "c.png"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_files(tmp_path / "nowhere")
