"""The drawn images: counts, patients, determinism, and lesions that can be told from the mucosa."""

import cv2
import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.data.prepare.synthetic import generate, render_view


def read(folder, num_images, size=64, seed=0):
    folder.mkdir()
    return list(generate(folder, num_images, size, seed).samples)


@pytest.mark.parametrize(("num_images", "num_healthy"), [(1, 0), (8, 1), (20, 3), (40, 5)])
def test_counts(tmp_path, num_images, num_healthy):
    samples = read(tmp_path / "a", num_images)
    assert len({sample.file_name for sample in samples}) == num_images
    assert sum(not sample.has_lesion for sample in samples) == num_healthy


def test_patients_have_several_views(tmp_path):
    samples = read(tmp_path / "a", 40)
    views = {}
    for sample in samples:
        views.setdefault(sample.fields["patient_id"], []).append(sample.has_lesion)
    sizes = [len(view) for view in views.values()]
    assert max(sizes) <= 5
    assert np.mean(sizes) > 2
    assert all(len(set(view)) == 1 for view in views.values())  # with a lesion, or healthy


def test_seeded(tmp_path):
    first, again, other = (read(tmp_path / n, 4, seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    pairs = [(a.image.sha256, a.annotations) for a in first]
    assert pairs == [(b.image.sha256, b.annotations) for b in again]
    assert pairs != [(c.image.sha256, c.annotations) for c in other]


@pytest.mark.parametrize("size", [64, 100, 357])
def test_any_size(tmp_path, size):
    sample = read(tmp_path / "a", 1, size)[0]
    assert (sample.image.width, sample.image.height, sample.image.mode) == (size, size, "RGB")
    image = np.asarray(Image.open(sample.image.path))
    for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]):
        assert corner.max() < 16
    assert image[size // 3 : -size // 3, size // 3 : -size // 3].mean() > 40


@pytest.mark.parametrize("patient", range(12))
def test_lesions_differ_from_the_mucosa_around_them(patient):
    image, masks = render_view(192, 0, patient, 0)
    assert 1 <= len(masks) <= 2
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(float)
    for mask in masks:
        assert 0.005 < mask.mean() < 0.2
        near = cv2.dilate(mask.astype(np.uint8), np.ones((31, 31))) > 0
        around = near & ~np.any(masks, axis=0) & (image.max(axis=2) > 25)
        inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5))) > 0
        difference = np.median(lab[inner], axis=0) - np.median(lab[around], axis=0)
        assert np.linalg.norm(difference) > 8  # a just noticeable difference is about 2


def test_views_share_a_look_and_differ_in_pose():
    colours = {}
    for patient in range(6):
        views = [render_view(96, 0, patient, view, healthy=True)[0] for view in range(4)]
        centre = [view[24:72, 24:72].reshape(-1, 3).astype(float) for view in views]
        # the ratio of red to green does not depend on the light's strength
        colours[patient] = [np.median(c[:, 0] / np.maximum(c[:, 1], 1)) for c in centre]
        assert not np.array_equal(views[0], views[1])
    within = np.mean([np.var(ratios) for ratios in colours.values()])
    between = np.var([np.mean(ratios) for ratios in colours.values()])
    assert between > 2 * within


def test_healthy_views_have_no_mask():
    assert render_view(64, 0, 0, 0, healthy=True)[1] == []


@pytest.mark.parametrize(("num_images", "size"), [(0, 64), (5, 32)])
def test_refusals(tmp_path, num_images, size):
    with pytest.raises(ValueError, match=f"{num_images} images of {size} pixels"):
        generate(tmp_path, num_images, size)
