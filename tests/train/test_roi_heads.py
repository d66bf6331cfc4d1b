"""Heads in bf16 against fp32, and gradients for CPUs, next to Detectron2's own."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign, ShapeSpec, paste_masks_in_image
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from imrcnn_d2.modeling import (
    FP32SeparableROIPooler,
    SeparableGradientROIAlign,
    SparseGradientRPNHead,
    cpu_gradients,
)

SIZE = 640
LEVELS = (2, 3, 4, 5)
STOCK = ("StandardROIHeads", "MaskRCNNConvUpsampleHead")
OURS = ("AMPSafeROIHeads", "AMPSafeMaskHead")


def build(names, mask_on=True):
    cfg = get_cfg()
    cfg.MODEL.update(DEVICE="cpu", MASK_ON=mask_on)
    cfg.MODEL.ROI_HEADS.update(NAME=names[0], IN_FEATURES=[f"p{k}" for k in LEVELS], NUM_CLASSES=2)
    cfg.MODEL.ROI_BOX_HEAD.update(NAME="FastRCNNConvFCHead", NUM_FC=1, FC_DIM=64)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.update(NAME=names[1], NUM_CONV=1, CONV_DIM=16, POOLER_RESOLUTION=14)
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in LEVELS})
    # Predictions as large as a trained model's.
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.05)
    if mask_on:
        torch.nn.init.normal_(heads.mask_head.predictor.weight, std=0.5)
    return heads.eval()


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(1)
    return {f"p{k}": torch.randn(1, 16, SIZE // 2**k, SIZE // 2**k) for k in LEVELS}


@pytest.fixture(scope="module")
def boxes():
    torch.manual_seed(2)
    corner = 400 * torch.rand(40, 2)
    return Boxes(torch.cat([corner, corner + 20 + 200 * torch.rand(40, 2)], 1))


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


def test_inference_in_bf16_agrees_with_fp32(features, boxes):
    heads = build(OURS)
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


def test_in_fp32_they_are_detectron2_s_heads(features, boxes):
    stock, ours = build(STOCK), build(OURS)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(infer(ours, features, boxes), infer(stock, features, boxes), strict=True):
        assert torch.equal(a, b)
    assert isinstance(build(OURS, mask_on=False).box_pooler, FP32SeparableROIPooler)


def test_training_losses_in_bf16_agree_with_fp32(features, boxes):
    heads = build(OURS).train()
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
