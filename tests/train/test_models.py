"""MR-CNN, IBMR-CNN and IMR-CNN as whole models, built from the shipped configs."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from rectangles import rectangle

from imrcnn_d2.data.mapper import LesionMapper
from imrcnn_d2.engine import load_config


def config(name, *opts):
    """A shipped config, with random weights, on the CPU."""
    random = ["MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    return load_config(name, [*random, *opts])


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.mark.parametrize("system", ["mrcnn", "ibmrcnn", "imrcnn"])
def test_training_on_batches_with_no_some_and_only_lesion_free_images(system, tmp_path):
    cfg = config(f"{system}_lite.yaml", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50)
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96)
    mapper = LesionMapper(cfg, is_train=True)
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    lesion = rectangle(1, 40, 30, 70, 50, category_id=0, size=(120, 160))
    lesion["bbox_mode"] = BoxMode.XYWH_ABS
    record = {"file_name": str(tmp_path / "image.png"), "height": 120, "width": 160}
    diseased, healthy = {**record, "annotations": [lesion]}, {**record, "annotations": []}

    model = build(cfg).train()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=1e-3)
    learned = set()
    for batch in ([diseased, diseased], [diseased, healthy], [healthy, healthy]):
        with EventStorage():
            losses = model([mapper(record) for record in batch])
        assert (losses["loss_mask"] > 0) == (losses["loss_rpn_loc"] > 0) == (diseased in batch)
        assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in named.items():
            # None would leave other processes waiting in DistributedDataParallel.
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        learned |= {name for name, parameter in named.items() if parameter.grad.any()}
        optimizer.step()
    assert learned == named.keys()


@torch.no_grad()
def test_several_shapes_in_one_batch_and_channels_last_throughout():
    # A neck that does something, and predictions of every score.
    opts = ["MODEL.PAFPN.INIT", "xavier", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    model = build(config("imrcnn_lite.yaml", *opts, "TEST.DETECTIONS_PER_IMAGE", 5)).eval()
    shapes = [(64, 160), (128, 96), (97, 65)]
    batch = [{"image": torch.rand(3, *s), "height": 2 * s[0], "width": 2 * s[1]} for s in shapes]
    for (height, width), result in zip(shapes, model(batch), strict=True):
        assert result["instances"].pred_masks.shape == (5, 2 * height, 2 * width)
        boxes = result["instances"].pred_boxes.tensor.reshape(-1, 2)
        assert boxes.min() >= 0 and (boxes <= torch.tensor([2 * width, 2 * height])).all()

    x = torch.rand(1, 3, 64, 96)
    expected = model.backbone(x)
    model.backbone.to(memory_format=torch.channels_last)
    pyramid = model.backbone(x.contiguous(memory_format=torch.channels_last))
    for name, feature in pyramid.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)
    # One layout change on the way would cost more than the format gains.
    assert pyramid["p2"].is_contiguous(memory_format=torch.channels_last)
