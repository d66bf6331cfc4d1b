"""ROI heads in bf16 against fp32, beside Detectron2's own, which shows what there is to lose."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from imrcnn_d2.modeling import FP32ROIPooler

SIZE = 640
LEVELS = (2, 3, 4, 5)
STOCK = ("StandardROIHeads", "MaskRCNNConvUpsampleHead")
OURS = ("AMPSafeROIHeads", "AMPSafeMaskHead")


def build(names, mask_on=True):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = mask_on
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_MASK_HEAD.NAME = names
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [f"p{k}" for k in LEVELS]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in LEVELS})
    # Predictions as large as a trained model's.
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.05)
    if mask_on:
        torch.nn.init.normal_(heads.mask_head.predictor.weight, std=0.5)
    return heads.eval()


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(1)
    return {
        f"p{k}": torch.randn(1, 16, SIZE // 2**k, SIZE // 2**k, generator=generator) for k in LEVELS
    }


@pytest.fixture(scope="module")
def boxes():
    generator = torch.Generator().manual_seed(2)
    corner = 400 * torch.rand(40, 2, generator=generator)
    return Boxes(torch.cat([corner, corner + 20 + 200 * torch.rand(40, 2, generator=generator)], 1))


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


def errors_in_bf16(names, features, boxes):
    """Relative error of pooled values, largest of a box in pixels, and share of wrong pixels."""
    heads = build(names)
    pooled, refined, pasted = infer(heads, features, boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = infer(heads, {k: v.bfloat16() for k, v in features.items()}, boxes)
    return (
        ((low[0] - pooled).abs().mean() / pooled.abs().mean()).item(),
        (low[1] - refined).abs().max().item(),
        ((low[2] != pasted).sum() / pasted.sum()).item(),
    )


def test_bf16_agrees_with_fp32_where_detectron2_s_heads_do_not(features, boxes):
    pooled, box, mask = errors_in_bf16(OURS, features, boxes)
    assert pooled < 0.004  # bf16 rounds to 2^-9
    assert box < 0.1
    assert mask < 0.001
    pooled, box, mask = errors_in_bf16(STOCK, features, boxes)
    assert pooled > 0.05
    assert box > 0.5
    assert mask > 0.01
    # Each of the two is needed: the poolers as above, the mask head where masks are pasted.
    _, _, mask = errors_in_bf16((OURS[0], STOCK[1]), features, boxes)
    assert mask > 0.003


def test_pooling_is_exact_where_the_features_are():
    # Whole numbers below 256 are exact in bf16, so fp32 pooling of them must be as well.
    ramp = torch.arange(160.0).expand(1, 1, 160, 160)
    boxes = [Boxes(torch.tensor([[301.3, 200.0, 437.7, 390.1]]))]
    stock = ROIPooler(7, scales=[0.25], sampling_ratio=0, pooler_type="ROIAlignV2")
    expected = stock([ramp], boxes)
    # Bin centres of the box in stride-4 pixels, half a pixel to the left (aligned=True).
    centres = (301.3 + (torch.arange(7) + 0.5) / 7 * (437.7 - 301.3)) / 4 - 0.5
    torch.testing.assert_close(expected[0, 0, 0], centres, rtol=1e-5, atol=0)
    assert torch.equal(FP32ROIPooler(stock)([ramp.bfloat16()], boxes), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (stock([ramp.bfloat16()], boxes) - expected).abs().max() > 0.1


def test_in_fp32_they_are_detectron2_s_heads(features, boxes):
    stock, ours = build(STOCK), build(OURS)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    for a, b in zip(infer(ours, features, boxes), infer(stock, features, boxes), strict=True):
        assert torch.equal(a, b)


def test_training_losses_in_bf16_agree_with_fp32(features, boxes):
    heads = build(OURS).train()
    truth = Instances((SIZE, SIZE), gt_boxes=boxes[:3], gt_classes=torch.tensor([0, 1, 0]))
    bitmaps = torch.zeros(3, SIZE, SIZE, dtype=torch.bool)
    for bitmap, (x0, y0, x1, y1) in zip(bitmaps, boxes.tensor[:3].int(), strict=True):
        bitmap[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5] = True
    truth.gt_masks = BitMasks(bitmaps)
    proposals = Instances((SIZE, SIZE), proposal_boxes=boxes, objectness_logits=torch.zeros(40))
    images = ImageList(torch.zeros(1, 3, SIZE, SIZE), [(SIZE, SIZE)])

    def losses(features):
        torch.manual_seed(0)  # the same proposals are drawn
        with EventStorage():
            return heads(images, features, [proposals], [truth])[1]

    expected = losses(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses({k: v.bfloat16() for k, v in features.items()})
    assert set(got) == {"loss_cls", "loss_box_reg", "loss_mask"}
    for name, value in expected.items():
        assert value > 0
        torch.testing.assert_close(got[name].float(), value, rtol=0.02, atol=1e-3)


def test_works_without_masks(features, boxes):
    heads = build(OURS, mask_on=False)
    assert isinstance(heads.box_pooler, FP32ROIPooler)
    assert not heads.mask_on
