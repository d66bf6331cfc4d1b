"""Detectors without masks, on our backbones."""

import json

import pytest
import torch
from detectron2.modeling import build_model

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.engine import load_config

from .conftest import OPTS, picture


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
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


def test_a_retinanet(weights, image_folder, tmp_path):
    predictor = Predictor(None, weights)
    assert predictor.classes == ["class 1", "class 2"]
    loaded = load_model(None, weights)
    image = predictor.prepare(picture(0))
    with torch.no_grad():
        (expected,) = loaded.model([{"image": image, "height": 60, "width": 80}])
    found = predictor(picture(0))
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
