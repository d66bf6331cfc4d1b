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
from model_benchmark import build_stock_model
from omegaconf import ListConfig
from scipy.signal import correlate2d
from scipy.special import expit

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.trainer import LazyTrainer, Trainer
from imrcnn_d2.modeling import CBAM, PAFPN

from .conftest import changed, sample

CHANNELS = 32
LEVELS = (2, 3, 4, 5)
CBAM_ON = {"attention": "cbam", "cbam_reduction": 4}  # with 2 hidden units all may be dead
EVERYWHERE = {**CBAM_ON, "attention_before": ("backbone", "top_down", "both_inputs")}
RESIDUAL = {"form": "residual", "cbam_gate": "double_sigmoid"}


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


PLACES = [(), ("backbone",), ("top_down",), ("bottom_up",), ("both_inputs",)]
PLACES += [("top_down", "bottom_up"), ("backbone", "top_down", "bottom_up", "both_inputs")]


def expected_pyramid(neck, form, before, gate, fuse_type):
    """{l: N_l} by the formulas of the docs, from the neck's weights, with torch's functions."""
    state, scale = neck.state_dict(), {"sigmoid": 1, "double_sigmoid": 2}[gate]

    def conv(name, x, **settings):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    def cbam(name, place, x):
        if not {place}.intersection(before):
            return x
        weights = {k.removeprefix(f"{name}."): v for k, v in state.items()}
        return torch.from_numpy(numpy_cbam(x, weights, scale))

    features, levels, above = neck.bottom_up(images().double()), {}, None
    for level in reversed(LEVELS):
        c = cbam(f"cbam_backbone{level}", "backbone", features[f"res{level}"])
        path = cbam(f"cbam_lateral{level}", "top_down", conv(f"fpn_lateral{level}", c))
        if above is not None:
            path = path + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
            path = path / 2 if fuse_type == "avg" else path
        above = path
        place = "both_inputs" if "both_inputs" in before else "bottom_up"
        levels[level] = cbam(f"cbam{level}", place, conv(f"fpn_output{level}", path, padding=1))
    for low, level in itertools.pairwise(LEVELS):
        down = conv(f"pan_down{low}", levels[low], stride=2, padding=1)
        down = down if form == "affine" else down.clamp(min=0)
        down = cbam(f"cbam_down{level}", "both_inputs", down)
        if form == "residual":
            levels[level] = levels[level] + conv(f"pan_output{level}", down, padding=1)
        else:
            levels[level] = conv(f"pan_output{level}", down + levels[level], padding=1)
            levels[level] = levels[level] if form == "affine" else levels[level].clamp(min=0)
    return {**levels, 6: levels[5][:, :, ::2, ::2]}


@torch.no_grad()
@pytest.mark.parametrize("before", PLACES)
@pytest.mark.parametrize(
    "form, gate",
    [("panet", "sigmoid"), ("residual", "double_sigmoid"), ("affine", "double_sigmoid")],
)
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_pafpn_agrees_with_its_formulas(before, form, gate, fuse_type):
    options = {"attention": "cbam", "attention_before": before} if before else {}
    neck = build_neck(PAFPN, fuse_type, form=form, cbam_gate=gate, cbam_reduction=4, **options)
    neck.double()
    for name, value in neck.named_parameters():
        if name.startswith(("pan_", "cbam")):  # as after training: none of them is zero
            value.normal_(std=value.numel() ** -0.25)
    pyramid = neck(images().double())
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    expected = expected_pyramid(neck, form, before, gate, fuse_type)
    for name, feature in pyramid.items():
        torch.testing.assert_close(feature, expected[int(name[1])], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, CBAM_ON, EVERYWHERE])
@pytest.mark.parametrize("form", [{}, RESIDUAL])
def test_all_keys_of_the_fpn_load_and_all_new_layers_learn(options, form):
    fpn, neck = build_neck(FPN), build_neck(PAFPN, **options, **form)
    missing, unexpected = neck.load_state_dict(fpn.state_dict(), strict=False)
    new = {k: v for k, v in neck.named_parameters() if k.startswith(("pan_", "cbam"))}
    assert set(new) == set(missing) and not unexpected
    x = images()
    with torch.no_grad():
        pyramid = neck(x)
        for name, feature in fpn(x).items():
            difference = (pyramid[name] - feature).abs().max() / feature.abs().max()
            # "panet" has other maps from the first fusion on.
            assert difference <= 1e-5 if form or (not options and name == "p2") else True, name

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
        ({"form": "residual", "pan_norm": "GN"}, "FORM 'residual'.*PAFPN.NORM 'GN'"),
        ({"form": "residual", **CBAM_ON}, "FORM 'residual'.*CBAM.GATE 'sigmoid'"),
        ({"form": "zero"}, "PAFPN.FORM is 'zero'"),
        *(({key: "relu"}, f"{key}.*form") for key in ("init", "activation")),  # of 0.1.0
        ({"attention": "se"}, "PAFPN.ATTENTION is 'se'"),
        *(
            ({"attention_before": v}, "PAFPN.ATTENTION_BEFORE is")
            for v in (("bottom_up", "fpn"), ())
        ),
        ({**CBAM_ON, "cbam_gate": "tanh"}, "CBAM.GATE is 'tanh'"),
        ({**CBAM_ON, "cbam_kernel_size": 4}, "CBAM.KERNEL_SIZE is 4"),
        ({**CBAM_ON, "cbam_reduction": 0}, "CBAM.REDUCTION is 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, keys):
    with pytest.raises(ValueError, match=keys):
        build_neck(PAFPN, **options)
    build_neck(PAFPN, form="residual", cbam_gate="sigmoid")  # of an attention that is not used


@pytest.mark.parametrize("form", [{}, RESIDUAL])
def test_the_neck_in_bf16_and_in_channels_last(form):
    neck = build_neck(PAFPN, **EVERYWHERE, **form)
    with torch.no_grad():
        for output_conv in neck.pan_output_convs:  # zero in a new "residual"
            output_conv.weight.normal_(std=0.05)
    x = images()
    expected = neck(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pyramid = neck(x)
    sum(feature.float().square().mean() for feature in pyramid.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in neck.parameters())
    assert neck.pan_down2.weight.grad.any() and neck.cbam5.spatial.conv.weight.grad.any()
    neck.to(memory_format=torch.channels_last)
    last = neck(x.contiguous(memory_format=torch.channels_last))
    for name, feature in expected.items():
        largest = feature.abs().max()
        assert (last[name] - feature).abs().max() <= 1e-5 * largest
        assert pyramid[name].dtype == torch.bfloat16
        assert (pyramid[name].float() - feature).abs().max() <= 0.05 * largest
    # One layout change on the way would cost more than the format gains.
    assert last["p2"].is_contiguous(memory_format=torch.channels_last)


def test_top_block_on_a_bottom_up_feature():
    block = LastLevelP6P7(64, CHANNELS)
    neck = build_neck(PAFPN, top_block=block, levels=(3, 4, 5), **EVERYWHERE).eval()
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
    neck = build_neck(PAFPN, **EVERYWHERE)
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


def test_a_step_of_the_light_model_has_the_gradients_of_detectron2_s_parts():
    opts = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
    cfg = config("imrcnn_lite", *opts, "MODEL.ROI_BOX_HEAD.FC_DIM", 32)
    torch.manual_seed(0)
    sides = Trainer.build_model(cfg), build_stock_model(cfg)
    for key, value in sides[1].state_dict().items():
        if "running_mean" in key or ".bn" in key and key.endswith("bias"):
            value.normal_(0, 0.2)  # at first they are zero
    sides[0].load_state_dict(sides[1].state_dict())
    batch = [sample(96, 80, [[10, 20, 60, 70], [50, 5, 75, 30]]), sample(65, 96)]
    gradients = []
    for model in sides:
        torch.manual_seed(1)  # the same anchors and proposals are sampled
        with EventStorage():
            sum(model.train()(batch).values()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        if gradient is None:  # frozen
            assert ours[key] is None
        else:
            assert (ours[key] - gradient).norm() <= 1e-3 * gradient.norm(), key


@torch.no_grad()
def test_several_shapes_in_one_batch_and_channels_last_throughout():
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]  # predictions of every score
    model = build(config("imrcnn_lite.yaml", *opts, "TEST.DETECTIONS_PER_IMAGE", 5)).eval()
    shapes = [(64, 160), (128, 96), (97, 65)]
    batch = [{"image": torch.rand(3, *s), "height": 2 * s[0], "width": 2 * s[1]} for s in shapes]
    for (height, width), result in zip(shapes, model(batch), strict=True):
        assert result["instances"].pred_masks.shape == (5, 2 * height, 2 * width)
        boxes = result["instances"].pred_boxes.tensor.reshape(-1, 2)
        assert boxes.min() >= 0 and (boxes <= torch.tensor([2 * width, 2 * height])).all()

    model.backbone.to(memory_format=torch.channels_last)
    pyramid = model.backbone(torch.rand(1, 3, 64, 96).contiguous(memory_format=torch.channels_last))
    assert pyramid["p2"].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_stock_checkpoint_gives_the_residual_imrcnn_its_predictions(tmp_path):
    """Detectron2's model, checkpoint and checkpointer; the new layers add nothing at first."""
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    opts += ["MODEL.RPN.POST_NMS_TOPK_TEST", 50, "TEST.DETECTIONS_PER_IMAGE", 20]
    stock_cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    stock_cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu"])
    stock, model = build(stock_cfg).eval(), build(config("imrcnn_R_50_residual.yaml", *opts)).eval()
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


@pytest.mark.parametrize("size", [pytest.param("R_50", marks=pytest.mark.slow), "lite"])
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


@pytest.mark.slow
def test_a_lazy_config_trains_resumes_and_evaluates(tiny_lazy_opts, tmp_path):
    opts = ["train.eval_period=1", "train.checkpointer.period=1", "train.max_iter=2"]
    opts += tiny_lazy_opts
    cfg = LazyConfig.apply_overrides(LazyConfig.load("configs/lazy/imrcnn_lite.py"), opts)
    wrong = LazyConfig.apply_overrides(copy.deepcopy(cfg), ["model.roi_heads.num_classes=3"])
    with pytest.raises(ValueError, match="1 classes.*roi_heads.num_classes is 3"):
        LazyTrainer(wrong)
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
    again, _ = LazyTrainer.evaluate(cfg, trainer.evaluated_model, "test")
    for group, values in results.items():
        assert again[group] == pytest.approx(values, nan_ok=True), group
