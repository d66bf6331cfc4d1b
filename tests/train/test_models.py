"""CBAM and PAFPN against their formulas and Detectron2's FPN; YAML and LazyConfig models."""

import copy
import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig
from scipy.signal import correlate2d
from scipy.special import expit

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.trainer import LazyTrainer
from imrcnn_d2.modeling import CBAM, PAFPN

from .conftest import changed, sample

CHANNELS = 32
LEVELS = (2, 3, 4, 5)
CBAM_ON = {"attention": "cbam"}
BOTH = {**CBAM_ON, "attention_before": ("bottom_up", "top_down"), "cbam_reduction": 4}
XAVIER = {"init": "xavier", "cbam_reduction": 4}


def numpy_cbam(x, weights, scale):
    """Equations 1 to 3 of Woo et al. (2018) for x (N, C, H, W), with `scale` on each sigmoid."""
    first, second = (weights[f"channel.mlp.{i}.weight"].double().numpy() for i in (0, 2))
    kernel = weights["spatial.conv.weight"][0].double().numpy()

    def mlp(v):
        return second @ np.maximum(first @ v, 0)

    result = []
    for image in x.detach().double().numpy():
        flat = image.reshape(len(image), -1)
        refined = image * scale * expit(mlp(flat.mean(1)) + mlp(flat.max(1)))[:, None, None]
        pooled = (refined.mean(0), refined.max(0))
        logits = sum(correlate2d(p, k, mode="same") for p, k in zip(pooled, kernel, strict=True))
        result.append(refined * scale * expit(logits))
    return np.stack(result)


@pytest.mark.parametrize("gate, scale", [("sigmoid", 1), ("double_sigmoid", 2), ("residual", 1)])
@pytest.mark.parametrize("reduction, hidden, kernel_size", [(4, 3, 3), (16, 1, 7), (1, 12, 1)])
def test_cbam_agrees_with_the_paper_s_formulas(gate, scale, reduction, hidden, kernel_size):
    torch.manual_seed(0)
    cbam = CBAM(12, reduction=reduction, kernel_size=kernel_size, gate=gate).double()
    x = 3 * torch.randn(2, 12, 9, 14, dtype=torch.double)
    before = x.clone()
    expected = numpy_cbam(x, cbam.state_dict(), scale) + (x.numpy() if gate == "residual" else 0)
    np.testing.assert_allclose(cbam(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # in place
        np.testing.assert_allclose(cbam(x).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(x, before), "the input was changed"
    assert cbam.channel.mlp[0].out_features == hidden
    assert [p.shape for p in CBAM(64).parameters()] == [(4, 64), (64, 4), (1, 2, 7, 7)]


def build_neck(cls, fuse_type="sum", norm="", top_block=None, levels=LEVELS, **options):
    """A neck on a ResNet of one narrow block per stage: 8, 16, 32, 64 channels."""
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(BasicBlock, 1, in_channels=a, out_channels=b, stride_per_block=[stride])
        for a, b, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
    ]
    resnet = ResNet(BasicStem(out_channels=8), stages, out_features=[f"res{k}" for k in LEVELS])
    names = [f"res{k}" for k in levels]
    return cls(resnet, names, CHANNELS, norm, top_block or LastLevelMaxPool(), fuse_type, **options)


def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("before", [(), ("bottom_up",), ("top_down",), ("top_down", "bottom_up")])
@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_pafpn_agrees_with_its_formulas(before, activation, fuse_type):
    options = {"attention": "cbam", "attention_before": before} if before else {}
    neck = build_neck(PAFPN, fuse_type, activation=activation, **options, **XAVIER)
    state = neck.state_dict()
    for name, value in state.items():
        if "pan_" in name and "bias" in name:
            value.normal_()

    def conv(name, x, **settings):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    def cbam(name, x):
        weights = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        return torch.from_numpy(numpy_cbam(x, weights, scale=2.0)).float()

    def act(x):
        return x.clamp(min=0) if activation == "relu" else x

    with torch.no_grad():
        features, expected, above = neck.bottom_up(images()), {}, None
        for level in reversed(LEVELS):
            path = conv(f"fpn_lateral{level}", features[f"res{level}"])
            if "top_down" in before:
                path = cbam(f"cbam_lateral{level}.", path)
            if above is not None:
                path = path + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
                path = path / 2 if fuse_type == "avg" else path
            above = path
            expected[level] = conv(f"fpn_output{level}", path, padding=1)
            if "bottom_up" in before:
                expected[level] = cbam(f"cbam{level}.", expected[level])
        for low, level in itertools.pairwise(LEVELS):
            down = act(conv(f"pan_down{low}", expected[low], stride=2, padding=1))
            expected[level] = act(conv(f"pan_output{level}", down + expected[level], padding=1))
        expected[6] = expected[5][:, :, ::2, ::2]
        pyramid = neck(images())

    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in pyramid.items():
        torch.testing.assert_close(feature, expected[int(name[1])], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, CBAM_ON, BOTH])
def test_identity_starts_as_the_fpn_and_yet_learns(options):
    fpn, neck = build_neck(FPN), build_neck(PAFPN, **options)
    missing, unexpected = neck.load_state_dict(fpn.state_dict(), strict=False)
    assert not unexpected
    x = images()
    with torch.no_grad():
        pyramid = neck(x)
        for name, feature in fpn(x).items():
            assert (pyramid[name] - feature).abs().max() <= 1e-5 * feature.abs().max(), name

    new = {k: v for k, v in neck.named_parameters() if k.startswith(("pan_", "cbam"))}
    assert set(new) == set(missing)
    optimizer, learned = torch.optim.SGD(new.values(), lr=1e-3), set()
    for _ in range(2):
        optimizer.zero_grad()
        # A loss with a random direction per value, so that no gradient cancels by symmetry.
        generator = torch.Generator().manual_seed(2)
        loss = sum((f * torch.randn(f.shape, generator=generator)).sum() for f in neck(x).values())
        loss.backward()
        learned |= {name for name, parameter in new.items() if parameter.grad.any()}
        optimizer.step()
    assert learned == set(new)


@pytest.mark.parametrize(
    "options, keys",
    [
        ({"activation": "relu", "pan_norm": "GN"}, "ACTIVATION 'relu'.*PAFPN.NORM 'GN'"),
        ({**CBAM_ON, "cbam_gate": "sigmoid"}, "CBAM.GATE 'sigmoid'"),
        ({"init": "zero"}, "PAFPN.INIT is 'zero'"),
        ({"activation": "gelu", "init": "xavier"}, "PAFPN.ACTIVATION is 'gelu'"),
        ({"attention": "se"}, "PAFPN.ATTENTION is 'se'"),
        *(
            ({"attention_before": v}, "PAFPN.ATTENTION_BEFORE is")
            for v in (("bottom_up", "fpn"), ())
        ),
        ({**CBAM_ON, "cbam_gate": "tanh", "init": "xavier"}, "CBAM.GATE is 'tanh'"),
        ({**CBAM_ON, "cbam_kernel_size": 4}, "CBAM.KERNEL_SIZE is 4"),
        ({**CBAM_ON, "cbam_reduction": 0}, "CBAM.REDUCTION is 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, keys):
    with pytest.raises(ValueError, match=keys):
        build_neck(PAFPN, **options)
    build_neck(PAFPN, attention="", cbam_gate="sigmoid")  # of an attention that is not used


def test_top_block_on_a_bottom_up_feature():
    block = LastLevelP6P7(64, CHANNELS)
    neck = build_neck(PAFPN, top_block=block, levels=(3, 4, 5), attention="cbam", **XAVIER).eval()
    with torch.no_grad():
        pyramid = neck(images())
        p6 = block.p6(neck.bottom_up(images())["res5"])
        p7 = block.p7(p6.clamp(min=0))
    assert list(pyramid) == ["p3", "p4", "p5", "p6", "p7"]
    torch.testing.assert_close(pyramid["p6"], p6)
    torch.testing.assert_close(pyramid["p7"], p7)
    for name, shape in neck.output_shape().items():
        size = -(-64 // shape.stride), -(-96 // shape.stride)
        assert pyramid[name].shape == (2, shape.channels, *size) and shape.channels == CHANNELS


def test_a_deep_copy_shares_nothing_with_the_original():
    # FPN keeps its layers in plain lists too: a copy must run on its layers, not on the original's.
    neck = build_neck(PAFPN, init="xavier", **BOTH)
    copied = copy.deepcopy(neck.eval())
    with torch.no_grad():
        before = neck(images())["p5"]
        for parameter in neck.parameters():
            parameter.zero_()
        assert torch.equal(copied(images())["p5"], before)


def config(name, *opts):
    """A shipped config, with random weights, on the CPU."""
    random = ["MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    return load_config(name, [*random, *opts])


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def calm(model):
    """Without statistics of real features they grow into the thousands, and boxes vanish."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.data.fill_(0.3)


@pytest.mark.parametrize("system", ["mrcnn", "ibmrcnn", "imrcnn"])
def test_training_on_batches_with_no_some_and_only_lesion_free_images(system):
    model = build(config(f"{system}_lite.yaml", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50)).train()
    diseased, healthy = sample(96, 128, [[32, 24, 88, 64]]), sample(96, 128)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=1e-3)
    learned = set()
    for batch in ([diseased, diseased], [diseased, healthy], [healthy, healthy]):
        with EventStorage():
            losses = model(batch)
        assert (losses["loss_mask"] > 0) == (losses["loss_rpn_loc"] > 0) == (batch[0] is diseased)
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


@torch.no_grad()
def test_a_stock_checkpoint_gives_the_imrcnn_its_predictions(tmp_path):
    """Detectron2's model, checkpoint and checkpointer; the new layers begin as the identity."""
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    opts += ["MODEL.RPN.POST_NMS_TOPK_TEST", 50, "TEST.DETECTIONS_PER_IMAGE", 20]
    stock_cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    stock_cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu"])
    stock, model = build(stock_cfg).eval(), build(config("imrcnn_R_50.yaml", *opts)).eval()
    calm(stock)
    torch.save({"model": stock.state_dict()}, tmp_path / "stock.pth")
    loader = DetectionCheckpointer(model)
    loader._log_incompatible_keys = Mock()
    loader.load(str(tmp_path / "stock.pth"))
    (keys,) = loader._log_incompatible_keys.call_args.args
    new = {k for k in model.state_dict() if k.startswith(("backbone.pan_", "backbone.cbam"))}
    assert set(keys.missing_keys) == new and not keys.unexpected_keys + keys.incorrect_shapes

    batch = [{"image": torch.randint(0, 255, (3, 96, 128))}]
    expected, got = (m(batch)[0]["instances"].get_fields() for m in (stock, model))
    assert len(expected["scores"]) == 20
    assert torch.equal(expected.pop("pred_boxes").tensor, got.pop("pred_boxes").tensor)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


PARTS = "proposal_generator proposal_generator.anchor_generator roi_heads roi_heads.box_predictor "
PARTS += "roi_heads.mask_head roi_heads.box_pooler.pooler roi_heads.mask_pooler.pooler"


def settings(module):
    """The plain values that a module was made with: thresholds, batch sizes, feature names."""
    plain = {}
    for key, value in vars(module).items():
        if isinstance(value, (tuple, list, ListConfig)) and key != "conv_norm_relus":
            plain[key] = list(value)
        elif isinstance(value, (int, float, str, dict)) and not key.startswith("_"):
            plain[key] = value
    # Weights of 1 are given by YAML for one loss and left to the default for the others.
    if isinstance(plain.get("loss_weight"), dict):
        plain["loss_weight"] = {k: v for k, v in plain["loss_weight"].items() if v != 1.0}
    return plain


@pytest.mark.parametrize("size", ["R_50", "lite"])
def test_lazy_and_yaml_models_are_equal(size):
    lazy_cfg = LazyConfig.load(f"configs/lazy/imrcnn_{size}.py")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    lazy_cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    yaml_model = build_model(load_config(f"configs/imrcnn_{size}.yaml", opts))
    lazy_model = instantiate(lazy_cfg.model)
    models = lazy_model, yaml_model
    calm(yaml_model)
    assert list(lazy_model.state_dict()) == list(yaml_model.state_dict())
    lazy_model.load_state_dict(yaml_model.state_dict())
    parameters = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in models]
    assert parameters[0] == parameters[1]
    for part in PARTS.split():
        ours, theirs = (settings(model.get_submodule(part)) for model in models)
        assert ours == theirs and len(ours) > 1, part

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        a, b = (m.eval()([{"image": image}])[0]["instances"] for m in models)
    assert len(a) == 100
    fields = [{**x.get_fields(), "pred_boxes": x.pred_boxes.tensor} for x in (a, b)]
    assert not changed(*fields)


def test_a_lazy_config_trains_resumes_and_evaluates(tiny_lazy_opts, tmp_path):
    opts = ["train.eval_period=1", "train.checkpointer.period=1", "train.max_iter=2"]
    opts += tiny_lazy_opts
    cfg = LazyConfig.apply_overrides(LazyConfig.load("configs/lazy/imrcnn_lite.py"), opts)
    trainer = LazyTrainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["lesion"]["TN"] + results["lesion"]["FP"] >= 1
    for name in ("best", "0000000"):  # of the first iteration, by the period
        assert (tmp_path / f"output/model_{name}.pth").is_file(), name
    moved = " ".join(changed(before, trainer.model.state_dict()))
    assert "pan_down" in moved and "bottom_up.body.conv_stem" not in moved, "a frozen layer moved"

    cfg.train.max_iter = 3
    resumed = LazyTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert resumed.best.best_score == trainer.best.best_score is not None
    again, _ = LazyTrainer.evaluate(cfg, trainer.model, "test")
    for group, values in results.items():
        assert again[group] == pytest.approx(values, nan_ok=True), group
