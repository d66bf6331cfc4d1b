import pytest
import torch
from detectron2.modeling import build_model

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.schedule import check_trainable, frozen_norms, trainable_parameters
from imrcnn_d2.modeling import ImageClassifier


@pytest.fixture(scope="module")
def mask_rcnn():
    """MR-CNN on ResNet-50, with stem and res2 frozen from the start."""
    opts = [*("MODEL.DEVICE", "cpu"), *("MODEL.FPN.OUT_CHANNELS", 16), *("MODEL.WEIGHTS", "")]
    opts += [*("MODEL.ROI_BOX_HEAD.FC_DIM", 16), *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16)]
    return build_model(load_config("configs/mrcnn_R_50.yaml", opts))


def named(model, *prefixes):
    return {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefixes)}


def test_parts_of_a_detector(mask_rcnn):
    head = ("backbone.fpn_", "proposal_generator.", "roi_heads.")
    body = "backbone.bottom_up."
    assert trainable_parameters(mask_rcnn, "head") == named(mask_rcnn, *head)
    for text, stages in (
        ("stages from 5", ["res5"]),
        ("stages from 4", ["res4", "res5"]),
        ("stages from 2", ["res3", "res4", "res5"]),  # res2 is frozen
    ):
        expected = named(mask_rcnn, *head, *(f"{body}{stage}." for stage in stages))
        assert trainable_parameters(mask_rcnn, text) == expected, text
    assert trainable_parameters(mask_rcnn, "all") == named(mask_rcnn, "")


@pytest.mark.parametrize(
    ("name", "below", "first"),
    [
        # The layers in the order in which an image passes them; those below stage 4, then one more.
        ("resnet18", ["conv1", "bn1", "layer1", "layer2"], "layer3"),
        ("convnext_atto", ["stem", "stages.0", "stages.1"], "stages.2"),
        ("densenet121", ["features.conv0", "features.norm0", "features.denseblock1"], None),
    ],
)
def test_stages_of_classifiers(name, below, first):
    model = ImageClassifier(name, 3)
    chosen = trainable_parameters(model, "stages from 4")
    assert not any(n.startswith(tuple(f"backbone.{layer}." for layer in below)) for n in chosen)
    assert named(model, "head.") < chosen
    if first:
        assert named(model, f"backbone.{first}.") <= chosen
        frozen = named(model, "") - chosen
        assert frozen == named(model, *(f"backbone.{layer}." for layer in below))
    assert trainable_parameters(model, "head") == {"head.weight", "head.bias"}


def test_norms_whose_weights_do_not_learn_are_found():
    model = ImageClassifier("resnet18", 3)
    assert not frozen_norms(model)
    for parameter in model.backbone.layer1.parameters():
        parameter.requires_grad = False
    layer1 = model.backbone.layer1.modules()
    assert frozen_norms(model) == [m for m in layer1 if isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize("text", ["Head", "stages from", "stages from x", "", 4, None])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="use 'head', 'stages from k'"):
        check_trainable(text)
