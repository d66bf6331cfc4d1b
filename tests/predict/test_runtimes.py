"""Every runtime agrees with PyTorch in fp32."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import RUNTIMES, build_runtime
from imrcnn_d2.modeling.roi_heads import FP32ROIPooler

from .conftest import picture


def test_bf16_is_near_fp32(predictor, tiny_run):
    other = Predictor(None, tiny_run / "model_best.pth", runtime="torch-bf16")
    assert other.metadata["runtime"] == "torch-bf16"
    image = other.prepare(picture(0))
    (one,), (two,) = predictor.forward([image]), other.forward([image])
    assert two.scores.dtype == two.pred_masks.dtype == two.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(two.scores, two.scores.bfloat16().float()), "scores in steps"
    assert not torch.equal(one.scores, two.scores), "it was not run in bf16"
    assert abs(one.scores[0] - two.scores[0]) < 0.05
    assert abs(one.pred_boxes.tensor[0] - two.pred_boxes.tensor[0]).max() < 2


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_others_run_a_checkpoint(predictor, tiny_run, name):
    other = Predictor(None, tiny_run / "model_best.pth", runtime=name)
    assert other.metadata["runtime"] == name
    one, two = predictor(picture(0)), other(picture(0))
    torch.testing.assert_close(two.scores, one.scores, rtol=0, atol=1e-4)


def test_foreign_heads_pool_in_fp32_too(tiny_run):
    cfg = load_model(None, tiny_run / "model_best.pth").cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model = build_model(cfg).eval()
    assert isinstance(model.roi_heads.box_pooler, ROIPooler)
    runtime = build_runtime("torch-bf16", model, None)
    assert isinstance(model.roi_heads.box_pooler, FP32ROIPooler)
    assert isinstance(model.roi_heads.mask_pooler, FP32ROIPooler)
    runtime([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_auto_is_one_of_them(tiny_run):
    predictor = Predictor(None, tiny_run / "model_best.pth", runtime="auto")
    assert predictor.metadata["runtime"] in RUNTIMES
    assert len(predictor(picture(0)))


def test_another_is_named(tiny_run):
    with pytest.raises(
        ValueError, match="'tensorrt'; choose of torch, onnxruntime, openvino, torch-bf16"
    ):
        Predictor(None, tiny_run / "model_best.pth", runtime="tensorrt")
