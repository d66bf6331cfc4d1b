"""Every tensor of the models is where the model is: run on "cuda" without a card, by
FakeTensorMode, which knows shapes and devices only and raises where devices mix.

The models are built inside ``torch.device("cuda")``, but run outside: a tensor that the code makes
without naming a device then lands on the CPU, as it does in a training. The backward pass needs a
real device: the last tests, which ``-m gpu`` runs, train and detect on a card."""

import copy

import pytest
import torch
from detectron2 import model_zoo
from detectron2.engine import SimpleTrainer
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from model_benchmark import stock_config
from packaging.version import Version
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.schedule import build_optimizer
from imrcnn_d2.engine.train_step import TrainStep

from .conftest import changed, sample

fake_card = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"),
    reason="seen in torch 2.9: a fake tensor is filled with random numbers on a real card",
)
real_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")

aten = torch.ops.aten
SIDE = 128  # of the padded images
LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
FOUND = 5  # what a search in a tensor yields


class MadeUpValues(TorchDispatchMode):
    """Answers where FakeTensorMode has none, as the answer depends on values: comparisons hold, and
    a search (nonzero, a boolean index, NMS) yields a few indices, on the device of its tensor.
    Counts the `waits` of the program for the card: for such answers, and for copies to and from
    it."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            out = func(*args, **(kwargs or {}))
        except fake_tensor.DataDependentOutputException:
            self.waits += args[0].device.type == "cuda"
            if args[0].dtype is torch.bool:
                return True
            if args[0].is_floating_point():
                return 0.5
            return SIDE if args[0].device.type == "cpu" else 1  # images' sizes are on the CPU
        except fake_tensor.DynamicOutputShapeException:
            self.waits += args[0].device.type == "cuda"
            return self._search(func, *args)
        if func is aten._to_copy.default:
            self.waits += args[0].device != out.device
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


def batch():
    """Two images, on the CPU."""
    sizes, boxes = ((SIDE, SIDE - 32), (SIDE - 32, SIDE)), torch.zeros(2, 4).tolist()
    return [{**sample(*size, boxes), "height": 200, "width": 150} for size in sizes]


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


@fake_card
@pytest.mark.parametrize("backbone", ["lite", pytest.param("R_50", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "system", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("mrcnn", "ibmrcnn")), "imrcnn"]
)
def test_a_detector_trains_and_detects(system, backbone):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
    with FakeTensorMode():
        check(load_config(f"configs/{system}_{backbone}.yaml", opts), LOSSES)


@fake_card
@pytest.mark.parametrize("bottom_up", ["resnet", "timm"])
def test_a_retinanet_trains_and_detects(bottom_up):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.BACKBONE.NAME = f"build_retinanet_{bottom_up}_pafpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    with FakeTensorMode():
        check(cfg, {"loss_cls", "loss_box_reg"})


@fake_card
def test_a_tensor_on_another_device_is_noticed():
    with FakeTensorMode(), MadeUpValues():
        x = torch.zeros(2, device="cuda")
        with pytest.raises(RuntimeError, match="different devices|same device"):
            x + torch.zeros(2)
        assert (x > 1).nonzero().device.type == "cuda"


@pytest.mark.slow
@fake_card
def test_a_step_waits_for_the_card_no_more_often_than_detectron2s(monkeypatch):
    """Without the backward pass, which needs a card and is the same."""

    def waits(cfg, build_trainer):
        with FakeTensorMode(), MadeUpValues() as mode, EventStorage():
            with torch.device("cuda"):
                model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
            learning = [p for p in model.parameters() if p.requires_grad]

            def backward(loss):
                for parameter in learning:
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            trainer = build_trainer(cfg, model, [batch()])
            trainer.iter, mode.waits = 0, 0
            trainer.run_step()
            return mode.waits

    def ours(cfg, model, data):
        return TrainStep(model, data, build_optimizer(cfg, model), seed=0)

    def stock(cfg, model, data):
        return SimpleTrainer(model, data, detectron2_build_optimizer(cfg, model))

    cfg = load_config("configs/imrcnn_lite.yaml", ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""])
    # Detectron2 reads one loss after the other.
    assert 0 < waits(cfg, ours) <= waits(stock_config(cfg), stock) - len(LOSSES) + 1


@pytest.fixture
def cfg(tiny_opts):
    """A function: the tiny config on the card, with other keys."""
    opts = [*tiny_opts, "MODEL.DEVICE", "cuda"]
    return lambda *keys: load_config("configs/imrcnn_lite.yaml", [*opts, *keys])


@pytest.mark.gpu
@real_card
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_validates_resumes_and_evaluates(cfg, precision):
    keys = ["SOLVER.AMP.PRECISION", precision]
    trainer = Trainer(cfg("SOLVER.MAX_ITER", 2, *keys))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert {v.device.type for v in before.values()} == {"cuda"}
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["lesion"]["TN"] + results["lesion"]["FP"] >= 1
    after = trainer.model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    if precision != "fp16":  # whose scaler skips steps until its scale fits
        assert any("pan_" in name for name in changed(before, after))

    resumed = Trainer(cfg("SOLVER.MAX_ITER", 3, *keys))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert not changed(after, resumed.model.state_dict())
    resumed.train()
    assert resumed.iter == 3


@pytest.mark.gpu
@real_card
def test_inference_equals_the_cpu_s(cfg):
    torch.manual_seed(0)
    on_cpu = build_model(cfg("MODEL.DEVICE", "cpu")).eval()
    on_card = build_model(cfg()).eval()
    on_card.load_state_dict(on_cpu.state_dict())
    inputs = [{"image": torch.randint(0, 255, (3, 96, 128)), "height": 192, "width": 256}]
    given = Instances((96, 128))
    given.pred_boxes = Boxes(torch.tensor([[10.3, 20.1, 100.7, 90.2], [3.0, 4.0, 60.0, 50.0]]))
    given.pred_classes = torch.zeros(2, dtype=torch.int64)

    def outputs(model):
        pyramid = model.backbone(model.preprocess_image(inputs).tensor)
        masks = model.inference(inputs, [copy.deepcopy(given)], do_postprocess=False)[0].pred_masks
        instances = model(inputs)[0]["instances"].to("cpu")
        return {k: v.cpu() for k, v in pyramid.items()}, masks.cpu(), instances

    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected, got = outputs(on_cpu), outputs(on_card)
    for name, feature in got[0].items():
        bound = 1e-4 * expected[0][name].abs().max().item()
        torch.testing.assert_close(feature, expected[0][name], rtol=1e-4, atol=bound, msg=name)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-3)
    # Of a random model the ranks are ties, but for the best of all.
    assert len(got[2]) > 0 and got[2].pred_masks.shape[1:] == (192, 256)
    torch.testing.assert_close(got[2].scores[:1], expected[2].scores[:1], rtol=0, atol=1e-3)
