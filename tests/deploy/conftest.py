"""A tiny IMR-CNN with random weights, which finds something everywhere, and files to find it in."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.engine import load_config

TAU = 0.5
OPTS = [
    *("INPUT.MIN_SIZE_TEST", 64),
    *("INPUT.MAX_SIZE_TEST", 128),
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.WEIGHTS", ""),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder that a training leaves: config.yaml and model_best.pth."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_config("configs/kvasir_seg/imrcnn_lite.yaml", OPTS)
    cfg.OUTPUT_DIR = str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():  # surer of themselves, so that scores differ and masks have edges
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)
        model.roi_heads.mask_head.predictor.weight.normal_(std=10)
    point = {"tau": TAU, "rule": "f1", "dataset": "kvasir_seg_val"}
    torch.save({"model": model.state_dict(), "operating_point": point}, folder / "model_best.pth")
    return folder


@pytest.fixture(scope="session")
def predictor(tiny_run):
    """Of the tiny model."""
    return Predictor(None, tiny_run / "model_best.pth")


def picture(seed, height=60, width=80):
    """A coarse random pattern, (H, W, 3) uint8: JPEG and H.264 keep it nearly."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def image_folder(tmp_path):
    """Three images, one in a folder below."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b/c.jpg", "d.png")):
        Image.fromarray(picture(seed)).save(folder / name)
    return folder
