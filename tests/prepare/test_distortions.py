"""Each distortion does what its level says, to the whole image, the same for the same seed."""

import io

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort, distort_mask
from imrcnn_d2.data.images import read_image

SIDE = 200
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


@pytest.fixture
def frame(kvasir_352):
    return read_image(kvasir_352 / "images" / "train_0002.jpg")


def level(name, severity):
    return DISTORTIONS[name].levels[severity - 1]


def linear(image):
    values = image / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_seeded_not_in_place_and_stronger_by_severity(name, frame):
    before, errors = frame.copy(), []
    for severity in SEVERITIES:
        image = distort(frame, name, severity, (7, 1))
        assert np.array_equal(image, distort(frame, name, severity, (7, 1)))
        assert np.array_equal(frame, before)
        assert (image.shape, image.dtype) == (frame.shape, np.uint8)
        errors.append(np.abs(image.astype(int) - frame).mean())
        if name in ("motion", "highlights"):
            assert not np.array_equal(image, distort(frame, name, severity, (7, 2)))
    assert errors[0] > 0
    if name not in ("over_exposure", "rotation"):
        assert errors == sorted(errors) and errors[0] < 0.75 * errors[-1]


@every_severity
def test_blur_makes_a_disc_or_a_line_of_a_point_and_leaves_flat_areas(severity):
    point = np.zeros((SIDE, SIDE, 3), np.uint8)
    point[SIDE // 2, SIDE // 2] = 255
    blurred = distort(point, "defocus", severity)[..., 0]
    rows, columns = np.nonzero(blurred)
    reach = np.hypot(rows - SIDE // 2, columns - SIDE // 2).max()
    assert reach == pytest.approx(level("defocus", severity) / 100 * SIDE, abs=1)
    # light is kept: a disc is not brighter than the point spread over its area
    assert linear(blurred).sum() == pytest.approx(1, rel=0.05)
    for seed in range(3):
        lit = np.argwhere(distort(point, "motion", severity, seed)[..., 0]).astype(float)
        lit -= lit.mean(axis=0)
        along, across = (lit @ np.linalg.svd(lit)[2].T).T
        assert np.ptp(along) == pytest.approx(level("motion", severity) / 100 * SIDE, abs=2.5)
        assert np.ptp(across) <= 2.5
        flat = np.full((60, 90, 3), 70 + 40 * seed, np.uint8)
        for name in ("defocus", "motion"):
            assert np.array_equal(distort(flat, name, severity, seed), flat)


@pytest.mark.parametrize("name", ["over_exposure", "under_exposure"])
@every_severity
def test_exposure_multiplies_light(name, severity):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.minimum(linear(values) * 2.0 ** level(name, severity), 1)
    light = linear(distort(values, name, severity))
    assert np.abs(light - expected).max() < 0.5 / 255 * 2.3  # half a step, where it is steepest
    # 128 is 21.6 % of the light; a stop more is 43.2 %, which sRGB writes as 176
    gray = np.full((1, 1, 3), 128, np.uint8)
    assert distort(gray, "over_exposure", 2).tolist() == [[[176] * 3]]


@every_severity
def test_highlights_cover_their_share_of_the_tissue(severity):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    assert not distort(image, "highlights", severity).any()
    image[:, 40:] = 101
    lit = distort(image, "highlights", severity, 5)
    assert (lit >= image).all()
    half_lit = (lit >= image + (255.0 - image) / 2).all(axis=2)
    share = level("highlights", severity)
    assert 100 * half_lit[:, 40:].mean() == pytest.approx(share, rel=0.25, abs=0.7)
    assert half_lit[:, :30].mean() < 0.01  # none is centred on the black
    if severity > 1:  # more of them, where the others were as well
        assert (lit >= distort(image, "highlights", severity - 1, 5)).all()


@every_severity
def test_jpeg_is_what_another_encoder_makes(severity, frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=level("jpeg", severity))
    expected = np.asarray(Image.open(file)).astype(int)
    assert np.abs(distort(frame, "jpeg", severity) - expected).mean() < 1


def test_rotation_by_right_angles_is_exact_and_unknown_distortions_are_refused():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    turned = {distort(image, "rotation", 3, seed).tobytes() for seed in range(9)}
    assert turned == {np.rot90(image, k).tobytes() for k in (1, 3)}
    assert np.array_equal(distort(image, "rotation", 5, 1), image[::-1, ::-1])
    with pytest.raises(KeyError, match="fog"):
        distort(image, "fog", 1)
    with pytest.raises(ValueError, match="not in tuple"):
        distort(image, "jpeg", 6)


@every_severity
@pytest.mark.parametrize("shape", [(60, 60), (50, 80), (80, 50)])
def test_masks_turn_with_their_images(severity, shape):
    mask = np.zeros(shape, bool)
    mask[18:33, 20:41] = True
    image = np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2)
    turned = distort_mask(mask, "rotation", severity, 4)
    shown = distort(image, "rotation", severity, 4)[..., 0] >= 128
    assert turned.shape == shown.shape == (max(shape),) * 2
    assert (turned & shown).sum() / (turned | shown).sum() > 0.9
    assert turned.sum() == pytest.approx(mask.sum(), rel=0.05)
    for name in DISTORTIONS.keys() - {"rotation"}:
        assert distort_mask(mask, name, severity) is mask
