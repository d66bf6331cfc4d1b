"""Every tensor of the models is where the model is: run on "cuda" without a card, by
FakeTensorMode, which knows shapes and devices only and raises where devices mix.

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
    """Answers where FakeTensorMode has none, as the answer depends on values: comparisons hold, and
    a search (nonzero, a boolean index, NMS) yields a few indices, on the device of its tensor.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if args[0].dtype is torch.bool:
                return True
            if args[0].is_floating_point():
                return 0.5
            return SIDE if args[0].device.type == "cpu" else 1  # images' sizes are on the CPU
        except DynamicOutputShapeException:
            return self._search(func, *args)
        if func is aten.cat.default:
            self._last_cat = out
        return out

    def _search(self, func, first, *rest):
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


def config(name, *opts):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", *opts]
    return load_config(f"configs/{name}.yaml", opts)


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


def check(cfg, expected_losses):
    """Build, train and detect."""
    with torch.device("cuda"):  # not build_model, whose .to(device) fake modules refuse
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert is_on_cuda([*model.parameters(), *model.buffers()])
    # RetinaNet's loss is TorchScript, which would be compiled for the card.
    with EventStorage(), MadeUpValues(), torch.jit.optimized_execution(False):
        losses = model.train()(batch())
    assert losses.keys() == expected_losses
    assert is_on_cuda(losses.values()) and all(loss.shape == () for loss in losses.values())
    with torch.no_grad(), MadeUpValues():
        results = [result["instances"] for result in model.eval()(batch())]
    for instances in results:
        fields = instances.get_fields()
        if "loss_mask" in losses:
            assert fields["pred_masks"].shape == (len(instances), 200, 150)
        assert is_on_cuda([fields.pop("pred_boxes").tensor, *fields.values()]), fields
        assert instances.image_size == (200, 150) and len(instances) > 0


@pytest.mark.parametrize("backbone", ["lite", pytest.param("R_50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("system", ["mrcnn", "ibmrcnn", "imrcnn"])
def test_a_detector_trains_and_detects(system, backbone):
    with FakeTensorMode():
        check(config(f"{system}_{backbone}"), LOSSES)


@pytest.mark.parametrize("bottom_up", ["resnet", "timm"])
def test_a_retinanet_trains_and_detects(bottom_up):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.BACKBONE.NAME = f"build_retinanet_{bottom_up}_pafpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    with FakeTensorMode():
        check(cfg, {"loss_cls", "loss_box_reg"})


@pytest.mark.parametrize(("key", "value"), [("ACTIVATION", "relu"), ("NORM", "GN"), ("NORM", "BN")])
def test_other_settings_of_the_neck(key, value):
    opts = [f"MODEL.PAFPN.{key}", value, "MODEL.PAFPN.INIT", "xavier", "MODEL.CBAM.GATE", "sigmoid"]
    with FakeTensorMode():
        with torch.device("cuda"):
            backbone = build_backbone(config("imrcnn_lite", *opts))
        assert is_on_cuda(backbone(torch.zeros(1, 3, SIDE, SIDE, device="cuda")).values())


def test_a_tensor_on_another_device_is_noticed():
    with FakeTensorMode(), MadeUpValues():
        x = torch.zeros(2, device="cuda")
        with pytest.raises(RuntimeError, match="different devices|same device"):
            x + torch.zeros(2)
        assert (x > 1).nonzero().device.type == "cuda"
