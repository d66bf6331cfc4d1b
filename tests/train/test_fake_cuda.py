"""
Every tensor of the models is where the model is: run on "cuda" without a card, by FakeTensorMode,
which knows shapes and devices only and raises where devices mix.

The models are built inside ``torch.device("cuda")``, but run outside: a tensor that the code makes
without naming a device then lands on the CPU, as it does in a training. The backward pass needs a
real device; ``-m gpu`` runs it.
"""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from packaging.version import Version
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from imrcnn_d2.engine import load_config

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"),
    reason="seen in torch 2.9: a fake tensor is filled with random numbers on a real card",
)

aten = torch.ops.aten
SIDE = 128  # of the padded images
LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
FOUND = 5  # what a search in a tensor yields


class MadeUpValues(TorchDispatchMode):
    """
    Answers where FakeTensorMode has none, as the answer depends on values: comparisons hold, and a
    search (nonzero, a boolean index, NMS) yields a few indices, on the device of what is searched.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return self._number(args[0])
        except DynamicOutputShapeException:
            return self._search(func, args, kwargs or {})
        if func is aten.cat.default:
            self._last_cat = out
        return out

    @staticmethod
    def _number(tensor):
        if tensor.dtype is torch.bool:
            return True
        if tensor.is_floating_point():
            return 0.5
        return SIDE if tensor.device.type == "cpu" else 1  # sizes of images are kept on the CPU

    def _search(self, func, args, kwargs):
        first, *rest = args
        if func is aten.nonzero.default:
            return _indices(first, first.dim())
        if func is aten.index.Tensor:
            return func(first, [place for index in rest[0] for place in _places(index)])
        if func is torch.ops.torchvision.nms.default:
            first[:, 0] + rest[0]  # boxes and scores: on one device?
            return _indices(first[:, 0], 1)[:, 0]
        if func is aten.repeat_interleave.Tensor:
            # Detectron2 numbers the boxes that it has just concatenated.
            return first.new_empty(len(self._last_cat))
        raise NotImplementedError(func)


def _places(index):
    is_mask = index is not None and index.dtype is torch.bool
    return _indices(index, index.dim()).unbind(1) if is_mask else [index]


def _indices(tensor, dims):
    return tensor.new_empty((min(tensor.numel(), FOUND), dims), dtype=torch.int64)


def config(name, **keys):
    opts = [
        x for key in {"MODEL.DEVICE": "cpu", "MODEL.TIMM.WEIGHTS": "", **keys}.items() for x in key
    ]
    return load_config(f"configs/{name}.yaml", opts)


def build(cfg):
    with torch.device("cuda"):  # not build_model, whose .to(device) fake modules refuse
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def batch():
    """Two images, on the CPU, as the mapper gives them."""
    inputs = []
    for height, width in ((SIDE, SIDE - 32), (SIDE - 32, SIDE)):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.zeros(2, 4))
        truth.gt_classes = torch.zeros(2, dtype=torch.int64)
        truth.gt_masks = BitMasks(torch.zeros(2, height, width, dtype=torch.bool))
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        inputs.append({"image": image, "instances": truth, "height": 200, "width": 150})
    return inputs


def is_on_cuda(tensors):
    return {tensor.device.type for tensor in tensors} == {"cuda"}


def check_training(model):
    # RetinaNet's loss is TorchScript, which would be compiled for the card.
    with EventStorage(), MadeUpValues(), torch.jit.optimized_execution(False):
        losses = model.train()(batch())
    assert is_on_cuda(losses.values()) and all(loss.shape == () for loss in losses.values())
    return losses


def check_inference(model):
    with torch.no_grad(), MadeUpValues():
        results = [result["instances"] for result in model.eval()(batch())]
    for found in results:
        fields = found.get_fields()
        assert is_on_cuda([fields.pop("pred_boxes").tensor, *fields.values()]), fields
        assert found.image_size == (200, 150) and len(found) > 0
    return results


@pytest.mark.parametrize("backbone", ["lite", pytest.param("R_50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("system", ["MRCNN", "IBMRCNN", "IMRCNN"])
def test_a_detector_trains_and_detects(system, backbone):
    cfg = config(f"{system.lower()}_{backbone}")
    with FakeTensorMode():
        model = build(cfg)
        assert is_on_cuda([*model.parameters(), *model.buffers()])
        assert check_training(model).keys() == LOSSES
        for found in check_inference(model):
            assert found.pred_masks.shape == (len(found), 200, 150)


@pytest.mark.parametrize("bottom_up", ["resnet", "timm"])
def test_a_retinanet_trains_and_detects(bottom_up):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.BACKBONE.NAME = f"build_retinanet_{bottom_up}_pafpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    with FakeTensorMode():
        model = build(cfg)
        assert check_training(model).keys() == {"loss_cls", "loss_box_reg"}
        check_inference(model)


@pytest.mark.parametrize(
    "keys",
    [
        {"ACTIVATION": "relu", "INIT": "xavier"},
        {"NORM": "GN", "INIT": "xavier"},
        {"NORM": "BN", "INIT": "xavier"},
    ],
)
def test_other_settings_of_the_neck(keys):
    keys = {f"MODEL.PAFPN.{key}": value for key, value in keys.items()}
    cfg = config("imrcnn_lite", **keys, **{"MODEL.CBAM.GATE": "sigmoid"})
    with FakeTensorMode():
        with torch.device("cuda"):
            backbone = build_backbone(cfg)
        assert is_on_cuda(backbone(torch.zeros(1, 3, SIDE, SIDE, device="cuda")).values())


def test_a_tensor_on_another_device_is_noticed():
    with FakeTensorMode(), MadeUpValues():
        x = torch.zeros(2, device="cuda")
        with pytest.raises(RuntimeError, match="different devices|same device"):
            x + torch.zeros(2)
        assert (x > 1).nonzero().device.type == "cuda"
