import copy

import torch
from detectron2.modeling import build_model

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.train_step import use_channels_last

LAST = torch.channels_last


def test_on_a_cpu_what_lies_below_the_pyramid():
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
    model = build_model(load_config("configs/imrcnn_lite.yaml", opts)).eval()
    other = use_channels_last(copy.deepcopy(model))
    assert other.backbone.bottom_up.body.conv_stem.weight.is_contiguous(memory_format=LAST)
    assert not other.backbone.fpn_output2.weight.is_contiguous(memory_format=LAST)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted, got = model.backbone(image), other.backbone(image)
    assert all(feature.is_contiguous() for feature in other.backbone.bottom_up(image).values())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_a_model_without_a_pyramid():
    model = use_channels_last(torch.nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous(memory_format=LAST)
