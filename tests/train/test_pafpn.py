import copy
import itertools

import detectron2.export  # noqa: F401  (makes Detectron2's ResNet scriptable)
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock

from imrcnn_d2.modeling import PAFPN

CHANNELS = 32
LEVELS = (2, 3, 4, 5)
XAVIER = {"init": "xavier", "cbam_reduction": 4}


def bottom_up():
    """A ResNet of one narrow block a stage: 8, 16, 32, 64 channels."""
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(BasicBlock, 1, in_channels=a, out_channels=b, stride_per_block=[stride])
        for a, b, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
    ]
    return ResNet(BasicStem(out_channels=8), stages, out_features=[f"res{k}" for k in LEVELS])


def build(cls, fuse_type="sum", norm="", top_block=None, levels=LEVELS, **options):
    top_block = LastLevelMaxPool() if top_block is None else top_block
    names = [f"res{k}" for k in levels]
    return cls(bottom_up(), names, CHANNELS, norm, top_block, fuse_type, **options)


def images(height=64, width=96, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["", "cbam"])
@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_agrees_with_the_formulas(numpy_cbam, attention, activation, fuse_type):
    neck = build(PAFPN, fuse_type, attention=attention, activation=activation, **XAVIER)
    for name, parameter in neck.named_parameters():
        if "pan_" in name and "bias" in name:
            torch.nn.init.normal_(parameter)
    state = neck.state_dict()
    fpn = build(FPN, fuse_type)
    fpn.load_state_dict(state, strict=False)

    def conv(name, x, stride):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding=1)

    def act(x):
        return x.clamp(min=0) if activation == "relu" else x

    with torch.no_grad():
        # A_l, from Detectron2's own FPN and the numpy CBAM
        expected = fpn(images())
        for level in LEVELS:
            if attention:
                weights = of_module(state, f"cbam{level}")
                refined = numpy_cbam(expected[f"p{level}"], weights, scale=2.0)
                expected[f"p{level}"] = torch.from_numpy(refined).float()
        for low, level in itertools.pairwise(LEVELS):
            merged = act(conv(f"pan_down{low}", expected[f"p{low}"], 2)) + expected[f"p{level}"]
            expected[f"p{level}"] = act(conv(f"pan_output{level}", merged, 1))
        expected["p6"] = expected["p5"][:, :, ::2, ::2]
        pyramid = neck(images())

    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in pyramid.items():
        assert feature.shape == expected[name].shape
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)


def of_module(state, name):
    """The entries of one module, under its own names."""
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("before", [("top_down",), ("top_down", "bottom_up")])
def test_attention_before_the_top_down_path(numpy_cbam, before):
    neck = build(PAFPN, attention="cbam", attention_before=before, **XAVIER)
    state = neck.state_dict()

    def cbam(name, x):
        refined = numpy_cbam(x, of_module(state, name), scale=2.0)
        return torch.from_numpy(refined).float()

    with torch.no_grad():
        features = neck.bottom_up(images())
        top_down, expected = None, {}
        for level in reversed(LEVELS):
            weight, bias = of_module(state, f"fpn_lateral{level}").values()
            lateral = cbam(f"cbam_lateral{level}", F.conv2d(features[f"res{level}"], weight, bias))
            if top_down is not None:
                lateral = lateral + top_down.repeat_interleave(2, 2).repeat_interleave(2, 3)
            top_down = lateral
            weight, bias = of_module(state, f"fpn_output{level}").values()
            expected[level] = F.conv2d(lateral, weight, bias, padding=1)
            if "bottom_up" in before:
                expected[level] = cbam(f"cbam{level}", expected[level])
        assert any(k.startswith("cbam2.") for k in state) == ("bottom_up" in before)
        first = neck(images())["p2"]
    torch.testing.assert_close(first, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "norm, kind", [("BN", "BatchNorm2d"), ("GN", "GroupNorm"), ("FrozenBN", "FrozenBatchNorm2d")]
)
def test_pan_norm_follows_each_new_convolution(norm, kind):
    neck = build(PAFPN, pan_norm=norm, attention="cbam", **XAVIER)
    for name in ("pan_down2", "pan_output5"):
        conv = getattr(neck, name)
        assert conv.bias is None
        assert type(conv.norm).__name__ == kind
    assert neck.fpn_output2.norm is None


@pytest.mark.parametrize(
    "attention, before",
    [("", ("bottom_up",)), ("cbam", ("bottom_up",)), ("cbam", ("bottom_up", "top_down"))],
)
def test_identity_starts_as_the_fpn_and_yet_learns(attention, before):
    fpn = build(FPN)
    neck = build(PAFPN, attention=attention, attention_before=before, cbam_reduction=4)
    missing, unexpected = neck.load_state_dict(fpn.state_dict(), strict=False)
    assert not unexpected
    x = images()
    with torch.no_grad():
        pyramid = neck(x)
        for name, feature in fpn(x).items():
            difference = (pyramid[name] - feature).abs().max() / feature.abs().max()
            assert difference <= 1e-5, (name, difference)

    new = {k: v for k, v in neck.named_parameters() if k.startswith(("pan_", "cbam"))}
    assert set(new) == set(missing)
    optimizer = torch.optim.SGD(new.values(), lr=1e-3)
    seen = dict.fromkeys(new, False)
    for _ in range(2):
        optimizer.zero_grad()
        # A loss with a random direction per value, so that no gradient cancels by symmetry.
        generator = torch.Generator().manual_seed(2)
        loss = sum((f * torch.randn(f.shape, generator=generator)).sum() for f in neck(x).values())
        loss.backward()
        for name, parameter in new.items():
            seen[name] |= bool(parameter.grad.any())
        optimizer.step()
    assert all(seen.values()), [name for name, learned in seen.items() if not learned]


@pytest.mark.parametrize(
    "options, keys",
    [
        ({"activation": "relu"}, ["MODEL.PAFPN.ACTIVATION 'relu'"]),
        ({"pan_norm": "BN"}, ["MODEL.PAFPN.NORM 'BN'"]),
        ({"attention": "cbam", "cbam_gate": "sigmoid"}, ["MODEL.CBAM.GATE 'sigmoid'"]),
        (
            {"activation": "relu", "pan_norm": "GN"},
            ["MODEL.PAFPN.ACTIVATION 'relu'", "MODEL.PAFPN.NORM 'GN'"],
        ),
    ],
)
def test_what_cannot_be_an_identity_is_refused(options, keys):
    with pytest.raises(ValueError) as error:
        build(PAFPN, **options)
    for key in (*keys, "MODEL.PAFPN.INIT 'identity'", "'xavier'"):
        assert key in str(error.value)


def test_a_sigmoid_gate_is_no_obstacle_where_there_is_no_attention():
    build(PAFPN, attention="", cbam_gate="sigmoid")


@pytest.mark.parametrize(
    "options, key",
    [
        ({"init": "zero"}, "MODEL.PAFPN.INIT is 'zero'"),
        ({"activation": "gelu", "init": "xavier"}, "MODEL.PAFPN.ACTIVATION is 'gelu'"),
        ({"attention": "se"}, "MODEL.PAFPN.ATTENTION is 'se'"),
        ({"attention_before": ("fpn",)}, "MODEL.PAFPN.ATTENTION_BEFORE is"),
        ({"attention_before": ()}, "MODEL.PAFPN.ATTENTION_BEFORE is"),
        ({"attention": "cbam", "cbam_gate": "tanh", "init": "xavier"}, "MODEL.CBAM.GATE is 'tanh'"),
    ],
)
def test_unknown_values_are_refused(options, key):
    with pytest.raises(ValueError, match=key):
        build(PAFPN, **options)


def test_top_block_takes_the_last_level_or_the_bottom_up_feature():
    last = build(PAFPN, attention="cbam", **XAVIER).eval()
    with torch.no_grad():
        pyramid = last(images())
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])

    retinanet = build(
        PAFPN,
        top_block=LastLevelP6P7(64, CHANNELS),
        levels=(3, 4, 5),
        attention="cbam",
        **XAVIER,
    ).eval()
    with torch.no_grad():
        pyramid = retinanet(images())
        p6 = retinanet.top_block.p6(retinanet.bottom_up(images())["res5"])
        p7 = retinanet.top_block.p7(p6.clamp(min=0))
    assert list(pyramid) == ["p3", "p4", "p5", "p6", "p7"]
    torch.testing.assert_close(pyramid["p6"], p6)
    torch.testing.assert_close(pyramid["p7"], p7)
    shapes = retinanet.output_shape()
    for name, feature in pyramid.items():
        assert shapes[name].channels == feature.shape[1] == CHANNELS
        assert feature.shape[2:] == (-(-64 // shapes[name].stride), -(-96 // shapes[name].stride))


@pytest.mark.parametrize(
    "options",
    [
        {"attention": ""},
        {"attention": "cbam", "activation": "relu"},
        {"attention": "cbam", "attention_before": ("top_down",), "cbam_gate": "residual"},
    ],
)
def test_a_scripted_deep_copy_agrees_and_leaves_the_model_alone(options):
    neck = build(PAFPN, **options, **XAVIER).eval()
    keys = list(neck.state_dict())
    scripted = torch.jit.script(copy.deepcopy(neck))
    assert list(neck.state_dict()) == keys
    assert len(scripted.state_dict()) == len(keys)  # each parameter once
    for size in ((64, 96), (96, 64)):
        x = images(*size, count=1)
        with torch.no_grad():
            expected, got = neck(x), scripted(x)
        for name in expected:
            # fused, it may order fp32 sums otherwise
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_a_deep_copy_shares_nothing_with_the_original():
    # FPN keeps its layers in plain lists too: a copy must run on its own layers, not on ours.
    neck = build(PAFPN, attention="cbam", **XAVIER).eval()
    copied = copy.deepcopy(neck)
    with torch.no_grad():
        before = copied(images())["p5"]
        for parameter in neck.parameters():
            parameter.zero_()
        assert torch.equal(copied(images())["p5"], before)
