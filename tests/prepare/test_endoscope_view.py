"""The view and its insets are found in synthetic frames of every shape, and in real ones."""

import io

import cv2
import numpy as np
import pytest
from endoscope_frames import BACKGROUNDS, INSETS, SHAPES, draw_frame, patient_banner
from PIL import Image

from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.data.images import read_image, read_mask


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


FRAMES = [(shape, ground, "none") for shape in SHAPES[:-1] for ground in BACKGROUNDS]
FRAMES += [(shape, "black", inset) for shape in SHAPES[:-1] for inset in INSETS[1:]]
FRAMES += [("whole", "black", inset) for inset in INSETS[:-1]]


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
    assert iou(view.mask, truth) > 0.98 and iou(view.with_insets, shown) > 0.95
    assert len(view.insets) == (box is not None) and not view.is_empty
    assert view.is_whole == (shape == "whole" and box is None)
    beyond = ~cv2.dilate(truth.astype(np.uint8), np.ones((11, 11))).astype(bool)
    assert not (view.mask & written & beyond).any()
    if box is not None:
        assert not view.mask[box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3].any()
    rows, columns = (np.flatnonzero(view.mask.any(axis=axis)) for axis in (1, 0))
    assert view.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    rows, columns = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    cropped = np.where(view.mask[..., None], frame, 0)[rows, columns]
    assert np.array_equal(view.crop(frame), cropped) and cropped.dtype == np.uint8
    assert np.array_equal(view.crop(view.mask), view.mask[rows, columns])


def test_other_sizes_and_a_line_that_leads_to_the_view():
    for height, width in ((1080, 1920), (120, 160)):
        frame, truth, _ = draw_frame("octagon", inset="map", height=height, width=width)
        assert iou(find_view(frame).mask, truth) > 0.95
    frame, truth, _ = draw_frame("disc")
    frame[200:203, 4:240] = 240
    frame[60:180, 20:23] = frame[180:203, 20:23] = 240
    assert iou(find_view(frame).mask, truth) > 0.98


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
