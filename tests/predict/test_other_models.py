"""Classification models, and detectors without masks, predict and export alike."""

import csv
import json

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import EXPORTS, TorchRuntime
from imrcnn_d2.deploy.runtimes.check import compare_predictors
from imrcnn_d2.engine import load_config

from .conftest import OPTS, random_image


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a classifier that has learnt nothing."""
    folder = tmp_path_factory.mktemp("recognition")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", "INPUT.SIZE", 64]
    cfg = load_config("configs/recognition/lite.yaml", opts)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        model.head.weight.normal_()
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def classifier(weights):
    return Predictor(None, weights)


def test_it_is_what_the_evaluation_sees(classifier, weights, image_folder):
    loaded = load_model(None, weights)
    mapper = ClassificationMapper(loaded.cfg, is_train=False)
    paths = [image_folder / "a.png", image_folder / "b" / "c.jpg"]
    with torch.no_grad():
        expected = loaded.model([mapper({"file_name": str(path)}) for path in paths])
    for found, output in zip(classifier(paths, batch_size=2), expected, strict=True):
        torch.testing.assert_close(found, output["scores"], rtol=1e-4, atol=1e-5)
        assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert classifier.tau is None
    assert len(classifier.classes) == 3


def test_the_files(classifier, image_folder, tmp_path):
    done = predict_files(classifier, [image_folder], tmp_path, save=["overlays", "labelme"])
    assert done.images == 3
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities = classifier(image_folder / "a.png").tolist()
    best = classifier.classes[probabilities.index(max(probabilities))]
    assert rows[0]["class"] == best
    written = [float(rows[0][f"probability {name}"]) for name in classifier.classes]
    assert written == pytest.approx(probabilities)
    annotation = json.loads((tmp_path / "predictions.json").read_text())["annotations"][0]
    assert annotation["image_id"] == 1 and "bbox" not in annotation
    assert annotation["score"] == pytest.approx(max(probabilities))
    assert json.loads((tmp_path / "labelme" / "a.json").read_text())["flags"] == {best: True}
    with Image.open(tmp_path / "overlays" / "a.jpg") as overlay:
        assert overlay.size == (80, 60)


def test_there_are_no_masks_and_no_threshold(classifier, weights, image_folder, tmp_path):
    with pytest.raises(ValueError, match="ImageClassifier"):
        predict_files(classifier, [image_folder], tmp_path, save=["masks"])
    with pytest.raises(ValueError, match="likeliest class"):
        Predictor(None, weights, tau=0.5)


def test_an_export_agrees(classifier, weights, image_folder, tmp_path):
    path = tmp_path / "model.safetensors"
    TorchRuntime.export(load_model(None, weights), path, precision="fp16")
    other = Predictor(None, path)
    assert other.classes == classifier.classes and other.tau is None
    agreement = compare_predictors(classifier, other, [image_folder / "a.png"])
    assert agreement.detections == 1 and 0 < agreement.largest()[0] < 0.02
    bf16 = Predictor(None, path, runtime="torch-bf16")(random_image(0))
    assert bf16.dtype == torch.float32


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_files_of_other_runtimes_agree(classifier, weights, image_folder, tmp_path, form):
    path = tmp_path / f"model.{form}"
    EXPORTS[form].export(
        load_model(None, weights), path, example=classifier.prepare(random_image(0))
    )
    other = Predictor(None, path)
    assert other.classes == classifier.classes and other.tau is None
    images = [random_image(seed) for seed in range(3)]
    for one, two in zip(classifier(images, 3), other(images, 3), strict=True):
        # as of detectors in test_runtimes.py: every runtime orders its sums in its own way
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory):
    """Of a RetinaNet."""
    folder = tmp_path_factory.mktemp("retinanet")
    opts = [
        *OPTS,
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_timm_pafpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.RETINANET.NUM_CLASSES", 2),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
        *("MODEL.MASK_ON", False),
        *("TEST.DETECTIONS_PER_IMAGE", 4),
        *("MODEL.IMRCNN.SCORE_THRESH", 0.0),
    ]
    cfg = load_config("configs/kvasir_seg/imrcnn_lite.yaml", opts)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    return folder / "model.pth"


def test_a_retinanet(retinanet, image_folder, tmp_path):
    predictor = Predictor(None, retinanet)
    assert predictor.classes == ["class 1", "class 2"]
    loaded = load_model(None, retinanet)
    image = predictor.prepare(random_image(0))
    with torch.no_grad():
        (expected,) = loaded.model([{"image": image, "height": 60, "width": 80}])
    found = predictor(random_image(0))
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor, rtol=0, atol=1e-2
    )
    predict_files(predictor, [image_folder], tmp_path, save=["overlays", "labelme"])
    annotations = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert len(annotations) == 12 and "segmentation" not in annotations[0]
    shapes = json.loads((tmp_path / "labelme" / "a.json").read_text())["shapes"]
    assert [shape["shape_type"] for shape in shapes] == ["rectangle"] * 4
    x, y, width, height = annotations[0]["bbox"]
    assert shapes[0]["points"] == [[x, y], [x + width, y + height]]
    with pytest.raises(ValueError, match="RetinaNet"):
        predict_files(predictor, [image_folder], tmp_path / "masks", save=["masks"])
