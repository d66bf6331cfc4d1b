"""Image files of all kinds, and the endoscope's view in them."""

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
from endoscope_frames import BACKGROUNDS, INSETS, SHAPES, draw_frame, patient_banner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from scipy import ndimage

from imrcnn_d2.data import images, masks
from imrcnn_d2.data.endoscope_view import find_crop, find_view
from imrcnn_d2.data.images import read_image, read_mask
from imrcnn_d2.data.masks import annotation_from_mask, components, mask_polygons, polygon_rle
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def as_trained_on(tmp_path):
    """A function: what Detectron2 reads after the image was installed, (H, W, 3) RGB."""

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


def test_the_same_pixels_have_the_same_hash(tmp_path, noise, rotated):
    rgb = noise(20, 30)
    for name in ("one.png", "two.bmp", "three.tif"):
        Image.fromarray(rgb).save(tmp_path / name)
    rotated(tmp_path / "turned.png", 6, np.rot90(rgb))  # as shown, the same
    changed = rgb.copy()
    changed[-1, -1, 2] ^= 1
    Image.fromarray(changed).save(tmp_path / "one_bit.png")
    Image.fromarray(rgb.reshape(30, 20, 3)).save(tmp_path / "reshaped.png")
    digests = {path.name: images.pixel_sha256(path) for path in tmp_path.glob("*.*")}
    assert len({digests[name] for name in ("one.png", "two.bmp", "three.tif", "turned.png")}) == 1
    assert len(set(digests.values())) == 3
    (tmp_path / "broken.png").write_bytes((tmp_path / "one.png").read_bytes()[:-300])
    with pytest.raises(BadInputError, match="broken.png"):
        images.pixel_sha256(tmp_path / "broken.png")


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_a_tiff_of_colours_tagged_as_gray(tmp_path, noise, as_trained_on, monkeypatch):
    """As those of CVC-ClinicDB: Pillow refuses them, and OpenCV reads the red channel alone."""
    path, (rgb, gray) = tmp_path / "1.tif", [struct.pack("<HHIH", 262, 3, 1, n) for n in (2, 1)]
    for compression in ("raw", "tiff_lzw"):
        Image.fromarray(noise(20, 30)).save(path, compression=compression)
        data = path.read_bytes()
        assert data.count(rgb) == 1
        path.write_bytes(data.replace(rgb, gray))
        assert (read_image(path) == noise(20, 30)).all()
        assert (detection_utils.read_image(str(path), "RGB") == noise(20, 30)).all()
        assert images.inspect_image(path).needs_conversion  # for programs that use Pillow alone
        assert (as_trained_on(path) == noise(20, 30)).all()
        assert (tmp_path / "out" / "sub" / "image.png").is_file()
    Image.fromarray(noise(20, 30)).save(tmp_path / "2.tif")
    assert not images.inspect_image(tmp_path / "2.tif").needs_conversion
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 599)
    with pytest.raises(BadInputError, match="1.tif: has 30x20 = 600 pixels"):
        read_image(path)


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
    for name in ("turned.png", "turned.tif"):
        rotated(tmp_path / name, orientation, stored)
    # EXIF 2.3: where the stored first row and first column are shown
    shown = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    shown += [np.rot90(stored, -1), stored[::-1, ::-1].swapaxes(0, 1), np.rot90(stored)]
    expected = shown[orientation - 1]
    assert np.array_equal(as_trained_on(tmp_path / "turned.png"), expected)
    assert np.array_equal(as_trained_on(tmp_path / "turned.tif"), expected)
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
    assert components(mask, 2)[1] == 1600 and len(list(components(mask[:, :50], 1)[0])) == 1000


def test_dicom_stills(tmp_path, noise):
    path = write_dicom(tmp_path / "Frau.dcm", noise(40, 60))
    assert images.is_dicom(path) and not images.is_dicom(tmp_path)
    image, still = images.inspect_image(path), noise(40, 60)
    assert (image.width, image.height, image.orientation) == (60, 40, 1)
    assert image.needs_conversion and image.mode == "DICOM"
    assert (images.read_image(path) == still).all()
    images.install_image(image, tmp_path, "new/a.png")
    with Image.open(tmp_path / "new" / "a.png") as png:
        assert not png.info and (np.asarray(png) == still).all()
    files = [write_dicom(tmp_path / "several.dcm", np.stack([still] * 3))]
    files += [write_dicom(tmp_path / "none.dcm"), write_dicom(tmp_path / "cut.dcm", still)]
    os.truncate(files[-1], files[-1].stat().st_size - 500)
    syntax = DeflatedExplicitVRLittleEndian  # to any size
    files.append(write_dicom(tmp_path / "deflated.dcm", still, syntax=syntax))
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
    stream = io.BytesIO()
    Image.fromarray(noise(40, 60)).save(stream, "JPEG", progressive=True)
    jpeg, pixels = stream.getvalue(), np.stack([noise(40, 60)] * 2)
    options = {"syntax": JPEGBaseline8Bit, "PhotometricInterpretation": "YBR_FULL_422"}

    def second_frame(times):
        many = [jpeg, jpeg[:-2] + times * jpeg[jpeg.rindex(b"\xff\xda") : -2] + jpeg[-2:]]
        path = write_dicom(tmp_path / "a.dcm", pixels, encoded=many, **options)
        first, second = images.iter_rgb(path, images.read_header(path))
        return second

    assert second_frame(50).shape == (40, 60, 3)
    with pytest.raises(BadInputError, match="a.dcm: has a JPEG of 1[0-9][0-9] scans"):
        second_frame(150)


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


@given(MASKS.filter(np.any), st.integers(1, 30))
def test_annotation_and_union_against_numpy(mask, count):
    annotation = annotation_from_mask(mask, 3, lesion_id="x")
    (y0, x0), (y1, x1) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0)
    assert np.array_equal(decoded(annotation.pop("segmentation")), mask)
    expected = {"category_id": 3, "iscrowd": 0, "lesion_id": "x", "area": mask.sum()}
    assert annotation == expected | {"bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1]}
    parts = [np.roll(mask, i, axis=0) for i in range(count)]
    union = masks.union([masks.encode(part) for part in parts])
    assert np.array_equal(decoded(union), np.any(parts, axis=0))


def decoded(rle):
    return mask_util.decode(rle).astype(bool)


def iou(polygons, mask):  # of what the polygons enclose
    filled = decoded(mask_util.merge([polygon_rle(p.tolist(), *mask.shape) for p in polygons]))
    return (filled & mask).sum() / (filled | mask).sum()


@given(MASKS.filter(np.any))
def test_polygons_are_near_the_mask(mask):
    without_holes = ndimage.binary_fill_holes(mask)
    polygons = mask_polygons(mask)
    has_holes = (without_holes != mask).any()
    assert has_holes if polygons is None else iou(polygons, mask) >= masks.MIN_IOU
    polygons = mask_polygons(mask, fill_holes=True)
    assert iou(polygons, without_holes) >= masks.MIN_IOU
    assert len(polygons) == ndimage.label(without_holes, np.ones((3, 3)))[1]


def test_polygons_have_few_points_on_the_edges_of_pixels(kvasir_352):
    points = []
    for path in sorted((kvasir_352 / "masks").iterdir())[:40]:
        mask = read_mask(path)
        points.append(sum(map(len, mask_polygons(mask))))  # specks alone are left out
        assert iou(mask_polygons(mask, True), mask) >= masks.MIN_IOU
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
    corners = [sorted(map(tuple, polygon)) for polygon in mask_polygons(mask)]
    assert corners == [[(3, 2), (3, 5), (9, 2), (9, 5)], [(1, 7), (1, 8), (2, 7), (2, 8)]]


def test_rectangles_and_ellipses_are_turned_clockwise():
    assert masks.rectangle(0, 0, 4, 2).tolist() == [[0, 0], [4, 0], [4, 2], [0, 2]]
    # the top left corner goes to the right, as y points down
    turned = np.array([[3, -1], [3, 3], [1, 3], [1, -1]])
    assert masks.rectangle(0, 0, 4, 2, 90) == pytest.approx(turned)
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
    rle = masks.patch_rle(patch, left, top, 6, 7)
    mask = decoded(rle)
    assert rle == masks.encode(mask), "as pycocotools writes it"
    for y, x in np.ndindex(6, 7):
        inside = 0 <= y - top < 4 and 0 <= x - left < 5
        assert mask[y, x] == (inside and patch[y - top, x - left])


def test_points_and_sizes_that_are_refused():
    for value in (600.5, -600.5, math.inf, math.nan, "3", None, True):
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
    for size in ((0, 5), (5, -1), (65_536, 5), (6235, 14_352), ("5", 5), (5.5, 5), (True, 5)):
        with pytest.raises(ValueError, match="image"):
            masks.check_size(*size)
    for size in ((1.0, 65_535), (6235, 14_351)):  # Pillow's limit
        assert masks.check_size(*size) == size


FRAMES = [(shape, ground, "none") for shape in SHAPES[:-1] for ground in BACKGROUNDS]
FRAMES += [(shape, "black", inset) for shape in SHAPES[:-1] for inset in INSETS[1:]]
FRAMES += [("whole", "black", inset) for inset in INSETS[:-1]]


def view_iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("shape", "background", "inset"), FRAMES)
def test_synthetic_frames(shape, background, inset):
    frame, truth, box = draw_frame(shape, background, inset, seed=len(shape) + len(inset))
    shown = truth.copy()
    if box is not None:
        shown[box[1] : box[3], box[0] : box[2]] = True
    frame, written = patient_banner(frame, shown)
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=90)
    view = find_view(np.asarray(Image.open(stream)))
    assert view_iou(view.mask, truth) > 0.98 and view_iou(view.with_insets, shown) > 0.95
    assert len(view.insets) == (box is not None) and not view.is_empty
    assert view.is_whole == (shape == "whole" and box is None)
    beyond = ~cv2.dilate(truth.astype(np.uint8), np.ones((11, 11))).astype(bool)
    assert not (view.mask & written & beyond).any()
    if box is not None:
        assert not view.mask[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].any()
    rows, columns = (np.flatnonzero(view.mask.any(axis=axis)) for axis in (1, 0))
    x0, y0, x1, y1 = view.box
    assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    cropped = np.where(view.mask[..., None], frame, 0)[y0:y1, x0:x1]
    assert np.array_equal(view.crop(frame), cropped) and cropped.dtype == np.uint8
    assert np.array_equal(view.crop(view.mask), view.mask[y0:y1, x0:x1])


def test_other_sizes_and_a_line_that_leads_to_the_view():
    for height, width in ((1080, 1920), (120, 160)):
        frame, truth, _ = draw_frame("octagon", inset="map", height=height, width=width)
        assert view_iou(find_view(frame).mask, truth) > 0.95
    frame, truth, _ = draw_frame("disc")
    frame[200:203, 4:240] = 240
    frame[60:180, 20:23] = frame[180:203, 20:23] = 240
    assert view_iou(find_view(frame).mask, truth) > 0.98


def test_frames_without_a_view_and_arrays_that_are_no_frame():
    only_a_map = np.zeros((300, 400, 3), np.uint8)
    only_a_map[200:280, 10:110] = (20, 165, 135)
    for frame in (np.full((60, 80, 3), 3, np.uint8), only_a_map):
        view = find_view(frame)
        assert view.is_empty and view.box == (0, 0, 0, 0) and not view.insets
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="a frame is"):
            find_view(array)
    assert not find_view(np.full((1, 1, 3), 200, np.uint8)).insets


def test_real_frames(kvasir_original, no_polyp, kvasir_352):
    """Insets as a person sees them: a green or a blanked map, lower left; no lesion beyond."""
    with_inset = {"cju0rx1idathl0835detmsp84", "0da47e4e-d994-44b5-86aa-0fd8ba92c62e"}
    with_inset |= {"0f498083-9ed1-47a5-bf10-8c83f6362c1e", "0f8c43a2-2b4e-4b52-84c5-ec3d962c7e27"}
    for path in (*(kvasir_original / "images").iterdir(), *no_polyp.iterdir()):
        image = read_image(path)
        height, width = image.shape[:2]
        view = find_view(image)
        assert len(view.insets) == (path.stem in with_inset), path
        for x0, y0, x1, y1 in view.insets:
            assert x0 < 0.05 * width and y1 > 0.95 * height
            assert 0.25 < x1 / width < 0.4 and 0.6 < y0 / height < 0.72
        assert 0.6 < view.mask.mean() < 0.97
        lost = ~view.with_insets & (image.max(axis=2) > 60)
        assert lost.mean() < 0.02, "only writing lies beyond"
    outside = []
    for path in sorted((kvasir_352 / "images").iterdir())[::25]:
        polyps = read_mask(kvasir_352 / "masks" / path.name)
        outside.append((polyps & ~find_view(read_image(path)).mask).sum() / polyps.sum())
    assert len(outside) == 40 and np.mean(outside) < 0.002 and max(outside) < 0.05


@pytest.mark.slow
def test_no_annotated_lesion_is_cut(kvasir_352, polypgen_4):
    """At most 5 % of the lesions of an image lie outside the view, over 1 % in no more than ten of
    the 2,122 images with lesions, of five hospitals; all images but a few are cropped."""
    pairs = [(p, kvasir_352 / "masks" / p.name) for p in (kvasir_352 / "images").iterdir()]
    for centre in ("C1", "C2", "C3", "C4"):
        folder = polypgen_4 / f"data_{centre}"
        for path in (folder / f"images_{centre}").iterdir():
            pairs.append((path, folder / f"masks_{centre}" / f"{path.stem}_mask.jpg"))
    outside, whole = [], []
    for path, mask in pairs:
        view, lesions = find_crop(read_image(path)), read_mask(mask)
        if view is None:
            whole.append(path.name)
        elif lesions.any():
            outside.append((lesions & ~view.mask).sum() / lesions.sum())
    assert max(outside) < 0.05 and np.mean(outside) < 0.001
    assert sum(share > 0.01 for share in outside) <= 10
    assert len(whole) <= 10, whole
