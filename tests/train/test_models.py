"""MR-CNN, IBMR-CNN and IMR-CNN as whole models, built from the shipped configs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.export import scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from pycocotools import mask as rle

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.data.mapper import LesionMapper
from imrcnn_d2.modeling import PAFPN

CONFIGS = Path(__file__).parents[2] / "configs"
ZOO_FILE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")


def is_new(key):
    return key.startswith(("backbone.pan_", "backbone.cbam"))


def config(name, **overrides):
    """A shipped config, with random weights, on the CPU."""
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([x for pair in overrides.items() for x in pair])
    return cfg


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 255 * torch.rand(3, height, width, generator=generator)


@pytest.fixture(scope="module")
def stock():
    """Detectron2's own Mask R-CNN R-50 FPN, 80 classes, random weights."""
    cfg = model_zoo.get_config(ZOO_FILE)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return build(cfg).eval()


@pytest.fixture(scope="module")
def imrcnn(stock, tmp_path_factory):
    """IMR-CNN R-50 for one class, with the stock model's weights; and what it was before those."""
    file = tmp_path_factory.mktemp("weights") / "stock.pth"
    torch.save({"model": stock.state_dict()}, file)
    model = build(config("imrcnn_R_50.yaml")).eval()
    before = copy.deepcopy(model.state_dict())
    DetectionCheckpointer(model).load(str(file))
    file.unlink()
    return model, before


@pytest.fixture(scope="module")
def light():
    """The light IMR-CNN with a neck that does something, and predictions of every score."""
    cfg = config("imrcnn_lite.yaml")
    cfg.MODEL.PAFPN.INIT = "xavier"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return build(cfg).eval()


def test_every_key_of_a_stock_mask_rcnn_loads(stock):
    cfg = config("imrcnn_R_50.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build(cfg)
    ours = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in stock.state_dict().items()}.items() <= ours.items()
    new = ours.keys() - stock.state_dict().keys()
    assert new and all(is_new(k) for k in new)


def test_for_other_classes_only_the_predictors_start_anew(stock, imrcnn):
    model, before = imrcnn
    source = stock.state_dict()
    for key, value in model.state_dict().items():
        if is_new(key) or key.startswith(PREDICTORS):
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value, source[key]), key
    skipped = {k for k in source if source[k].shape != before[k].shape}
    assert skipped and all(k.startswith(PREDICTORS) for k in skipped)


def test_fine_tuning_starts_from_exactly_the_model_that_was_loaded(stock, imrcnn):
    model, _ = imrcnn
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, pyramid = stock.backbone(x), model.backbone(x)
    assert list(pyramid) == list(expected)
    for name, feature in pyramid.items():
        assert (feature - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("system", ["MRCNN", "IBMRCNN", "IMRCNN"])
def test_training_on_batches_with_no_some_and_only_lesion_free_images(system, tmp_path):
    cfg = config(f"{system.lower()}_lite.yaml", **{"MODEL.RPN.POST_NMS_TOPK_TRAIN": 50})
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96)
    mapper = LesionMapper(cfg, is_train=True)
    mask = np.zeros((120, 160), dtype=np.uint8)
    mask[30:80, 40:110] = 1
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    lesion = {
        "bbox": [40, 30, 70, 50],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": rle.encode(np.asfortranarray(mask)),
    }
    record = {"file_name": str(tmp_path / "image.png"), "height": 120, "width": 160}
    diseased, healthy = {**record, "annotations": [lesion]}, {**record, "annotations": []}

    model = build(cfg).train()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert any(map(is_new, named)) == (system != "MRCNN")
    optimizer = torch.optim.SGD(named.values(), lr=1e-3)
    learned = set()
    for batch in (
        [diseased, diseased],
        [diseased, healthy],
        [healthy, healthy],
    ):
        inputs = [mapper(record) for record in batch]
        lesions = sum(len(x["instances"]) for x in inputs)
        assert lesions == sum(len(record["annotations"]) for record in batch)
        with EventStorage():
            losses = model(inputs)
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        assert (losses["loss_mask"] > 0) == (lesions > 0)
        assert (losses["loss_rpn_loc"] > 0) == (lesions > 0)
        assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in named.items():
            # None would leave other processes waiting in DistributedDataParallel.
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            if parameter.grad.any():
                learned.add(name)
        optimizer.step()
    assert learned == named.keys()


def test_images_of_several_shapes_in_one_batch(light):
    shapes = [(64, 160), (128, 96), (97, 65)]
    inputs = [{"image": image(*s), "height": 2 * s[0], "width": 2 * s[1]} for s in shapes]
    with torch.no_grad():
        results = [r["instances"] for r in light(inputs)]
    for (height, width), detected in zip(shapes, results, strict=True):
        assert len(detected) == 5
        assert detected.pred_masks.shape == (5, 2 * height, 2 * width)
        boxes = detected.pred_boxes.tensor
        assert boxes.min() >= 0
        assert (boxes[:, [0, 2]] <= 2 * width).all() and (boxes[:, [1, 3]] <= 2 * height).all()

    light.train()
    for example, (height, width) in zip(inputs, shapes, strict=True):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, width - 8.0, height - 8.0]]))
        truth.gt_classes = torch.zeros(1, dtype=torch.long)
        bitmap = torch.ones(1, height, width, dtype=torch.bool)
        truth.gt_masks = BitMasks(bitmap)
        example["instances"] = truth
    with EventStorage():
        losses = light(inputs)
    light.eval()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values()), losses


def test_a_scripted_deep_copy_gives_the_same_detections(light):
    keys = list(light.state_dict())
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    scripted = scripting_with_instances(copy.deepcopy(light), fields)
    assert list(light.state_dict()) == keys
    inputs = [{"image": image(64, 96)}]
    with torch.no_grad():
        (expected,) = light.inference(inputs, do_postprocess=False)
        (got,) = scripted.inference(inputs, do_postprocess=False)
    assert len(expected) == 5
    # fused, it may order fp32 sums otherwise, and on each processor in another way
    boxes = got.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.pred_masks, expected.pred_masks, rtol=0, atol=1e-4)


def test_masks_of_given_boxes_in_bf16_agree_with_fp32(light):
    inputs = [{"image": image(96, 128)}]
    detected = Instances((96, 128))
    detected.pred_boxes = Boxes(torch.tensor([[10.3, 20.1, 100.7, 90.2], [3.0, 4.0, 60.0, 50.0]]))
    detected.pred_classes = torch.zeros(2, dtype=torch.long)

    def masks():
        with torch.no_grad():
            return light.inference(inputs, [copy.deepcopy(detected)], do_postprocess=False)[
                0
            ].pred_masks

    expected = masks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = masks()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


def test_channels_last_changes_nothing_but_the_layout(light):
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(light.backbone).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = light.backbone(x)
        got = other(x.contiguous(memory_format=torch.channels_last))
    for name, feature in got.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)
    assert isinstance(light.backbone, PAFPN)
    # One layout change on the way would cost more than the format gains.
    assert got["p2"].is_contiguous(memory_format=torch.channels_last)
