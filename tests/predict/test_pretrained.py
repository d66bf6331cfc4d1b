"""The weights that come with the package."""

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import pretrained


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained("demo", device="cpu")


def test_it_is_small_and_says_what_it_is_for():
    path = pretrained("demo")
    assert path.stat().st_size <= 20e6
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    for text in ("polyps of the colon, not gastric cancer", "research and education", "Kvasir-SEG"):
        assert text in card


def test_it_finds_polyps_at_original_size(predictor, kvasir_original):
    ious = []
    for path in sorted((kvasir_original / "images").iterdir()):
        (mask_path,) = (kvasir_original / "masks").glob(f"{path.stem}.*")
        truth = np.asarray(Image.open(mask_path).convert("L")) >= 128
        found = predictor(path)
        lesions = found[found.scores >= predictor.tau]
        assert lesions.image_size == truth.shape
        mask = lesions.pred_masks.any(dim=0).numpy()
        ious.append((mask & truth).sum() / (mask | truth).sum())
    assert len(ious) == 5 and np.median(ious) > 0.8, np.round(ious, 2)
