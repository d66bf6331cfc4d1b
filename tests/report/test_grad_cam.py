import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import ClassificationEvaluator
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.report.plots.images import choose_hits_and_misses, plot_test_grad_cams

CLASSES = ["cancer", "ulcer", "gastritis"]


def row(label, predicted, score):
    return {"label": label, "predicted": predicted, "score": str(score)}


def test_misses_are_the_most_confident_and_hits_are_spread():
    hits = [row("cancer", "cancer", score) for score in (0.5, 0.9, 0.6, 0.7, 0.8)]
    misses = [row("cancer", "ulcer", score) for score in (0.4, 0.95, 0.6)]
    chosen = choose_hits_and_misses([*hits, *misses], CLASSES, 2)
    scores = [[float(r["score"]) for r in kind] for kind in chosen["cancer"]]
    assert scores == [[0.9, 0.5], [0.95, 0.6]]
    assert chosen["ulcer"] == ([], []), "ulcer was called, but none is there"


@pytest.fixture
def evaluated(tmp_path):
    """The config of an evaluation of six images, a model, and the name of the data set."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 7):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 50})
        annotations.append({"id": i, "image_id": i, "category_id": (i - 1) // 2 + 1})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    name = f"grad_cam_{tmp_path.name}"
    register_classification_dataset(name, tmp_path / "coco.json", tmp_path)
    opts = [*("MODEL.DEVICE", "cpu"), *("MODEL.TIMM.NAME", "resnet18"), *("INPUT.SIZE", 64)]
    opts += [*("DATASETS.TEST", (name,)), *("OUTPUT_DIR", str(tmp_path))]
    cfg = load_config("configs/resnet50.yaml", opts)
    evaluator = ClassificationEvaluator(name, output_dir=str(tmp_path / "inference" / name))
    for i in range(1, 7):
        evaluator.process([{"image_id": i}], [{"scores": torch.tensor([0.5, 0.3, 0.2])}])
    evaluator.evaluate()
    yield cfg, ImageClassifier("resnet18", 3, input_size=64), tmp_path / "inference" / name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_a_picture_lies_beside_the_evaluation(evaluated, monkeypatch, caplog):
    cfg, model, folder = evaluated
    pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    plot_test_grad_cams(cfg, model)
    picture = cv2.imread(str(folder / "grad_cam.png"))
    assert picture.shape[1] > picture.shape[0] > 300
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 1000, "images and heat, in colour"


def test_without_the_package_there_is_a_hint(evaluated, monkeypatch, caplog):
    cfg, model, folder = evaluated
    monkeypatch.setattr("imrcnn_d2.report.plots.images.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        plot_test_grad_cams(cfg, model)
    assert "pip install grad-cam" in caplog.text
    assert not (folder / "grad_cam.png").exists()


def test_a_network_without_feature_maps_is_no_error(evaluated, caplog):
    cfg, _, folder = evaluated
    pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    cfg.INPUT.SIZE = 224
    plot_test_grad_cams(cfg, ImageClassifier("vit_tiny_patch16_224", 3))
    assert "'vit_tiny_patch16_224' does not have" in caplog.text
    assert not (folder / "grad_cam.png").exists()
