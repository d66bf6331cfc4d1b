"""A detector's backbone out of a classifier computes what it computed there."""

import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.checkpoint import Checkpointer, classifier_backbone
from imrcnn_d2.modeling import ImageClassifier

LITE0 = "tf_efficientnet_lite0"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", ""]
for key in ("FPN.OUT_CHANNELS", "ROI_BOX_HEAD.FC_DIM", "ROI_MASK_HEAD.CONV_DIM"):
    SMALL += [f"MODEL.{key}", 16]
IMAGENET = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]]
IMAGENET += ["MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
RESNET = [*IMAGENET, "MODEL.RESNETS.STRIDE_IN_1X1", False]
TIMM_RESNET = ["MODEL.TIMM.NAME", "resnet50", *IMAGENET]


def detector(config, *opts):
    return build_model(load_config(f"configs/{config}.yaml", [*SMALL, *opts])).eval()


@pytest.fixture(scope="module")
def classifiers():
    """Random ones, whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    models = {name: ImageClassifier(name, 3).eval() for name in ("resnet50", LITE0)}
    for module in (module for model in models.values() for module in model.modules()):
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return models


@pytest.mark.parametrize(
    "name, config, opts",
    [
        ("resnet50", "imrcnn_R_50", RESNET),
        ("resnet50", "imrcnn_lite", TIMM_RESNET),
        (LITE0, "mrcnn_lite", []),
    ],
)
def test_the_feature_maps_are_the_classifier_s(classifiers, tmp_path, caplog, name, config, opts):
    caplog.set_level(logging.INFO)
    classifier = classifiers[name]
    Checkpointer(classifier, str(tmp_path)).write("classifier")
    model = detector(config, *opts)
    head = model.roi_heads.box_predictor.cls_score.weight.detach().clone()
    Checkpointer(model).load(str(tmp_path / "classifier.pth"))

    image = torch.randn(1, 3, 64, 96)
    expected = {}
    for level, layer in classifier.feature_layers().items():
        layer.register_forward_hook(lambda m, i, out, level=level: expected.update({level: out}))
    with torch.no_grad():
        classifier.backbone(image)
        features = model.backbone.bottom_up(image)
    assert {"res2", "res3", "res4", "res5"} <= features.keys()
    for feature, value in features.items():
        torch.testing.assert_close(value, expected[int(feature[3:])], rtol=1e-4, atol=1e-4)
    assert torch.equal(head, model.roi_heads.box_predictor.cls_score.weight)
    total = sum("num_batches" not in k for k in model.backbone.bottom_up.state_dict())
    assert f"{total} of the {total} tensors of backbone.bottom_up" in caplog.text


def test_what_does_not_fit_is_reported_or_refused(classifiers, caplog):
    state = classifiers["resnet50"].state_dict()
    for opts, remedy in (([], r"INPUT.FORMAT RGB.*123.675"), (IMAGENET, "STRIDE_IN_1X1 False")):
        with pytest.raises(ValueError, match=remedy):
            classifier_backbone(state, detector("mrcnn_R_50", *opts))
    model = detector("mrcnn_R_50", *RESNET)
    with pytest.raises(ValueError, match="ResNet"):
        classifier_backbone(classifiers[LITE0].state_dict(), model)
    state["backbone.conv1.weight"] = torch.zeros(64, 3, 3, 3)
    del state["backbone.bn1.bias"]
    assert "backbone.bottom_up.stem.conv1.weight" not in classifier_backbone(state, model)
    assert "2 of the 265 tensors" in caplog.text
    assert "stem.conv1.weight" in caplog.text and "stem.conv1.norm.bias" in caplog.text


def test_weights_to_start_from(tmp_path):
    """A detector's start one with other heads and another neck, on the same backbone alone."""
    heads = ("MODEL.ROI_HEADS.NUM_CLASSES", 7)
    detectors = {
        "lite": detector("mrcnn_lite", *heads),
        "R-50": detector("mrcnn_R_50", *heads),
        "R-101": detector("mrcnn_R_50", "MODEL.RESNETS.DEPTH", 101),
    }
    for name, model in detectors.items():
        Checkpointer(model, str(tmp_path)).write(name)
    # As ImageNet's: a backbone alone, under names of its own, with a layer for its classes.
    bottom_up = detectors["R-50"].backbone.bottom_up.state_dict()
    arrays = {name: value.numpy() for name, value in bottom_up.items()}
    content = {"model": arrays | {"stem.fc.bias": np.zeros(1000)}, "__author__": "test"}
    content["matching_heuristics"] = True
    (tmp_path / "ImageNet.pkl").write_bytes(pickle.dumps(content))

    fitting = {  # R-101 has all blocks of R-50
        "imrcnn_lite": {"lite.pth"},
        "imrcnn_R_50": {"R-50.pth", "R-101.pth", "ImageNet.pkl"},
    }
    for config, names in fitting.items():
        for file in tmp_path.glob("*.p*"):
            model = detector(config)
            first = next(model.backbone.bottom_up.parameters())
            before = first.detach().clone()
            if file.name in names:
                Checkpointer(model).load(str(file))
                assert not torch.equal(first, before)
            with pytest.raises(ValueError, match=f"{file.name}: .*another"):
                Checkpointer(model, whole=file.name in names).load(str(file))
