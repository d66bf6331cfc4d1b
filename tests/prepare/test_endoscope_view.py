"""The view and its insets are found in drawn frames of every shape, and in real ones."""

import io

import cv2
import numpy as np
import pytest
from endoscope_frames import BACKGROUNDS, INSETS, SHAPES, draw_frame, patient_banner
from PIL import Image

from imrcnn_d2.data.endoscope_view import Box, find_view
from imrcnn_d2.data.images import read_image, read_mask


def as_jpeg(frame):
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=90)
    return np.asarray(Image.open(stream))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


FRAMES = [(shape, ground, "none") for shape in SHAPES[:-1] for ground in BACKGROUNDS]
FRAMES += [(shape, "black", inset) for shape in SHAPES[:-1] for inset in INSETS[1:]]
FRAMES += [("whole", "black", inset) for inset in INSETS[:-1]]


@pytest.mark.parametrize(("shape", "background", "inset"), FRAMES)
def test_drawn_frames(shape, background, inset):
    frame, truth, box = draw_frame(shape, background, inset, seed=len(shape) + len(inset))
    shown = truth.copy()
    if box is not None:
        shown[box[1] : box[3], box[0] : box[2]] = True
    frame, written = patient_banner(frame, shown)
    view = find_view(as_jpeg(frame))
    assert iou(view.mask, truth) > 0.98
    assert len(view.insets) == (box is not None)
    beyond = ~cv2.dilate(truth.astype(np.uint8), np.ones((11, 11))).astype(bool)
    assert not (view.mask & written & beyond).any()
    if box is not None:
        assert not view.mask[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].any()
    rows, columns = (np.flatnonzero(view.mask.any(axis=axis)) for axis in (1, 0))
    assert view.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (120, 160)])
def test_sizes(height, width):
    frame, truth, _ = draw_frame("octagon", inset="map", height=height, width=width)
    assert iou(find_view(frame).mask, truth) > 0.95


def test_a_line_that_leads_to_the_view_is_no_part_of_it():
    frame, truth, _ = draw_frame("disc")
    frame[200:203, 4:240] = 240
    frame[60:180, 20:23] = frame[180:203, 20:23] = 240
    assert iou(find_view(frame).mask, truth) > 0.98


def test_a_dark_frame_has_no_view():
    view = find_view(np.full((60, 80, 3), 3, np.uint8))
    assert view.is_empty and view.box == (0, 0, 0, 0) and not view.insets
    assert not find_view(draw_frame("disc")[0]).is_empty
    only_a_map = np.zeros((300, 400, 3), np.uint8)
    only_a_map[200:280, 10:110] = (20, 165, 135)
    assert find_view(only_a_map).is_empty


def test_cropped_to_the_view():
    frame, _, box = draw_frame("disc", inset="map")
    view = find_view(frame)
    seen = view.crop(frame)
    height, width = view.box.y1 - view.box.y0, view.box.x1 - view.box.x0
    assert seen.shape == (height, width, 3) and seen.dtype == np.uint8
    assert (seen[height // 2, width // 2] == frame[view.box.slices][height // 2, width // 2]).all()
    x, y = box[0] + 20 - view.box.x0, box[1] + 20 - view.box.y0
    assert not seen[y, x].any() and not seen[0, 0].any()
    assert (view.crop(view.mask) == view.mask[view.box.slices]).all()
    assert not view.is_whole and find_view(draw_frame("whole")[0]).is_whole


def test_real_frames(kvasir_original, no_polyp):
    """Insets as a person sees them: a green or a blanked map, lower left."""
    with_inset = {"cju0rx1idathl0835detmsp84", "0da47e4e-d994-44b5-86aa-0fd8ba92c62e"}
    with_inset |= {"0f498083-9ed1-47a5-bf10-8c83f6362c1e", "0f8c43a2-2b4e-4b52-84c5-ec3d962c7e27"}
    paths = [*(kvasir_original / "images").iterdir(), *no_polyp.iterdir()]
    for path in paths:
        image = read_image(path)
        view = find_view(image)
        assert len(view.insets) == (path.stem in with_inset), path
        for x0, y0, x1, y1 in view.insets:
            height, width = image.shape[:2]
            assert x0 < 0.05 * width and y1 > 0.95 * height
            assert 0.25 < x1 / width < 0.4 and 0.6 < y0 / height < 0.72
        assert 0.6 < view.mask.mean() < 0.97
        lost = ~view.mask & (image.max(axis=2) > 60)
        for box in view.insets:
            lost[box.slices] = False
        assert lost.mean() < 0.02, "only writing lies beyond"


def test_lesions_lie_in_it(kvasir_352):
    paths = sorted((kvasir_352 / "images").iterdir())[::25]
    outside = []
    for path in paths:
        polyps = read_mask(kvasir_352 / "masks" / path.name)
        outside.append((polyps & ~find_view(read_image(path)).mask).sum() / polyps.sum())
    assert len(outside) == 40 and np.mean(outside) < 0.002 and max(outside) < 0.05


def test_what_is_no_frame():
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="a frame is"):
            find_view(array)
    assert not find_view(np.full((1, 1, 3), 200, np.uint8)).insets
    assert Box(1, 2, 4, 8).slices == (slice(2, 8), slice(1, 4))
