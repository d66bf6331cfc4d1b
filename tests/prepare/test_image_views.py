import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.data.audit.validity import colour_histogram, texture_histogram
from imrcnn_d2.data.images import read_image

pytest.importorskip("skimage")


def test_one_colour_is_one_bin_and_hue_is_what_tells_colours_apart():
    red, blue = (np.full((50, 60, 3), colour, np.uint8) for colour in ([200, 0, 0], [0, 0, 200]))
    shares = colour_histogram(red), colour_histogram(blue)
    assert [share.max() for share in shares] == [1, 1]
    assert shares[0] @ shares[1] == 0


def test_texture_does_not_depend_on_light_or_direction(kvasir_original):
    image = read_image(min((kvasir_original / "images").iterdir()))
    texture = texture_histogram(image)
    assert texture.shape == (54,) and texture.sum() == pytest.approx(3)
    noise = np.random.default_rng(0).integers(0, 256, image.shape).astype(np.uint8)
    far = np.abs(texture_histogram(noise) - texture).sum()
    for same in ((image * 0.7).astype(np.uint8), np.ascontiguousarray(image[:, ::-1])):
        assert np.abs(texture_histogram(same) - texture).sum() < 0.15 * far


def test_an_images_size_hardly_matters(kvasir_original):
    paths = sorted((kvasir_original / "images").iterdir())
    images = [read_image(path) for path in paths]
    small = [np.array(Image.fromarray(i).resize((256, 256), Image.Resampling.BOX)) for i in images]
    for describe in (colour_histogram, texture_histogram):
        one, other = (np.sqrt([describe(i) for i in group]) for group in (images, small))
        distances = np.linalg.norm(one[:, None] - other[None], axis=2)
        assert distances.argmin(axis=1).tolist() == list(range(len(paths)))
