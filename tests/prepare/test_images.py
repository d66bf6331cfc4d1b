"""Detectron2 reads every installed image as the viewer of the original would see it; shapes and
masks become annotations."""

import io
import math
import os
import struct
from unittest.mock import Mock

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import detection_utils
from dicoms import write_dicom
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from scipy import ndimage

from imrcnn_d2.data import images, masks
from imrcnn_d2.data.images import read_mask
from imrcnn_d2.data.masks import (
    annotation_from_mask,
    components,
    mask_polygons,
    polygon_rle,
    rectangle,
)
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def as_trained_on(tmp_path):
    """Returns a function: what Detectron2 reads after the image was installed, (H, W, 3) RGB."""

    def read(path):
        image = images.inspect_image(path)
        target = "sub/image.png" if image.needs_conversion else "sub/" + path.name
        images.install_image(image, tmp_path / "out", target)
        array = detection_utils.read_image(str(tmp_path / "out" / target), "RGB")
        assert array.shape == (image.height, image.width, 3)
        return array

    return read


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.bmp", "image.tif"])
def test_rgb_is_linked_else_copied(tmp_path, noise, name, monkeypatch):
    path, out = tmp_path / name, tmp_path / "out"
    Image.fromarray(noise(20, 30)).save(path)
    (tmp_path / f"link_{name}").symlink_to(name)
    for source in (name, f"link_{name}"):
        image = images.inspect_image(tmp_path / source)
        assert (image.width, image.height, image.orientation) == (30, 20, 1)
        assert not image.needs_conversion
        images.install_image(image, out, source)
        assert path.samefile(out / source) and not (out / source).is_symlink()
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("other file system")))
    images.install_image(image, out, "copied")
    assert (out / "copied").read_bytes() == path.read_bytes() and not path.samefile(out / "copied")


def test_other_modes_become_rgb(tmp_path, noise, rotated, as_trained_on):
    rgb = noise(20, 30)
    rgb[:, :10] = (1, 255, 3)
    black, gray = rgb.copy(), rgb[..., :1]
    black[:, :10] = 0
    rgba = np.dstack([rgb, 255 * black.any(axis=2).astype(np.uint8)])
    deep = np.linspace(0, 65535, 600).reshape(20, 30, 1).astype(np.uint16)
    for name, pixels, expected, options in (
        ("binary.png", gray > 99, 255 * (gray > 99), {}),
        ("gray.png", gray, gray, {}),
        ("deep.png", deep, deep / 257, {}),
        ("deep.tif", deep, deep / 257, {}),
        ("colour.png", rgb, black, {"transparency": (1, 255, 3)}),
    ):
        Image.fromarray(pixels.squeeze()).save(tmp_path / name, **options)
        assert np.abs(as_trained_on(tmp_path / name) - expected.astype(float)).max() <= 0.5, name
    rotated(tmp_path / "turned.png", 6, rgba)
    assert np.array_equal(as_trained_on(tmp_path / "turned.png"), np.rot90(black, -1))
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "rgb.png"), deep[..., ::-1])  # Pillow cannot write it
    assert np.abs(as_trained_on(tmp_path / "rgb.png") - deep / 257.0).max() <= 1

    image = Image.fromarray((np.arange(600) % 4).reshape(20, 30).astype(np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "palette.png", transparency=2)
    expected = [[10, 20, 30], [40, 50, 60], [0, 0, 0], [100, 110, 120]]
    assert as_trained_on(tmp_path / "palette.png")[0, :4].tolist() == expected
    values, changes_numbers = images.read_values(tmp_path / "palette.png")
    assert values[0, :4].tolist() == [0, 1, 2, 3] and not changes_numbers


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


def test_cmyk_by_its_profile_or_without(tmp_path, as_trained_on):
    inks = 255 * np.eye(4, dtype=np.uint8)  # cyan, magenta, yellow, and none
    inks[3] = 0
    image = Image.fromarray(np.tile(inks.repeat(16, axis=0), (16, 1, 1)), mode="CMYK")
    image.save(tmp_path / "plain.jpg", quality=100)
    image.save(tmp_path / "profile.tif", icc_profile=grey_ink_profile())
    plain = as_trained_on(tmp_path / "plain.jpg").astype(int)[8, 8::16]
    assert np.abs(plain - [(0, 255, 255), (255, 0, 255), (255, 255, 0), (255,) * 3]).max() < 20
    profile = as_trained_on(tmp_path / "profile.tif").astype(int)[8, [8, 56]]
    assert np.abs(profile - [[119], [255]]).max() <= 3  # sRGB of L* 50 and 100
    image.save(tmp_path / "broken.tif", icc_profile=b"no profile")
    with pytest.raises(BadInputError, match="broken.tif"):
        images.inspect_image(tmp_path / "broken.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, noise, rotated, as_trained_on, orientation):
    stored = noise(16, 24)
    rotated(tmp_path / "turned.png", orientation, stored)
    # EXIF 2.3: where the stored first row and first column are shown
    shown = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    shown += [np.rot90(stored, -1), stored[::-1, ::-1].swapaxes(0, 1), np.rot90(stored)]
    expected = shown[orientation - 1]
    assert np.array_equal(as_trained_on(tmp_path / "turned.png"), expected)
    assert np.array_equal(images.orient(stored[..., 0] > 127, orientation), expected[..., 0] > 127)

    image = images.inspect_image(tmp_path / "turned.png")
    assert not images.annotated_on_stored_pixels(image, image.width, image.height)
    assert images.annotated_on_stored_pixels(image, 24, 16) == (orientation >= 5)
    with pytest.raises(BadInputError, match="turned.png: is .* its annotation says 25x16"):
        images.annotated_on_stored_pixels(image, 25, 16)


def test_what_is_no_image_of_a_clear_range(tmp_path, noise):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.full((20, 30), 4095, np.uint16)).save(tmp_path / "12bit.png")
    Image.fromarray(np.ones((20, 30), np.float32)).save(tmp_path / "float.tif")
    for name in ("cut.jpeg", "cut.png"):
        Image.fromarray(noise(200, 300)).save(tmp_path / name)
        os.truncate(tmp_path / name, 9000)
    pages = [Image.fromarray(noise(20, 30)[..., 0]) for _ in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    for path in (*tmp_path.iterdir(), tmp_path / "missing.jpg"):
        with pytest.raises(BadInputError, match=path.name):
            images.inspect_image(path)
    pages[0].save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=pages[1:])
    images.inspect_image(tmp_path / "camera.jpg")  # a photograph and previews of it


def test_masks_are_thresholded_at_128_and_have_few_parts(tmp_path):
    for pixels in (np.array([[0, 127], [128, 255]], np.uint8), np.array([[False] * 2, [True] * 2])):
        Image.fromarray(pixels).save(tmp_path / "mask.png")
        assert images.read_mask(tmp_path / "mask.png").tolist() == [[False, False], [True, True]]
    mask = np.zeros((80, 80), bool)  # a small PNG can hold millions of components
    mask[::2, ::2] = True
    with pytest.raises(ValueError, match="1600 separate parts"):
        components(mask, 1)
    assert components(mask, 2)[1] == 1600


def test_dicom_stills(tmp_path, noise):
    path = write_dicom(tmp_path / "Frau.dcm", noise(40, 60))
    assert images.is_dicom(path) and not images.is_dicom(tmp_path)
    image = images.inspect_image(path)
    assert (image.width, image.height, image.orientation) == (60, 40, 1)
    assert image.needs_conversion and image.mode == "DICOM"
    assert (images.read_image(path) == noise(40, 60)).all()
    images.install_image(image, tmp_path, "new/a.png")
    with Image.open(tmp_path / "new" / "a.png") as png:
        assert not png.info and (np.asarray(png) == noise(40, 60)).all()
    files = [write_dicom(tmp_path / "several.dcm", np.stack([noise(40, 60)] * 3))]
    files += [write_dicom(tmp_path / "none.dcm"), write_dicom(tmp_path / "cut.dcm", noise(40, 60))]
    files[-1].write_bytes(files[-1].read_bytes()[:-500])
    syntax = DeflatedExplicitVRLittleEndian  # to any size
    files.append(write_dicom(tmp_path / "deflated.dcm", noise(40, 60), syntax=syntax))
    for start in (b"\x02\0\0\0UL\4\0", b"\x08\0\5\0CS", b"\x08\0\5\0\x0a\0\0\0"):
        files.append(tmp_path / f"{start[0]}{start[4]}.dcm")
        files[-1].write_bytes(start + bytes(200))  # without a preamble
        assert images.is_dicom(files[-1])
    for path in files:
        with pytest.raises(BadInputError, match=path.name):
            images.read_image(path)


def test_no_dicom_file_may_fill_the_memory(tmp_path, noise, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", noise(40, 60))
    data = path.read_bytes()
    tags = {b"\x10\0\x10\0": b"\x09\0\x10\0", b"\x02\0\x12\0": b"\x02\0\x11\0"}
    for before, tag in tags.items():  # before PatientName, and among group 2
        at = data.index(before)
        with open(path, "wb") as file:
            file.write(data[:at] + tag + b"OB\0\0" + (2**31).to_bytes(4, "little"))
            file.seek(2**31, io.SEEK_CUR)  # a hole, which takes no room on the disk
            file.write(data[at:])
        for options in ({}, {"specific_tags": ["PatientID"]}):
            with pytest.raises(BadInputError, match="a.dcm: is no readable .*: its elements"):
                images.read_header(path, **options)
    large = write_dicom(tmp_path / "large.dcm", np.zeros((1500, 1500, 3), np.uint8))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1500**2)
    assert images.read_still(large).shape == (1500, 1500, 3)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1500**2 - 1)
    with pytest.raises(BadInputError, match="large.dcm: has 1500x1500 = 2250000 pixels"):
        images.read_still(large)


def test_a_dicom_jpeg_of_many_scans(tmp_path, noise):
    stream, path = io.BytesIO(), tmp_path / "a.dcm"
    Image.fromarray(noise(40, 60)).save(stream, "JPEG", progressive=True)
    jpeg = stream.getvalue()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    pixels, kind = np.stack([noise(40, 60)] * 2), {"PhotometricInterpretation": "YBR_FULL_422"}
    for times in (50, 150):
        many = [jpeg, jpeg[:-2] + times * scan + jpeg[-2:]]
        write_dicom(path, pixels, encoded=many, syntax=JPEGBaseline8Bit, **kind)
        frames = images.iter_rgb(path, images.read_header(path))
        next(frames)
        if times == 50:
            assert len(list(frames)) == 1
        else:
            with pytest.raises(BadInputError, match="a.dcm: has a JPEG of 1[0-9][0-9] scans"):
                next(frames)


MASKS = arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))


@given(MASKS, st.integers(1, 5))
@settings(max_examples=200)
def test_components_against_scipy(mask, min_area):
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    parts = [labels == i for i in range(1, count + 1)]
    expected = sorted(part.tobytes() for part in parts if part.sum() >= min_area)
    kept, specks = components(mask, min_area)
    kept = [(np.argwhere(part).min(axis=0).tolist(), part.tobytes()) for part in kept]
    assert sorted(part for _, part in kept) == expected and specks == count - len(expected)
    assert [corner for corner, _ in kept] == sorted(corner for corner, _ in kept)


@given(MASKS.filter(np.any))
def test_annotation_against_numpy(mask):
    annotation = annotation_from_mask(mask, 3, lesion_id="x")
    (y0, x0), (y1, x1) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0)
    assert np.array_equal(mask_util.decode(annotation.pop("segmentation")), mask)
    expected = {"category_id": 3, "iscrowd": 0, "lesion_id": "x", "area": mask.sum()}
    assert annotation == expected | {"bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1]}


def decoded(rle):
    return mask_util.decode(rle).astype(bool)


def iou(polygons, mask):
    """The overlap of what the polygons enclose with a mask."""
    filled = decoded(mask_util.merge([polygon_rle(p.tolist(), *mask.shape) for p in polygons]))
    return (filled & mask).sum() / (filled | mask).sum()


@given(MASKS)
def test_polygons_are_near_the_mask(mask):
    assume(mask.any())
    without_holes = ndimage.binary_fill_holes(mask)
    polygons = mask_polygons(mask)
    if polygons is None:
        assert (without_holes != mask).any()
    else:
        assert iou(polygons, mask) >= masks.MIN_IOU
    polygons = mask_polygons(mask, fill_holes=True)
    assert iou(polygons, without_holes) >= masks.MIN_IOU
    assert len(polygons) == ndimage.label(without_holes, np.ones((3, 3)))[1]


def test_polygons_have_few_points_on_the_edges_of_pixels(kvasir_352):
    points = []
    for path in sorted((kvasir_352 / "masks").iterdir())[:40]:
        mask = read_mask(path)
        assert mask_polygons(mask) is not None, "specks alone"
        assert iou(mask_polygons(mask, True), mask) >= masks.MIN_IOU
        points.append(sum(map(len, mask_polygons(mask))))
    assert np.median(points) < 50, "to be moved by hand"

    mask = np.zeros((60, 80), bool)
    mask[5:55, 5:75] = True  # of 3,500 pixels
    mask[20, 20:25] = False
    assert [len(polygon) for polygon in mask_polygons(mask)] == [4]  # a speck adds no points
    mask[20:30, 20:25] = False
    assert mask_polygons(mask) is None
    assert [len(polygon) for polygon in mask_polygons(mask, fill_holes=True)] == [4]
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = mask[7, 1] = True
    first, second = mask_polygons(mask)
    assert sorted(map(tuple, first)) == [(3, 2), (3, 5), (9, 2), (9, 5)]
    assert sorted(map(tuple, second)) == [(1, 7), (1, 8), (2, 7), (2, 8)]


def test_rectangles_and_ellipses_are_turned_clockwise():
    assert rectangle(0, 0, 4, 2).tolist() == [[0, 0], [4, 0], [4, 2], [0, 2]]
    # the top left corner goes to the right, as y points down
    assert rectangle(0, 0, 4, 2, 90) == pytest.approx(np.array([[3, -1], [3, 3], [1, 3], [1, -1]]))
    for degrees, bounds in ((0, (28, 51, 20, 79)), (90, (10, 69, 38, 61))):
        mask = decoded(masks.ellipse_rle((50, 40), (30, 12), 80, 100, degrees))
        assert mask.sum() == pytest.approx(math.pi * 30 * 12, rel=0.01)
        rows, columns = np.nonzero(mask)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == bounds
    tilted = decoded(masks.ellipse_rle((50, 40), (30, 12), 80, 100, 30))
    assert tilted[40 + 10, 50 + 20] and not tilted[40 - 10, 50 + 20]
    with pytest.raises(ValueError, match="radius 0"):
        masks.ellipse_rle((5, 5), (3, 0), 10, 10)


@given(st.integers(-9, 9), st.integers(-9, 9), arrays(bool, (4, 5)))
def test_patch_is_cut_at_the_borders(left, top, patch):
    mask = decoded(masks.patch_rle(patch, left, top, 6, 7))
    for y, x in np.ndindex(6, 7):
        inside = 0 <= y - top < 4 and 0 <= x - left < 5
        assert mask[y, x] == (inside and patch[y - top, x - left])


def test_points_and_sizes_that_are_refused():
    for value in (1e9, -1e9, math.inf, math.nan, "3", None, True):
        with pytest.raises(ValueError, match="coordinate"):
            masks.check_extent([1, value], 40, 60)
        with pytest.raises(ValueError, match="coordinate"):
            polygon_rle([[1, 1], [5, value], [3, 3]], 40, 60)
    # A million points to and fro would take 50 GB.
    zigzag = [[x, y] for x in range(100) for y in (0, 400)] * 5000
    for points, message in (([[1, 1], [5, 5]], "2 points"), (zigzag, "1000000 points")):
        with pytest.raises(ValueError, match=message):
            polygon_rle(points, 40, 60)
    around = 10 * np.array([[-40, -40], [60, -40], [60, 40], [-40, 40]])
    assert decoded(polygon_rle(around.tolist(), 40, 60)).all(), "far outside, but no longer"
    for size in ((0, 5), (5, -1), (10**6, 5), (20_000, 20_000), ("5", 5), (5.5, 5)):
        with pytest.raises(ValueError, match="image"):
            masks.check_size(*size)
    assert masks.check_size(5.0, 60) == (5, 60)


@given(MASKS, st.integers(1, 30))
def test_union(mask, count):
    parts = [np.roll(mask, i, axis=0) for i in range(count)]
    rles = [mask_util.encode(np.asfortranarray(part, dtype=np.uint8)) for part in parts]
    assert np.array_equal(decoded(masks.union(rles)), np.any(parts, axis=0))
