"""The builders in projects that know nothing of this package but ``import imrcnn_d2``."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import imrcnn_d2  # noqa: F401  (registers the builders)
from imrcnn_d2.modeling import PAFPN

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
ONE_STAGE, TWO_STAGE = ["p3", "p4", "p5", "p6", "p7"], ["p2", "p3", "p4", "p5", "p6"]


def foreign_config(zoo_file, builder):
    """A config of Detectron2's zoo with our backbone by name; narrow, for speed."""
    cfg = model_zoo.get_config(zoo_file)
    assert "PAFPN" not in cfg.MODEL
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    return cfg


def training_example():
    truth = Instances((64, 96))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 60.0, 50.0]]))
    truth.gt_classes = torch.tensor([3])
    bitmap = torch.zeros(1, 64, 96, dtype=torch.bool)
    bitmap[0, 14:48, 12:58] = True
    truth.gt_masks = BitMasks(bitmap)
    return {"image": torch.randint(0, 255, (3, 64, 96)).float(), "instances": truth}


@pytest.mark.parametrize(
    "zoo_file, builder, levels",
    [
        (RETINANET, "build_retinanet_resnet_pafpn_backbone", ONE_STAGE),
        (RETINANET, "build_retinanet_timm_pafpn_backbone", ONE_STAGE),
        (FASTER, "build_resnet_pafpn_backbone", TWO_STAGE),
        (FASTER, "build_timm_pafpn_backbone", TWO_STAGE),
        (FASTER, "build_timm_fpn_backbone", TWO_STAGE),
        (CASCADE, "build_resnet_pafpn_backbone", TWO_STAGE),
        (CASCADE, "build_timm_pafpn_backbone", TWO_STAGE),
    ],
)
def test_a_foreign_detector_trains_and_detects(zoo_file, builder, levels):
    torch.manual_seed(0)
    cfg = foreign_config(zoo_file, builder)
    model = build_model(cfg)
    assert list(model.backbone.output_shape()) == levels
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = [training_example(), training_example()]
    with EventStorage():
        for _ in range(2):  # with identity init the second step reaches every new layer
            losses = model(batch)
            assert all(torch.isfinite(loss) for loss in losses.values()), losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    new = {k: p for k, p in model.backbone.named_parameters() if k.startswith("pan_")}
    assert len(new) == (4 * (len(model.backbone.in_features) - 1) if "pafpn" in builder else 0)
    for name, parameter in new.items():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name

    model.eval()
    with torch.no_grad():
        for result in model(batch):
            detected = result["instances"]
            assert len(detected) > 0
            assert detected.image_size == (64, 96)
            assert torch.isfinite(detected.pred_boxes.tensor).all()
            if cfg.MODEL.MASK_ON:
                assert detected.pred_masks.shape == (len(detected), 64, 96)


def test_each_builder_reads_its_config():
    cfg = get_cfg()
    imrcnn_d2.add_imrcnn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.FPN.FUSE_TYPE = "avg"
    cfg.MODEL.TIMM.NAME = "resnet18"
    cfg.MODEL.PAFPN.NORM = "GN"
    cfg.MODEL.PAFPN.INIT = "xavier"
    cfg.MODEL.PAFPN.ACTIVATION = "relu"
    cfg.MODEL.PAFPN.ATTENTION = "cbam"
    cfg.MODEL.CBAM.REDUCTION = 4
    cfg.MODEL.CBAM.KERNEL_SIZE = 3
    cfg.MODEL.CBAM.GATE = "sigmoid"

    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    fpn = build_backbone(cfg)
    assert type(fpn) is FPN
    assert isinstance(fpn.fpn_output2.norm, torch.nn.GroupNorm)
    assert fpn._fuse_type == "avg"

    cfg.MODEL.BACKBONE.NAME = "build_timm_pafpn_backbone"
    neck = build_backbone(cfg)
    assert type(neck) is PAFPN
    assert isinstance(neck.fpn_output2.norm, torch.nn.GroupNorm)
    assert neck._fuse_type == "avg"
    assert isinstance(neck.pan_down2.norm, torch.nn.GroupNorm)
    assert neck.pan_output3.weight.abs().sum() > 32  # no Dirac, which would sum to its 32 channels
    assert neck.cbam2.channel.mlp[0].weight.shape == (8, 32)
    assert neck.cbam2.spatial.conv.kernel_size == (3, 3)
    assert neck.cbam2.spatial.scale == neck.cbam2.channel.scale == 1.0
    with torch.no_grad():
        pyramid = neck.eval()(torch.randn(1, 3, 64, 64))
    assert pyramid["p5"].min() == 0  # ReLU


def test_the_timm_backbone_alone():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    shapes = build_backbone(cfg, ShapeSpec(channels=3)).output_shape()
    assert {k: v.stride for k, v in shapes.items()} == {f"res{k}": 2**k for k in range(1, 6)}
