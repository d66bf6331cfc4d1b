"""Each distortion does what its level says, to the whole image, the same for the same seed."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort, distort_mask

SIDE = 200


@pytest.fixture
def frame(kvasir_352):
    with Image.open(kvasir_352 / "images" / "train_0002.jpg") as image:
        return np.asarray(image.convert("RGB"))


def point():
    """White in the middle of black."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[SIDE // 2, SIDE // 2] = 255
    return image


def linear(image):
    values = image / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", DISTORTIONS)
def test_seeded_and_not_in_place(name, severity, frame):
    before = frame.copy()
    once = distort(frame, name, severity, (7, 1))
    assert np.array_equal(once, distort(frame, name, severity, (7, 1)))
    assert np.array_equal(frame, before)
    assert (once.shape, once.dtype) == (frame.shape, np.uint8)
    assert not np.array_equal(once, frame)
    if name in ("motion", "highlights"):
        assert not np.array_equal(once, distort(frame, name, severity, (7, 2)))


@pytest.mark.parametrize("name", ["defocus", "motion", "highlights", "jpeg", "under_exposure"])
def test_severity_is_the_distance_from_the_image(name, frame):
    errors = [np.abs(distort(frame, name, s, 3).astype(int) - frame).mean() for s in SEVERITIES]
    assert errors == sorted(errors)
    assert errors[0] < 0.75 * errors[-1]


@given(st.integers(0, 99), st.sampled_from(SEVERITIES), st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_blur_leaves_flat_areas(seed, severity, value):
    flat = np.full((60, 90, 3), value, np.uint8)
    for name in ("defocus", "motion"):
        assert np.array_equal(distort(flat, name, severity, seed), flat)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_makes_a_disc_of_a_point(severity):
    radius = DISTORTIONS["defocus"].levels[severity - 1] / 100 * SIDE
    rows, columns = np.nonzero(distort(point(), "defocus", severity)[..., 0])
    reach = np.hypot(rows - SIDE // 2, columns - SIDE // 2).max()
    assert reach == pytest.approx(radius, abs=1)
    # light is kept: a disc is not brighter than the point spread over its area
    lit = linear(distort(point(), "defocus", severity)[..., 0])
    assert lit.sum() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("seed", range(3))
def test_motion_makes_a_line_of_a_point(severity, seed):
    length = DISTORTIONS["motion"].levels[severity - 1] / 100 * SIDE
    where = np.argwhere(distort(point(), "motion", severity, seed)[..., 0]).astype(float)
    spread = np.linalg.svd(where - where.mean(axis=0))[2]
    along, across = ((where - where.mean(axis=0)) @ spread.T).T
    assert np.ptp(along) == pytest.approx(length, abs=2.5)
    assert np.ptp(across) <= 2.5


@pytest.mark.parametrize("name", ["over_exposure", "under_exposure"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_exposure_multiplies_light(name, severity):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.minimum(linear(values) * 2.0 ** DISTORTIONS[name].levels[severity - 1], 1)
    light = linear(distort(values, name, severity))
    assert np.abs(light - expected).max() < 0.5 / 255 * 2.3  # half a step, where it is steepest
    # 128 is 21.6 % of the light; a stop more is 43.2 %, which sRGB writes as 176
    gray = np.full((1, 1, 3), 128, np.uint8)
    assert distort(gray, "over_exposure", 2).tolist() == [[[176] * 3]]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_highlights_cover_their_share_of_the_tissue(severity):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:, 40:] = 101
    lit = distort(image, "highlights", severity, 5)
    assert (lit >= image).all()
    half_lit = (lit >= image + (255.0 - image) / 2).all(axis=2)
    share = DISTORTIONS["highlights"].levels[severity - 1]
    assert 100 * half_lit[:, 40:].mean() == pytest.approx(share, rel=0.25, abs=0.7)
    assert half_lit[:, :30].mean() < 0.01  # none is centred on the black
    if severity > 1:  # more of them, where the others were as well
        weaker = distort(image, "highlights", severity - 1, 5)
        assert (lit >= weaker).all()


def test_no_highlights_without_tissue():
    black = np.zeros((50, 50, 3), np.uint8)
    assert not distort(black, "highlights", 5).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_what_another_encoder_makes(severity, frame):
    file = io.BytesIO()
    quality = DISTORTIONS["jpeg"].levels[severity - 1]
    Image.fromarray(frame).save(file, "jpeg", quality=quality)
    other = np.asarray(Image.open(file)).astype(int)
    assert np.abs(distort(frame, "jpeg", severity) - other).mean() < 1


def test_rotation_by_right_angles_is_exact():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    turned = distort(image, "rotation", 3, 1)  # 90 degrees
    assert any(np.array_equal(turned, np.rot90(image, k)) for k in (1, 3))
    assert np.array_equal(distort(image, "rotation", 5, 1), image[::-1, ::-1])
    sides = {
        int(np.array_equal(distort(image, "rotation", 3, s), np.rot90(image))) for s in range(9)
    }
    assert sides == {0, 1}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("shape", [(60, 60), (50, 80), (80, 50)])
def test_masks_turn_with_their_images(severity, shape):
    mask = np.zeros(shape, bool)
    mask[18:33, 20:41] = True
    image = np.zeros((*shape, 3), np.uint8)
    image[mask] = 255
    turned = distort_mask(mask, "rotation", severity, 4)
    shown = distort(image, "rotation", severity, 4)[..., 0] >= 128
    assert turned.shape == shown.shape == (max(shape),) * 2
    assert (turned & shown).sum() / (turned | shown).sum() > 0.9
    assert turned.sum() == pytest.approx(mask.sum(), rel=0.05)


def test_other_distortions_leave_masks():
    mask = np.eye(5, dtype=bool)
    for name in DISTORTIONS.keys() - {"rotation"}:
        assert np.array_equal(distort_mask(mask, name, 5), mask)


def test_unknown_names_and_severities():
    with pytest.raises(KeyError):
        distort(point(), "fog", 1)
    with pytest.raises(ValueError):
        distort(point(), "jpeg", 6)
